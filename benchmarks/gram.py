"""Times gradient_gram against its peers, in turn in one process: the Gram matrix of all loss gradients, float32.

python benchmarks/gram.py [--workload NAME ...] [--repeats 5] [--device cuda] [--growth _build/growth.svg]

For each candidate the median of the repeats, each the mean of the calls that begin within three seconds, or one time
where that is longer than 100 s; the memory taken beside model and points (Linux, CUDA); the largest error of a cosine
among the first 32 points (8 of BERT-base), against a float64 loop. The floor counts the operations of a forward pass, a
backward pass to the layers' inputs, per-sample weight gradients where they must exist and half of a Gram product, at
the rate that this machine multiplies large matrices with. A candidate that refuses a network says so, and so does one
whose gradients of all points do not fit into memory twice. No TF32. Opacus and BackPACK take part where they are
installed: `python ci/benchmark.py` installs them. After the workloads, where none was named: the cosine class matrix of
BERT-base from class sums, once; and how time grows with the number of points and of parameters, each timed once after a
first call, as a table and a plot.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import time
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stiffkit import class_cosine, gradient_gram
from stiffkit._torchvision import import_torchvision
from stiffkit.measuring import free_memory

CHECKED = 32  # points that the float64 loop takes
LONG = 100.0  # seconds: what takes longer is timed once
SPAN = 3.0  # seconds: shorter calls are repeated for so long
REFUSALS = (ImportError, NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError)


class Block(nn.Module):
    """Two convolutions of a ResNet20 with batch norm, and a shortcut."""

    def __init__(self, before, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        same = stride == 1 and before == channels
        shortcut = [nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def fully_connected(n=500, width=1.0):
    sizes = [784, *(round(width * size) for size in (500, 300, 100))]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10)), torch.randn(n, 784)


def convolutional():
    stages = ((3, 16), (16, 32), (32, 32))
    layers = [layer for a, b in stages for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), torch.randn(500, 3, 32, 32)


def resnet20(classes=10, n=500):
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for channels in (16, 32, 64):
        for k in range(3):
            layers.append(Block(before, channels, 2 if k == 0 and channels > 16 else 1))
            before = channels
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)
    return nn.Sequential(*layers, *head), torch.randn(n, 3, 32, 32)


class Bert(nn.Module):
    """A BERT of Hugging Face with random weights, called and read so that all peers can take it."""

    def __init__(self, layers, width):
        super().__init__()
        import_torchvision()
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
        sizes |= {"intermediate_size": 4 * width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(**sizes, num_labels=3, attn_implementation="eager")
        self.bert = BertForSequenceClassification(config)

    def forward(self, tokens):
        n, length = tokens.shape
        places = torch.arange(length, device=tokens.device).expand(n, length)
        mask = torch.zeros(n, 1, length, length, device=tokens.device)  # added to scores; none of it is padding
        ids = {"input_ids": tokens, "position_ids": places, "token_type_ids": torch.zeros_like(tokens)}
        return self.bert(**ids, attention_mask=mask).logits


def bert(layers, width, n):
    return Bert(layers, width), torch.randint(0, 30_522, (n, 128))


WORKLOADS = {
    "FC 784-500-300-100-10, N=500": fully_connected,
    "CNN 16-32-32, N=500": convolutional,
    "ResNet20, N=500": resnet20,
    "ResNet20, 100 classes, N=3000": partial(resnet20, 100, 3000),
    "BERT L2 H128 T=128, N=128": partial(bert, 2, 128, 128),
    "BERT L4 H256 T=128, N=64": partial(bert, 4, 256, 64),
    "BERT-base T=128, N=64": partial(bert, 12, 768, 64),
}
GROWTH = {  # points and parameters of a fully-connected network
    **{f"N={n}": partial(fully_connected, n) for n in (125, 250, 500, 1000, 2000)},
    **{f"width x {w}": partial(fully_connected, width=w) for w in (0.25, 0.5, 1, 2)},
}


def ours(model, x, y):
    return gradient_gram(model, nn.CrossEntropyLoss(reduction="none"), (x, y)).dot


def vmapped(model, x, y):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    return product(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y).values())


def loop(model, x, y):
    return product([torch.stack(rows(model, x, y))])


def rows(model, x, y):
    """The gradient of one point after the other."""
    found = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in gradients]))
    return found


def exact_cosines(model, x, y):
    """In float64, pair by pair: all of a large network's gradients once are memory enough."""
    found = rows(copy.deepcopy(model).double(), *double(x, y))
    return cosines(torch.stack([torch.stack([g @ h for h in found]) for g in found]))


