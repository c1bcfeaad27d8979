"""Which kernel runs, and what is said about it."""

import logging
import threading
import warnings

import pytest
import torch
from cpu_cases import last

import batchnorm as bn
from batchnorm.functional import batch_norm, normalize_with
from batchnorm.kernels import cpu, dispatch, native, reference

pytest.importorskip("numba", reason="the CPU's kernels need numba")


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that run, in order."""
    seen = []

    def spied(name, kernel):
        original = kernel.forward

        def forward(*arguments):
            seen.append(name)
            return original(*arguments)

        monkeypatch.setattr(kernel, "forward", forward)

    for name, kernel in (("cpu", cpu), ("torch", native), ("reference", reference)):
        spied(name, kernel)
    return seen


def big(dtype=torch.float32):
    return torch.randn(8, 4, 40, 40, dtype=torch.float64).to(dtype)


def test_the_kernel_asked_for_runs_and_all_agree(calls):
    x, mask = big().requires_grad_(), None
    results = {}
    for name in ("reference", "torch", "cpu", "auto"):
        with bn.kernels.use(name):
            y, _ = batch_norm(x, activation="silu", mask=mask, residual=x)
        results[name] = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view_as(y))[0]
    assert calls == ["reference", "torch", "cpu", "cpu"]
    for name, found in results.items():
        torch.testing.assert_close(found, results["reference"], rtol=1e-4, atol=1e-5, msg=name)


def test_contexts_nest_and_end_with_errors(calls):
    with bn.kernels.use("reference"):
        with pytest.raises(RuntimeError), bn.kernels.use("torch"):
            raise RuntimeError
        batch_norm(big())
        with bn.kernels.use("auto"):
            batch_norm(big())
    batch_norm(big())
    assert calls == ["reference", "cpu", "cpu"]


def test_a_choice_holds_for_its_own_thread(calls):
    with bn.kernels.use("reference"):
        thread = threading.Thread(target=lambda: batch_norm(big()))
        thread.start()
        thread.join()
    assert calls == ["cpu"]


def test_backward_is_the_same_kernels_wherever_it_runs(monkeypatch):
    x = big().requires_grad_()
    with bn.kernels.use("cpu"):
        y, _ = batch_norm(x)
    ran = []
    original = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *a: ran.append(1) or original(*a))
    with bn.kernels.use("reference"):
        y.backward(torch.ones_like(y))
    assert ran == [1]


@pytest.mark.parametrize(
    ("name", "x", "mask", "says"),
    [
        ("cpu", big(torch.float16), None, r"'cpu' was asked for and cannot run: .*torch.float16.*'auto'"),
        ("torch", big(), torch.ones(8, 40, 40, dtype=torch.bool), "'torch' was asked for.*no mask"),
        ("gpu", big(), None, "'gpu' was asked for.*input is on cpu"),
    ],
    ids=["half precision on the CPU", "a mask for torch", "no GPU"],
)
def test_a_kernel_that_cannot_run_says_why(name, x, mask, says, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with bn.kernels.use(name), pytest.raises(ValueError, match=says):
        batch_norm(x, mask=mask)
    mean, var = torch.zeros(4), torch.ones(4)
    with bn.kernels.use(name), pytest.raises(ValueError, match=says):
        normalize_with(x, mean, var, mask=mask)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="unknown kernel 'cuda': use one of 'reference', 'torch', 'cpu'"):
        with bn.kernels.use("cuda"):
            pass


def test_a_fallback_is_logged_once(calls, caplog):
    dispatch._say.cache_clear()
    with caplog.at_level(logging.INFO, "batchnorm"):
        for _ in range(3):
            y, _ = batch_norm(big(torch.float16))
        batch_norm(big(torch.float16), mask=torch.ones(8, 40, 40, dtype=torch.bool))
    assert calls == ["torch"] * 3 + ["reference"]
    (record,) = caplog.records
    assert "the input is torch.float16" in record.message
    assert y.dtype == torch.float16


@pytest.mark.parametrize("layout", [lambda t: t, last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", ["reference", "torch", "cpu"])
def test_given_statistics_by_every_kernel(name, activation, masked, layout):
    if name == "torch" and masked:
        pytest.skip("PyTorch's own kernel has no mask")
    x, residual = layout(torch.randn(5, 3, 7)).requires_grad_(), layout(torch.randn(5, 3, 7)).requires_grad_()
    weight, bias = torch.rand(3, requires_grad=True), torch.randn(3, requires_grad=True)
    mean, var, mask = torch.randn(3), torch.rand(3) + 0.2, torch.rand(5, 7) > 0.4 if masked else None
    leaves = (x, weight, bias, residual)

    def by_hand(x, weight, bias, residual):
        z = (x - mean[:, None]) / (var[:, None] + 0.01).sqrt() * weight[:, None] + bias[:, None] + residual
        y = z if activation is None else getattr(torch.nn.functional, activation)(z)
        return y if mask is None else torch.where(mask[:, None], y, 0)

    dy = torch.randn(5, 3, 7)
    expected = torch.autograd.grad(by_hand(*leaves), leaves, dy)
    with bn.kernels.use(name):
        options = {"eps": 0.01, "activation": activation, "residual": residual, "mask": mask}
        y = normalize_with(x, mean, var, weight, bias, **options)
    torch.testing.assert_close(y, by_hand(*leaves))
    for found, wanted in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_second_derivatives_by_the_cpus_kernel(activation):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    inputs = (leaf(3, 2, 4), leaf(2), leaf(2), leaf(3, 2, 4))
    mean, var = torch.randn(2).double(), torch.rand(2).double() + 0.5

    def trained(x, weight, bias, residual):
        return batch_norm(x, weight, bias, residual=residual, activation=activation)[0]

    def given(x, weight, bias, residual):
        return normalize_with(x, mean, var, weight, bias, residual=residual, activation=activation)

    with bn.kernels.use("cpu"):
        for f in (trained, given):
            assert torch.autograd.gradcheck(f, inputs)
            assert torch.autograd.gradgradcheck(f, inputs)


# Where kernels that read memory by address must not run.


def test_fake_tensors_dispatch_modes_tracing_and_forward_derivatives_see_operations(calls):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    with FakeTensorMode():
        y, _ = batch_norm(torch.empty(8, 4, 40, 40), activation="relu")
        assert y.shape == (8, 4, 40, 40)
        assert batch_norm(torch.empty(8, 4), mask=torch.ones(8, dtype=torch.bool))[0].shape == (8, 4)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    with Watch():
        batch_norm(big())
    assert any("batch_norm" in name for name in names)

    layer, x = bn.BatchNorm2d(4).eval(), big()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that tracing is deprecated, and that shapes are constants of a trace
        traced = torch.jit.trace(layer, (x,))
    other = big()
    torch.testing.assert_close(traced(other), layer(other))

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.double(), torch.ones_like(x).double())
        tangent = torch.autograd.forward_ad.unpack_dual(batch_norm(dual)[0]).tangent
    assert tangent.abs().max() < 1e-9
    assert "cpu" not in calls


def test_meta_tensors_and_a_default_device_elsewhere(calls):
    y, _ = batch_norm(torch.empty(8, 4, 40, 40, device="meta"), activation="relu")
    assert y.device.type == "meta"
    x = big()
    with torch.device("meta"):
        y, moments = batch_norm(x)
    assert y.device.type == moments.mean.device.type == "cpu"
    assert calls == ["torch", "cpu"]


def test_a_lazily_negated_view_is_read_as_it_shows():
    x = torch.complex(big(), big()).conj().imag
    assert x.is_neg()
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    y, _ = batch_norm(x, weight)
    torch.testing.assert_close(y, batch_norm(x.resolve_neg().clone(), weight)[0])


def test_inference_mode_and_no_gradients():
    layer, plain, x = bn.BatchNorm2d(4, activation="relu"), torch.nn.BatchNorm2d(4), big()
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            torch.testing.assert_close(layer(x), plain(x).relu())
    torch.testing.assert_close(layer.running_var, plain.running_var)
    x.requires_grad_()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None


def test_only_what_backward_needs_is_kept():
    kept = []

    def pack(t):
        kept.append(t.data_ptr())
        return t

    x, residual = big().requires_grad_(), big().requires_grad_()
    for activation, holds_y, holds_residual in ((None, 0, 0), ("relu", 1, 0), ("gelu", 0, 1)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), bn.kernels.use("cpu"):
            y, _ = batch_norm(x, residual=residual, activation=activation)
        assert (y.data_ptr() in kept) == bool(holds_y)
        assert (residual.data_ptr() in kept) == bool(holds_residual)


def test_an_output_changed_in_place_is_noticed_where_it_is_needed():
    x, residual = big().requires_grad_(), big()
    y, _ = batch_norm(x, activation="relu", residual=residual)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y, _ = batch_norm(x, activation="relu")
    y.add_(1).sum().backward()


def test_compiled_code_has_no_break_and_the_same_numbers():
    layer = bn.BatchNorm2d(4, activation="relu")
    plain = torch.nn.BatchNorm2d(4)
    x = big().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True)
    for x in (big().requires_grad_(), last(big()).requires_grad_()):
        expected = torch.relu(plain(x))
        y = compiled(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        (mine,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view_as(y))
        (theirs,) = torch.autograd.grad(expected, x, torch.linspace(-1, 1, y.numel()).view_as(y))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_statistics_may_move_between_a_forward_by_them_and_its_backward(name):
    layer, x = bn.BatchNorm2d(4, activation="relu"), big().requires_grad_()
    with bn.kernels.use(name):
        (expected,) = torch.autograd.grad(layer.eval()(x).sum(), x)
        y = layer(x)
        layer.train()(big())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


def test_compiled_training_runs_the_cpus_kernel(calls):
    layer = bn.BatchNorm2d(4, activation="relu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(big().requires_grad_()).sum().backward()
    assert calls == ["cpu"]


def test_compiled_lanes():
    x, weight = torch.randn(3, 8, 4, 6), torch.rand(3, 4) + 0.5

    def one(x, weight):
        return batch_norm(x, weight, activation="relu")[0]

    compiled = torch.compile(torch.vmap(one), backend="aot_eager")
    expected = torch.stack([one(*lane) for lane in zip(x, weight, strict=True)])
    torch.testing.assert_close(compiled(x, weight), expected)


def test_exported_training_is_pytorchs_operations():
    class Net(torch.nn.Module):
        def forward(self, x):
            return batch_norm(x, activation="relu")[0]

    program = torch.export.export(Net(), (big(),))
    assert not any("batchnorm" in str(node.target) for node in program.graph.nodes)
    x = big()
    torch.testing.assert_close(program.module()(x), Net()(x))


def test_what_pytorchs_kernel_does_faster_is_left_to_it(calls, caplog):
    x = torch.randn(32, 2048, 7, 7, dtype=torch.bfloat16)
    dispatch._say.cache_clear()
    with caplog.at_level(logging.INFO, "batchnorm"):
        batch_norm(x, residual=x, activation="relu")
    assert "short runs" in caplog.text
    batch_norm(x, activation="relu")
    batch_norm(last(x), residual=last(x), activation="relu")
    assert calls == ["torch", "cpu", "cpu"]
