"""Times gradient_gram against its peers, in turn in one process: the Gram matrix of all loss gradients, float32.

python benchmarks/gram.py [--points 500] [--repeats 9]

For each candidate: the median and the fastest of the repeats, and the median relative error of the entries against a
float64 loop on the first 100 points.
"""

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from stiffkit import gradient_gram


def main(points: int, repeats: int) -> None:
    torch.manual_seed(0)
    workloads = {
        "FC 784-500-300-100-10": (fully_connected(), torch.randn(points, 784)),
        "CNN 16-32-32 on 32 x 32 x 3": (convolutional(), torch.randn(points, 3, 32, 32)),
    }
    candidates = {"stiffkit": ours, "torch.func vmap": vmapped, "loop": loop}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {points} points, {repeats} repeats\n")
    print("| workload | candidate | median s | fastest s | stiffkit is faster by | error |\n|---|---|---|---|---|---|")
    for workload, (model, x) in workloads.items():
        y = torch.arange(points) % 10
        exact = loop(copy.deepcopy(model).double(), x[:100].double(), y[:100])
        grams = {name: candidate(model, x, y) for name, candidate in candidates.items()}
        seconds = {name: [] for name in candidates}
        for _ in range(repeats):
            for name, candidate in candidates.items():
                candidate(model, x, y)  # untimed: a peer's gigabytes are still being given back
                start = time.perf_counter()
                candidate(model, x, y)
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, times in seconds.items():
            error = ((grams[name][:100, :100] - exact) / exact).abs().median()
            ratio = medians[name] / medians["stiffkit"]
            print(f"| {workload} | {name} | {medians[name]:.3f} | {min(times):.3f} | {ratio:.1f} | {error:.0e} |")


def fully_connected() -> nn.Module:
    layers = [layer for a, b in ((784, 500), (500, 300), (300, 100)) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def convolutional() -> nn.Module:
    stages = ((3, 16), (16, 32), (32, 32))
    layers = [layer for a, b in stages for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def ours(model, x, y):
    return gradient_gram(model, nn.CrossEntropyLoss(reduction="none"), (x, y)).dot


def vmapped(model, x, y):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    return flat @ flat.T


def loop(model, x, y):
    rows = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    flat = torch.stack(rows)
    return flat @ flat.T


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--points", type=int, default=500)
    options.add_argument("--repeats", type=int, default=9)
    main(**vars(options.parse_args()))