def opacus(model, x, y):
    from opacus import GradSampleModule

    wrapped = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")  # in eval mode it records nothing
    F.cross_entropy(wrapped(x), y, reduction="sum").backward()
    return product(p.grad_sample for p in wrapped.parameters())


def backpack(model, x, y):
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    chain = isinstance(model, nn.Sequential) and not any(isinstance(m, Block) for m in model)
    extended = extend(copy.deepcopy(model), use_converter=not chain)
    with backpack(BatchGrad()):
        extend(nn.CrossEntropyLoss(reduction="sum"))(extended(x), y).backward()
    return product(p.grad_batch for p in extended.parameters())


def product(gradients):
    flat = torch.cat([g.flatten(1) for g in gradients], dim=1)
    return flat @ flat.T


CANDIDATES = {"stiffkit": ours, "loop": loop, "torch.func vmap": vmapped, "Opacus": opacus, "BackPACK": backpack}


def main(workload, repeats, device, growth):
    warnings.simplefilter("ignore")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    speed = rate(device)
    kind = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {kind}, products at {speed:.0f} GF/s, {repeats} repeats")
    for name in workload or WORKLOADS:
        model, x, y = built(WORKLOADS[name], device)
        print(f"\n{name}, {parameters(model):,} parameters; floor {floor(model, x) / speed / 1e9:.3g} s\n")
        print("| candidate | median s | MB | stiffkit is faster by | error |\n|---|---|---|---|---|")
        found = timed(model, x, y, repeats, CHECKED if parameters(model) < 1e8 else 8)
        for candidate, (seconds, memory, error) in found.items():
            numbers = f"{seconds:.3g} | {memory:.0f} | {seconds / found['stiffkit'][0]:.2g} | {error:.0e}"
            print(f"| {candidate} | {numbers} |", flush=True)
    if not workload:
        class_sums(device)
        grown(device, growth, speed)


def built(workload, device):
    torch.manual_seed(0)
    model, x = workload()
    return model.eval().to(device), x.to(device), torch.arange(len(x), device=device) % 3


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def timed(model, x, y, repeats, checked=0):
    """The median seconds of each candidate, its memory in MB and its error; those that do not take part say why."""
    free, whole, device = free_memory(x.device), 4 * len(x) * parameters(model), x.device.type
    exact = exact_cosines(model, x[:checked], y[:checked]) if checked else None
    seconds, others = {}, {}
    for candidate, gram in CANDIDATES.items():
        if candidate != "stiffkit" and 2 * whole > free:
            print(f"| {candidate} | would take {2 * whole / 1e9:.0f} GB | | | |")
            continue
        try:
            start = now(device)
            K, memory = taken(gram, device, model, x, y)
            seconds[candidate] = [now(device) - start]
        except REFUSALS as refusal:
            print(f"| {candidate} | refuses: {str(refusal).strip().splitlines()[0][:60].rstrip()} | | | |")
            continue
        error = float((cosines(K)[:checked, :checked] - exact).abs().max()) if checked else float("nan")
        others[candidate] = memory, error
    for _ in range(repeats):
        for candidate, found in seconds.items():
            if found[0] <= LONG:
                found.append(mean_seconds(lambda gram=CANDIDATES[candidate]: gram(model, x, y), device))
    medians = {c: statistics.median(found[1:] or found) for c, found in seconds.items()}  # the first was to warm up
    return {candidate: (median, *others[candidate]) for candidate, median in medians.items()}


