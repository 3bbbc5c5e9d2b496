"""Slow and obvious float64 references, and a zoo of small networks and losses to hold against them.

The oracle of a gradient is plain autograd on a float64 copy of the model, one point at a time. For points that a
network has fitted, where even float64 autograd cancels, the gradient of cross-entropy at the outputs comes from the
textbook formula in hundreds of digits.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import mpmath
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from stiffkit import losses
from stiffkit._torchvision import import_torchvision

N, M, CLASSES = 5, 4, 3


# ---------------------------------------------------------------------------------------------------------- the oracle


def take(tree, index):
    """Index every tensor of a tensor, tuple or dict."""
    if isinstance(tree, Tensor):
        return tree[index]
    if isinstance(tree, dict):
        return {name: take(leaf, index) for name, leaf in tree.items()}
    return tuple(take(leaf, index) for leaf in tree)


def to(tree, what):
    """Move or cast the floating-point tensors of a tensor, tuple or dict."""
    if isinstance(tree, Tensor):
        return tree.to(what) if tree.is_floating_point() or isinstance(what, (str, torch.device)) else tree
    if isinstance(tree, dict):
        return {name: to(leaf, what) for name, leaf in tree.items()}
    return tuple(to(leaf, what) for leaf in tree)


def call(model, inputs):
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _pull_back(model, inputs, n, cotangent):
    """Gradients of the scalars `cotangent(i, outputs of point i)`, shape (n, parameters), on a float64 copy."""
    model = copy.deepcopy(model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    with torch.inference_mode(False), torch.enable_grad():
        for i in range(n):
            scalar = cotangent(i, call(model, to(take(inputs, slice(i, i + 1)), torch.float64)))
            pulled = torch.autograd.grad(scalar, parameters, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in pulled]))
    return torch.stack(rows) if rows else torch.zeros(0, sum(p.numel() for p in parameters), dtype=torch.float64)


def gradients(model, reference_loss, points):
    """Loss gradients, shape (n, parameters): float64, batch size 1, plain autograd."""
    inputs, targets = points

    def value(i, outputs):
        return reference_loss(getattr(outputs, "logits", outputs), targets[i : i + 1]).sum()

    return _pull_back(model, inputs, len(targets), value)


class Reference(NamedTuple):
    cos: Tensor
    norms: Tensor
    norms2: Tensor

    @property
    def dot(self):
        return self.cos * self.norms[:, None] * self.norms2


def reference_gram(G, H=None, scale=1.0, scale2=None):
    """What `gradient_gram` should give for the gradients `scale * G` (rows) and `scale2 * H` (columns)."""
    (H, scale2) = (G, scale) if H is None else (H, scale2 if scale2 is not None else 1.0)
    norms, norms2 = G.norm(dim=1), H.norm(dim=1)
    unit, unit2 = (V / torch.where(v > 0, v, 1)[:, None] for V, v in ((G, norms), (H, norms2)))
    return Reference(unit @ unit2.T, scale * norms, scale2 * norms2)


def loop_gram(model, reference_loss, points, points2=None):
    """The gradient Gram matrix of one or two sets by the loop."""
    G = gradients(model, reference_loss, points)
    return reference_gram(G, None if points2 is None else gradients(model, reference_loss, points2))


def softmax_gradient(logits, mass):
    """Gradient of `sum_k mass_k (-log p_k)` at the logits, `p sum(mass) - mass`, in 700 digits: direction and length.

    The mass is 1 at the target; class weights scale it, label smoothing and soft targets spread it.
    """
    with mpmath.workdps(700):
        powers = [mpmath.exp(mpmath.mpf(z)) for z in logits]
        mass = [mpmath.mpf(m) for m in mass]
        g = [p / mpmath.fsum(powers) * mpmath.fsum(mass) - m for p, m in zip(powers, mass, strict=True)]
        length = mpmath.sqrt(mpmath.fsum(v * v for v in g))
        direction = [float(v / length) if length > 1e-500 else 0.0 for v in g]
        return torch.tensor(direction, dtype=torch.float64), float(length)


def fitted_gram(model, points, mass=None, temperature=1.0):
    """The Gram matrix of cross-entropy at any confidence: 700 digits at the outputs, then the loop."""
    inputs, targets = points
    with torch.no_grad():
        logits = call(model, inputs).double() / temperature
    mass = one_hot(targets, logits.shape[1]) if mass is None else mass.double()
    pairs = [softmax_gradient(z, m) for z, m in zip(logits.tolist(), mass.tolist(), strict=True)]
    G = _pull_back(model, inputs, len(targets), lambda i, outputs: (outputs[0] * pairs[i][0]).sum())
    return reference_gram(G, scale=torch.tensor([length / temperature for _, length in pairs], dtype=torch.float64))


def assert_agrees(gram, reference, dtype=torch.float32):
    """Median relative error below 1e-5 and no wrong sign where |cos| > 1e-4 (float32); about 1e-10 (float64)."""
    small = 1e-10 if dtype == torch.float64 else 1e-4
    assert gram.cos.shape == reference.cos.shape
    assert {t.dtype for t in (gram.cos, gram.norms, gram.norms2, gram.dot)} == {torch.float64}
    if not gram.cos.numel():
        return
    torch.testing.assert_close(gram.norms, reference.norms, rtol=small, atol=0)
    torch.testing.assert_close(gram.norms2, reference.norms2, rtol=small, atol=0)
    torch.testing.assert_close(gram.cos, reference.cos, rtol=0, atol=small)
    torch.testing.assert_close(gram.dot, reference.dot, rtol=0, atol=2 * small * float(reference.dot.abs().max()))
    assert torch.equal(gram.zero, reference.norms == 0)
    assert torch.equal(gram.zero2, reference.norms2 == 0)
    present = reference.cos != 0
    if present.any():
        error = (gram.cos - reference.cos).abs()[present] / reference.cos.abs()[present]
        assert error.median() < 0.1 * small
    clear = reference.cos.abs() > 1e-4
    assert torch.equal(gram.cos.sign()[clear], reference.cos.sign()[clear])


def class_means(S, y, y2):
    """Class means and counts by four loops: {(a, b): (mean or nan, pairs)}."""
    cells = {}
    for a in sorted(set(y)):
        for b in sorted(set(y2)):
            cell = [S[i][j] for i in range(len(y)) for j in range(len(y2)) if y[i] == a and y2[j] == b]
            cell = [s for s in cell if s == s]
            cells[a, b] = (sum(cell) / len(cell) if cell else float("nan"), len(cell))
    return cells


# -------------------------------------------------------------------------------------------------------- the networks


class Forward(nn.Module):
    """A network in one expression: modules and parameters by name, and `forward(self, ...)` as a function."""

    def __init__(self, function: Callable, **members: nn.Module | nn.Parameter):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class StraightThrough(torch.autograd.Function):
    """An autograd function of the old style, without a rule for `torch.func`."""

    @staticmethod
    def forward(ctx, x):
        return x.round(decimals=1)

    @staticmethod
    def backward(ctx, v):
        return v


def normal(*shape):
    return lambda n: torch.randn(n, *shape)


def tokens(length=6, vocabulary=11):
    return lambda n: torch.randint(vocabulary, (n, length))


def weight(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


def tied_linears():
    """Two layers, each called once, that own one and the same weight."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    model[2].weight = model[0].weight
    return model


