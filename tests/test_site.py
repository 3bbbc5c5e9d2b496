"""The built site, as files and in a real browser: links, figures, alt text, both schemes, two widths, no network."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from stiffkit import rerun

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "ci"))

import setup  # noqa: E402

import book  # noqa: E402

OFF = ("gpu", "quic", "background-networking", "component-update", "sync")
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in OFF)]
VIEWS = [(390, "light"), (390, "dark"), (1280, "dark"), (1280, "light")]
FIGURES = {
    "01_definition": 5,
    "02_class_matrices": 6,
    "03_random_labels": 6,
    "04_superclasses": 5,
    "05_learning_rate": 4,
    "06_critical_length": 6,
    "08_network_or_arithmetic": 6,
}
CHAPTERS = sorted(path.stem for path in ROOT.glob("book/[0-9]*.ipynb"))
LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src", "video": "src", "source": "src"}
FACTS = """() => {
  const article = document.querySelector(".bd-article") || document.body;
  const clipped = e => { while ((e = e.parentElement) && e !== document.body)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)) return true; return false; };
  const rgba = c => { const [r, g, b, a = 1] = (c.match(/[\\d.]+/g) || []).map(Number); return [r, g, b, a]; };
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const once = (f, known = new Map()) => e => (known.has(e) || known.set(e, f(e)), known.get(e));
  const style = once(e => getComputedStyle(e));
  const ground = once(e => { const own = e ? rgba(style(e).backgroundColor) : [255, 255, 255, 1];
    return own[3] ? own : ground(e.parentElement); });
  const opacity = once(e => e ? style(e).opacity * opacity(e.parentElement) : 1);
  const contrast = e => { const below = ground(e), own = rgba(style(e).color), share = opacity(e) * own[3];
    const ink = own.slice(0, 3).map((v, i) => share * v + (1 - share) * below[i]);
    const [a, b] = [light(ink), light(below.slice(0, 3))].sort((x, y) => x - y); return (b + 0.05) / (a + 0.05); };
  const seen = [...article.querySelectorAll("h1, h2, p, li, td, th, a, .caption-text, code, pre span")]
    .filter(e => e.getClientRects().length && e.textContent.trim() && !e.closest("mjx-container, .headerlink"));
  return {
    theme: document.documentElement.dataset.theme || "",
    wide: document.documentElement.scrollWidth - window.innerWidth,
    beyond: [...article.querySelectorAll("*")].filter(e => e.getClientRects().length
      && e.getBoundingClientRect().right > window.innerWidth + 1 && !clipped(e)).map(e => e.outerHTML.slice(0, 120)),
    pale: seen.filter(e => contrast(e) < 4.45).map(e => e.outerHTML.slice(0, 120) + " " + contrast(e).toFixed(2)),
    broken: [...document.images].filter(e => !(e.complete && e.naturalWidth)).map(e => e.src.slice(-80)),
    formulas: document.querySelectorAll(".math").length,
    typeset: document.querySelectorAll(".math mjx-container").length,
    begun: [...article.querySelectorAll("mjx-container")].map(e => e.getBoundingClientRect().left).filter(x => x < 0),
    mistakes: document.querySelectorAll("mjx-merror, [data-mml-node='merror']").length,
  };
}"""


class Page(HTMLParser):
    """What the tests need of one page: links, anchors, loaded addresses, images, and captions of figures."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.ids, self.loads, self.images, self.captions = path, [], set(), [], [], []
        self.open = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in LOADING and found.get(LOADING[tag]) and found.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(found[LOADING[tag]])
        if tag == "figure":
            self.open.append("")
        if tag == "img":
            self.images.append((found.get("src", ""), found.get("alt") or "", bool(self.open)))

    def handle_data(self, data):
        if self.open:
            self.open[-1] += data

    def handle_endtag(self, tag):
        if tag == "figure" and self.open:
            self.captions.append(" ".join(self.open.pop().split()))


@pytest.fixture(scope="session")
def pages():
    """All pages of the site by path; it is built first unless it was built from the very same files."""
    if not (book.BUILT.exists() and book.BUILT.read_text(encoding="utf-8") == book.inputs()):
        code = "import sys; sys.path.append('ci'); import book; book.main([])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.fail(f"the book was not built:\n{done.stdout[-1500:]}{done.stderr[-1500:]}", pytrace=False)
    found = [path for path in sorted(book.HTML.rglob("*.html")) if "_static" not in path.parts]
    return {path.relative_to(book.HTML).as_posix(): Page(path) for path in found}


@pytest.fixture(scope="session")
def visits(pages):
    """Every page opened once from file://, and looked at in each view: what was seen, asked for, complained about."""
    program = setup.chromium()
    if not program:
        advice = "no Chromium found: python ci/setup.py --system installs one, or set CHROMIUM to its path"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(advice)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        seen = {name: visit(browser, page.path) for name, page in pages.items()}
        browser.close()
    return seen


def visit(browser, path):
    tab = browser.new_page(viewport={"width": VIEWS[0][0], "height": 844}, color_scheme=VIEWS[0][1])
    requests, complaints, views = [], [], {}
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(path.as_uri(), wait_until="load")
    tab.wait_for_function("document.documentElement.dataset.theme")  # the first page leads on to the book's
    tab.wait_for_load_state("load")
    tab.wait_for_function("!window.MathJax || (MathJax.startup && MathJax.startup.promise)")
    tab.evaluate("window.MathJax && MathJax.startup.promise")
    tab.add_style_tag(content="* { animation: none !important; transition: none !important; }")
    tab.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    tab.evaluate("document.querySelectorAll('img').forEach(e => e.loading = 'eager')")
    for width, scheme in VIEWS:
        tab.set_viewport_size({"width": width, "height": 844})
        tab.emulate_media(color_scheme=scheme)
        tab.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")
        views[width, scheme] = tab.evaluate(FACTS)
    tab.close()
    return {"requests": requests, "complaints": complaints, "views": views}