def mean_seconds(call, device):
    """Of as many calls as begin within `SPAN`: short ones would be timed with what the candidate before left behind."""
    start, calls = now(device), 0
    while not calls or now(device) - start < SPAN:
        call()
        calls += 1
    return (now(device) - start) / calls


def class_sums(device, n=500):
    """The cosine class matrix of BERT-base, whose Gram matrix would need all points' signals at once."""
    model, x, y = built(partial(bert, 12, 768, n), device)
    start = now(device)
    _, memory = taken(class_cosine, device, model, nn.CrossEntropyLoss(reduction="none"), (x, y), y.cpu())
    print(f"\nClass sums of BERT-base T=128, N={n}: {now(device) - start:.3g} s, {memory:.0f} MB", flush=True)


def grown(device, path, speed):
    """How time grows with points and parameters, beside the floor at the measured speed."""
    import pandas as pd

    print("\nGrowth, seconds\n")
    rows = []
    for workload in GROWTH.values():
        model, x, y = built(workload, device)
        found = {candidate: median for candidate, (median, *_) in timed(model, x, y, repeats=1).items()}
        least = floor(model, x) / speed / 1e9
        rows.append({"points": len(x), "parameters": parameters(model), **found, "floor": least})
    table = pd.DataFrame(rows)
    print(table.to_markdown(index=False, floatfmt=".3g"), flush=True)
    draw(table, Path(path))


def draw(table, path):
    """Growth in points and in parameters, a panel each, both logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    reference = table.iloc[list(GROWTH).index("width x 1")]
    for ax, along, other in zip(axes, ("points", "parameters"), ("parameters", "points"), strict=True):
        part = table[table[other] == reference[other]].drop_duplicates(along).sort_values(along)
        for candidate in CANDIDATES:
            if candidate in part:
                ax.loglog(part[along], part[candidate], "o-", label=candidate)
        ax.loglog(part[along], part["floor"], "k--", label="floor")
        ax.set_xticks(part[along], [f"{value:,.0f}" for value in part[along]])
        ax.set_xticks([], minor=True)
        ax.set_xlabel(along)
    axes[0].set_ylabel("seconds")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(CANDIDATES) + 1, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def double(x, y):
    return (x.double() if x.is_floating_point() else x), y


def cosines(K):
    norms = K.diagonal().sqrt()
    return (K.double() / norms[:, None] / norms).cpu()


def rate(device):
    """Operations a second in units of 1e9, of a product of large matrices."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device)
    a @ a
    start = now(device)
    for _ in range(10):
        a @ a
    return 10 * 2 * size**3 / (now(device) - start) / 1e9


def floor(model, x):
    """The operations that no way to the Gram matrix can do without."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    counts = {name: sum(of_op.values()) for name, of_op in counter.get_flop_counts().items()}
    n, total = len(x), 2 * counter.get_total_flops()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        once = counts[f"{type(model).__name__}.{name}"]
        if isinstance(module, nn.Linear) and once == 2 * n * module.weight.numel():  # on vectors
            total += n**2 * sum(module.weight.shape)
        else:  # gradients of weights cost as much as a forward pass; half of a product of n of them
            total += once + n**2 * module.weight.numel()
    return total


def taken(gram, device, *arguments):
    """A Gram matrix, and the most memory in MB that it took beside what is there, where the system tells."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return gram(*arguments), (torch.cuda.max_memory_allocated() - before) / 2**20
    if not sys.platform.startswith("linux"):
        return gram(*arguments), float("nan")
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier candidates freed
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return gram(*arguments), (status("VmHWM") - before) / 1024


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--workload", nargs="*", choices=WORKLOADS)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--growth", metavar="FILE.svg", default="_build/growth.svg")
    main(**vars(options.parse_args()))
