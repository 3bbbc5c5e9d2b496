"""Compute the runs that tests/test_band.py holds a run to, and write book/results/digits_band.nc; some minutes."""

from stiffkit.results import book
from stiffkit.sweeps import Sweep

if __name__ == "__main__":
    print(Sweep.read(book() / "sweeps/00_digits_band.yml").record("digits_band"))
