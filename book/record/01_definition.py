"""Measure chapter 1 with its defaults and write book/results/01_definition.nc; about a minute on two cores.

Nothing is done where the file is there, by the present versions of the code. Needs MNIST: in $STIFFKIT_DATA, in the
cache, or fetched.
"""

from stiffkit import definition
from stiffkit.chapters import Definition
from stiffkit.results import load_recorded, record

if __name__ == "__main__":
    p = Definition()
    print(f"{p.recorded}: is there" if load_recorded(p) else record(p, definition.measure))
