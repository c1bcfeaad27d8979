"""The CPU's kernels against float64 truth: every dtype, layout and fusion, and awkward numbers."""

import pytest
import torch
from cpu_cases import doubled, inputs, judge, last, moments_of, run
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.kernels import cpu, cpu_plan, reference
from batchnorm.kernels.activations import TABLE

pytest.importorskip("numba", reason="the CPU's kernels need numba")

SHAPES = {
    "fewest samples": (2, 3),
    "rows, nothing divides": (67, 19),
    "one channel of features": (37, 1),
    "runs shorter than a vector": (5, 3, 7),
    "runs of 49": (6, 5, 7, 7),
    "one image, one channel": (1, 1, 33),
    "longer than a chunk": (2, 2, 4103),
    "3-d": (2, 3, 2, 3, 5),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
FUSIONS = {
    "plain": {},
    "residual": {"residual": True},
    "mask": {"mask": True},
    "both": {"residual": True, "mask": True},
}
LAYOUTS = {"contiguous": lambda t: t, "channels last": last}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_layouts(shape, layout, dtype):
    judge(inputs(shape, dtype, layout=layout))


@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by", ["batch", "given statistics"])
def test_fusions(fusion, layout, dtype, by):
    for shape in ((5, 6, 23), (3, 70, 4, 5)):
        arguments = inputs(shape, dtype, layout=layout, **fusion)
        judge(arguments, given=moments_of(arguments[0]) if by == "given statistics" else None)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", sorted(set(TABLE) - {"relu"}))
def test_every_activation(activation, residual, layout):
    # Each layout once with and once without a residual would compile twice as much for nothing new.
    if (layout is last) == residual:
        judge(inputs((6, 5, 21), layout=layout, residual=residual), activation=activation)


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_not_affine_and_identity_with_a_residual(layout, mask):
    judge(inputs((4, 3, 9), affine=False, residual=True, mask=mask, layout=layout), activation="identity")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "shape", [(6, 3, 95, 97), (5, 32, 41, 43), (1, 1, 70001), (700, 101), (3, 24, 1000)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_same_bits_again_and_the_truth_with_any_number_of_threads(shape, layout, threads):
    torch.set_num_threads(threads)
    arguments = inputs(shape, layout=layout, offset=3.0)
    first = judge(arguments)
    again, _ = run(cpu, *arguments)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_masks_and_given_statistics_with_threads(layout, threads):
    torch.set_num_threads(threads)
    judge(inputs((7, 3, 61, 53), layout=layout, mask=True, residual=True))
    arguments = inputs((7, 3, 61, 53), layout=layout)
    judge(arguments, given=moments_of(arguments[0]))


# Numbers that are awkward.


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_a_mean_of_1e4_with_deviation_1(layout, dtype, mask):
    # Not relu: the mean's own rounding moves z by 1e-3, to the other side of zero for some.
    judge(inputs((16, 3, 500), dtype, offset=1e4, mask=mask, layout=layout), activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_variance_is_exact_to_roundings_where_the_mean_is_1e4_deviations(layout):
    # E[x²] − E[x]² in float32 would be off by 10 here, in any order of summation.
    x = layout((1e4 + torch.randn(16, 4, 700, dtype=torch.float64)).float())
    _, moments = cpu.forward(x, None, None, None, None, 1e-5, "relu")
    flat = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(moments.var.double(), flat.var(1, unbiased=False), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.mean.double(), flat.mean(1), rtol=6e-8, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_mean_that_drifts_between_chunks_and_a_first_value_far_off(layout):
    # The centre that deviations are taken from is wrong at first, and again in every chunk.
    steps = torch.arange(12, dtype=torch.float64)[:, None, None] * 300
    x = torch.randn(12, 3, 1500, dtype=torch.float64) + steps
    x[0, :, 0] = -1e6
    x = layout(x.float())
    _, moments = cpu.forward(x, None, None, None, None, 1e-5, "relu")
    flat = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(moments.var.double(), flat.var(1, unbiased=False), rtol=2e-6, atol=0)
    within = layout((torch.randn(12, 3, 1500, dtype=torch.float64) + 5e5).float())
    within[0, :, 0] = 0.0
    mask = torch.ones(12, 1500, dtype=torch.bool)
    mask[0, 0] = False
    _, moments = cpu.forward(within, None, None, None, mask, 1e-5, "relu")
    shown = within.double().movedim(1, -1)[mask]
    torch.testing.assert_close(moments.var.double(), shown.var(0, unbiased=False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678])
def test_a_constant_channel_has_variance_zero_exactly(layout, value):
    x = layout(torch.full((5, 3, 1111), value))
    y, moments = cpu.forward(x, None, torch.ones(3), None, None, 1e-5, "relu")
    assert moments.var.tolist() == [0.0] * 3
    assert moments.mean.tolist() == x[0, :, 0].tolist()
    assert (y == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_the_mask_hides_may_be_nan(layout):
    x, dy, gamma, beta, residual, mask = inputs((5, 3, 40), mask=True, residual=True, layout=layout)
    mask[2] = False
    clean, count = run(cpu, x, dy, gamma, beta, residual, mask, activation="silu")
    hide = mask.unsqueeze(1)
    hostile = [torch.where(hide, t, torch.nan) for t in (x, dy, residual)]
    dirty, _ = run(cpu, hostile[0], hostile[1], gamma, beta, hostile[2], mask, activation="silu")
    assert count == mask.sum()
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
    for name in ("y", "dx", "dresidual"):
        assert (torch.where(hide, 0, clean[name]) == 0).all()


def test_a_mask_that_shows_nothing_gives_zeros():
    for layout in LAYOUTS.values():
        x, dy, *_ = inputs((4, 3, 6), layout=layout)
        found, count = run(cpu, x, dy, None, None, None, torch.zeros(4, 6, dtype=torch.bool))
        assert count == 0
        assert all((value == 0).all() for value in found.values())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_channel_that_is_not_finite_shows_it_and_leaves_the_others_alone(layout, bad):
    x = layout(torch.randn(4, 3, 30))
    x[2, 1, 7] = bad
    y, moments = cpu.forward(x, None, None, None, None, 1e-5, "relu")
    assert not (moments.mean[1].isfinite() and moments.var[1].isfinite())
    assert y[:, 1].isnan().any()
    assert y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_relus_mask_comes_from_the_value_before_it_is_rounded(layout, dtype):
    # Two samples, ±1: z = ±1/sqrt(1 + eps) + β is far smaller than a rounding of its two terms.
    x = layout(torch.tensor([[[1.0], [1.0]], [[-1.0], [-1.0]]]).to(dtype))
    near = 1 / (1 + 1e-5) ** 0.5
    beta = torch.tensor([-near + 1e-6, -near - 1e-6])
    y, moments = cpu.forward(x, None, beta, None, None, 1e-5, "relu")
    dy = layout(torch.ones_like(x))
    _, _, dbeta, _ = cpu.backward(dy, x, None, None, beta, None, None, moments, 1e-5, "relu")
    assert (y[0].flatten() > 0).tolist() == [True, False]
    assert dbeta.tolist() == [1.0, 0.0]


def test_bfloat16_is_rounded_to_nearest_with_ties_to_even_as_torch_does():
    # eps and the given statistics make y = x + β exactly, in float32; every tie occurs.
    bits = torch.arange(0, 65536, 7, dtype=torch.int32).to(torch.uint16)
    x = bits.view(torch.bfloat16)
    x = x[x.float().abs() < 1e30].reshape(-1, 1)
    for beta in (0.0, 2.0**-8, 3 * 2.0**-9, 1.0, -1.0):
        shift = torch.tensor([beta])
        y = cpu.apply(x, torch.zeros(1), torch.ones(1), None, shift, None, None, 0.0, "identity")
        assert torch.equal(y, (x.float() + shift).bfloat16())
    nan = cpu.apply(
        torch.full((3, 1), torch.nan).bfloat16(), *(torch.ones(1),) * 2, *(None,) * 4, 0.0, "identity"
    )
    assert nan.isnan().all()


def test_bfloat16_keeps_a_nan_of_any_bits():
    # Rounded up as numbers are, the last two would be zeros.
    shift = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    x, one = torch.ones(4, 3).bfloat16(), torch.ones(3)
    assert cpu.apply(x, one, one, None, shift, None, None, 0.0, "identity").isnan().all()


@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bfloat16_is_rounded_where_it_is_stored_and_nowhere_before(layout, fusion):
    # Eager PyTorch, by which the judge measures, rounds between normalizing, adding and activating.
    arguments = inputs((7, 3, 41), torch.bfloat16, layout=layout, **fusion)
    truth, _ = run(reference, *map(doubled, arguments), activation="silu")
    found, _ = run(cpu, *arguments, activation="silu")
    if "residual" in fusion:
        del truth["dx"]  # made of the stored ∂residual, so rounded twice
    for name, value in truth.items():
        rtol = 2**-8 if found[name].dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found[name].double(), value, rtol=rtol, atol=1e-4, msg=name)


# Layouts that no kernel knows, and odd companions.


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.transpose(2, 3),
        lambda t: t.flip(0).as_strided(t.shape, t.stride()),
        lambda t: t.repeat_interleave(2, 3)[..., ::2],
        lambda t: t[:, :, :1].expand(t.shape),
        lambda t: t.permute(3, 1, 2, 0),
        lambda t: t[..., :1, :1],
        lambda t: last(t)[..., :1, :1],
    ],
    ids=[
        "transposed",
        "with a stride",
        "every second",
        "expanded",
        "permuted",
        "cut to 1x1",
        "cut to 1x1, last",
    ],
)
def test_strided_tensors(change):
    x, _, gamma, beta, residual, _ = inputs((5, 6, 8, 7), residual=True)
    x, residual = change(x), change(residual)
    found = judge((x, torch.randn(x.shape), gamma, beta, residual, None))
    assert found["y"].stride() == torch.empty_like(x).stride() == found["dx"].stride()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_companions_that_lie_otherwise_or_have_another_dtype(layout):
    x, dy, gamma, beta, residual, mask = inputs((5, 6, 8), residual=True, mask=True, layout=layout)
    expected, _ = run(cpu, x, dy, gamma, beta, residual, mask)
    other = (last if layout is not last else torch.Tensor.contiguous)(dy)
    strided = torch.stack([gamma, gamma], 1)[:, 0]
    masked = mask.t().contiguous().t()
    found, _ = run(cpu, x, other, strided, beta.double(), last(residual), masked)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    ones, _ = run(cpu, x, torch.ones(()).expand(x.shape), gamma, beta, None, None)
    same, _ = run(cpu, x, torch.ones_like(x), gamma, beta, None, None)
    assert torch.equal(ones["dx"], same["dx"])


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).filter(lambda s: torch.Size(s).numel() > s[1]),
    layout=st.sampled_from(list(LAYOUTS.values())),
    fused=st.tuples(st.booleans(), st.booleans()),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, -5.0, 300.0]),
)
@settings(max_examples=120, deadline=None)
def test_any_shape(shape, layout, fused, scale, offset):
    x, *others = inputs(tuple(shape), residual=fused[0], mask=fused[1], layout=layout, offset=offset)
    judge((x * scale, *others))