def one_module_twice():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, CLASSES))


def aliased():
    """A direct parameter keeps it from going layer by layer; both layers have a second name."""
    model = Forward(lambda s, x: s.b(s.a(x).tanh() * s.scale), a=nn.Linear(6, 5), b=nn.Linear(5, 3), scale=weight(5))
    model.head, model.layers = model.b, nn.ModuleList([model.a, model.a])
    return model


def with_hook():
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, CLASSES))
    model[0].register_forward_hook(lambda module, args, output: 3 * output - 1)
    return model


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def batch_normed():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))
    nn.init.uniform_(model[1].running_mean, -1, 1)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    return model


def experts(self, x):
    """Boolean masks route each point through one of two layers."""
    z, left = x.new_zeros(len(x), CLASSES), x[:, 0] > 0
    z[left], z[~left] = self.a(x[left]), self.b(x[~left])
    return z


def sorting(self, x):
    """Points are sorted inside, as packing sequences by length does, and brought back into order."""
    order = x[:, 0].argsort()
    return self.b(self.a(x[order]).tanh())[order.argsort()]


def ends_in_place(x):
    """Points whose smallest is the first and whose largest is the last, and those between in descending order."""
    order = x[:, 0].argsort()
    return x[torch.cat([order[:1], order[1:-1].flip(0), order[1:][-1:]])]


