"""Compute the runs behind chapter 2 and add them to its file in book/results: all of the ledger's, or those named.

python book/record/02_class_matrices.py [mnist] [fashion_mnist] [cifar10] [cifar10_v3]

Needs the data sets: in $STIFFKIT_DATA, in the cache, or fetched. MNIST and Fashion-MNIST take about 5 minutes a seed in
one thread, CIFAR-10 an hour. Runs that are recorded, or in the cache, are not computed again; a run that was stopped
goes on from its last checkpoint. With --present nothing is computed: what the cache has is recorded.
"""

import sys

from stiffkit import claims
from stiffkit.chapters import ClassMatrices

if __name__ == "__main__":
    claims.record(ClassMatrices, sys.argv[1:])
