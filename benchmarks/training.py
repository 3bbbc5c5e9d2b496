"""Times training between two measurements: the fully-connected network on 60,000 images, batches of 32, Adam, float32.

python benchmarks/training.py [--batches 600] [--repeats 7]

Candidates in turn, in one thread, alone and as two processes at a time; random images, so no data set is needed. For
each the median and the fastest of the repeats, in seconds a model-epoch: with two processes, half the time in which
both train an epoch.
"""

import argparse
import statistics
import time
from functools import cache

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from stiffkit.data import Dataset
from stiffkit.engines import Processes
from stiffkit.models import build_model
from stiffkit.training import train

IMAGES, BATCH = 60_000, 32


def main(batches: int, repeats: int) -> None:
    torch.set_num_threads(1)
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(50):
        a @ a
    speed = 50 * 2 * 1024**3 / (time.perf_counter() - start) / 1e9
    print(f"torch {torch.__version__}, products at {speed:.0f} GF/s a thread, {batches} batches, {repeats} repeats\n")
    print("| candidate | processes | median s a model-epoch | fastest |\n|---|---|---|---|")
    scale = IMAGES / BATCH / batches
    for processes in (1, 2):
        with Processes(processes) as engine:
            seconds = {name: [] for name in CANDIDATES}
            for repeat in range(repeats + 1):
                for name in CANDIDATES:
                    start = time.perf_counter()
                    calls = [engine.submit(train_once, name, batches) for _ in range(processes)]
                    _ = [call.result() for call in calls]
                    if repeat:  # the first is untimed: a process imports and makes its images
                        seconds[name].append((time.perf_counter() - start) * scale / processes)
        for name, found in seconds.items():
            print(f"| {name} | {processes} | {statistics.median(found):.2f} | {min(found):.2f} |", flush=True)


def train_once(name: str, batches: int) -> None:
    CANDIDATES[name](*model_and_points(), batches)


@cache
def model_and_points():
    torch.manual_seed(0)
    points = torch.randn(IMAGES, 1, 28, 28), torch.arange(IMAGES) % 10
    some = tuple(part[:100] for part in points)
    return build_model("fc", Dataset("random", tuple("0123456789"), some, some, some, ""), seed=1), points


def ours(model, points, batches) -> None:
    list(train(model, points, checkpoints=[batches * BATCH], unit="images", seed=1))


def by_indexing(model, points, batches, **options) -> None:
    optimizer = torch.optim.Adam(model.parameters(), **options)
    for batch in torch.randperm(IMAGES).split(BATCH)[:batches]:
        step(model, optimizer, points[0][batch], points[1][batch])


def by_data_loader(model, points, batches) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(TensorDataset(*points), BATCH, shuffle=True)
    for _, (x, y) in zip(range(batches), loader, strict=False):
        step(model, optimizer, x, y)


def step(model, optimizer, x, y) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


CANDIDATES = {
    "stiffkit": ours,
    "indexing, fused Adam": lambda *given: by_indexing(*given, fused=True),
    "indexing, default Adam": by_indexing,
    "DataLoader, default Adam": by_data_loader,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if not 0 < arguments.batches <= IMAGES // BATCH:
        parser.error(f"--batches: 1 to {IMAGES // BATCH}, an epoch")
    main(arguments.batches, arguments.repeats)
