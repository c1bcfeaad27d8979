"""batch_norm against float64 truth, beside eager PyTorch, in every dtype, layout and fusion."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import assert_as_exact_as_eager

from batchnorm.functional import ACTIVATIONS, batch_norm, normalize_with

SHAPES = {
    "N C": (9, 5),
    "fewest samples": (2, 3),
    "batch of one with locations": (1, 3, 7),
    "N C L, nothing divides": (5, 3, 11),
    "N C H W": (4, 6, 5, 3),
    "one channel": (6, 1, 3, 3),
    "N C D H W": (2, 3, 2, 3, 5),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values lying differently in memory."""
    wider = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    strided = wider[..., ::2].copy_(x)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return {"contiguous": x, "strided": strided, "channels last": last}


def plain(x, weight, bias, eps, activation, residual, mask):
    """The definition in the dtype of ``x``, by torch's own functions; masked samples are picked by hand."""
    if mask is None:
        y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    else:
        rows = x.movedim(1, -1)[mask]
        y = torch.zeros_like(x.movedim(1, -1))
        y[mask] = F.batch_norm(rows, None, None, weight, bias, True, 0.0, eps)
        y = y.movedim(-1, 1)
    y = y if residual is None else y + residual
    y = y if activation is None else getattr(F, activation)(y)
    return y if mask is None else y * mask.unsqueeze(1)


def with_gradients(f, x, weight, bias, eps, activation, residual, mask, dy):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    extra = None if residual is None else residual.detach().requires_grad_()
    y = f(*leaves, eps, activation, extra, mask)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves), *([] if extra is None else [extra.grad])]


def ours(x, weight, bias, eps, activation, residual, mask):
    return batch_norm(x, weight, bias, eps=eps, activation=activation, residual=residual, mask=mask)[0]


def compare(x, *, activation=None, with_residual=False, with_mask=False, eps=1e-5):
    num_channels = x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = torch.rand(num_channels).to(wide) + 0.5, torch.randn(num_channels).to(wide)
    residual = torch.randn_like(x) if with_residual else None
    mask = None
    if with_mask:
        mask = torch.rand(x.shape[:1] + x.shape[2:]) > 0.3
        mask.view(-1)[:2] = True
    dy = torch.randn_like(x)
    arguments = (x, weight, bias, eps, activation, residual, mask, dy)
    got = with_gradients(ours, *arguments)
    eager = with_gradients(plain, *arguments)
    doubled = (t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments)
    truth = with_gradients(plain, *doubled)
    flat = x.double().movedim(1, 0).flatten(1)
    condition = (flat.mean(1).abs() / (flat.var(1, unbiased=False) + eps).sqrt()).max().item()
    # What is summed: y of three terms; ∂x of three that can cancel; ∂γ and ∂β over the batch.
    deviation = (flat.var(1, unbiased=False) + eps).sqrt().min().item()
    x_hat = (flat - flat.mean(1, keepdim=True)).abs().max().item() / deviation
    each = dy.abs().max().item() * 1.2  # the steepest activation
    sums = each * flat.shape[1] ** 0.5 * max(x_hat, 1.0)
    terms = {"y": 1.5 * x_hat, "dx": 1.5 * each * max(x_hat, 1.0) / deviation, "dweight": sums, "dbias": sums}
    for name, g, e, t in zip(("y", "dx", "dweight", "dbias", "dresidual"), got, eager, truth, strict=False):
        assert_as_exact_as_eager(g, e, t, condition=condition, name=name, terms=terms.get(name, each))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fusion", ["plain", "residual", "mask", "residual and mask"])
def test_as_exact_as_torch(shape, dtype, fusion):
    for x in layouts(torch.randn(shape, dtype=torch.float64).to(dtype)).values():
        compare(x, with_residual="residual" in fusion, with_mask="mask" in fusion, activation="relu")


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("fusion", ["plain", "residual", "mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_activation_is_as_exact_as_torch(activation, fusion, dtype):
    x = torch.randn(6, 4, 5, dtype=torch.float64).to(dtype)
    compare(x, activation=activation, with_residual=fusion == "residual", with_mask=fusion == "mask")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("with_mask", [False, True], ids=["whole", "masked"])
def test_a_mean_of_1e4_with_deviation_1(dtype, with_mask):
    for x in layouts((1e4 + torch.randn(16, 3, 20, dtype=torch.float64)).to(dtype)).values():
        compare(x, activation="sigmoid", with_mask=with_mask)


@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=5).filter(
        lambda s: s[0] * int(torch.tensor(s[2:]).prod()) > 1
    ),
    activation=st.sampled_from([None, *ACTIVATIONS]),
    fused=st.tuples(st.booleans(), st.booleans()),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, -5.0, 100.0]),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_scale_and_fusion(shape, activation, fused, scale, offset):
    x = (torch.randn(shape, dtype=torch.float64) * scale + offset * scale).float()
    compare(x, activation=activation, with_residual=fused[0], with_mask=fused[1])


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradcheck_and_gradgradcheck(activation, masked):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    inputs = (leaf(3, 2, 4), leaf(2), leaf(2), leaf(3, 2, 4))
    mask = torch.rand(3, 4) > 0.3 if masked else None

    def f(x, weight, bias, residual):
        return batch_norm(x, weight, bias, residual=residual, mask=mask, activation=activation)[0]

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_compiles_in_one_graph_with_the_same_numbers(activation, masked):
    mask = torch.rand(5, 4) > 0.3 if masked else None

    def f(x, weight, bias):
        y, moments = batch_norm(x, weight, bias, activation=activation, mask=mask, residual=x)
        return y, moments.mean, moments.unbiased()

    compiled = torch.compile(f, fullgraph=True)
    x, weight, bias = torch.randn(5, 3, 4), torch.rand(3), torch.randn(3)
    results = []
    for g in (f, compiled):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y, mean, var = g(*leaves)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        results.append([y.detach(), mean, var, *(t.grad for t in leaves)])
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-6)


