"""The Triton kernels on what is rare: drawn shapes, 64-bit offsets, NaN, constants, odd gradients."""

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import DEVICE, INTERPRETED, compare, layouts, need_device, small_tiles, transform
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchnorm.kernels import gpu, gpu_plan
from batchnorm.kernels.activations import TABLE

need_device()
PLAIN = (None, None, None, None, 1e-5, "identity")


@pytest.fixture
def splits(monkeypatch):
    small_tiles(monkeypatch)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4).filter(
        lambda s: s[0] * int(torch.tensor(s[2:]).prod()) > 1
    ),
    layout=st.sampled_from(["contiguous", "channels last", "strided"]),
    activation=st.sampled_from(sorted(TABLE)),
    fused=st.tuples(st.booleans(), st.booleans()),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, -5.0, 100.0]),
    training=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_layout_scale_and_fusion(splits, shape, layout, activation, fused, scale, offset, training):
    x = layouts(draw(*shape) * scale + offset * scale)[layout]
    with_residual, with_mask = fused
    fusion = {"with_residual": with_residual, "with_mask": with_mask}
    compare(x, activation=activation, given=not training, **fusion)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_64_bit_offsets_change_nothing(layout, splits, monkeypatch):
    x, mask = layouts(draw(5, 3, 13))[layout], torch.rand(5, 13, device=DEVICE) > 0.3
    dy = draw(5, 3, 13)

    def run():
        y, moments = gpu.forward(x, None, None, x, mask, 1e-5, "gelu")
        return y, *gpu.backward(dy, x, None, None, None, x, mask, moments, 1e-5, "gelu")

    narrow = run()
    monkeypatch.setattr(gpu_plan, "INT32_VALUES", 1)
    for n, w in zip(narrow, run(), strict=True):
        assert n.equal(w)


