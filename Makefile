# A thin front for the scripts under ci/: `make book` is `python ci/book.py`, on every system.
PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help book test test-all chapters benchmark clean distclean

help:  ## these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

book:  ## install into .venv, run every chapter quickly on this machine, build the site into _build/html
	@$(PYTHON) ci/book.py $(ARGS)

test:  ## install into .venv, then lint, tests, and the notebooks against their outputs (ARGS="-k name")
	@$(PYTHON) ci/test.py $(ARGS)

test-all:  ## make test, and what takes long: processes killed at many moments
	@$(PYTHON) ci/test.py --all

chapters:  ## write the notebooks from book/text/ with their outputs (ARGS=01 for one of them)
	@$(PYTHON) ci/chapters.py $(ARGS)

benchmark:  ## time the Gram matrix against its peers, which are installed into .venv first
	@$(PYTHON) ci/benchmark.py $(ARGS)

clean:  ## remove the built site, the live pages and caches
	@$(PYTHON) ci/clean.py

distclean:  ## remove .venv too
	@$(PYTHON) ci/clean.py --all
