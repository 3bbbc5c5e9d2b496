"""What measuring costs beside training: the share that 30 checkpoints take of a run of 30 epochs, in one thread.

python benchmarks/measuring.py [--repeats 5]

Measuring is the Gram matrix of 500 training and 500 validation points in exact arithmetic and the class matrices, sign
and cosine, of the three regimes. Training is timed on 200 batches of 32 and scaled to the full training set; random
images, so no data set is needed.
"""

import argparse
import statistics
import time

import torch

from stiffkit import class_stiffness, gradient_gram, stiffness
from stiffkit.data import Dataset
from stiffkit.losses import cross_entropy
from stiffkit.models import build_model
from stiffkit.training import train

WORKLOADS = {"FC, MNIST": ("fc", (1, 28, 28), 60_000), "v1's CNN, CIFAR-10": ("cnn_v1", (3, 32, 32), 50_000)}
BATCHES = 200


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    print("| workload | training, s an epoch | measuring, s a checkpoint | share of a run |\n|---|---|---|---|")
    for workload, (name, shape, images) in WORKLOADS.items():
        x, y = torch.randn(BATCHES * 32, *shape), torch.arange(BATCHES * 32) % 10
        model = build_model(name, Dataset(name, tuple("0123456789"), (x, y), (x, y), (x, y), ""), seed=1)
        epoch = statistics.median(train_once(model, (x, y)) for _ in range(repeats)) * images / len(y)
        checkpoint = statistics.median(measure_once(model, (x[:1000], y[:1000])) for _ in range(repeats))
        print(f"| {workload} | {epoch:.1f} | {checkpoint:.2f} | {100 * checkpoint / (epoch + checkpoint):.1f} % |")


def train_once(model, points) -> float:
    start = time.perf_counter()
    list(train(model, points, checkpoints=[1], seed=1))
    return time.perf_counter() - start


def measure_once(model, points) -> float:
    start = time.perf_counter()
    gram = gradient_gram(model, cross_entropy, points)
    for rows in (slice(0, 500), slice(500, 1000)):
        for columns in (slice(0, 500), slice(500, 1000)):
            if rows.start <= columns.start:
                for measure in ("sign", "cos"):
                    class_stiffness(stiffness(gram.block(rows, columns), measure), points[1][rows], points[1][columns])
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    main(parser.parse_args().repeats)