def test_features_last_is_features_first_transposed():
    x, weight, bias = torch.randn(4, 7, 3), torch.rand(3), torch.randn(3)
    mask = torch.rand(4, 7) > 0.3
    options = {"activation": "tanh", "mask": mask}
    last, moments = batch_norm(x, weight, bias, channel_dim=-1, residual=x, **options)
    first, expected = batch_norm(x.mT, weight, bias, residual=x.mT, **options)
    torch.testing.assert_close(last, first.mT)
    torch.testing.assert_close(moments.var, expected.var)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_the_input_is_kept(memory_format):
    x = torch.randn(4, 6, 5, 3).contiguous(memory_format=memory_format)
    for mask in (None, torch.ones(4, 5, 3, dtype=torch.bool)):
        y, _ = batch_norm(x, activation="relu", mask=mask)
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_are_those_of_the_input_in_float32_or_wider(dtype):
    x = (torch.randn(8, 3, 9, dtype=torch.float64) * 2 + 5).to(dtype)
    _, moments = batch_norm(x)
    assert moments.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    flat = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(moments.mean.double(), flat.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.var.double(), flat.var(1, unbiased=False), rtol=1e-5, atol=0)
    assert moments.count == 72
    assert not moments.mean.requires_grad


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0), (0, 3, 2, 2)], ids=str)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(shape):
    x, weight = torch.empty(shape, requires_grad=True), torch.ones(3, requires_grad=True)
    y, moments = batch_norm(x, weight, activation="relu")
    y.sum().backward()
    assert y.shape == shape
    assert moments.count == 0
    assert x.grad.shape == shape
    assert weight.grad.tolist() == [0, 0, 0]


def test_autocast_keeps_the_dtype_that_the_layer_before_gives():
    x, matrix = torch.randn(8, 4), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = x @ matrix
        y, moments = batch_norm(u, torch.ones(3), torch.zeros(3), activation="silu")
    assert u.dtype == y.dtype == torch.bfloat16
    assert moments.var.dtype == torch.float32


def test_what_the_mask_hides_changes_nothing():
    x = torch.randn(4, 3, 6)
    mask = torch.tensor([6, 4, 2, 1])[:, None] > torch.arange(6)
    hostile = torch.where(mask[:, None], x, torch.nan)
    results = []
    for data in (x, hostile):
        leaf = data.clone().requires_grad_()
        y, _ = batch_norm(leaf, mask=mask, activation="gelu", residual=data)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (results[0][0].movedim(1, -1)[~mask] == 0).all()


def test_function_transforms_agree_with_a_loop():
    x, weight = torch.randn(3, 6, 4), torch.rand(4)
    together = torch.vmap(lambda one: batch_norm(one, weight, activation="relu")[0])(x)
    torch.testing.assert_close(
        together, torch.stack([batch_norm(one, weight, activation="relu")[0] for one in x])
    )
    jacobian = torch.func.jacrev(lambda one: batch_norm(one)[0])(x[0])
    torch.testing.assert_close(torch.func.jacfwd(lambda one: batch_norm(one)[0])(x[0]), jacobian)


def test_inference_with_given_statistics_by_hand():
    x = torch.randn(2, 5, 3)
    mean, var, weight, bias = torch.randn(3), torch.rand(3) + 0.1, torch.rand(3), torch.randn(3)
    mask = torch.rand(2, 5) > 0.5
    y = normalize_with(x, mean, var, weight, bias, eps=0.01, activation="relu", mask=mask, channel_dim=-1)
    by_hand = ((x - mean) / (var + 0.01).sqrt() * weight + bias).relu() * mask[..., None]
    torch.testing.assert_close(y, by_hand)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"x": torch.ones(4, 3, dtype=torch.int64)}, TypeError, r"torch.int64.*x.float\(\)"),
        ({"x": torch.ones(4, 3, dtype=torch.complex64)}, TypeError, "torch.complex64"),
        ({"x": torch.randn(3)}, ValueError, r"batch and a channel dimension, got shape \(3,\)"),
        ({"x": torch.randn(1, 3)}, ValueError, r"more than one value per channel.*\(1, 3\)"),
        ({"x": torch.randn(1, 3, 1, 1)}, ValueError, "more than one value per channel"),
        (
            {"weight": torch.ones(4)},
            ValueError,
            r"weight must have one entry per channel, \(3,\).*got \(4,\)",
        ),
        ({"bias": torch.ones(2)}, ValueError, "bias must have one entry"),
        ({"eps": -1e-5}, ValueError, "eps must not be negative, got -1e-05"),
        ({"activation": "swishy"}, ValueError, "unknown activation 'swishy'"),
        (
            {"residual": torch.randn(4, 1)},
            ValueError,
            r"residual must have the shape.*\(4, 3\), got \(4, 1\)",
        ),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask must have.*\(4,\).*got \(3,\)"),
        ({"mask": torch.ones(4)}, ValueError, "mask must be boolean"),
        ({"channel_dim": 2}, ValueError, "channel_dim must be 1 or -1"),
    ],
    ids=lambda v: "",
)
def test_bad_input_says_what_is_wrong(arguments, error, says):
    with pytest.raises(error, match=says):
        batch_norm(**{"x": torch.randn(4, 3), **arguments})
