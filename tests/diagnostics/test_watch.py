"""Watching: the right numbers, at the right steps, and a training that cannot tell."""

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchnorm.diagnostics import load_histories, watch
from batchnorm.diagnostics.summary import Samples, drift, summarize
from batchnorm.layers import BatchNorm1d, BatchNormPerActivation


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Dropout(0.3), nn.Linear(8, 3))


def batches(num: int, size: int = 20) -> Tensor:
    return torch.randn(num, size, 6, generator=torch.Generator().manual_seed(4))


def train(model: nn.Module, num_steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x in batches(num_steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def outputs_of(model: nn.Module, name: str, x: Tensor) -> np.ndarray:
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return torch.cat(seen).double().numpy()


def test_one_record_equals_numpy():
    model, x = network(), batches(1)[0]
    recorder = watch(model, every=1)
    y = outputs_of(model, "1", x)  # in training mode: one recorded step
    seen = recorder.history["1"]
    assert recorder.layers == ("1",)
    assert seen.step.tolist() == [0]
    np.testing.assert_allclose(seen.mean[0], y.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(seen.var[0], y.var(0), rtol=1e-5)
    np.testing.assert_allclose(seen.percentiles[0], np.percentile(y, [15, 50, 85], axis=0), rtol=1e-6)
    np.testing.assert_allclose(seen.pooled[0], np.percentile(y, [15, 50, 85]), rtol=1e-6)
    assert seen.drift.tolist() == [0]


def test_drift_is_the_mean_move_of_the_percentiles_in_deviations():
    model, (a, b) = network(), batches(2)
    recorder = watch(model, "0", every=1, percentiles=(10, 90))
    model(a)
    model(b)
    first, second = outputs_of(model.eval(), "0", a), outputs_of(model, "0", b)
    std = np.sqrt((first.var(0) + second.var(0)) / 2)
    move = np.abs(np.percentile(second, [10, 90], axis=0) - np.percentile(first, [10, 90], axis=0))
    seen = recorder.history["0"]
    assert seen.drift[1] == pytest.approx((move / std).mean(), rel=1e-5)
    model.train()(a)  # and back: each record is compared with the one before it
    seen = recorder.history["0"]
    assert seen.drift[2] == pytest.approx(seen.drift[1])
    assert seen.total_drift == pytest.approx(2 * seen.drift[1])


def test_noise_predicts_the_drift_of_a_network_that_stands_still():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50))
    with watch(model, "0", every=1) as recorder:
        for x in batches(40, size=60):
            model(x)
    seen = recorder.history["0"]
    assert seen.noise.mean() == pytest.approx(seen.drift[1:].mean(), rel=0.1)


def test_constant_and_non_finite_units_are_left_out_of_drift_and_counted():
    x = torch.randn(30, 4)
    y = x + torch.tensor([1.0, 0.0, 5.0, 0.0])
    for t in (x, y):
        t[:, 1] = 7.0
        t[3, 2] = torch.nan
    first, second = (summarize(Samples.of(t, channel_dim=1, mask=None, max_samples=99), [50]) for t in (x, y))
    # Unit 0 moves by 1, unit 3 not at all, units 1 and 2 do not count.
    assert drift(first, second) == pytest.approx(0.5 / x[:, 0].std(correction=0).item(), rel=1e-5)
    assert second.num_nonfinite == 1
    assert np.isnan(second.percentiles[0, 2])
    assert np.isfinite(second.percentiles[0, [0, 1, 3]]).all()


LAYOUTS = {
    "convolution (N, C, H, W)": (nn.Conv2d(3, 5, 3), (4, 3, 9, 7), 1),
    "linear on (N, L, C)": (nn.Linear(5, 4), (4, 7, 5), -1),
    "ours, features last": (BatchNorm1d(5, channel_dim=-1), (4, 7, 5), -1),
    "non-contiguous": (nn.BatchNorm2d(3).to(memory_format=torch.channels_last), (4, 3, 5, 7), 1),
    "half precision": (nn.Linear(4, 3).bfloat16(), (6, 4), -1),
}


@pytest.mark.parametrize(("layer", "shape", "dim"), LAYOUTS.values(), ids=LAYOUTS)
def test_units_are_found_in_every_layout(layer, shape, dim):
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    x = (torch.randn(shape) * 3 + 1).to(next(layer.parameters()).dtype)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    with watch(model, "0", every=1, max_samples=10**6) as recorder:
        y = model(x).detach().double().movedim(dim, -1).flatten(0, -2).numpy()
    seen = recorder.history["0"]
    np.testing.assert_allclose(seen.mean[0], y.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        seen.percentiles[0], np.percentile(y, [15, 50, 85], axis=0), rtol=1e-4, atol=1e-6
    )


def test_per_activation_layers_have_one_unit_for_each_activation():
    model = nn.Sequential(BatchNormPerActivation((2, 3)))
    x = torch.randn(9, 2, 3) * 4
    with watch(model, on="input", every=1) as recorder:
        model(x)
    np.testing.assert_allclose(recorder.history["0"].var[0], x.flatten(1).var(0, correction=0), rtol=1e-5)


def test_input_of_a_masked_layer_counts_true_places_only():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNorm1d(3, channel_dim=-1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)

    torch.manual_seed(0)
    x, mask = torch.randn(5, 6, 3), torch.rand(5, 6) < 0.5
    x[~mask] = 1e6
    model = Masked()
    with watch(model, on="input", every=1) as recorder:
        model(x, mask)
    seen, real = recorder.history["norm"], x[mask].numpy()
    np.testing.assert_allclose(seen.mean[0], real.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.percentiles[0, 1], np.median(real, axis=0), rtol=1e-5)


def test_what_is_not_finite_is_counted_at_true_places_only():
    x, mask = torch.randn(4, 3, 2), torch.ones(4, 3, dtype=torch.bool)
    mask[0] = False
    x[0], x[1, 2, 0] = torch.nan, torch.inf
    for channel_dim, given in ((-1, x), (1, x.movedim(-1, 1))):
        seen = Samples.of(given, channel_dim=channel_dim, mask=mask, max_samples=99)
        assert seen.num_nonfinite == 1
        assert seen.num_seen == 9


@pytest.mark.parametrize("layer", [BatchNorm1d(3, channel_dim=-1), BatchNormPerActivation((4, 3))])
def test_units_of_another_dimension_have_no_mask(layer):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)

    model, x = Masked(), torch.randn(5, 4, 3)
    mask = torch.ones((5, 4) if isinstance(layer, BatchNorm1d) else 5, dtype=torch.bool)
    for on in ("input", "output"):
        with watch(model, on=on, every=1, channel_dim=1) as recorder:
            with pytest.raises(ValueError, match=r"'norm' is called with a mask, .* and channel_dim=1 takes"):
                model(x, mask)
            assert num_hooks(model) == 1
        assert not len(recorder.history["norm"].step)
    usual = -1 if isinstance(layer, BatchNorm1d) else None
    with watch(model, every=1, channel_dim=usual) as recorder:  # the layer's own is fine
        model(x, mask)
    assert len(recorder.history["norm"].step) == 1


