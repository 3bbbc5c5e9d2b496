"""Compute the runs behind chapter 4 and add them to its file in book/results: all of the ledger's, or those named.

python book/record/04_superclasses.py [cifar100] [cifar100_resnet20] [cifar100_resnet20_norm] [cifar100_shuffled]

Needs CIFAR-100: in $STIFFKIT_DATA, in the cache, or fetched. A run takes an hour or two in one thread. Runs that are
recorded, or in the cache, are not computed again; a run that was stopped goes on from its last checkpoint. With
--present nothing is computed: what the cache has is recorded.
"""

import sys

from stiffkit import claims
from stiffkit.chapters import Superclasses
from stiffkit.measurement import COMPANIONS

LEAVE_OUT = (
    *COMPANIONS,
    "coherence",
    "true_stiffness",
    "true_within",
    "true_between",
    "batch_loss",
    "crossed",
)

if __name__ == "__main__":
    claims.record(Superclasses, sys.argv[1:], LEAVE_OUT)
