"""`convert` from classes that are neither torch's plain ones nor ours: synced, and frozen by class."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import layers
from batchnorm.surgery import convert, thaw

X = torch.randn(6, 3, 8, 8)


def settle(model, *shape):
    """Statistics, weights and counters that are not those of the beginning."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5) if buffer.is_floating_point() else buffer.fill_(7)
        assert name
    return model


def assert_same_state(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
        assert got[name].dtype == value.dtype


@pytest.mark.parametrize(
    ("shape", "plain", "theirs"),
    [
        ((6, 4), layers.BatchNorm1d, nn.BatchNorm1d),
        ((6, 4, 3), layers.BatchNorm1d, nn.BatchNorm1d),
        ((6, 4, 3, 3), layers.BatchNorm2d, nn.BatchNorm2d),
        ((6, 4, 2, 3, 3), layers.BatchNorm3d, nn.BatchNorm3d),
    ],
    ids=["2-d", "3-d", "4-d", "5-d"],
)
def test_a_synced_layer_gets_the_dimension_of_its_inputs(shape, plain, theirs):
    model = settle(nn.Sequential(nn.SyncBatchNorm(4, momentum=0.3))).eval()
    x = torch.randn(shape)
    for to, cls in (("plain", plain), ("torch", theirs)):
        new, report = convert(model, to, x)
        assert type(new[0]) is cls
        assert new[0].momentum == 0.3
        assert report.changes[0].what.endswith("every rank uses its own batch")
        assert len(report.agreement) == 2  # alone, in no process group, torch's trains on the CPU too
        torch.testing.assert_close(new(x), model(x))
        assert_same_state(new, model)
        reference = theirs(4, momentum=0.3)
        reference.load_state_dict(model[0].state_dict())
        torch.testing.assert_close(new.train()(x), reference(x))


def test_a_synced_layer_of_unknown_or_changing_dimension_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.SyncBatchNorm(4)

        def forward(self, x):
            return self.norm(x)[..., None, None] + self.norm(x[..., None, None])

    model = Twice().eval()
    assert "give an example that reaches it" in convert(model, "plain")[1].refusals[0].reason
    _, report = convert(model, "plain", torch.randn(3, 4))
    assert report.refusals[0].reason.startswith("it is called with inputs of 2 and 4 dimensions")


class FrozenBatchNorm2d(nn.Module):
    """As detectors write it: buffers alone, and no class of torch's."""

    def __init__(self, num_features, eps=1e-5, factor=1.0):
        super().__init__()
        self.eps, self.factor = eps, factor
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(num_features) + 0.5)

    def forward(self, x):
        weight, bias, mean, var = (b.reshape(1, -1, 1, 1) for b in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return self.factor * (x * scale + bias - mean * scale)


def test_a_frozen_class_becomes_a_frozen_layer():
    norm = FrozenBatchNorm2d(4, eps=1e-3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), norm).train()
    new, report = convert(model, "plain", X)
    assert type(new[1]) is layers.BatchNorm2d
    assert new[1] is new[3]
    assert new[1].frozen
    assert new[1].eps == 1e-3
    assert not any(p.requires_grad for p in new[1].parameters())
    assert all(a.largest <= a.allowed for a in report.agreement)
    assert len(report.agreement) == 2
    torch.testing.assert_close(new(X), model(X), rtol=1e-5, atol=1e-5)
    fresh = copy.deepcopy(new)
    fresh[1].reset_parameters()
    fresh.load_state_dict(model.state_dict())  # strictly
    torch.testing.assert_close(fresh(X), model(X), rtol=1e-5, atol=1e-5)
    thaw(new)
    new(X)
    assert new[1].num_batches_tracked.item() == 2


def test_a_frozen_class_that_does_something_else_or_has_no_counterpart_is_refused():
    _, report = convert(nn.Sequential(FrozenBatchNorm2d(4, factor=2.0)), "plain")
    assert report.refusals[0].reason == "it computes something else than its weight, bias and statistics say"
    _, report = convert(nn.Sequential(FrozenBatchNorm2d(4)), "torch")
    assert "torch.nn has no layer that stays frozen in training" in report.refusals[0].reason


def test_a_frozen_class_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(FrozenBatchNorm2d(4))
    new, _ = convert(model, "plain")
    assert new[0].frozen
    assert new[0].weight.device.type == "meta"
