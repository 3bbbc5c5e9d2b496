"""Compute the runs behind chapter 3 and add them to its file in book/results: all of the ledger's, or those named.

python book/record/03_random_labels.py [mnist_random] [mnist_true] [mnist_noise_50] ...

Needs the data sets: in $STIFFKIT_DATA, in the cache, or fetched. A hundred epochs take about 9 minutes in one thread,
the thirty with true labels 3. Runs that are recorded, or in the cache, are not computed again; a run that was stopped
goes on from its last checkpoint. With --present nothing is computed: what the cache has is recorded.
"""

import sys

from stiffkit import claims
from stiffkit.chapters import RandomLabels
from stiffkit.measurement import COMPANIONS

LEAVE_OUT = (
    *COMPANIONS,
    "within_error",
    "between_error",
    "batch_loss",
    "pair_within",
    "pair_between",
    "pair_share",
    "share_within",
    "share_between",
    "alive_within",
    "alive_between",
    "padded_within",
    "padded_between",
    "unclipped",
    "decile_gap",
    "decile_within",
    "rightness",
    "decile",
)

if __name__ == "__main__":
    claims.record(RandomLabels, sys.argv[1:], LEAVE_OUT)
