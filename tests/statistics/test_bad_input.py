"""Bad input: what, where, what to do; and nothing changed."""

import pytest
import torch
from population import assert_unchanged, deep, images, snapshot
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.statistics import recalibrate


def poisoned(value: float) -> list[Tensor]:
    batches = [b.clone() for b in images().split(9)]
    batches[3][0, 0, 0, 0] = value
    return batches


BAD = {
    "a nan in one batch": (lambda: poisoned(torch.nan), {}, ValueError, r"batch 3, layer 'bn1'.*not finite"),
    "an inf, pooled": (
        lambda: poisoned(torch.inf),
        {"method": "pooled"},
        ValueError,
        r"batch 3, layer 'bn1'",
    ),
    "no batches": (lambda: [], {}, ValueError, "batches is empty"),
    "unknown method": (lambda: [], {"method": "ema"}, ValueError, "'exact', 'pooled', 'paper', got 'ema'"),
    "negative tolerance": (lambda: [], {"tolerance": -1}, ValueError, "zero or more deviations"),
    "a batch of strings": (lambda: ["x"], {}, TypeError, r"got str. Pass forward="),
    "an empty tuple": (lambda: [()], {}, TypeError, "an empty tuple"),
    "another device": (
        lambda: [images().to("meta")],
        {},
        RuntimeError,
        r"batch 0 is on meta and the model on cpu; move one",
    ),
}


@pytest.mark.parametrize(("batches", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_explained_and_leaves_no_trace(batches, options, error, message):
    model = deep()
    model.train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        recalibrate(model, batches(), **options)
    assert_unchanged(model, before)


def test_wrong_channel_count_names_batch_and_layer():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    with pytest.raises(ValueError, match=r"batch 1, layer '0': expected 4 channels"):
        recalibrate(model, [torch.randn(3, 4), torch.randn(3, 5)])


def test_one_sample_in_all_the_data_has_no_variance():
    with pytest.raises(ValueError, match=r"layer '0': 1 sample\(s\) a channel in all the data"):
        recalibrate(nn.Sequential(nn.BatchNorm1d(4)), [torch.randn(1, 4)])


METHODS = ["exact", "pooled", "paper"]


@pytest.mark.parametrize("method", METHODS)
def test_a_loader_that_raises_half_way_leaves_no_trace(method):
    model = deep()
    model.train()
    before = snapshot(model)

    def breaks():
        yield images()[:20]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        recalibrate(model, breaks(), method=method)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_raises_half_way_leaves_no_trace(method):
    model, calls = deep(), []
    model.train()
    model.drop.register_forward_hook(lambda *_: calls.append(1) if len(calls) < 3 else 1 / 0)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        recalibrate(model, images().split(4), method=method)
    assert_unchanged(model, before)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.norm(x * scale)


MISFITS = {
    "an argument is missing": (torch.ones(4, 3), "missing a required argument: 'scale'"),
    "a tuple gives its first item only": (
        (torch.ones(4, 3), torch.ones(3)),
        "Of a tuple or list only the first",
    ),
    "a dict has a label too": (
        {"x": torch.ones(4, 3), "scale": torch.ones(3), "label": 1},
        "got an unexpected keyword argument 'label'",
    ),
    "a dict lacks one": ({"x": torch.ones(4, 3)}, "missing a required argument: 'scale'"),
}


@pytest.mark.parametrize(("batch", "says"), MISFITS.values(), ids=MISFITS)
def test_a_batch_that_does_not_fit_forward_is_explained(batch, says):
    model = TwoInputs().train()
    good = {"x": torch.randn(4, 3), "scale": torch.ones(3)}
    before = snapshot(model)
    with pytest.raises(
        TypeError, match=r"batch 1 does not fit TwoInputs\.forward\(x.*forward=callable"
    ) as caught:
        recalibrate(model, [good, batch])
    assert says in str(caught.value)
    assert_unchanged(model, before)


def test_a_type_error_of_the_models_own_is_passed_on():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.register_forward_pre_hook(lambda *_: len(3))
    with pytest.raises(TypeError, match=r"object of type 'int' has no len\(\)"):
        recalibrate(model, [torch.randn(4, 3)])


def test_another_argument_for_a_layer_than_it_takes_names_it():
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, mask=x > 0)

    with pytest.raises(TypeError, match="batch 0, layer 'norm': got an unexpected keyword argument 'mask'"):
        recalibrate(Wrong(), [torch.randn(4, 3)])


def test_a_model_without_batch_normalization():
    with pytest.raises(ValueError, match="Linear has no batch normalization"):
        recalibrate(nn.Linear(2, 2), [torch.randn(3, 2)])


def test_a_model_whose_layers_keep_no_statistics():
    with pytest.raises(ValueError, match="no layer to recalibrate: '0' left alone: it keeps no running"):
        recalibrate(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), [torch.randn(3, 2)])


@pytest.mark.parametrize(
    ("modules", "place"),
    [
        (lambda: (nn.Linear(2, 2), nn.LazyBatchNorm1d()), 1),
        (lambda: (nn.LazyLinear(2), nn.BatchNorm1d(2)), 0),
    ],
    ids=["the normalization", "what is before it"],
)
def test_a_lazy_module_is_named_and_stays_lazy(modules, place):
    model = nn.Sequential(*modules())
    with pytest.raises(ValueError, match=f"layer '{place}' is still lazy: run one batch"):
        recalibrate(model, [torch.randn(3, 2)])
    assert is_lazy(model[place].weight)


@pytest.mark.parametrize(
    "inside", [nn.BatchNorm1d, nn.Linear], ids=["the normalization", "what is before it"]
)
def test_a_module_on_the_meta_device_is_named(inside):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for module in model:
        if isinstance(module, inside):
            module.to("meta")
    place = 0 if inside is nn.Linear else 1
    with pytest.raises(ValueError, match=rf"layer '{place}' is on the meta device.*to_empty\(device"):
        recalibrate(model, [torch.randn(3, 2)])


@pytest.mark.parametrize("method", METHODS)
def test_a_model_whose_normalizations_no_batch_reaches(method):
    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="no batch reached any of the layers 'spare' in evaluation mode"):
        recalibrate(Elsewhere(), [torch.randn(3, 2)], method=method)