def siamese(self, x):
    """Both halves of the input go through one layer in one call, stacked along the batch."""
    left, right = self.a(torch.cat([x[:, :3], x[:, 3:]])).tanh().chunk(2)
    return self.b(left - right)


def in_place(self, x):
    h = self.a(x)
    h += 1
    h[:, 0] *= 3
    return self.b(h.relu_())


def without_gradient(self, x):
    with torch.no_grad():
        h = self.a(x).tanh()
    return self.b(h)


def straight_through(self, x):
    return self.b(StraightThrough.apply(self.a(x)) + getattr(self, "shift", 0))


def checkpointed(self, x):
    return self.b(torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False).tanh() + getattr(self, "shift", 0))


def class_token(self, x):
    x = torch.cat([self.token.expand(len(x), 1, -1), self.a(x)], dim=1) + self.position
    return self.b(self.encoder(x)[:, 0])


def vision_transformer():
    return Forward(
        class_token,
        token=weight(1, 1, 8),
        position=weight(1, 5, 8),
        a=nn.Linear(3, 8),
        encoder=transformer(8, batch_first=True),
        b=nn.Linear(8, CLASSES),
    )


def transformer(width, batch_first):
    layer = nn.TransformerEncoderLayer(width, 2, 12, batch_first=batch_first, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def recurrent(kind):
    return Forward(
        lambda self, x: self.head(self.cell(x)[0][:, -1]), cell=kind(3, 5, batch_first=True), head=nn.Linear(5, CLASSES)
    )


def bert():
    """A Hugging Face classifier from a configuration: nothing is fetched."""
    with suppress(ImportError):  # transformers does without it, but not with one that fails to import
        import_torchvision()
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.bert.modeling_bert import BertForSequenceClassification

    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=CLASSES,
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config)


def bert_inputs(n):
    mask = (torch.arange(6) < torch.randint(2, 7, (n, 1))).long()
    return {"input_ids": torch.randint(11, (n, 6)), "attention_mask": mask}


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    looped: bool | None = False  # torch.func refuses it: point by point, with a warning. None: depends on versions


