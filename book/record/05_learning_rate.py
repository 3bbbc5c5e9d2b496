"""Compute the runs behind chapters 5 and 6 and add them to their file in book/results: the ledger's, or those named.

python book/record/05_learning_rate.py [mnist_rates] [fashion_mnist_rates] [cifar10_rates] [mnist_descent] ...

Needs the data sets: in $STIFFKIT_DATA, in the cache, or fetched. A run of MNIST takes about 5 minutes in one thread,
one of CIFAR-10 an hour. Runs that are recorded, or in the cache, are not computed again; a run that was stopped goes on
from its last checkpoint. With --present nothing is computed: what the cache has is recorded.
"""

import sys

from stiffkit import claims
from stiffkit.chapters import LearningRate
from stiffkit.measurement import COMPANIONS

LEAVE_OUT = (
    *COMPANIONS,
    "stiffness",
    "within_error",
    "between_error",
    "coherence",
    "zero",
    "batch_loss",
    "class_a",
    "class_b",
)

if __name__ == "__main__":
    claims.record(LearningRate, sys.argv[1:], LEAVE_OUT)