def gather(visits, fact):
    """(page, view, value) for the pages and views where a fact is not empty."""
    return [(name, view, at[fact]) for name, seen in visits.items() for view, at in seen["views"].items() if at[fact]]


def none(wrong):
    """Fails with one line for each thing that is wrong, as pytest would cut a long list short."""
    if wrong:
        pytest.fail("\n".join(str(one)[:600] for one in wrong[:30]), pytrace=False)


def is_figure(page, inside):
    return inside and not page.path.name.startswith(("search", "genindex"))


def test_front_page_and_all_chapters_are_there(pages):
    chapters = [f"book/{name}.html" for name in CHAPTERS]
    expected = ["index.html", "book/index.html", "book/live.html", "book/api.html", "book/references.html", *chapters]
    expected += [name.replace("book/", "book/live/") for name in chapters]
    assert set(expected) <= set(pages)


def test_internal_links_lead_somewhere(pages):
    wrong = []
    for name, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or link in ("#", "#top"):
                continue
            target = (page.path.parent / unquote(address.path)).resolve() if address.path else page.path
            there = pages.get(target.relative_to(book.HTML).as_posix()) if target.is_relative_to(book.HTML) else None
            anchored = not address.fragment or (there and unquote(address.fragment) in there.ids)
            if not (target.exists() and anchored):
                wrong.append(f"{name}: {link}")
    none(wrong)


def test_nothing_is_loaded_from_elsewhere(pages):
    none([f"{name}: {load}" for name, page in pages.items() for load in page.loads if "//" in load])


def test_figures_are_numbered_and_have_captions(pages):
    captions = [(name, text) for name, page in pages.items() for text in page.captions]
    none([found for found in captions if not re.match(r"Fig\. \d+(\.\d+)? \S.{10,}", found[1])])


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_have_the_numbers_of_their_files(pages, name):
    page, number = pages[f"book/{name}.html"], int(name[:2])
    assert [re.match(r"Fig\. (\d+)\.", text)[1] for text in page.captions] == [str(number)] * FIGURES[name]
    text = " ".join(re.sub(r"<[^>]*>", " ", page.path.read_text(encoding="utf-8")).split())
    assert f" {number}. {book.live.title(nbformat.read(ROOT / 'book' / f'{name}.ipynb', 4))} " in text


def test_alt_text_says_what_is_to_be_seen(pages):
    images = [(name, *image[:2]) for name, page in pages.items() for image in page.images if is_figure(page, image[2])]
    wrong = [found for found in images if len(found[2]) < 20 or re.search(r"\.(png|svg)$|^\S+$", found[2])]
    none(wrong)


def test_pictures_outside_figures_have_alt_text_too(pages):
    none([(name, src) for name, page in pages.items() for src, alt, _ in page.images if not alt])


def test_the_figures_of_every_chapter_are_counted():
    assert list(FIGURES) == CHAPTERS


@pytest.mark.parametrize("name", FIGURES)
def test_the_chapter_ran_on_this_machine_and_drew_everything(pages, name):
    path = book.live.RUNS / f"{name}.ipynb"
    executed, stored = nbformat.read(path, 4), nbformat.read(ROOT / "book" / f"{name}.ipynb", 4)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    figures = [sum(bool(book.live.images(cell)) for cell in one.cells) for one in (executed, stored)]
    assert figures[0] == figures[1] == FIGURES[name]
    texts = [output.get("data", {}).get("text/markdown", "") for cell in cells for output in cell.outputs]
    assert any(re.search("You ran this chapter with `dataset` = `'(digits|hierarchy)'`", text) for text in texts)
    assert not [text for text in texts if "nan" in text]
    assert "You ran" not in str(stored)
    html = rerun.page(path)
    assert html.count('src="data:image/png;base64,') == figures[0]
    assert "system-message" not in html


@pytest.mark.browser
def test_no_external_request(visits):
    asked = [(name, url) for name, seen in visits.items() for url in seen["requests"]]
    assert asked
    none([found for found in asked if not found[1].startswith(("file:", "data:", "blob:"))])


@pytest.mark.browser
def test_no_complaint_in_the_console(visits):
    none([(name, seen["complaints"]) for name, seen in visits.items() if seen["complaints"]])


@pytest.mark.browser
def test_no_sideways_scrolling(visits):
    none([found for found in gather(visits, "wide") if found[2] > 0])
    none(gather(visits, "beyond"))


@pytest.mark.browser
def test_every_picture_is_shown(visits):
    none(gather(visits, "broken"))


@pytest.mark.browser
def test_mathematics_is_typeset(visits):
    none(gather(visits, "mistakes"))
    none(gather(visits, "begun"))  # left of the page, where nobody can scroll to
    first = {name: seen["views"][VIEWS[0]] for name, seen in visits.items()}
    none([(name, at["formulas"], at["typeset"]) for name, at in first.items() if at["formulas"] != at["typeset"]])
    texts = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("book/text/[0-9]*.md")}
    with_formulas = [name for name, text in texts.items() if "$" in text]
    assert with_formulas
    assert all(at["typeset"] for name, at in first.items() if Path(name).stem in with_formulas and "live" not in name)


@pytest.mark.browser
def test_both_colour_schemes_are_readable(visits):
    themes = {(at["theme"], scheme) for seen in visits.values() for (_, scheme), at in seen["views"].items()}
    assert themes <= {("light", "light"), ("dark", "dark")}
    none(gather(visits, "pale"))
