"""Gradients, weights, updates and running statistics: the right numbers, and a training that cannot tell."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from batchnorm.diagnostics import watch
from batchnorm.layers import BatchNorm1d, BatchNormPerActivation


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(8, 3),
    )


def batches(num: int) -> Tensor:
    return torch.randn(num, 20, 6, generator=torch.Generator().manual_seed(4)) * 2 + 1


def rms(values: Tensor) -> float:
    return values.detach().double().square().mean().sqrt().item()


def loss_of(y: Tensor) -> Tensor:
    """Random cotangents: the mean of a batch-normalized tensor has gradient zero."""
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(7))).sum()


def gradients_at(module: nn.Module) -> list[Tensor]:
    """Filled with what reaches the module's outputs."""
    found: list[Tensor] = []

    def hook(called: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda g: found.append(g.clone()))

    module.register_forward_hook(hook)
    return found


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "one tensor at a time": lambda p: torch.optim.SGD(p, 0.1, foreach=False),
    "fused, which no version counter shows": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_gradients_weights_and_updates_of_one_step(optimizer):
    model, (x, other) = network(), batches(2)
    optimizer = optimizer(model.parameters())
    recorder = watch(model, ["0", "1", "4"], every=2)
    seen = {name: gradients_at(model.get_submodule(name)) for name in recorder.layers}
    before = copy.deepcopy(model)
    loss_of(model(x)).backward()
    gradients = {name: model.get_submodule(name).weight.grad.clone() for name in recorder.layers}
    optimizer.step()
    after = copy.deepcopy(model)
    optimizer.zero_grad(set_to_none=True)
    loss_of(model(other)).backward()  # between records: nothing of it may show
    optimizer.step()
    for name, layer in recorder.history.items():
        old, new = before.get_submodule(name).weight, after.get_submodule(name).weight
        assert layer.gradient_rms == pytest.approx([rms(seen[name][0])], rel=1e-5)
        assert layer.weight_gradient_rms == pytest.approx([rms(gradients[name])], rel=1e-5)
        assert layer.weight_rms == pytest.approx([rms(old)], rel=1e-5)
        assert layer.update == pytest.approx([rms(new - old) / rms(old)], rel=1e-5)
    assert np.isnan(recorder.history["0"].bias_rms).all()
    assert recorder.history["4"].bias_rms == pytest.approx([rms(before[4].bias)], rel=1e-5)


def test_accumulated_gradients_are_those_that_the_optimizer_is_given():
    model, (x, y, z) = nn.Sequential(nn.Linear(6, 3)), batches(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, every=3) as recorder:
        for part in (x, y, z):
            loss_of(model(part)).backward()
        given, old = model[0].weight.grad.clone(), model[0].weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    seen = recorder.history["0"]
    assert seen.weight_gradient_rms == pytest.approx([rms(given)], rel=1e-5)
    assert seen.update == pytest.approx([rms(model[0].weight - old) / rms(old)], rel=1e-5)
    assert len(seen.step) == 1


@pytest.mark.parametrize("on", ["output", "input"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_bit_identical_with_and_without(optimizer, on):
    def train(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        steps, losses = optimizer(model.parameters()), []
        for x in batches(12):
            steps.zero_grad()
            losses.append(loss_of(model(x)))
            losses[-1].backward()
            steps.step()
        return [*losses, *model.state_dict().values(), *(p.grad for p in model.parameters())]

    plain, watched = network(), network()
    without = train(plain)
    with watch(watched, "*", every=2, on=on, max_samples=7, window=3) as recorder:
        with_it = train(watched)
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))
    has_gradient = recorder.history["1"].gradient_rms  # and it did watch
    assert (has_gradient > 0).all()


def test_between_records_nothing_is_hooked():
    model, x = network(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hooks = []

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))

    with watch(model, "*", every=3) as recorder:
        model[0].register_forward_pre_hook(count)
        for _ in range(6):
            loss_of(model(x)).backward()
            optimizer.step()
        # The root's own, and `count`.
        assert hooks[1] == hooks[2] == hooks[4] == 2 < hooks[0] == hooks[3]
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert not recorder._unsettled


def test_in_place_modules_show_what_they_were_given():
    model, x = network().eval(), batches(1)[0]
    with watch(model, "2", on="input", every=1, during="both") as recorder:
        model(x)
    given = model[1](model[0](x)).detach().double().numpy()
    assert given.min() < 0
    np.testing.assert_allclose(recorder.history["2"].mean[0], given.mean(0), rtol=1e-4, atol=1e-6)


def test_gradients_may_be_left_out():
    model, x = network(), batches(1)[0]
    with watch(model, "0", every=1, gradients=False) as recorder:
        loss_of(model(x)).backward()
        assert not model[0].weight._post_accumulate_grad_hooks
    seen = recorder.history["0"]
    assert np.isnan([seen.gradient_rms, seen.weight_rms, seen.weight_gradient_rms, seen.update]).all()