MODELS = {
    "linear": Case(lambda: nn.Linear(4, CLASSES), normal(4)),
    "linear without bias": Case(lambda: nn.Linear(4, CLASSES, bias=False), normal(4)),
    "mlp": Case(
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(6, 8),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(8, 7, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(7, CLASSES),
        ),
        normal(2, 3),
    ),
    "nested": Case(
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.ModuleDict({"fc": nn.Linear(5, 3)})["fc"]),
        normal(6),
    ),
    "residual": Case(
        lambda: Forward(lambda s, x: s.b(x + s.a(x).tanh()), a=nn.Linear(6, 6), b=nn.Linear(6, CLASSES)), normal(6)
    ),
    "stride, padding, groups, dilation, max-pool": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        ),
        normal(2, 8, 8),
    ),
    "uneven convolutions": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
            nn.Tanh(),
            nn.Conv2d(3, 6, (1, 3), groups=3, padding="same", dilation=(1, 2)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, CLASSES),
        ),
        normal(2, 7, 6),
    ),
    "stride that does not divide": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=3, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        normal(2, 9, 9),
    ),
    "circular and reflecting padding": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(3, 3, 3, padding=(1, 2), padding_mode="reflect"),
            nn.Flatten(),
            nn.Linear(3 * 5 * 7, CLASSES),
        ),
        normal(2, 5, 5),
    ),
    "as many channels, rows and columns as points": Case(
        lambda: nn.Sequential(nn.Conv2d(N, N, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(N**3, CLASSES)),
        normal(N, N, N),
    ),
    "channels last": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).to(
            memory_format=torch.channels_last
        ),
        lambda n: torch.randn(n, 6, 6, 3).movedim(-1, 1),
    ),
    "other convolutions": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2), nn.Flatten(), nn.Linear(14, 3)
        ),
        normal(2, 8),
    ),
    "one and three dimensions": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2, padding=1, padding_mode="replicate"),
            nn.Tanh(),
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv3d(1, 2, 2, padding=(1, 0, 1), dilation=(1, 1, 2)),
            nn.Flatten(),
            nn.Linear(24, CLASSES),
        ),
        normal(2, 8),
    ),
    "norms of sequences and images": Case(
        lambda: nn.Sequential(
            nn.LayerNorm((4, 6)),
            nn.RMSNorm(6),
            nn.Conv1d(4, 4, 3),
            nn.GroupNorm(2, 4),
            nn.BatchNorm1d(4).eval(),
            nn.Flatten(),
            nn.LayerNorm(16, bias=False),
            nn.Linear(16, CLASSES),
        ).eval(),
        normal(4, 6),
    ),
    "positions looked up once": Case(
        lambda: Forward(
            lambda s, x: s.c((s.a(x) + s.b(torch.arange(6, device=x.device)[None])).tanh()[:, 2]),
            a=nn.Embedding(11, 5, padding_idx=3),
            b=nn.Embedding(6, 5),
            c=nn.Linear(5, CLASSES),
        ),
        tokens(),
    ),
    "positions without a batch": Case(
        lambda: Forward(
            lambda s, x: s.c((s.a(x) + s.b(torch.arange(6, device=x.device)[None]).view(6, 5)).tanh().flatten(1)),
            a=nn.Embedding(11, 5),
            b=nn.Embedding(6, 5),
            c=nn.Linear(30, CLASSES),
        ),
        tokens(),
    ),
    "two numbers a sample": Case(
        lambda: Forward(
            lambda s, x: s.c(s.a(x[:, 0]) * s.b(x[:, 1:3]).flatten(1)),
            a=nn.Embedding(11, 4),
            b=nn.Embedding(11, 2),
            c=nn.Linear(4, CLASSES),
        ),
        tokens(),
    ),
    "batch norm in eval mode": Case(batch_normed, normal(2, 6, 6)),
    "layer and group norm": Case(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.GroupNorm(2, 8), nn.Linear(8, CLASSES)),
        normal(6),
    ),
    "called twice": Case(
        lambda: Forward(lambda s, x: s.b(s.a(s.a(x).tanh()).tanh()), a=nn.Linear(6, 6), b=nn.Linear(6, CLASSES)),
        normal(6),
    ),
    "one module in two places": Case(one_module_twice, normal(6)),
    "one module under two names": Case(aliased, normal(6)),
    "two modules, one weight": Case(tied_linears, normal(6)),
    "tied embedding": Case(
        lambda: Forward(
            lambda s, x: s.b(F.linear(s.a(x).mean(1), s.a.weight)), a=nn.Embedding(11, 5), b=nn.Linear(11, CLASSES)
        ),
        tokens(),
    ),
    "padded embedding": Case(
        lambda: Forward(
            lambda s, x: s.b(s.a(x).mean(1)), a=nn.Embedding(11, 5, padding_idx=0), b=nn.Linear(5, CLASSES)
        ),
        tokens(),
    ),
    "parameter used directly": Case(
        lambda: Forward(lambda s, x: s.a(x * s.scale) @ s.last, a=nn.Linear(6, 5), scale=weight(6), last=weight(5, 3)),
        normal(6),
    ),
    "weight used besides its module": Case(
        lambda: Forward(
            lambda s, x: s.b((s.a(x) + F.linear(x.cos(), s.a.weight)).tanh()),
            a=nn.Linear(6, 5),
            b=nn.Linear(5, CLASSES),
        ),
        normal(6),
    ),
    "weight decay in the outputs": Case(
        lambda: Forward(
            lambda s, x: s.b(s.a(x).tanh()) + s.a.weight.square().sum(), a=nn.Linear(6, 5), b=nn.Linear(5, 3)
        ),
        normal(6),
    ),
    "unused layer": Case(
        lambda: Forward(lambda s, x: s.a(x), a=nn.Linear(6, CLASSES), unused=nn.Linear(6, 2)), normal(6)
    ),
    "part of an output unused": Case(
        lambda: Forward(lambda s, x: (s.b(x), s.a(x))[1], a=nn.Linear(6, CLASSES), b=nn.Linear(6, 2)), normal(6)
    ),
    "subclass of Linear": Case(lambda: nn.Sequential(DoubledLinear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)), normal(6)),
    "hook that changes an output": Case(with_hook, normal(6)),
    "weight norm": Case(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, CLASSES)),
        normal(6),
    ),
    "keyword argument": Case(
        lambda: Forward(lambda s, x: s.b(input=s.a(input=x).tanh()), a=nn.Linear(6, 5), b=nn.Linear(5, CLASSES)),
        normal(6),
    ),
    "changed in place": Case(lambda: Forward(in_place, a=nn.Linear(6, 5), b=nn.Linear(5, CLASSES)), normal(6)),
    "detached": Case(
        lambda: Forward(lambda s, x: s.b(s.a(x).tanh().detach()) + s.a(x)[:, :3], a=nn.Linear(6, 5), b=nn.Linear(5, 3)),
        normal(6),
    ),
    "part without gradient": Case(
        lambda: Forward(without_gradient, a=nn.Linear(6, 5), b=nn.Linear(5, CLASSES)), normal(6)
    ),
    "sequences": Case(
        lambda: Forward(lambda s, x: s.b(s.a(x).relu().mean(1)), a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES)),
        normal(7, 4),
    ),
    "as many steps as points": Case(
        lambda: Forward(lambda s, x: s.b(s.a(x).relu().mean(1)), a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES)),
        normal(N, 4),
    ),
    "time first, as many steps as points": Case(
        lambda: Forward(
            lambda s, x: s.b(s.a(x.transpose(0, 1)).relu().cumsum(0)[-1]), a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES)
        ),
        normal(N, 4),
    ),
    "channels in the place of points": Case(
        lambda: Forward(
            lambda s, x: s.b(s.a(x.movedim(0, 1)).relu().movedim(0, 1).flatten(1)),
            a=nn.Linear(4, 6),
            b=nn.Linear(6 * N, 3),
        ),
        normal(N, 4),
    ),
    "two leading dimensions folded": Case(
        lambda: Forward(
            lambda s, x: s.b(s.a(x.flatten(0, 1)).relu().unflatten(0, (-1, 4)).sum(1)),
            a=nn.Linear(3, 6),
            b=nn.Linear(6, CLASSES),
        ),
        normal(4, 3),
    ),
    "siamese": Case(lambda: Forward(siamese, a=nn.Linear(3, 5), b=nn.Linear(5, CLASSES)), normal(6)),
    "sorts the batch": Case(lambda: Forward(sorting, a=nn.Linear(6, 5), b=nn.Linear(5, CLASSES)), normal(6)),
    "sorts the batch, first and last in place": Case(
        lambda: Forward(sorting, a=nn.Linear(6, 5), b=nn.Linear(5, CLASSES)),
        lambda n: ends_in_place(torch.randn(n, 6)),
    ),
    "reverses the batch and back": Case(
        lambda: Forward(lambda s, x: s.b(s.a(x.flip(0)).tanh()).flip(0), a=nn.Linear(6, 5), b=nn.Linear(5, CLASSES)),
        normal(6),
    ),
    "layer of a constant": Case(
        lambda: Forward(
            lambda s, x: s.b(x * s.a(s.query)), a=nn.Linear(4, 6), b=nn.Linear(6, CLASSES), query=weight(1, 4)
        ),
        normal(6),
    ),
    "layer of as many constants as points": Case(
        lambda: Forward(
            lambda s, x: s.b((x @ s.a(s.query).T).tanh()), a=nn.Linear(4, 6), b=nn.Linear(N, 3), query=weight(N, 4)
        ),
        normal(6),
    ),
    "frozen layer": Case(
        lambda: frozen(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)), "0.weight", "0.bias"),
        normal(6),
    ),
    "frozen weight": Case(
        lambda: frozen(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)), "0.weight", "2.bias"),
        normal(6),
    ),
    "frozen convolution bias": Case(
        lambda: frozen(
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, CLASSES)),
            "0.bias",
            "2.weight",
        ),
        normal(2, 5, 5),
    ),
    "frozen on sequences": Case(
        lambda: frozen(
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Flatten(), nn.Linear(35, CLASSES)),
            "0.bias",
            "2.weight",
        ),
        normal(7, 4),
    ),
    "transformer": Case(
        lambda: nn.Sequential(transformer(4, batch_first=True), nn.Flatten(), nn.Linear(20, CLASSES)), normal(5, 4)
    ),
    "transformer, time first": Case(
        lambda: Forward(
            lambda s, x: s.b(s.a(x.transpose(0, 1)).mean(0)),
            a=transformer(4, batch_first=False),
            b=nn.Linear(4, CLASSES),
        ),
        normal(N, 4),
    ),
    "class token": Case(vision_transformer, normal(4, 3)),
    "tuple inputs": Case(
        lambda: Forward(
            lambda s, x, k: s.b(s.a(x).tanh() + s.e(k)), a=nn.Linear(4, 5), e=nn.Embedding(7, 5), b=nn.Linear(5, 3)
        ),
        lambda n: (torch.randn(n, 4), torch.randint(7, (n,))),
    ),
    "dict inputs": Case(
        lambda: Forward(lambda s, *, left, right: s.b(s.a(left) * right), a=nn.Linear(4, 5), b=nn.Linear(5, CLASSES)),
        lambda n: {"left": torch.randn(n, 4), "right": torch.randn(n, 5)},
    ),
    "BERT": Case(bert, bert_inputs, looped=None),
    "GRU": Case(lambda: recurrent(nn.GRU), normal(4, 3), looped=True),
    "LSTM": Case(lambda: recurrent(nn.LSTM), normal(4, 3), looped=None),
    "experts": Case(lambda: Forward(experts, a=nn.Linear(6, CLASSES), b=nn.Linear(6, CLASSES)), normal(6), looped=True),
    "old autograd function": Case(lambda: Forward(straight_through, a=nn.Linear(6, 5), b=nn.Linear(5, 3)), normal(6)),
    "old autograd function, direct parameter": Case(
        lambda: Forward(straight_through, a=nn.Linear(6, 5), b=nn.Linear(5, CLASSES), shift=weight(5)),
        normal(6),
        looped=True,
    ),
    "checkpointed": Case(lambda: Forward(checkpointed, a=nn.Linear(6, 5), b=nn.Linear(5, CLASSES)), normal(6)),
    "checkpointed, direct parameter": Case(
        lambda: Forward(checkpointed, a=nn.Linear(6, 5), b=nn.Linear(5, CLASSES), shift=weight(5)),
        normal(6),
        looped=True,
    ),
}


