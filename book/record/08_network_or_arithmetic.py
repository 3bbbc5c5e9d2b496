"""Compute the runs behind chapter 8 and add them to its file in book/results: all of the ledger's, or those named.

python book/record/08_network_or_arithmetic.py [mnist_parts] [mnist_mse] [cifar10_tanh] ...

Needs the data sets: in $STIFFKIT_DATA, in the cache, or fetched. A fully-connected network takes about 3 minutes a seed
in one thread, the convolutional one on all of CIFAR-10 80 minutes. Runs that are recorded, or in the cache, are not
computed again; a run that was stopped goes on from its last checkpoint. With --present nothing is computed: what the
cache has is recorded.
"""

import sys

from stiffkit import claims
from stiffkit.chapters import NetworkOrArithmetic

LEAVE_OUT = (  # chapter 2 shows them, of the same trainings, or nothing does
    "stiffness",
    "within_error",
    "between_error",
    "centred_within",
    "centred_between",
    "disparity",
    "gradient_norm",
    "mean_norm",
    "wrong_sign",
    "batch_loss",
    "pair_share",
    "pair_between",
    "share_between",
    "alive_between",
    "padded_between",
    "centring",
)

if __name__ == "__main__":
    claims.record(NetworkOrArithmetic, sys.argv[1:], LEAVE_OUT)
