"""Patterns of normalizations and their neighbours, each made of random sizes, with what becomes of them."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import batchnorm as bn


@dataclass(frozen=True)
class Sizes:
    """Batch, channels, other channels, two lengths; channels are even."""

    n: int
    c: int
    d: int
    h: int
    w: int


def trained(norm, positive=False):
    """Statistics, scale and shift as after training, no channel like another."""
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn_like(norm.running_mean) * 2)
        norm.running_var.copy_(torch.rand_like(norm.running_var) * 3 + 0.1)
        if norm.weight is not None:
            norm.weight.copy_(torch.rand_like(norm.weight) + 0.2)
            if not positive:
                norm.weight[::2].neg_()
        if norm.bias is not None:
            norm.bias.copy_(torch.randn_like(norm.bias))
    return norm


def norm1(c, **kw):
    return trained(nn.BatchNorm1d(c, **kw))


def norm2(c, **kw):
    return trained(nn.BatchNorm2d(c, **kw))


def norm3(c, **kw):
    return trained(nn.BatchNorm3d(c, **kw))


def each(*shape):
    return trained(bn.BatchNormPerActivation(shape))


class Net(nn.Module):
    """A forward given as a function of the module and its inputs."""

    def __init__(self, run, **children):
        super().__init__()
        self.run = run
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args):
        return self.run(self, *args)


def seq(*layers):
    return nn.Sequential(*layers)


class FrozenBatchNorm2d(nn.Module):
    """Buffers only, as torchvision and others write it."""

    def __init__(self, c, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(c))

    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        var, mean = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


class Recurrent(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.block = seq(nn.Linear(d, d), norm1(d), nn.Tanh())

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        return x


class Halves(nn.Module):
    """Channels cut in two, one half normalized, both shuffled: as in ShuffleNet."""

    def __init__(self, c, d):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c, 2 * d, 1), norm2(d)

    def forward(self, x):
        a, b = self.conv(x).chunk(2, 1)
        return torch.cat([self.bn(a), b.relu()], 1)


def frozen(model):
    model.eval()
    bn.freeze(model)
    return model


def joined_layer(s):
    layer = trained(bn.BatchNorm2d(s.d, activation="relu"))
    return Net(
        lambda m, x: m.bn(m.a(x), m.b(x)), a=nn.Conv2d(s.c, s.d, 3), b=nn.Conv2d(s.c, s.d, 3), bn=layer
    )


def branches(s):
    children = {f"conv{i}": nn.Conv2d(s.c, s.d, 1) for i in range(3)}
    return Net(
        lambda m, x: (lambda y: m.conv0(y) * m.conv1(y.mean((2, 3), keepdim=True)) + m.conv2(y))(m.bn(x)),
        bn=norm2(s.c),
        **children,
    )


def hooked(s):
    model = seq(seq(nn.Conv2d(s.c, s.d, 1), nn.Identity()), seq(norm2(s.d), nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, out: None)
    return model


def images(s):
    return (s.n, s.c, s.h, s.w)


def rows(s):
    return (s.n, s.c)


def texts(s):
    return (s.n, s.c, s.w)


def features_last(s):
    return (s.n, s.w, s.c)


def volumes(s):
    return (s.n, s.c, 4, s.h, 5)


def pads(mode):
    return {"padding": 2, "padding_mode": mode}


def two(s, run, norm=norm2, **more):
    """Two convolutions of the input and a normalization."""
    return Net(run, a=nn.Conv2d(s.c, s.d, 3), b=nn.Conv2d(s.c, s.d, 3), bn=norm(s.d), **more)


# Name: how it is made, the shape of its input. First what is folded, then what is left.
FOLDED = {
    "conv1d": (lambda s: seq(nn.Conv1d(s.c, s.d, 3, 2), norm1(s.d)), texts),
    "conv2d, grouped, dilated, strided": (
        lambda s: seq(nn.Conv2d(s.c, 2 * s.d, 3, 2, 3, 2, groups=2), norm2(2 * s.d)),
        images,
    ),
    "conv3d": (lambda s: seq(nn.Conv3d(s.c, s.d, 2, bias=False), norm3(s.d)), volumes),
    "depthwise": (lambda s: seq(nn.Conv2d(s.c, 2 * s.c, 3, groups=s.c), norm2(2 * s.c)), images),
    "reflected": (lambda s: seq(nn.Conv2d(s.c, s.d, 3, **pads("reflect")), norm2(s.d)), images),
    "replicated": (lambda s: seq(nn.Conv2d(s.c, s.d, 3, **pads("replicate")), norm2(s.d)), images),
    "circular": (lambda s: seq(nn.Conv1d(s.c, s.d, 3, **pads("circular")), norm1(s.d)), texts),
    "same": (lambda s: seq(nn.Conv2d(s.c, s.d, (3, 5), padding="same"), norm2(s.d)), images),
    "linear": (lambda s: seq(nn.Linear(s.c, s.d), norm1(s.d)), rows),
    "linear, not affine": (lambda s: seq(nn.Linear(s.c, s.d), norm1(s.d, affine=False)), rows),
    "linear, features last": (
        lambda s: seq(nn.Linear(s.c, s.d), trained(bn.BatchNorm1d(s.d, channel_dim=-1))),
        features_last,
    ),
    "transposed 1d": (lambda s: seq(nn.ConvTranspose1d(s.c, s.d, 3, 2, 1, 1), norm1(s.d)), texts),
    "transposed 2d": (lambda s: seq(nn.ConvTranspose2d(s.c, s.d, 2, 2), norm2(s.d)), images),
    "transposed 3d": (lambda s: seq(nn.ConvTranspose3d(s.c, s.d, 2, 2, bias=False), norm3(s.d)), volumes),
    "transposed, grouped": (
        lambda s: seq(nn.ConvTranspose2d(s.c, 4 * s.d, 3, 2, groups=2, dilation=2), norm2(4 * s.d)),
        images,
    ),
    "transposed, depthwise": (
        lambda s: seq(nn.ConvTranspose2d(s.c, s.c, 3, groups=s.c), norm2(s.c)),
        images,
    ),
    "before linear": (lambda s: seq(norm1(s.c), nn.Linear(s.c, s.d)), rows),
    "before conv": (lambda s: seq(norm2(s.c), nn.Conv2d(s.c, s.d, 3, 2, bias=False)), images),
    "before grouped conv": (lambda s: seq(norm2(s.c), nn.Conv2d(s.c, 2 * s.d, 3, groups=2)), images),
    "before depthwise conv": (lambda s: seq(norm2(s.c), nn.Conv2d(s.c, 2 * s.c, 3, groups=s.c)), images),
    "before conv1d": (lambda s: seq(norm1(s.c), nn.Conv1d(s.c, s.d, 3)), texts),
    "before conv3d": (lambda s: seq(norm3(s.c), nn.Conv3d(s.c, s.d, 2)), volumes),
    "before reflected conv": (
        lambda s: seq(norm2(s.c), nn.Conv2d(s.c, s.d, 3, **pads("reflect"))),
        images,
    ),
    "before replicated conv": (
        lambda s: seq(norm2(s.c), nn.Conv2d(s.c, s.d, 3, **pads("replicate"))),
        images,
    ),
    "before circular conv": (
        lambda s: seq(norm2(s.c), nn.Conv2d(s.c, s.d, 3, **pads("circular"))),
        images,
    ),
    "before pointwise transposed": (lambda s: seq(norm2(s.c), nn.ConvTranspose2d(s.c, s.d, 1)), images),
    "before transposed that crops its borders": (
        lambda s: seq(norm2(s.c), nn.ConvTranspose2d(s.c, 2 * s.d, 3, padding=2, groups=2)),
        images,
    ),
    "behind and before": (
        lambda s: seq(norm2(s.c), nn.Conv2d(s.c, s.d, 1), norm2(s.d), nn.ReLU(), nn.Conv2d(s.d, s.c, 1)),
        images,
    ),
    "two behind": (lambda s: seq(nn.Conv2d(s.c, s.d, 3, padding=1), norm2(s.d), norm2(s.d)), images),
    "two before": (lambda s: seq(norm2(s.c), norm2(s.c), nn.Conv2d(s.c, s.d, 3)), images),
    "after cat": (
        lambda s: two(s, lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), lambda d: norm2(2 * d)),
        images,
    ),
    "half of a chunk": (lambda s: Halves(s.c, s.d), images),
    "both halves, normalized after cat": (
        lambda s: Net(
            lambda m, x: (lambda y: m.bn(torch.cat([y[1], y[0]], 1)))(torch.tensor_split(m.a(x), 2, 1)),
            a=nn.Conv2d(s.c, 2 * s.d, 1),
            bn=norm2(2 * s.d),
        ),
        images,
    ),
    "a slice": (
        lambda s: Net(lambda m, x: m.bn(m.a(x)[:, 1:]), a=nn.Conv2d(s.c, s.d + 1, 1), bn=norm2(s.d)),
        images,
    ),
    "cropped": (
        lambda s: two(
            s,
            lambda m, x: m.bn(torch.cat([m.a(x)[:, :, 1:], m.b(x)[..., :-1, :]], 1)),
            lambda d: norm2(2 * d),
        ),
        images,
    ),
    "residual sum": (lambda s: two(s, lambda m, x: m.bn(m.a(x) + m.b(x))), images),
    "difference": (lambda s: two(s, lambda m, x: m.bn(m.a(x) - m.b(x)).relu()), images),
    "sum in place": (lambda s: two(s, lambda m, x: m.bn(m.a(x).add_(m.b(x)))), images),
    "sum of folded layers": (
        lambda s: two(s, lambda m, x: m.bn(m.n1(m.a(x)) + m.b(x)), n1=norm2(s.d)),
        images,
    ),
    "flatten, linear": (
        lambda s: seq(norm2(s.c), nn.Flatten(), nn.Linear(s.c * s.h * s.w, s.d)),
        images,
    ),
    "linear, unflatten": (
        lambda s: seq(nn.Linear(s.c, s.d * 6), nn.Unflatten(1, (s.d, 2, 3)), norm2(s.d)),
        rows,
    ),
    "linear, rows of a sequence": (
        lambda s: Net(
            lambda m, x: m.bn(m.fc(x).reshape(-1, s.d)).view(x.shape[0], -1, s.d),
            fc=nn.Linear(s.c, s.d),
            bn=norm1(s.d),
        ),
        features_last,
    ),
    "permute, linear": (
        lambda s: Net(lambda m, x: m.fc(m.bn(x).permute(0, 2, 3, 1)), bn=norm2(s.c), fc=nn.Linear(s.c, s.d)),
        images,
    ),
    "linear, transpose": (
        lambda s: Net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)), fc=nn.Linear(s.c, s.d), bn=norm1(s.d)),
        features_last,
    ),
    "per activation, linear": (
        lambda s: seq(each(s.c, s.h, s.w), nn.Flatten(), nn.Linear(s.c * s.h * s.w, s.d)),
        images,
    ),
    "linear, per activation": (lambda s: seq(nn.Linear(s.c, s.d), each(s.d)), rows),
    "linear, unflatten, per activation": (
        lambda s: seq(nn.Linear(s.c, s.d * 6), nn.Unflatten(1, (s.d, 2, 3)), each(s.d, 2, 3)),
        rows,
    ),
    "average pool behind": (lambda s: seq(norm2(s.c), nn.AvgPool2d(2), nn.Conv2d(s.c, s.d, 1)), images),
    "average pool ahead": (lambda s: seq(nn.Conv2d(s.c, s.d, 3), nn.AvgPool2d(2), norm2(s.d)), images),
    "average pool that does not count its padding": (
        lambda s: seq(
            nn.Conv2d(s.c, s.d, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), norm2(s.d)
        ),
        images,
    ),
    "adaptive pool, flatten, linear": (
        lambda s: seq(norm2(s.c), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * s.c, s.d)),
        images,
    ),
    "mean, linear": (
        lambda s: Net(lambda m, x: m.fc(m.bn(x).mean([2, 3])), bn=norm2(s.c), fc=nn.Linear(s.c, s.d)),
        images,
    ),
    "max pool, positive scales": (
        lambda s: seq(nn.Conv2d(s.c, s.d, 1), nn.MaxPool2d(3, 2, 1), trained(nn.BatchNorm2d(s.d), True)),
        images,
    ),
    "one normalization for two convolutions": (
        lambda s: two(s, lambda m, x: m.bn(m.a(x)) * m.bn(m.b(x))),
        images,
    ),
    "one block in three calls": (lambda s: Recurrent(s.c), rows),
    "pixel shuffle": (
        lambda s: seq(nn.Conv2d(s.c, 4 * s.d, 3), nn.PixelShuffle(2), norm2(s.d)),
        images,
    ),
    "pixel unshuffle, conv": (
        lambda s: Net(
            lambda m, x: m.a(F.pixel_unshuffle(m.bn(F.interpolate(x, scale_factor=2)), 2)),
            bn=norm2(s.c),
            a=nn.Conv2d(4 * s.c, s.d, 1),
        ),
        images,
    ),
    "channel shuffle": (
        lambda s: seq(nn.Conv2d(s.c, 2 * s.d, 1), nn.ChannelShuffle(2), norm2(2 * s.d)),
        images,
    ),
    "upsampled, nearest": (
        lambda s: seq(nn.Conv2d(s.c, s.d, 1), nn.Upsample(scale_factor=2), norm2(s.d)),
        images,
    ),
    "upsampled, bilinear": (
        lambda s: seq(norm2(s.c), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(s.c, s.d, 1)),
        images,
    ),
    "arithmetic with numbers ahead": (
        lambda s: Net(lambda m, x: m.bn(-(m.a(x) * 2 + 1)).relu(), a=nn.Linear(s.c, s.d), bn=norm1(s.d)),
        rows,
    ),
    "arithmetic with numbers behind": (
        lambda s: Net(lambda m, x: m.fc(3 - m.bn(x.relu()) / 4 + 1), bn=norm1(s.c), fc=nn.Linear(s.c, 2)),
        rows,
    ),
    "dropout": (lambda s: seq(norm1(s.c), nn.Dropout(0.5), nn.Linear(s.c, s.d)), rows),
    "reflected by a layer of its own": (
        lambda s: seq(norm2(s.c), nn.ReflectionPad2d(1), nn.Conv2d(s.c, s.d, 3)),
        images,
    ),
    "several convolutions": (branches, images),
    "frozen by flag": (lambda s: frozen(seq(nn.Conv2d(s.c, s.d, 1), norm2(s.d))), images),
    "frozen by class": (
        lambda s: seq(nn.Conv2d(s.c, s.d, 1), trained(FrozenBatchNorm2d(s.d)), nn.ReLU()),
        images,
    ),
    "synchronized": (lambda s: seq(nn.Conv2d(s.c, s.d, 1), trained(nn.SyncBatchNorm(s.d))), images),
    "activation carried": (
        lambda s: seq(nn.Conv2d(s.c, s.d, 1), trained(bn.BatchNorm2d(s.d, activation="silu"))),
        images,
    ),
    "residual and activation carried": (joined_layer, images),
    "under two names, each in a call": (
        lambda s: (lambda b: seq(nn.Linear(s.c, s.c), b, nn.ReLU(), nn.Linear(s.c, s.c), b))(norm1(s.c)),
        rows,
    ),
}
LEFT = {
    "linear, other dimension": (lambda s: seq(nn.Linear(s.c, s.d), norm1(s.w)), features_last),
    "before zero-padded conv": (lambda s: seq(norm2(s.c), nn.Conv2d(s.c, s.d, 3, padding=1)), images),
    "before conv padded to the same size": (
        lambda s: seq(norm1(s.c), nn.Conv1d(s.c, s.d, 3, padding="same")),
        texts,
    ),
    "before transposed": (lambda s: seq(norm2(s.c), nn.ConvTranspose2d(s.c, s.d, 3, 2)), images),
    "before transposed without overlap": (
        lambda s: seq(norm2(s.c), nn.ConvTranspose2d(s.c, s.d, 2, 2)),
        images,
    ),
    "behind zero padding": (
        lambda s: seq(nn.Conv2d(s.c, s.d, 1), nn.ZeroPad2d(1), norm2(s.d), nn.ReLU()),
        images,
    ),
    "before zero padding": (
        lambda s: Net(lambda m, x: m.a(F.pad(m.bn(x), (1, 1))), bn=norm2(s.c), a=nn.Conv2d(s.c, s.d, 1)),
        images,
    ),
    "cat with a nonlinear branch": (
        lambda s: two(s, lambda m, x: m.bn(torch.cat([m.a(x).relu(), m.b(x)], 1)), lambda d: norm2(2 * d)),
        images,
    ),
    "cat of one value twice": (
        lambda s: Net(
            lambda m, x: (lambda y: m.bn(torch.cat([y, y], 1)))(m.a(x)),
            a=nn.Conv2d(s.c, s.d, 1),
            bn=norm2(2 * s.d),
        ),
        images,
    ),
    "cat of a value used elsewhere": (
        lambda s: two(
            s,
            lambda m, x: (lambda y: m.bn(torch.cat([y, m.b(x)], 1)).sum() + y)(m.a(x)),
            lambda d: norm2(2 * d),
        ),
        images,
    ),
    "overlapping slices": (
        lambda s: Net(
            lambda m, x: (lambda y: m.bn(y[:, 1:]) * y[:, :-1])(m.a(x)),
            a=nn.Conv2d(s.c, s.d + 1, 1),
            bn=norm2(s.d),
        ),
        images,
    ),
    "sum with the input": (
        lambda s: Net(lambda m, x: m.bn(m.a(x) + x), a=nn.Conv2d(s.c, s.c, 1), bn=norm2(s.c)),
        images,
    ),
    "sum with itself": (
        lambda s: Net(lambda m, x: (lambda y: m.bn(y + y))(m.a(x)), a=nn.Conv2d(s.c, s.c, 1), bn=norm2(s.c)),
        images,
    ),
    "sum of different shapes": (
        lambda s: Net(
            lambda m, x: m.bn(m.a(x) + m.b(x.mean((2, 3), keepdim=True))),
            a=nn.Conv2d(s.c, s.d, 1),
            b=nn.Conv2d(s.c, s.d, 1),
            bn=norm2(s.d),
        ),
        images,
    ),
    "forward into a sum": (
        lambda s: Net(
            lambda m, x: m.b(m.bn(x) + m.a(x)),
            a=nn.Conv2d(s.c, s.c, 1),
            b=nn.Conv2d(s.c, 2, 1),
            bn=norm2(s.c),
        ),
        images,
    ),
    "per activation behind conv": (
        lambda s: seq(nn.Conv2d(s.c, s.d, 1), each(s.d, s.h, s.w)),
        images,
    ),
    "average pool that counts its padding": (
        lambda s: seq(nn.Conv2d(s.c, s.d, 1), nn.AvgPool2d(3, 2, 1), norm2(s.d)),
        images,
    ),
    "average pool with a divisor": (
        lambda s: seq(nn.Conv2d(s.c, s.d, 1), nn.AvgPool2d(2, divisor_override=3), norm2(s.d)),
        images,
    ),
    "pool over locations with their own scales": (
        lambda s: seq(each(s.c, s.h, s.w), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(s.c, s.d)),
        images,
    ),
    "max pool, scales of both signs": (
        lambda s: seq(nn.Conv2d(s.c, s.d, 1), nn.MaxPool2d(2), norm2(s.d)),
        images,
    ),
    "nonlinearity between": (lambda s: seq(nn.Conv2d(s.c, s.d, 1), nn.ReLU(), norm2(s.d)), images),
    "one layer, another map in each call": (
        lambda s: Net(
            lambda m, x: m.bn(torch.cat([m.a(x), m.a(-x)], 1)), a=nn.Conv2d(s.c, s.d, 1), bn=norm2(2 * s.d)
        ),
        images,
    ),
    "one convolution for two callers": (lambda s: two(s, lambda m, x: m.bn(m.a(x)) + m.a(x)), images),
    "pixel shuffle, conv": (
        lambda s: seq(norm2(4 * s.c), nn.PixelShuffle(2), nn.Conv2d(s.c, s.d, 1)),
        lambda s: (s.n, 4 * s.c, s.h, s.w),
    ),
    "dropout at work in evaluation": (
        lambda s: Net(
            lambda m, x: m.fc(F.dropout(m.bn(x), 0.5, True)), bn=norm1(s.c), fc=nn.Linear(s.c, s.d)
        ),
        rows,
    ),
    "input overwritten": (
        lambda s: Net(
            lambda m, x: (lambda y, _: m.fc(y))(m.bn(x), x.mul_(2)), bn=norm1(s.c), fc=nn.Linear(s.c, s.d)
        ),
        rows,
    ),
    "returned too": (
        lambda s: Net(lambda m, x: (lambda y: (m.fc(y), y))(m.bn(x)), bn=norm1(s.c), fc=nn.Linear(s.c, s.d)),
        rows,
    ),
    "multiplied by a value": (
        lambda s: Net(lambda m, x: m.bn(m.a(x) * x), a=nn.Linear(s.c, s.c), bn=norm1(s.c)),
        rows,
    ),
    "seen by a hook": (hooked, images),
    "alone": (lambda s: norm2(s.c), images),
    "alone, activation carried": (
        lambda s: seq(nn.ReLU(), trained(bn.BatchNorm2d(s.c, activation="gelu"))),
        images,
    ),
    "alone, per activation": (lambda s: seq(nn.ReLU(), each(s.c, s.h, s.w)), images),
    "alone, features last": (
        lambda s: seq(nn.ReLU(), trained(bn.BatchNorm1d(s.c, channel_dim=-1))),
        features_last,
    ),
    "alone, residual": (
        lambda s: Net(
            lambda m, x: m.bn(x.relu(), x.abs(), activation="relu"), bn=trained(bn.BatchNorm2d(s.c))
        ),
        images,
    ),
}


def made(case, sizes):
    """A model of a case in float64, and two inputs: the example and another, far from zero."""
    make, shape = case
    model = copy.deepcopy(make(sizes)).double().eval()
    x = torch.randn(shape(sizes), dtype=torch.float64)
    return model, x, torch.randn_like(x) * 3 + 50