def test_what_never_comes_is_nan():
    model, (a, b) = network(), batches(2)
    model[0].weight.requires_grad_(False)
    with watch(model, ["0", "1", "3", "4"], every=1, during="both") as recorder:
        with torch.no_grad():
            model(a)  # no backward
        loss_of(model(b)).backward()  # no step of the optimizer
        with torch.inference_mode():
            model.eval()(a)
    seen = recorder.history
    assert np.isnan(seen["1"].gradient_rms).tolist() == [True, False, True]
    assert np.isnan(seen["0"].gradient_rms).all()  # nothing before it is trained
    assert np.isnan(seen["1"].update).all()
    assert np.isnan(seen["3"].weight_rms).all()
    assert seen["0"].weight_rms == pytest.approx([rms(model[0].weight)] * 3, rel=1e-5)


def test_a_weight_that_began_at_zero_moved_infinitely_and_one_left_alone_not_at_all():
    model, x = network(), batches(1)[0]
    nn.init.zeros_(model[1].weight)
    nn.init.ones_(model[1].bias)
    optimizer = torch.optim.SGD([model[1].weight], 0.1)
    with watch(model, ["1", "4"], every=1) as recorder:
        loss_of(model(x)).backward()
        optimizer.step()
    assert recorder.history["1"].update.tolist() == [np.inf]
    assert recorder.history["4"].update.tolist() == [0]


def test_two_calls_of_a_shared_layer_are_one_gradient():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first = self.linear(x)
            return first, self.linear(first[:5])

    model, x = Twice(), batches(1)[0]
    with watch(model, "linear", every=1) as recorder:
        seen = gradients_at(model.linear)
        first, second = model(x)
        (loss_of(first) + loss_of(second)).backward()
    assert [g.shape[0] for g in seen] == [5, 20]
    assert recorder.history["linear"].gradient_rms == pytest.approx([rms(torch.cat(seen))], rel=1e-5)


def test_tiny_and_half_precision_gradients_do_not_vanish():
    model, x = nn.Sequential(nn.Linear(6, 4).bfloat16(), nn.Linear(4, 2).bfloat16()), batches(1)[0].bfloat16()
    with watch(model, every=1) as recorder:
        (model(x).sum() * 1e-12).backward()
    assert recorder.history["1"].gradient_rms == pytest.approx([1e-12], rel=1e-2)


def test_sparse_gradients_count_their_zeros():
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True))
    with watch(model, "0", every=1) as recorder:
        loss_of(model(torch.tensor([[1, 4, 1]]))).backward()
    expected = rms(model[0].weight.grad.to_dense())
    assert recorder.history["0"].weight_gradient_rms == pytest.approx([expected], rel=1e-5)


WEIGHTS = {
    "integers": (torch.int8, np.nan),
    "complex": (torch.complex64, np.nan),
    "float8": (torch.float8_e4m3fn, 96.0),
    "float16, whose norm it cannot hold": (torch.float16, 96.0),
    "bfloat16": (torch.bfloat16, 96.0),
}


