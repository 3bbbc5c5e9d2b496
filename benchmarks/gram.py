"""Times gradient_gram against its peers, in turn in one process: the Gram matrix of all loss gradients, float32.

python benchmarks/gram.py [--workload NAME ...] [--repeats 5]

For each candidate the median of the repeats; the memory taken beside model and points (Linux); the largest error of a
cosine among the first 32 points, against a float64 loop. The floor counts the operations of a forward pass, a backward
pass to the layers' inputs, per-sample weight gradients where they must exist and half of a Gram product, at the rate
that this machine multiplies large matrices with. A candidate that refuses a network says so. Opacus and BackPACK take
part where they are installed: `python ci/benchmark.py` installs them.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stiffkit import gradient_gram
from stiffkit._torchvision import import_torchvision

CHECKED = 32  # points that the float64 loop takes


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


def fully_connected():
    layers = [layer for a, b in ((784, 500), (500, 300), (300, 100)) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(100, 10)), torch.randn(500, 784)


def convolutional():
    stages = ((3, 16), (16, 32), (32, 32))
    layers = [layer for a, b in stages for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), torch.randn(500, 3, 32, 32)


def resnet20():
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for channels in (16, 32, 64):
        for k in range(3):
            layers.append(Block(before, channels, 2 if k == 0 and channels > 16 else 1))
            before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), torch.randn(500, 3, 32, 32)


class Bert(nn.Module):
    """A BERT of Hugging Face with random weights that returns logits, as all peers want them."""

    def __init__(self, layers, width):
        super().__init__()
        import_torchvision()
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
        sizes |= {"intermediate_size": 4 * width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(**sizes, num_labels=3, attn_implementation="eager")
        self.bert = BertForSequenceClassification(config)

    def forward(self, tokens):
        return self.bert(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


WORKLOADS = {
    "FC 784-500-300-100-10, N=500": fully_connected,
    "CNN 16-32-32, N=500": convolutional,
    "ResNet20, N=500": resnet20,
    "BERT L2 H128 T=128, N=128": lambda: (Bert(2, 128), torch.randint(0, 30_522, (128, 128))),
    "BERT L4 H256 T=128, N=64": lambda: (Bert(4, 256), torch.randint(0, 30_522, (64, 128))),
}


def ours(model, x, y):
    return gradient_gram(model, nn.CrossEntropyLoss(reduction="none"), (x, y)).dot


def vmapped(model, x, y):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    return product(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y).values())


def loop(model, x, y):
    rows = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return product([torch.stack(rows)])


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


def main(workload, repeats):
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    speed = rate()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, products at {speed:.0f} GF/s, {repeats} repeats"
    )
    for name in workload or WORKLOADS:
        model, x = WORKLOADS[name]()
        model, y = model.eval(), torch.arange(len(x)) % 3
        exact = cosines(loop(copy.deepcopy(model).double(), *double(x[:CHECKED], y[:CHECKED])))
        print(f"\n{name}, {sum(p.numel() for p in model.parameters()):,} parameters; ", end="")
        print(f"floor {floor(model, x) / speed / 1e9:.3f} s\n")
        print("| candidate | median s | MB | stiffkit is faster by | error |\n|---|---|---|---|---|")
        found, memory, errors = {}, {}, {}
        for candidate, gram in CANDIDATES.items():
            try:
                error = (cosines(gram(model, x, y))[:CHECKED, :CHECKED] - exact).abs().max()
                errors[candidate], memory[candidate] = float(error), taken(gram, model, x, y)
                found[candidate] = []
            except (ImportError, NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError) as refusal:
                print(f"| {candidate} | refuses: {str(refusal).strip().splitlines()[0][:60]} | | | |")
        for _ in range(repeats):
            for candidate in found:
                start = time.perf_counter()
                CANDIDATES[candidate](model, x, y)
                found[candidate].append(time.perf_counter() - start)
        for candidate, seconds in found.items():
            median, own = statistics.median(seconds), statistics.median(found["stiffkit"])
            numbers = f"{median:.3f} | {memory[candidate]:.0f} | {median / own:.1f} | {errors[candidate]:.0e}"
            print(f"| {candidate} | {numbers} |", flush=True)


def double(x, y):
    return (x.double() if x.is_floating_point() else x), y


def cosines(K):
    norms = K.diagonal().sqrt()
    return K.double() / norms[:, None] / norms


def rate():
    """Operations a second in units of 1e9, of a product of large matrices."""
    a = torch.randn(2048, 2048)
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    return 10 * 2 * 2048**3 / (time.perf_counter() - start) / 1e9


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


def taken(gram, *arguments):
    """The most memory in MB that a call takes beside what is there; not a number where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return float("nan")
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier candidates freed
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    gram(*arguments)
    return (status("VmHWM") - before) / 1024


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--workload", nargs="*", choices=WORKLOADS)
    options.add_argument("--repeats", type=int, default=5)
    main(**vars(options.parse_args()))