SEQUENCES = {
    "recurrent": lambda: nn.LSTM(5, 4, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(5, 1, 4, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("layer", SEQUENCES.values(), ids=SEQUENCES)
def test_units_of_sequences_come_last(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer())
    with watch(model, "0", every=1) as recorder:
        y = model(torch.randn(6, 7, 5))
    y = (y[0] if isinstance(y, tuple) else y).detach().double().flatten(0, 1).numpy()
    np.testing.assert_allclose(recorder.history["0"].mean[0], y.mean(0), rtol=1e-4, atol=1e-6)


def test_percentiles_of_a_subsample_are_close_and_moments_exact():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Identity()), torch.randn(8, 3, 56, 56)
    x += torch.arange(56) * 0.2  # columns differ: a stride that keeps to some of them would be off
    with watch(model, "0", every=1, max_samples=512) as recorder:
        model(x)
    seen, all_of_it = recorder.history["0"], x.movedim(1, -1).flatten(0, 2).double().numpy()
    np.testing.assert_allclose(seen.mean[0], all_of_it.mean(0), rtol=1e-5)
    gap = np.abs(seen.percentiles[0] - np.percentile(all_of_it, [15, 50, 85], axis=0)) / all_of_it.std(0)
    assert gap.max() < 0.15


def test_steps_are_training_mode_forwards_and_every_so_many_are_recorded():
    model, x = network(), batches(1)[0]
    recorder = watch(model, every=3)
    for step in range(7):
        model.train()(x)
        if step % 2:
            model.eval()(x)
    assert recorder.num_steps == 7
    assert recorder.history["1"].step.tolist() == [0, 3, 6]


def test_during_evaluation_records_only_that():
    model, x = network(), batches(1)[0]
    with watch(model, every=1, during="evaluation") as recorder:
        model(x)
        for _ in range(3):
            model.eval()(x)
    assert recorder.history["1"].step.tolist() == [0, 1, 2]
    assert recorder.history["1"].total_drift == 0  # the same batch, the same network


def test_training_is_bit_identical_with_and_without():
    plain, watched = network(), network()
    torch.manual_seed(1)
    train(plain, 12)
    random_state = torch.get_rng_state()
    torch.manual_seed(1)
    with watch(watched, "*", every=2, max_samples=7):
        train(watched, 12)
    assert torch.equal(random_state, torch.get_rng_state())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_default_layers_without_batch_normalization_are_what_the_nonlinearities_receive():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    assert watch(model).layers == ("0", "3")


def test_the_model_itself_can_be_watched():
    model, x = network().eval(), batches(1)[0]
    with (
        watch(model, "", every=1, during="both") as output,
        watch(model, "", on="input", every=1, during="both") as given,
    ):
        y = model(input=x).detach().numpy()
    np.testing.assert_allclose(output.history[""].mean[0], y.mean(0), rtol=1e-5)
    np.testing.assert_allclose(given.history[""].mean[0], x.mean(0), rtol=1e-4, atol=1e-6)


def test_patterns_and_names():
    model = nn.Module()
    model.blocks = nn.ModuleList(network() for _ in range(2))
    model.head = nn.Linear(3, 2)
    assert watch(model, ["blocks.*.1", "head"]).layers == ("blocks.0.1", "blocks.1.1", "head")
    with pytest.raises(ValueError, match=r"matches 'blokcs.1.1'; close: 'blocks.1.1'"):
        watch(model, ["head", "blokcs.1.1"])


def test_a_shared_module_pools_its_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.tanh(self.linear(x)))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(10, 4)
    with watch(model, every=1) as recorder:
        y = outputs_of(model, "linear", x)
    assert y.shape == (20, 4)
    np.testing.assert_allclose(recorder.history["linear"].var[0], y.var(0), rtol=1e-5)
    np.testing.assert_allclose(recorder.history["linear"].percentiles[0, 1], np.median(y, axis=0), rtol=1e-5)


def test_copies_are_not_recorded_and_close_removes_every_hook():
    model, x = network(), batches(1)[0]
    recorder = watch(model, every=1)
    twin = copy.deepcopy(model)
    twin(x)
    assert recorder.num_steps == 0
    model(x)
    recorder.close()
    recorder.close()
    model(x)
    assert len(recorder.history["1"].step) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def num_hooks(model: nn.Module) -> int:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def test_a_forward_that_raises_leaves_no_record_and_no_hooks():
    model = network()
    with watch(model, every=1) as recorder:
        between = num_hooks(model)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            nn.Module.__call__(model, torch.randn(4, 5))
        assert num_hooks(model) == between
        model[4] = nn.Linear(9, 3)  # raises after the watched layer has been seen
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(batches(1)[0])
        assert num_hooks(model) == between
        model[1](torch.randn(5, 8))  # on its own, outside a step
        model[4] = nn.Linear(8, 3)
        model(batches(1)[0])
    assert recorder.history["1"].step.tolist() == [2]
    assert num_hooks(model) == 0


def test_an_interrupted_forward_is_cleared_by_the_next():
    model, x = network(), batches(1)[0]

    def interrupt(module: nn.Module, args: tuple[Tensor]) -> None:
        raise KeyboardInterrupt  # which no hook of a module hears of

    with watch(model, every=2) as recorder:
        handle = model[4].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
        model(x)
        assert num_hooks(model) == 1
        model(x)
    assert recorder.history["1"].step.tolist() == [2]


def test_a_watched_model_can_be_pickled_and_its_copy_watches_nothing():
    model, x = network(), batches(1)[0]
    with watch(model, "*", every=1) as recorder:
        model(x)  # with hooks on its weights too
        twin = pickle.loads(pickle.dumps(model))
        twin(x)
        copy.deepcopy(model)(x).sum().backward()
    assert recorder.num_steps == 1
    assert np.isnan(recorder.history["0"].weight_gradient_rms).all()
    assert torch.equal(twin[0].weight, model[0].weight)


@pytest.mark.parametrize("inner", [False, True], ids=["the wrapper", "the model inside"])
def test_a_model_trained_by_distributed_data_parallel(inner, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone, model = network(), network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        names = ("0", "1") if inner else ("module.0", "module.1")
        with (
            watch(alone, ["0", "1"], every=2) as one,
            watch(model if inner else wrapped, names, every=2) as two,
        ):
            for trained in (alone, wrapped):
                torch.manual_seed(1)
                train(trained, 5)
        for ours, theirs in zip(two.history.values(), one.history.values(), strict=True):
            for field, values in vars(theirs).items():
                np.testing.assert_array_equal(getattr(ours, field), values, err_msg=field)
        assert (two.history[names[0]].update > 0).all()
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_are_watched_from_the_pass_that_makes_them():
    model, x = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(3)), batches(1)[0]
    with watch(model, ["0", "1", "2"], every=1) as recorder:
        model(x).square().mean().backward()
    assert recorder.history["1"].units.tolist() == list(range(8))
    assert all((layer.gradient_rms > 0).all() for layer in recorder.history.values())


class Gives(nn.Module):
    """A model whose body gives something other than a tensor."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Identity()
        self.body.forward = make

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


OUTPUTS = {
    "a dictionary": (lambda x: {"logits": x, "aux": x}, "'body' has a dict of 'logits', 'aux' as its output"),
    "a tuple of no tensor": (lambda x: (None, x), "'body' has NoneType as its output"),
    "an empty tuple": (lambda x: (), "'body' has tuple as its output"),
}


@pytest.mark.parametrize(("make", "message"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_that_cannot_be_watched(make, message):
    model = Gives(make)
    with watch(model, "body", every=1) as recorder:
        with pytest.raises(TypeError, match=f"{message}, .*or name modules inside it"):
            model(torch.randn(3, 2))
        assert num_hooks(model) == 1
    assert not len(recorder.history["body"].step)


def test_of_a_tuple_the_first_is_watched():
    model, x = Gives(lambda x: (x * 2, None)), torch.randn(5, 2)
    with watch(model, ["body", ""], every=1) as recorder:
        model(x)
    for layer in recorder.history.values():
        np.testing.assert_allclose(layer.mean[0], (x * 2).mean(0), rtol=1e-5, atol=1e-7)


def test_a_number_of_units_that_changes_is_refused():
    model = nn.Sequential(nn.Identity())
    model[0].weight = nn.Parameter(torch.ones(1))  # followed, and let go of when the record fails
    with watch(model, "0", every=1):
        model(torch.randn(4, 3))
        with pytest.raises(ValueError, match="'0' has 5 units at step 1 and had 3 before"):
            model(torch.randn(4, 5))
        assert num_hooks(model) == 1
    with watch(model, "0", every=1, channel_dim=-1) as recorder:
        model(torch.randn(2, 4, 3))
        model(torch.randn(2, 6, 3))
    assert recorder.history["0"].mean.shape == (2, 3)


def test_tensors_without_values_are_refused():
    model = nn.Sequential(nn.Linear(3, 2, device="meta"))
    with (
        watch(model, every=1),
        pytest.raises(ValueError, match=r"'0' has a tensor without values .* with to_empty\(\)"),
    ):
        model(torch.empty(4, 3, device="meta"))


def test_wrong_arguments_raise_the_models_own_error():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].register_forward_pre_hook(lambda m, args, kwargs: (args, {"y": 1}), with_kwargs=True)
    recorder = watch(model, "0", on="input", every=1)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        model(torch.randn(4, 3))
    recorder.close()


def test_recomputation_under_checkpointing_is_not_a_second_call():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    model, x = Checkpointed(), batches(1)[0]
    with watch(model, every=1) as recorder:
        model(x).square().mean().backward()
    seen = recorder.history["body.0"]
    assert len(seen.step) == 1
    assert recorder._open is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_step_that_checkpointing_repeats_whole_is_one_step(reentrant):
    model, alone = network().eval(), network().eval()  # without dropout, and all of it watched
    optimizer = torch.optim.SGD([*model.parameters(), *alone.parameters()], 0.1)
    with (
        watch(model, "4", every=2, during="both") as one,
        watch(alone, "4", every=2, during="both") as two,
    ):
        for x in batches(5).requires_grad_():
            optimizer.zero_grad()
            checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
            alone(x).square().mean().backward()
            optimizer.step()
        assert num_hooks(model) == num_hooks(alone)
    assert one.num_steps == two.num_steps == 5
    seen, expected = one.history["4"], two.history["4"]
    assert seen.step.tolist() == [0, 2, 4]
    np.testing.assert_allclose(seen.weight_gradient_rms, expected.weight_gradient_rms, rtol=1e-5)
    np.testing.assert_allclose(seen.update, expected.update, rtol=1e-5)
    if not reentrant:
        np.testing.assert_allclose(seen.gradient_rms, expected.gradient_rms, rtol=1e-5)


def test_no_activation_and_no_graph_is_kept_alive():
    model = network()
    recorder = watch(model, "*", every=1)
    alive = []
    model[1].register_forward_hook(lambda m, args, y: alive.append(weakref.ref(y)))
    model(batches(1)[0]).sum().backward()
    gc.collect()
    assert alive[0]() is None
    assert len(recorder.history) == 6
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None  # the recorder does not keep the model either


def test_kept_units_are_spread_and_drift_still_counts_all():
    torch.manual_seed(0)
    model, (a, b) = nn.Sequential(nn.Linear(6, 100)), batches(2)
    with watch(model, every=1, keep_units=4) as few, watch(model, every=1, keep_units=None) as every_one:
        model(a)
        model(b)
    assert few.history["0"].units.tolist() == [0, 25, 50, 75]
    np.testing.assert_array_equal(few.history["0"].mean, every_one.history["0"].mean[:, [0, 25, 50, 75]])
    np.testing.assert_array_equal(few.history["0"].drift, every_one.history["0"].drift)


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_saved_histories_load_as_they_were(tmp_path, suffix):
    model = network()
    with watch(model, ["1", "4"], every=2) as recorder:
        train(model, 5)
    path = recorder.save(tmp_path / f"seen{suffix}")
    loaded = load_histories(path)
    for name, layer in recorder.history.items():
        for field, values in vars(layer).items():
            np.testing.assert_array_equal(getattr(loaded[name], field), values, err_msg=f"{name} {field}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_json_holds_null_for_nan(tmp_path):
    model = nn.Sequential(nn.Identity())
    with watch(model, "0", every=1) as recorder:
        model(torch.tensor([[torch.nan, 1.0], [2.0, 3.0]]))
    path = recorder.save(tmp_path / "seen.json")
    assert json.loads(path.read_text())["0"]["mean"] == [[None, 2.0]]
    assert np.isnan(load_histories(path)["0"].mean[0, 0])


def test_saving_and_loading_errors(tmp_path):
    recorder = watch(network())
    with pytest.raises(ValueError, match=r"saved as .json or .npz, got 'seen.csv'"):
        recorder.save(tmp_path / "seen.csv")
    with pytest.raises(FileNotFoundError, match="cannot write"):
        recorder.save(tmp_path / "missing" / "seen.json")
    with pytest.raises(FileNotFoundError):
        load_histories(tmp_path / "nothing.npz")
    (tmp_path / "other.json").write_text('{"a": {"b": [1]}}')
    with pytest.raises(ValueError, match="does not hold histories"):
        load_histories(tmp_path / "other.json")


def test_table_shows_every_layer():
    model = network()
    model.add_module("unused", nn.ModuleList([nn.Linear(2, 2)]))
    recorder = watch(model, ["1", "unused.0"], every=2)
    with pytest.raises(NotImplementedError):
        model(batches(1)[0])  # a ModuleList cannot be called
    del model[5]
    train(model, 4)
    lines = recorder.table().splitlines()
    assert "drift/record" in lines[0]
    assert lines[2].split()[:3] == ["1", "2", "4"]
    assert lines[3].split()[:3] == ["unused.0", "0", "-"]
    assert len({len(line) for line in lines}) == 1


BAD = {
    "every": ({"every": 0}, "every must be at least 1"),
    "max_samples": ({"max_samples": 1}, "max_samples at least 2"),
    "keep_units": ({"keep_units": 0}, "keep_units must be at least 1"),
    "no percentiles": ({"percentiles": ()}, "levels from 0 to 100"),
    "percentiles as fractions are fine, 120 is not": ({"percentiles": (50, 120)}, "levels from 0 to 100"),
    "on": ({"on": "weights"}, '"output" or "input", got \'weights\''),
    "during": ({"during": "test"}, "got 'test'"),
    "window": ({"window": 0}, "window must be at least 1 record, or None for the whole run, got 0"),
    "seed": ({"seed": -1}, "seed must be 0 or more, got -1"),
    "channel_dim": ({"channel_dim": 2}, "channel_dim must be 1, -1 or None, got 2"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        watch(network(), **options)


def test_models_that_cannot_be_watched():
    with pytest.raises(ValueError, match="or convolution to watch by default"):
        watch(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="layers names no module: leave it out"):
        watch(network(), [])
    with pytest.raises(ValueError, match="is compiled"):
        watch(torch.compile(network(), backend="eager"))
    model = nn.Sequential(nn.Embedding(5, 3))
    with (
        watch(model, "0", on="input", every=1),
        pytest.raises(TypeError, match=r"'0' has a tensor of torch\.int64"),
    ):
        model(torch.tensor([[1, 2]]))