def test_plans_know_which_tensors_are_dense():
    def room(x):
        found = cpu_plan._layout(x.shape, x.stride())
        return found and found[0]

    assert room(torch.empty(2, 3, 4, 5)) == "planes"
    assert room(last(torch.empty(2, 3, 4, 5))) == "rows"
    assert room(torch.empty(2, 3)) == room(torch.empty(2, 3, 1, 1)) == "rows"
    assert room(torch.empty(9, 1)) == "planes"
    assert room(torch.empty(2, 3, 4, 5).transpose(2, 3)) is None
    assert room(torch.empty(4, 3, 6)[::2]) is None


def test_moments_move_statistics_as_the_formula_says():
    mean, var = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
    for momentum, share in ((0.1, 0.1), (None, 1 / 8), (1.0, 1.0), (0.0, 0.0)):
        running_mean, running_var, tracked = (
            torch.tensor([3.0, 3.0]),
            torch.tensor([2.0, 2.0]),
            torch.tensor(7),
        )
        before = running_mean._version
        cpu.move(running_mean, running_var, tracked, mean, var, 5, momentum)
        torch.testing.assert_close(running_mean, torch.tensor([3.0, 3.0]).lerp(mean, share))
        torch.testing.assert_close(running_var, torch.tensor([2.0, 2.0]).lerp(var * 5 / 4, share))
        assert tracked == 8
        assert running_mean._version > before
        if momentum == 1.0:
            assert torch.equal(running_mean, mean)
    inverted = (var.double() + 1e-3).rsqrt().float()
    cpu.move(running_mean, running_var, tracked, mean, inverted, 5, 1.0, inverted_with=1e-3)
    torch.testing.assert_close(running_var, var * 5 / 4, rtol=1e-6, atol=0)