@pytest.mark.parametrize(("dtype", "scale"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_only_stored(dtype, scale):
    """Quantized ones, in a layer that computes in float32: training goes on, and no scale is made up."""
    model, x = network(), batches(1)[0]
    model[2].weight = nn.Parameter(torch.full((1024, 1024), 96).to(dtype), requires_grad=False)
    with watch(model, ["1", "2"], every=1) as recorder:
        loss_of(model(x)).backward()
    np.testing.assert_array_equal(recorder.history["2"].weight_rms, [scale])
    assert (recorder.history["2"].gradient_rms > 0).all()


def test_spectral_normalization_takes_no_extra_step():
    def trained(observe: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 4)))
        recorder = watch(model, "0", every=1) if observe else None
        for x in batches(3):
            loss_of(model(x)).backward()
        if recorder is not None:
            assert np.isnan(recorder.history["0"].weight_rms).all()
        return model[0].parametrizations.weight[0]._u

    assert torch.equal(trained(False), trained(True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model, x = Checkpointed(), batches(1)[0].requires_grad_()
    alone = copy.deepcopy(model)
    seen = gradients_at(alone.body[1])
    loss_of(alone.body(x)).backward()
    with watch(model, "body.1", every=1) as recorder:
        loss_of(model(x)).backward()
    layer = recorder.history["body.1"]
    assert layer.weight_gradient_rms == pytest.approx([rms(alone.body[1].weight.grad)], rel=1e-5)
    if reentrant:  # its first forward has no graph
        assert np.isnan(layer.gradient_rms).all()
    else:
        assert layer.gradient_rms == pytest.approx([rms(seen[0])], rel=1e-5)


def test_gradient_of_a_gradient():
    model, x = network(), batches(1)[0].requires_grad_()
    with watch(model, "1", every=1) as recorder:
        (g,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
        g.square().sum().backward()
    assert recorder.history["1"].gradient_rms > 0


def test_neither_model_nor_graph_nor_weight_is_kept_alive():
    model, x = network(), batches(1)[0]
    recorder = watch(model, "*", every=1)
    loss = loss_of(model(x))
    loss.backward()
    del loss
    gone = [weakref.ref(model), weakref.ref(model[0].weight)]
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert recorder.history["0"].weight_rms > 0


def test_running_statistics_are_compared_as_they_stood_before_the_batch():
    model, (a, b) = nn.Sequential(BatchNorm1d(6)), batches(2)
    model[0](b * 3 - 1)  # some statistics to compare with
    mean, var = model[0].running_mean.double(), model[0].running_var.double()
    with watch(model, every=1) as recorder:
        model(a)
    batch_mean, batch_var = a.double().mean(0), a.double().var(0)
    std = ((var + batch_var) / 2 + 1e-5).sqrt()
    seen = recorder.history["0"]
    assert seen.running_mean_gap == pytest.approx([((mean - batch_mean) / std).abs().mean().item()], rel=1e-5)
    logs = ((var + 1e-5) / (batch_var + 1e-5)).log() / 2
    assert seen.running_std_gap == pytest.approx([logs.abs().mean().item()], rel=1e-5)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNorm1d(3, channel_dim=-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.norm(x, mask=mask), None, mask)


@pytest.mark.parametrize("on", ["output", "input"])
def test_running_statistics_of_a_masked_layer_that_is_called_twice(on):
    torch.manual_seed(0)
    model, x, mask = Masked(), torch.randn(5, 6, 3) * 2, torch.rand(5, 6) < 0.5
    x[~mask] = 1e6
    with torch.no_grad():
        both = torch.cat([x[mask], copy.deepcopy(model).norm(x, mask=mask)[mask]]).double()
    with watch(model, on=on, every=1) as recorder:
        model(x, mask=mask)
    std = ((1 + both.var(0)) / 2 + 1e-5).sqrt()
    expected = (both.mean(0) / std).abs().mean().item()
    assert recorder.history["norm"].running_mean_gap == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize("on", ["output", "input"])
def test_other_units_than_channels_leave_the_layers_statistics_alone(on):
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(7, 3, 5) + 2
    with watch(model, on=on, every=1, channel_dim=-1) as recorder:
        model(x)
    mean, var = x.double().mean((0, 2)), x.double().transpose(0, 1).flatten(1).var(1)
    expected = (mean / ((1 + var) / 2 + 1e-5).sqrt()).mean().item()
    assert recorder.history["0"].running_mean_gap == pytest.approx([expected], rel=1e-5)
    assert recorder.history["0"].mean.shape == (1, 5)


LAYERS = {
    "none kept": (lambda: nn.BatchNorm1d(6, track_running_stats=False), (9, 6), True),
    "per activation": (lambda: BatchNormPerActivation((2, 3)), (9, 2, 3), False),
    "lazy": (nn.LazyBatchNorm1d, (9, 6), False),
    "evaluation": (lambda: nn.BatchNorm1d(6).eval(), (9, 6), False),
}


@pytest.mark.parametrize(("layer", "shape", "is_nan"), LAYERS.values(), ids=LAYERS)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_running_statistics_of_other_layers(layer, shape, is_nan):
    model, x = nn.Sequential(layer()), torch.randn(shape) + 2
    with watch(model, every=1, during="both") as recorder:
        model(x)
    flat = x.flatten(1).double()
    std = ((1 + flat.var(0)) / 2 + 1e-5).sqrt()
    seen, expected = recorder.history["0"].running_mean_gap, (flat.mean(0) / std).mean().item()
    assert np.isnan(seen).all() if is_nan else seen == pytest.approx([expected], rel=1e-4)


def test_the_gap_of_a_settled_layer_is_what_the_batch_explains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(200, momentum=None))
    with torch.no_grad():
        for _ in range(200):
            model(torch.randn(60, 200) * 3 + 5)
    with watch(model, every=1) as recorder, torch.no_grad():
        for _ in range(20):
            model(torch.randn(60, 200) * 3 + 5)
    # The mean of |N(0, 1/60)|, and of half the log of a variance of 60 samples.
    assert recorder.history["0"].running_mean_gap.mean() == pytest.approx((2 / np.pi / 60) ** 0.5, rel=0.05)
    assert recorder.history["0"].running_std_gap.mean() == pytest.approx((1 / np.pi / 60) ** 0.5, rel=0.05)