# ---------------------------------------------------------------------------------------------------------- the losses


class OwnLoss(nn.Module):
    def forward(self, outputs, targets):
        return (outputs - targets).cosh().log().sum(1)


def labels(n):
    """Every class in turn, shuffled."""
    return torch.randperm(n) % CLASSES


def probabilities(n):
    return torch.randn(n, CLASSES).softmax(1)


def pick(z, y):
    return z.gather(1, y[:, None])[:, 0]


def plain_cross_entropy(z, y):
    return z.exp().sum(1).log() - pick(z, y)


def plain_log_softmax(z):
    return z - z.exp().sum(1, keepdim=True).log()


def one_hot(y, classes=CLASSES):
    return torch.eye(classes, dtype=torch.float64)[y]


WEIGHT = torch.tensor([0.3, 1.7, 4.0])


class Loss(NamedTuple):
    """A loss as a user writes it, the same in plain float64 arithmetic, and targets for it."""

    loss: Callable
    reference: Callable
    targets: Callable[[int], Tensor]


LOSSES = {
    "module": Loss(nn.CrossEntropyLoss(reduction="none"), plain_cross_entropy, labels),
    "functional": Loss(lambda z, y: F.cross_entropy(z, y, reduction="none"), plain_cross_entropy, labels),
    "nll of log-softmax": Loss(
        lambda z, y: F.nll_loss(F.log_softmax(z, dim=1), y, reduction="none"), plain_cross_entropy, labels
    ),
    "gathered log-softmax": Loss(lambda z, y: -pick(z.log_softmax(-1), y), plain_cross_entropy, labels),
    "stiffkit": Loss(losses.cross_entropy, plain_cross_entropy, labels),
    "class weights": Loss(
        nn.CrossEntropyLoss(weight=WEIGHT, reduction="none"),
        lambda z, y: WEIGHT.double()[y] * plain_cross_entropy(z, y),
        labels,
    ),
    "ignored class": Loss(
        lambda z, y: F.cross_entropy(z, y, ignore_index=1, reduction="none"),
        lambda z, y: (y != 1) * plain_cross_entropy(z, y),
        labels,
    ),
    "label smoothing": Loss(
        nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"),
        lambda z, y: -((0.9 * one_hot(y) + 0.1 / CLASSES) * plain_log_softmax(z)).sum(1),
        labels,
    ),
    "soft targets": Loss(
        lambda z, t: F.cross_entropy(z, t.to(z.dtype), reduction="none"),
        lambda z, t: -(t.double() * plain_log_softmax(z)).sum(1),
        probabilities,
    ),
    "weighted, smoothed, soft float32 targets": Loss(
        lambda z, t: F.cross_entropy(z, t, weight=WEIGHT, label_smoothing=0.2, reduction="none"),
        lambda z, t: -((0.8 * t.double() + 0.2 / CLASSES) * WEIGHT.double() * plain_log_softmax(z)).sum(1),
        probabilities,
    ),
    "squared error": Loss(
        lambda z, t: F.mse_loss(z, t, reduction="none").mean(1),
        lambda z, t: (z - t.double()).square().mean(1),
        lambda n: torch.randn(n, CLASSES),
    ),
    "stiffkit's squared error": Loss(losses.mse, lambda z, y: (z - one_hot(y)).square().mean(1), labels),
    "binary": Loss(
        lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="none").sum(1),
        lambda z, t: ((1 + z.exp()).log() - t * z).sum(1),
        lambda n: torch.randint(2, (n, CLASSES)).float(),
    ),
    "own": Loss(OwnLoss(), lambda z, t: (z - t.double()).cosh().log().sum(1), lambda n: torch.randn(n, CLASSES)),
    "focal": Loss(
        lambda z, y: (
            (1 - (-F.cross_entropy(z, y, reduction="none")).exp()) ** 2 * F.cross_entropy(z, y, reduction="none")
        ),
        lambda z, y: (1 - (-plain_cross_entropy(z, y)).exp()) ** 2 * plain_cross_entropy(z, y),
        labels,
    ),
}


