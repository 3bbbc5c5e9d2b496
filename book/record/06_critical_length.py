"""Compute the runs of chapter 6 that chapter 5 does not have, and add them to book/results/06_critical_length.nc.

python book/record/06_critical_length.py [mnist_layers] [fashion_mnist_layers] [cifar10_layers]

Needs the data sets: in $STIFFKIT_DATA, in the cache, or fetched. A run of MNIST takes about 5 minutes in one thread.
Runs that are recorded, or in the cache, are not computed again. With --present nothing is computed: what the cache has
is recorded.
"""

import sys

from stiffkit import claims
from stiffkit.chapters import CriticalLength
from stiffkit.measurement import COMPANIONS

LEAVE_OUT = (
    *COMPANIONS,
    *("stiffness", "coherence", "zero", "batch_loss", "gap", "past_gap"),
    *(f"{kind}_{of}" for kind in ("layer", "share", "pair", "alive", "padded") for of in ("within", "between")),
    *("pair_share", "unclipped", "decile_gap", "decile_within"),
)

if __name__ == "__main__":
    claims.record(CriticalLength, sys.argv[1:], LEAVE_OUT)