@pytest.mark.skipif(INTERPRETED, reason="more memory and time than the interpreter has")
@pytest.mark.parametrize("shape", [(2**31 // (64 * 4096) + 3, 64, 4096), (2**31 + 5, 1)], ids=str)
def test_more_than_2_to_the_31_values(shape):
    x = torch.zeros(shape, dtype=torch.float16, device=DEVICE)
    x[-1] = 1
    y, moments = gpu.forward(x, *PLAIN)
    expected = 1 / shape[0]
    torch.testing.assert_close(moments.mean, torch.full_like(moments.mean, expected), rtol=1e-4, atol=0)
    last, first = ((v - expected) / (expected * (1 - expected) + 1e-5) ** 0.5 for v in (1, 0))
    torch.testing.assert_close(y[-1], torch.full_like(y[-1], last), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(y[0], torch.full_like(y[0], first), rtol=1e-2, atol=1e-3)


def test_repeats_bit_for_bit(splits):
    x, dy = draw(7, 2, 21), draw(7, 2, 21)

    def run():
        y, moments = gpu.forward(x, None, None, None, None, 1e-5, "silu")
        gradients = gpu.backward(dy, x, None, None, None, None, None, moments, 1e-5, "silu")
        return y, moments.mean, moments.var, *gradients[:3]

    for once, again in zip(run(), run(), strict=True):
        assert once.equal(again)


@pytest.mark.parametrize("num_samples", [7, 13, 211])
@pytest.mark.parametrize("size", [0.1, 1e4, 1e7], ids=str)
def test_the_mean_of_a_constant_is_exact_and_its_variance_nothing(size, num_samples, splits):
    # A sum divided by its count is not: the correction of the second pass makes it so.
    for constants in draw(3, 4) * size:
        y, moments = gpu.forward(constants.expand(num_samples, 4).contiguous(), *PLAIN)
        assert moments.mean.equal(constants)
        assert (moments.var >= 0).all()
        assert (moments.var <= (1e-12 * constants) ** 2).all()
        assert (y.abs() <= 1e-12 * constants.abs() / 1e-5**0.5).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_stays_in_its_channel_and_shows_in_its_moments(bad, splits):
    x = draw(9, 3, 29)
    clean, _ = gpu.forward(x, *PLAIN)
    x[4, 1, 5] = bad
    y, moments = gpu.forward(x, None, None, None, None, 1e-5, "relu")
    assert y[:, 1].isnan().all()
    assert not moments.mean[1].isfinite()
    assert not moments.var[1].isfinite()
    assert y[:, ::2].equal(clean[:, ::2].relu())


def test_splits_of_different_size_and_position_are_weighted_by_their_samples(splits):
    # Each third of the batch lies elsewhere; unweighted merging would miss the mean and the variance.
    x = torch.cat([draw(40, 2), draw(3, 2) + 100, draw(24, 2) - 30])
    _, moments = gpu.forward(x, *PLAIN)
    torch.testing.assert_close(moments.mean, x.double().mean(0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.var, x.double().var(0, unbiased=False).float(), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_what_a_mask_hides_is_zero_even_in_a_channel_that_is_not_finite(splits):
    x, residual, mask = draw(9, 3, 29), draw(9, 3, 29), torch.rand(9, 29, device=DEVICE) > 0.3
    mask[0, 0] = True
    x[0, 1, 0] = torch.nan
    y, moments = gpu.forward(x, None, None, residual, mask, 1e-5, "silu")
    dx, _, _, dz = gpu.backward(x, x, None, None, None, residual, mask, moments, 1e-5, "silu")
    hidden = ~mask.unsqueeze(1).expand_as(x)
    for t in (y, dx, dz):
        assert (t[hidden] == 0).all()


def test_a_mask_that_hides_everything(splits):
    x, mask = draw(9, 3, 29), torch.zeros(9, 29, dtype=torch.bool, device=DEVICE)
    y, moments = gpu.forward(x, None, None, x, mask, 1e-5, "sigmoid")
    gradients = gpu.backward(x, x, None, None, None, x, mask, moments, 1e-5, "sigmoid")
    for t in (y, moments.mean, moments.var, moments.count, *gradients):
        assert (t == 0).all()


def test_expanded_gradient_and_strided_vectors():
    x, dy = draw(6, 3, 5), draw(1).expand(6, 3, 5)
    gamma, beta = draw(3, 2).abs()[:, 0] + 0.5, draw(1).expand(3)
    _, moments = gpu.forward(x, gamma, beta, None, None, 1e-5, "silu")
    got = gpu.backward(dy, x, None, gamma, beta, None, None, moments, 1e-5, "silu")
    leaves = [t.double().requires_grad_() for t in (x, gamma, beta)]
    F.silu(F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.0, 1e-5)).backward(dy.double())
    for g, leaf in zip(got[:3], leaves, strict=True):
        torch.testing.assert_close(g.double(), leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_half_vectors_and_a_residual_wider_than_the_input(activation):
    x, residual, dy = draw(6, 3, 5).bfloat16(), draw(6, 3, 5), draw(6, 3, 5).bfloat16()
    gamma, beta = draw(3).abs().bfloat16(), draw(3).bfloat16()
    y, moments = gpu.forward(x, gamma, beta, residual, None, 1e-5, activation)
    expected = transform(x, moments, gamma, beta, residual, None, 1e-5, activation)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    dx, dgamma, dbeta, dz = gpu.backward(dy, x, y, gamma, beta, None, None, moments, 1e-5, activation)
    assert (dx.dtype, dz.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (dgamma.dtype, dbeta.dtype) == (torch.float32, torch.float32)
    shown = dy if activation == "identity" else torch.where(y > 0, dy, 0)
    assert dz.equal(shown)


def test_a_dense_layout_of_another_order_is_kept():
    # Channels outermost: neither contiguous nor channels-last; compare() checks the strides of results.
    compare(draw(3, 6, 5).transpose(0, 1), activation="silu", with_residual=True)
    compare(draw(3, 6).T, given=True)


def test_inputs_are_left_as_they_were(splits):
    x, residual, dy = draw(9, 3, 29), draw(9, 3, 29), draw(9, 3, 29)
    before = [t.clone() for t in (x, residual, dy)]
    _, moments = gpu.forward(x, None, None, residual, None, 1e-5, "silu")
    gpu.backward(dy, x, None, None, None, residual, None, moments, 1e-5, "silu")
    for t, b in zip((x, residual, dy), before, strict=True):
        assert t.equal(b)


def test_refusals_name_the_reason():
    x = draw(6, 3)
    assert gpu.refuses(x, None, None, None, None, "relu") == ""
    assert gpu.refuses(x, None, None, None, None, "swish") == "it has no activation 'swish'"
    assert gpu.refuses(x.to(torch.float8_e5m2), None, None, None, None, "relu") == (
        "it has no kernel for torch.float8_e5m2"
    )
    assert "empty" in gpu.refuses(x[:0], None, None, None, None, "relu")
    elsewhere = torch.ones(3, device="meta")
    assert "weight on meta" in gpu.refuses(x, elsewhere, None, None, None, "relu")
