"""The memory format that `accelerate` chooses, and what keeps it from choosing."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery import layout

IMAGES = (2, 3, 8, 8)


def images() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout(0.5)
    )


def is_channels_last(model: nn.Module) -> bool:
    weights = [p for p in model.parameters() if p.dim() == 4]
    return all(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)


@pytest.mark.parametrize(
    ("seconds", "taken"), [((1.0, 0.9), True), ((1.0, 0.97), False), ((1.0, 1.5), False)]
)
def test_the_faster_one_is_taken(monkeypatch, seconds, taken):
    monkeypatch.setattr(layout, "_race", lambda *_: seconds)
    net, x = images(), torch.randn(IMAGES)
    model, report = bn.accelerate(net, x)
    assert report.layout.channels_last is is_channels_last(model) is taken
    assert (report.layout.contiguous_s, report.layout.channels_last_s) == seconds
    reason = "a training step is faster" if taken else "a training step is not faster"
    name = "channels-last" if taken else "as it was"
    times = f"(1000.0 ms as it was, {seconds[1] * 1e3:.1f} ms channels-last)"
    assert f"memory format: {name}: {reason} {times}" in str(report)
    assert not is_channels_last(net)
    torch.testing.assert_close(model.eval()(x), net.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net.parameters(), strict=True))


def test_each_is_timed_in_turns_and_the_median_counts(monkeypatch):
    # A clock that goes on by one second, and by a hundred in one step of each.
    ticks = iter([*range(7), *range(107, 109), *range(209, 1000)])
    monkeypatch.setattr(layout, "_now", lambda model: next(ticks))
    chosen = layout.choose(images(), (torch.randn(IMAGES),), None)
    assert (chosen.contiguous_s, chosen.channels_last_s) == (1, 1)


def test_asked_for_and_not_asked_for(monkeypatch):
    monkeypatch.setattr(layout, "_race", lambda *_: (1.0, 2.0))
    for example, wanted in itertools.product((torch.randn(IMAGES), None), (True, False)):
        model, report = bn.accelerate(images(), example, channels_last=wanted)
        assert is_channels_last(model) is report.layout.channels_last is wanted
        assert report.layout.reason == ("asked for" if wanted else "not asked for")
    assert bn.accelerate(images())[1].layout.reason == "not measured without an example"


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), nn.Conv1d(4, 4, 3)),
    ],
    ids=["no convolution", "a 1-d one among them"],
)
def test_only_where_all_convolutions_are_of_images(make):
    model, report = bn.accelerate(make(), torch.randn(IMAGES), channels_last=True)
    assert report.layout.reason == "only for models with 2-d convolutions and no others"
    assert not report.layout.channels_last
    assert all(p.is_contiguous() for p in model.parameters())


def test_a_model_in_channels_last_stays_so():
    net = images().to(memory_format=torch.channels_last)
    model, report = bn.accelerate(net, torch.randn(IMAGES))
    assert report.layout.reason == "the model is channels-last already"
    assert is_channels_last(model)


def test_a_view_that_needs_contiguous_memory_keeps_the_model_as_it_was():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).view(x.shape[0], -1)

    model, report = bn.accelerate(Net(), torch.randn(IMAGES), channels_last=True)
    assert report.layout.reason.startswith("it does not run on the example: RuntimeError: view size is not")
    assert not is_channels_last(model)


def test_a_model_that_computes_something_else_keeps_the_format_it_had():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return y * y.stride(1)

    model, report = bn.accelerate(Net(), torch.randn(IMAGES), channels_last=True)
    assert report.layout.reason.startswith("outputs differ by ")
    assert not is_channels_last(model)
