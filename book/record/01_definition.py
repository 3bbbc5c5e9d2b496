"""Measure chapter 1 with its defaults and write book/results/01_definition.nc; about a minute on two cores.

Needs MNIST: in $STIFFKIT_DATA, in the cache, or fetched.
"""

from stiffkit import definition
from stiffkit.chapters import Definition
from stiffkit.results import record

if __name__ == "__main__":
    print(record(Definition(), definition.measure))