def build(model="mlp", loss="module", n=N, m=M, dtype=torch.float32, seed=0):
    """A case of the zoo: model (eval mode), loss, its reference, a set of n points and one of m."""
    torch.manual_seed(seed)
    case, spelled = MODELS[model], LOSSES[loss]
    network = case.model().to(dtype).eval()
    points, points2 = ((to(case.inputs(k), dtype), spelled.targets(k)) for k in (n, m))
    user_loss = spelled.loss
    if model == "BERT" and not isinstance(user_loss, nn.Module):
        user_loss = lambda outputs, targets: spelled.loss(outputs.logits, targets)  # noqa: E731
    return SimpleNamespace(
        model=network, loss=user_loss, reference=spelled.reference, points=points, points2=points2, looped=case.looped
    )


# ---------------------------------------------------------------------------------------------------- fitted networks


def logit_reader(classes=4):
    """A linear network whose inputs are its logits, so that a test can ask for any confidence."""
    model = nn.Linear(classes, classes)
    with torch.no_grad():
        model.weight.copy_(torch.eye(classes))
        model.bias.zero_()
    return model


def logits_with_gap(gaps, classes=4, seed=0):
    """Logits whose target has the wanted gap $\\log p_y/(1-p_y)$ (to float32), and the targets; classes take turns."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(gaps), classes, generator=generator, dtype=torch.float64)
    y = torch.arange(len(gaps)) % classes
    others = z.masked_fill(one_hot(y, classes).bool(), -torch.inf).logsumexp(1)
    z[torch.arange(len(gaps)), y] = others + torch.tensor(gaps, dtype=torch.float64)
    return z.float(), y


def dyadic_mlp(scale, seed=0):
    """A network and points whose arithmetic is exact in float32 (few binary digits), so that every order of summation
    gives the same logits; `scale`, a power of two, sets how confident it is in its own predictions.
    """
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-4, 5, p.shape, generator=generator) / 8)
        for p in model[2].parameters():
            p.mul_(scale)
        x = torch.randint(-8, 9, (12, 6), generator=generator) / 4
        y = model(x).argmax(1)
    return model, (x, y)