def test_reference_and_kernel_agree_on_the_whole_contract():
    arguments = inputs((4, 3, 6), torch.float64, residual=True, mask=True)
    for activation in ("relu", "identity"):
        for by in (None, moments_of(arguments[0])):
            mine, _ = run(cpu, *arguments, activation=activation, given=by)
            truth, _ = run(reference, *arguments, activation=activation, given=by)
            assert mine.keys() == truth.keys()
            for name, value in truth.items():
                torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-13, msg=name)


@pytest.fixture
def plans(monkeypatch):
    """Plans made anew, under whatever a test changes, and forgotten afterwards."""
    monkeypatch.setattr(cpu_plan, "_GRAIN", 8)
    cpu_plan.plan.cache_clear()
    yield monkeypatch
    cpu_plan.plan.cache_clear()


@pytest.mark.parametrize("shape", [(6, 8, 5, 7), (5, 3, 4), (6, 8), (1, 4, 9, 9), (6, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_slice_of_a_concatenations_gradient_is_read_where_it_is(shape, layout, threads, plans):
    torch.set_num_threads(threads)
    dy = layout(torch.randn(shape[0], shape[1] + 5, *shape[2:]))[:, 2 : 2 + shape[1]]
    x = layout(torch.randn(shape))
    assert cpu_plan.pitch(x.shape, x.stride(), dy.stride()) is not None
    for statistics in (None, moments_of(x)):
        arguments = (None, None, None, None, 1e-5, "relu", statistics)
        got, _ = run(cpu, x, dy, *arguments)
        expected, _ = run(cpu, x, dy.clone(), *arguments)
        assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_slice_of_a_concatenations_gradient_beside_a_residual_and_a_mask(layout, fusion):
    x, _, *others = inputs((5, 6, 3, 7), layout=layout, **fusion)
    dy = layout(torch.randn(5, 11, 3, 7))[:, 2:8]
    assert cpu_plan.pitch(x.shape, x.stride(), dy.stride()) is not None
    judge((x, dy, *others))


def test_gradients_that_lie_otherwise_are_copied():
    x = torch.randn(6, 8, 5, 7)
    lying = {
        "expanded": torch.ones(()).expand(6, 8, 5, 7),
        "channels last": last(torch.randn(6, 8, 5, 7)),
        "transposed": torch.randn(6, 8, 7, 5).mT,
        "every second": torch.randn(6, 8, 5, 14)[..., ::2],
        "broadcast over the batch": torch.randn(1, 8, 5, 7).expand(6, 8, 5, 7),
    }
    for images in (x, last(x)):
        for name, dy in lying.items():
            got, _ = run(cpu, images, dy, None, None, None, None)
            expected, _ = run(cpu, images, dy.contiguous(), None, None, None, None)
            assert all(torch.equal(got[k], expected[k]) for k in got), name


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 1, 4128), (3, 16), (3, 2064, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=FUSIONS)
def test_results_written_past_the_caches_are_the_same_bits(shape, layout, fusion, threads, plans):
    torch.set_num_threads(threads)
    plans.setattr(cpu, "is_kept", lambda: True)
    arguments = inputs(shape, layout=layout, **fusion)
    for statistics in (None, moments_of(arguments[0])):
        found = []
        for cache in (2**40, 0):
            plans.setattr(cpu_plan, "_cache_bytes", lambda cache=cache: cache)
            cpu_plan.plan.cache_clear()
            found.append(run(cpu, *arguments, given=statistics)[0])
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_only_whole_lines_beyond_the_cache_are_written_past_it(plans):
    plans.setattr(cpu_plan, "_cache_bytes", lambda: 2**20)

    def streams(*shape, dtype=torch.float32):
        x = torch.empty(shape)
        return cpu_plan.plan("forward", x.shape, x.stride(), dtype, "relu", False, False, 1).streams

    assert streams(32, 64, 16, 16)
    assert not streams(32, 64, 15, 15)
    assert not streams(2, 64, 16, 16)
    assert not streams(64, 64, 4, 4, dtype=torch.bfloat16)
