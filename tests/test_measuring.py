"""What a second reader found: each once gave wrong numbers or broke the model, in silence."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import Forward
from torch import nn

from stiffkit import class_cosine, gradient_gram

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
N = 12


def points(*shape):
    return torch.randn(N, *shape), torch.arange(N) % 3


def loop_cosine(model, loss, inputs, y):
    """Cosines by plain autograd in float64; inputs is a tuple, floating tensors cast."""
    model = copy.deepcopy(model).double()
    rows = []
    for i in range(len(y)):
        x = [t[i : i + 1].double() if t.is_floating_point() else t[i : i + 1] for t in inputs]
        gradients = torch.autograd.grad(loss(model(*x), y[i : i + 1]).sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    g = F.normalize(torch.stack(rows), dim=1)
    return g @ g.T


def test_padding_masks_of_a_transformer_encoder():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model = Forward(
        lambda s, x, mask: s.head(s.encoder(x, src_key_padding_mask=mask).mean(1)),
        encoder=encoder,
        head=nn.Linear(8, 3),
    ).eval()
    (x, y), mask = points(5, 8), torch.arange(5) >= torch.randint(2, 6, (N, 1))
    gram = gradient_gram(model, CROSS_ENTROPY, ((x, mask), y))
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    expected = loop_cosine(model, CROSS_ENTROPY, (x, mask), y)
    torch.backends.mha.set_fastpath_enabled(fastpath)
    assert fastpath, "left as it was"
    torch.testing.assert_close(gram.cos, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("softmax", [lambda z: z.log_softmax(1), lambda z: z.softmax(1)])
def test_a_softmax_inside_the_model_is_named_on_fitted_points(softmax):
    x, y = points(3)
    model = Forward(lambda s, x: softmax(s.a(x)), a=nn.Linear(3, 3))
    loss = F.nll_loss if softmax(torch.zeros(1, 3)).sum() < 0 else lambda p, y, reduction: -p.log()[range(len(y)), y]
    gradient_gram(model, lambda z, y: loss(z, y, reduction="none"), (x, y))  # nothing fitted, no warning
    fitted = 40 * F.one_hot(y, 3).float()
    with torch.no_grad():
        model.a.weight.copy_(torch.eye(3))
    with pytest.warns(UserWarning, match="return logits"):
        gradient_gram(model, lambda z, y: loss(z, y, reduction="none"), (fitted, y))


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_gradients_far_from_one_keep_their_direction(scale):
    x, y = points(6)
    model = nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    far, near = (gradient_gram(model, CROSS_ENTROPY, (factor * x, y)) for factor in (scale, 1.0))
    torch.testing.assert_close(far.cos, near.cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(far.norms, scale * near.norms, rtol=1e-5, atol=0)


def test_drop_path_is_refused_every_time():
    model = Forward(lambda s, x: s.b(s.a(x).relu() * (torch.rand(()) > 0.1)), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    for _ in range(20):
        with pytest.raises(ValueError, match="random"):
            gradient_gram(model, CROSS_ENTROPY, points(4))


@pytest.mark.parametrize("head", [1.0, 0.03])
def test_a_layer_whose_rows_are_sorted_is_found_however_small_its_gradients(head):
    def forward(s, x):
        order = x[:, 0].argsort()
        hidden = torch.empty(len(x), 5).index_copy(0, order, s.a(x[order]))
        return head * s.b(hidden.tanh())

    model, (x, y) = Forward(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3)), points(4)
    gram = gradient_gram(model, CROSS_ENTROPY, (x, y), by="layer")["a"]
    alone = gradient_gram(model.requires_grad_(True), CROSS_ENTROPY, (x[:1], y[:1]), (x[5:6], y[5:6]), by="layer")["a"]
    torch.testing.assert_close(gram.cos[0, 5], alone.cos[0, 0], rtol=0, atol=1e-5)


def test_a_penalty_on_the_weights_is_refused():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="parameters of the model"):
        gradient_gram(model, lambda z, y: CROSS_ENTROPY(z, y) + model.weight.square().sum(), points(4))


def test_a_forward_that_works_on_its_input_leaves_the_points_alone():
    model, (x, y) = Forward(lambda s, x: s.a(x.sub_(0.5)), a=nn.Linear(4, 3)), points(4)
    before = x.clone()
    gram = gradient_gram(model, CROSS_ENTROPY, (x, y))
    assert torch.equal(x, before)
    torch.testing.assert_close(gram.cos, loop_cosine(model, CROSS_ENTROPY, (x,), y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [list, lambda mask: mask, lambda mask: mask.numpy()])
def test_blocks_by_a_mask(kind):
    gram = gradient_gram(nn.Linear(4, 3), CROSS_ENTROPY, points(4))
    mask = torch.arange(N) % 4 == 0
    chosen = kind(mask.tolist() if kind is list else mask)
    assert torch.equal(gram.block(chosen, chosen).cos, gram.cos[mask][:, mask])


def test_a_hook_on_a_parameter_is_refused():
    model = nn.Linear(4, 3)
    handle = model.weight.register_hook(lambda g: 0 * g)
    with pytest.raises(ValueError, match="'weight' has a hook"):
        gradient_gram(model, CROSS_ENTROPY, points(4))
    handle.remove()
    assert gradient_gram(model, CROSS_ENTROPY, points(4)).cos.shape == (N, N)


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss])
def test_small_residuals_are_no_cancellation(loss):
    x = torch.randn(N, 3, dtype=torch.float64)
    model = nn.Linear(3, 3, bias=False).double()
    targets = model(x).detach() + 1e-6 * torch.randn(N, 3, dtype=torch.float64)
    assert not gradient_gram(model, lambda z, t: loss(z, t, reduction="none").mean(1), (x, targets)).zero.any()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_mixing_is_refused_at_every_scale(scale):
    model = Forward(lambda s, x: scale * (s.a(x) - s.a(x).mean(0)), a=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="in company"):
        gradient_gram(model, CROSS_ENTROPY, points(4))


@pytest.mark.parametrize("measure", [gradient_gram, lambda *args: class_cosine(*args, args[2][1])])
def test_a_module_that_keeps_what_it_saw_can_be_copied_afterwards(measure):
    class Keeps(nn.Module):
        def forward(self, x):
            self.last = x * 2
            return x

    model = nn.Sequential(nn.Linear(4, 5), Keeps(), nn.LayerNorm(5), nn.Linear(5, 3))
    measure(model, CROSS_ENTROPY, points(4))
    assert not hasattr(model[1], "last")
    copy.deepcopy(model)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_embeddings_that_cannot_be_measured_are_refused(options):
    model = nn.Sequential(nn.EmbeddingBag(7, 3, **options))
    with pytest.raises(ValueError, match="embedding"):
        gradient_gram(model, CROSS_ENTROPY, (torch.randint(7, (N, 2)), torch.arange(N) % 3))


def test_the_precision_that_was_set_is_set_again():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    gradient_gram(nn.Linear(4, 3), CROSS_ENTROPY, points(4))
    after, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, before
    assert after == "tf32"


def test_an_output_that_holds_no_tensor_is_named():
    with pytest.raises(TypeError, match="no floating tensor"):
        gradient_gram(Forward(lambda s, x: {"a": 1}, a=nn.Linear(4, 3)), CROSS_ENTROPY, points(4))


def test_class_matrices_of_no_points():
    C = class_cosine(nn.Linear(4, 3), CROSS_ENTROPY, (torch.zeros(0, 4), torch.zeros(0).long()), [])
    assert C.shape == (0, 0)
