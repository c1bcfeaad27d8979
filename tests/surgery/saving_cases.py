"""Networks, their gradients, and how closely they must agree, for the tests of `save_memory`."""

import itertools

import torch
from torch import Tensor, nn

import batchnorm as bn


def chain(num: int = 5, width: int = 6, act=lambda: nn.ReLU(inplace=True)) -> nn.Sequential:
    layers = [(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), act()) for _ in range(num)]
    return nn.Sequential(*itertools.chain.from_iterable(layers)).double()


IMAGES = (2, 6, 8, 8)


def accelerated(net: nn.Module, x: Tensor) -> nn.Module:
    return bn.accelerate(net, x, save_memory=True, channels_last=False)[0]


def gradients(net: nn.Module, x: Tensor, run=lambda net, x: net(x)) -> list[Tensor]:
    net.zero_grad()
    x = x.detach().requires_grad_()
    out = run(net, x)
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out))
    statistics = [b for b in net.buffers() if b.is_floating_point()]
    return [out.detach(), x.grad, *(p.grad for p in net.parameters()), *statistics]


def assert_same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
