"""Compute the runs behind chapter 7 and add them to book/results/07_bert_mnli.nc: the ledger's, or those named.

python book/record/07_bert_mnli.py [mnli_minilm] [mnli_random] [mnli_bert]

Needs the extras text and minilm, and MNLI: in $STIFFKIT_DATA, in the cache, or fetched. A run of minilm on a sample of
10,000 pairs takes two hours in one thread. Runs that are recorded, or in the cache, are not computed again; a run that
was stopped goes on from its last checkpoint. With --present nothing is computed: what the cache has is recorded.

`mnli_bert` stands for the whole of MNLI: it is not recorded from a sample.
"""

import sys

from stiffkit import claims
from stiffkit.chapters import BertMnli
from stiffkit.experiment import SCALES
from stiffkit.measurement import COMPANIONS
from stiffkit.sentences import count_of_mnli

LEAVE_OUT = (*COMPANIONS, "batch_loss", "coherence", "decile_gap", "decile_within", "unclipped")

if __name__ == "__main__":
    named = [word for word in sys.argv[1:] if word != "--present"] or claims.read().of_chapter(BertMnli.number)
    if "mnli_bert" in named and count_of_mnli() not in (None, SCALES["mnli"].images):
        if "mnli_bert" in sys.argv:
            raise SystemExit(f"mnli_bert is the whole of MNLI, and there are {count_of_mnli():,} training pairs here")
        named.remove("mnli_bert")
    claims.record(BertMnli, [*named, *(["--present"] if "--present" in sys.argv else [])], LEAVE_OUT)
