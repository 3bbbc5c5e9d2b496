"""Compute the runs behind chapters 5 and 6 and add them to their file in book/results: the ledger's, or those named.

python book/record/05_learning_rate.py [mnist_rates] [fashion_mnist_rates] [cifar10_rates] [mnist_descent] ...

Needs the data sets: in $STIFFKIT_DATA, in the cache, or fetched. A run of MNIST takes about 5 minutes in one thread,
one of CIFAR-10 an hour. Runs that are recorded, or in the cache, are not computed again; a run that was stopped goes on
from its last checkpoint. With --present nothing is computed: what the cache has is recorded.
"""

import sys

from stiffkit import claims
from stiffkit.chapters import LearningRate

LEAVE_OUT = (  # chapters 2 and 8 show them, or nothing does
    "stiffness",
    "within_error",
    "between_error",
    "centred_within",
    "centred_between",
    "weighted_within",
    "weighted_between",
    "within_share",
    "points_for_90",
    "disparity",
    "gradient_norm",
    "mean_norm",
    "coherence",
    "wrong_sign",
    "zero",
    "batch_loss",
    "centring",
    "weighting",
    "class_a",
    "class_b",
)

if __name__ == "__main__":
    claims.record(LearningRate, sys.argv[1:], LEAVE_OUT)
