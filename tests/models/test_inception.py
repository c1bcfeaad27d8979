"""Inception against the paper's table, and each of its options by what it changes."""

import math

import pytest
import torch
from torch import nn

from batchnorm import BatchNormPerActivation
from batchnorm.models.inception import TABLE, inception

ROWS = {
    "conv1": (64, 112, 112),
    "pool1": (64, 56, 56),
    "conv2": (192, 56, 56),
    "pool2": (192, 28, 28),
    "inception3a": (256, 28, 28),
    "inception3b": (320, 28, 28),
    "inception3c": (576, 14, 14),
    "inception4a": (576, 14, 14),
    "inception4b": (576, 14, 14),
    "inception4c": (576, 14, 14),
    "inception4d": (576, 14, 14),
    "inception4e": (1024, 7, 7),
    "inception5a": (1024, 7, 7),
    "inception5b": (1024, 7, 7),
    "pool": (1024, 1, 1),
    "head": (1000,),
}


def on_meta(**options):
    with torch.device("meta"):
        return inception(**options)


def shapes(net, size):
    found = {}
    x = torch.empty(2, 3, size, size, device="meta")
    for name, layer in net.named_children():
        x = layer(x)
        found[name] = tuple(x.shape[1:])
    return found


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("separable", [False, True], ids=["full", "separable"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "bn"])
def test_every_row_has_the_papers_output(normalize, separable):
    found = shapes(on_meta(normalize=normalize, separable=separable, response_norm=True), 224)
    assert {name: found[name] for name in ROWS} == ROWS


def test_projections_as_printed_contradict_the_papers_sums():
    found = shapes(on_meta(projection=128), 224)
    assert (found["inception4c"], found["inception4d"]) == ((608, 14, 14), (608, 14, 14))
    assert found["inception4e"] == (1056, 7, 7)


@pytest.mark.parametrize(
    ("options", "num"),
    [
        # 11.19 million, with projections of 96 channels in 4c and 4d.
        ({}, 11_194_984),
        # 32 channels more out of 4c and of 4d, and into all that follows.
        ({"projection": 128}, 11_194_984 + 2 * (32 * 576 + 64) + 32 * (512 + 320 + 832)),
        # γ and β of 9,952 feature maps in place of one bias each.
        ({"normalize": False}, 11_194_984 - 9_952),
        # 3·64·49 → 3·8·49 + 24·64 weights.
        ({"separable": True}, 11_194_984 - 9_408 + 2_712),
        # The paper's 13.6 million.
        ({"separable": True, "heads": 1}, 13_604_904),
    ],
    ids=["default", "projections as printed", "without BN", "separable", "with a head"],
)
def test_parameters(options, num):
    assert count(on_meta(**options)) == num


def test_normalized_layers():
    net = on_meta()
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 69
    assert all(m.bias is None for m in convolutions)
    plain = on_meta(normalize=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert all(m.bias is not None for m in plain.modules() if isinstance(m, nn.Conv2d))


def test_stem_for_small_images_keeps_the_body():
    small = shapes(on_meta(stem="cifar"), 32)
    for name in TABLE:
        channels, height, _ = ROWS[f"inception{name}"]
        # 8×8 where the paper has 28×28, and halved as often.
        side = {28: 8, 14: 4, 7: 2}[height]
        assert small[f"inception{name}"] == (channels, side, side)
    assert small["pool"] == (1024, 1, 1)


def test_width_scales_every_channel():
    net = on_meta(width=0.375, stem="cifar", classes=10)
    found = shapes(net, 32)
    assert found["conv1"] == (24, 32, 32)
    assert found["inception3a"] == (96, 8, 8)
    assert found["inception4d"] == (216, 4, 4)
    assert found["inception5b"] == (384, 2, 2)
    assert found["head"] == (10,)
    # Never without any channel.
    assert shapes(on_meta(width=0.001, stem="cifar"), 32)["inception5b"][0] >= 4


def test_sigmoid_takes_the_place_of_every_relu():
    kinds = [type(m) for m in on_meta(activation="sigmoid", heads=1).modules()]
    assert kinds.count(nn.Sigmoid) == 71
    assert nn.ReLU not in kinds


def test_response_normalization_and_dropout_stand_where_the_paper_has_them():
    names = list(dict(on_meta(response_norm=True, dropout=0.4).named_children()))
    assert names[:7] == ["conv1", "pool1", "norm1", "conv2_reduce", "conv2", "norm2", "pool2"]
    assert names[-4:] == ["pool", "flatten", "dropout", "head"]
    assert on_meta(dropout=0.4).dropout.p == 0.4


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_last_module_normalized_per_activation(stem):
    size, side = (224, 7) if stem == "imagenet" else (32, 2)
    net = inception(10, stem=stem, width=0.1, per_activation=True)
    kinds = {name: m for name, m in net.named_modules() if isinstance(m, BatchNormPerActivation)}
    assert len(kinds) == 7
    assert all(name.startswith("inception5b") for name in kinds)
    assert all(m.shape[1:] == (side, side) for m in kinds.values())
    assert net(torch.randn(3, 3, size, size)).shape == (3, 10)


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_speak_in_training_only(heads):
    net = inception(7, width=0.1, heads=heads, seed=1)
    x = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    in_training = net(x)
    assert [tuple(logits.shape) for logits in in_training] == [(4, 7)] * (1 + heads)
    assert net.eval()(x).shape == (4, 7)
    # The first of the heads is the upper one; its gradient reaches 4d, and no module above it.
    net.train().zero_grad()
    net(x)[1].square().sum().backward()
    assert net.inception4d.one_by_one.conv.weight.grad.abs().max() > 0
    assert net.inception4e.three_by_three[0].conv.weight.grad is None


def test_initial_weights():
    net = inception(10, seed=0)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 30_000:
            std = math.sqrt(2 / layer.weight[0].numel())
            assert layer.weight.std().item() == pytest.approx(std, rel=0.03), name
    assert net.head.weight.std().item() == pytest.approx(1 / 32, rel=0.03)
    assert net.head.bias.eq(0).all()
    scaled = inception(10, seed=0, init_scale=1.5)
    torch.testing.assert_close(scaled.conv2.conv.weight, 1.5 * net.conv2.conv.weight)
    assert scaled.head.weight.equal(net.head.weight)


def test_networks_of_a_seed_begin_alike_with_and_without_bn():
    plain, normalized = (inception(10, stem="cifar", width=0.1, normalize=n, seed=4) for n in (False, True))
    weights = [[m.weight for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (plain, normalized)]
    assert all(a.equal(b) for a, b in zip(*weights, strict=True))
    other = inception(10, stem="cifar", width=0.1, seed=5)
    assert not other.conv1.conv.weight.equal(normalized.conv1.conv.weight)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"projection": 64}, "projection must be 96, or 128"),
        ({"heads": 3}, "heads must be 0, 1 or 2, got 3"),
        ({"width": 0}, "width must be above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"classes": 0}, "classes must be 1 or more"),
        ({"init_scale": 0}, "init_scale must be above 0"),
        ({"image_size": 4}, "image_size must be 8 or more"),
        ({"normalize": False, "per_activation": True}, "needs normalize=True"),
        ({"heads": 1, "image_size": 64}, "give larger images, or heads=0"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        inception(**{"classes": 10, **options})
