"""Compute the runs behind chapter 2 and add them to its file in book/results: all of the ledger's, or those named.

python book/record/02_class_matrices.py [mnist] [fashion_mnist] [cifar10] [cifar10_v3]

Needs the data sets: in $STIFFKIT_DATA, in the cache, or fetched. MNIST and Fashion-MNIST take about 5 minutes a seed in
one thread, CIFAR-10 an hour; runs that are in the cache already are not computed again, and two processes with
different names share two cores well.
"""

import sys

from stiffkit import claims, results

if __name__ == "__main__":
    ledger = claims.read()
    for name in sys.argv[1:] or ledger.runs:
        experiments = ledger.runs[name].experiments()
        for experiment in experiments:
            experiment.run()
        print(results.pack("02_class_matrices", [e.key for e in experiments]))
