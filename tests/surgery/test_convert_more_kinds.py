"""Conversion to whitening, accumulating and example-weighing layers, back, and out into files."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.deploy import export

KINDS = {
    "whitened": ({"group_channels": 4, "iterations": 3}, "Whitened", "now batchnorm.WhitenedBatchNorm{}"),
    "accumulated": ({"micro_batches": 3}, "Accumulated", "now batchnorm.AccumulatedBatchNorm{}"),
    "evalnorm": ({"batch_size": 4}, "EvalNorm", "now batchnorm.EvalNorm{}"),
}


def network(last=False) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), bn.BatchNorm2d(6, activation="tanh"),
        nn.Flatten(2), nn.BatchNorm1d(6), nn.Unflatten(2, (1, 4, 4)), nn.BatchNorm3d(6), nn.Flatten(),
        nn.Linear(96, 5), bn.BatchNorm1d(5, channel_dim=-1),
    )  # fmt: skip
    for _ in range(3):
        net(torch.randn(8, 3, 6, 6))
    return net


@pytest.mark.parametrize(("to", "options"), [(to, o) for to, (o, _, _) in KINDS.items()], ids=KINDS)
def test_there_and_back_is_the_model_that_it_was(to, options):
    net, x = network(), torch.randn(8, 3, 6, 6)
    before = copy.deepcopy(net.state_dict())
    new, report = bn.convert(net, to=to, example=x, **options)
    assert [c.where for c in report.changes] == ["1", "3", "5", "7", "10"]
    assert [KINDS[to][2].format(d) in c.what for c, d in zip(report.changes, "22131", strict=False)]
    assert isinstance(new[1], nn.BatchNorm2d)
    assert (new[3].activation, new[10].channel_dim) == ("tanh", -1)
    again, report = bn.convert(new, to=to, example=x, **options)
    assert not report.changes
    for module in new.modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(
            module, getattr(bn.layers, KINDS[to][1])
        )
    back, report = bn.convert(again, to="plain", example=x)
    assert len(report.changes) == 5
    assert list(back.state_dict()) == list(before)
    assert all(torch.equal(before[name], t) for name, t in back.state_dict().items())
    assert torch.equal(back.eval()(x), bn.convert(net, to="plain")[0].eval()(x))


@pytest.mark.parametrize("frm", KINDS)
@pytest.mark.parametrize("to", KINDS)
def test_one_kind_becomes_another(frm, to):
    net, x = nn.Sequential(nn.BatchNorm1d(6)), torch.randn(8, 6)
    first, _ = bn.convert(net, to=frm, **KINDS[frm][0])
    straight, _ = bn.convert(net, to=to, **KINDS[to][0])
    other, report = bn.convert(first, to=to, example=x, **KINDS[to][0])
    assert len(report.changes) == (frm != to)
    assert list(other.state_dict()) == list(straight.state_dict())
    for mode in (True, False):
        assert torch.equal(other.train(mode)(x), straight.train(mode)(x))


def test_other_settings_are_a_change_and_a_model_keeps_its_statistics():
    net = network()
    four, _ = bn.convert(net, to="whitened", group_channels=4)
    two, report = bn.convert(four, to="whitened", group_channels=2)
    assert len(report.changes) == 5
    assert two[1].running_cov.shape == (6, 2)
    assert torch.equal(two[1].running_var, net[1].running_var)
    assert torch.equal(two[1].running_cov[::2, 0], net[1].running_var[::2])


def test_single_activations_do_not_whiten():
    net = nn.Sequential(bn.BatchNormPerActivation((3, 2)), nn.Flatten(), nn.BatchNorm1d(6))
    new, report = bn.convert(net, to="whitened")
    assert type(new[0]) is bn.BatchNormPerActivation
    assert [(r.where, "single activations" in r.reason) for r in report.refusals] == [("0", True)]
    for to in ("accumulated", "evalnorm"):
        assert not bn.convert(net, to=to, **KINDS[to][0])[1].refusals


def test_accelerate_fuses_activations_into_them():
    x = torch.randn(4, 3, 6, 6)
    for to, (options, _, _) in KINDS.items():
        net, _ = bn.convert(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), to=to, **options)
        net(x)
        fast, _ = bn.accelerate(net, x, save_memory=True)
        assert fast[1].activation == "relu", to
        for mode in (True, False):
            one, two = copy.deepcopy(net).train(mode), copy.deepcopy(fast).train(mode)
            grads = []
            for model in (one, two):
                y = model(x)
                y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
                grads.append((y.detach(), [p.grad for p in model.parameters()]))
            torch.testing.assert_close(grads[0], grads[1], msg=lambda m, to=to: f"{to}: {m}")


def test_a_sound_network_of_these_kinds_has_no_finding_that_is_wrong():
    batches = list(torch.randn(4, 16, 3, 6, 6))
    for to, (options, _, _) in KINDS.items():
        net, _ = bn.convert(network(), to=to, **options)
        for x in batches:
            net(x)
        bn.recalibrate(net, batches)
        before = copy.deepcopy(net.state_dict())
        found = bn.diagnose(net, batches).findings
        assert not [f.cause for f in found if f.level == "wrong"], to
        assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
        net[1].running_mean.add_(5)
        found = bn.diagnose(net, batches).findings
        assert [f.layers[0] for f in found if f.level == "wrong"][:1] == ["1"], to


@pytest.mark.parametrize("to", ["whitened", "evalnorm"])
def test_onnx_computes_what_the_layer_does_for_every_batch_size(to, tmp_path):
    pytest.importorskip("onnxruntime")
    net, _ = bn.convert(network(), to=to, **KINDS[to][0])
    net(torch.randn(8, 3, 6, 6))
    net.eval()
    export(net, torch.randn(3, 3, 6, 6), tmp_path / "m.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for num in (1, 5):
        x = torch.randn(num, 3, 6, 6)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), net(x).detach(), rtol=1e-4, atol=1e-4)
