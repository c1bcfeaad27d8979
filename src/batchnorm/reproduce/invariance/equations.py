"""The three equations on one layer, measured, and what eps must do to them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm import kernels
from batchnorm.functional import batch_norm
from batchnorm.kernels.dispatch import KERNELS
from batchnorm.reproduce.invariance.experiment import DTYPES, EQUATIONS

KERNEL_NAMES = ("reference", "torch", "cpu")
POWERS_OF_TWO = tuple(2.0**power for power in (-10, -7, -3, -1, 1, 3, 7, 10))


@dataclass(frozen=True)
class Layer:
    """A linear map before a normalization, with real inputs, in float64."""

    inputs: Tensor
    """u, shape (N, features) or (N, channels, H, W)."""
    weight: Tensor
    """W, of `torch.nn.Linear` or of `torch.nn.Conv2d` with 3×3 patches."""

    def apply(self, u: Tensor, weight: Tensor) -> Tensor:
        """W u."""
        return F.linear(u, weight) if u.dim() == 2 else F.conv2d(u, weight, padding=1)


@dataclass(frozen=True)
class Measured:
    """y and its gradients for one scale, in float64; the weight's gradient times a."""

    output: Tensor
    input: Tensor
    weight: Tensor

    def deviations(self, other: "Measured") -> dict[str, float]:
        """‖self − other‖ / ‖other‖ of each."""
        return {
            name: ((getattr(self, name) - getattr(other, name)).norm() / getattr(other, name).norm()).item()
            for name in EQUATIONS
        }

    def same_bits(self, other: "Measured") -> bool:
        """Whether nothing differs at all."""
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in EQUATIONS)


def measure(layer: Layer, cotangent: Tensor, a: float, eps: float, dtype: torch.dtype) -> Measured:
    """BN(aWu) and its gradients by the kernel in use; everything is rounded to ``dtype`` first."""
    u = layer.inputs.to(dtype).requires_grad_()
    weight = (a * layer.weight).to(dtype).requires_grad_()
    y, _ = batch_norm(layer.apply(u, weight), eps=eps)
    du, dw = torch.autograd.grad(y, (u, weight), cotangent.to(dtype))
    return Measured(y.detach().double(), du.double(), a * dw.double())


def predicted(layer: Layer, cotangent: Tensor, a: float, eps: float) -> Measured:
    """The same by calculation: BN without eps, and for each channel the share s that eps leaves of it.

    With x = Wu of variance σ², x̂ = (x − E[x])/σ and s = (1 + eps/(a²σ²))^(−1/2):
    BN(aWu) = s x̂, and what flows back to Wu is (s/σ)(dy − E[dy] − s² x̂ E[dy x̂]), whatever a is.
    """
    x = layer.apply(layer.inputs, layer.weight)
    around = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x, around, correction=0, keepdim=True)
    x_hat = (x - mean) / var.sqrt()
    s = (1 + eps / (a * a * var)) ** -0.5
    along = (cotangent * x_hat).mean(around, keepdim=True)
    dx = s / var.sqrt() * (cotangent - cotangent.mean(around, keepdim=True) - s**2 * x_hat * along)
    u, weight = layer.inputs.clone().requires_grad_(), layer.weight.clone().requires_grad_()
    du, dw = torch.autograd.grad(layer.apply(u, weight), (u, weight), dx)
    return Measured((s * x_hat).detach(), du, dw)


def try_layer(layer: Layer, scales: list[float], eps: float, seed: int) -> dict[str, Any]:
    """All scales, kernels, dtypes, with and without eps.

    Returns:
        ``deviations``: for each "dtype/kernel/eps" and equation, one number a scale, against a = 1.
        ``predicted``: the same by calculation, for eps; ``powers_of_two``: for each "dtype/kernel"
        how many of `POWERS_OF_TWO` change no bit at eps = 0. ``agreement``: see there. ``deviation``:
        smallest, median and largest σ of a channel. ``refused``: why a kernel was left out.
    """
    x = layer.apply(layer.inputs, layer.weight)
    cotangent = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found: dict[str, Any] = {"deviations": {}, "powers_of_two": {}, "refused": {}}
    for dtype_name in DTYPES:
        dtype = getattr(torch, dtype_name)
        for kernel in KERNEL_NAMES:
            why = KERNELS[kernel].refuses(x.to(dtype), None, None, None, None, "identity")
            if why:
                found["refused"][f"{dtype_name}/{kernel}"] = why
                continue
            with kernels.use(kernel):
                for eps_name, value in (("0", 0.0), ("eps", eps)):
                    base = measure(layer, cotangent, 1.0, value, dtype)
                    rows = [measure(layer, cotangent, a, value, dtype).deviations(base) for a in scales]
                    found["deviations"][f"{dtype_name}/{kernel}/{eps_name}"] = _columns(rows)
                base = measure(layer, cotangent, 1.0, 0.0, dtype)
                found["powers_of_two"][f"{dtype_name}/{kernel}"] = sum(
                    measure(layer, cotangent, a, 0.0, dtype).same_bits(base) for a in POWERS_OF_TWO
                )
    base = predicted(layer, cotangent, 1.0, eps)
    found["predicted"] = _columns([predicted(layer, cotangent, a, eps).deviations(base) for a in scales])
    found["agreement"] = agreement(found)
    sigma = x.transpose(0, 1).flatten(1).std(1, correction=0)
    found["deviation"] = [torch.quantile(sigma, q).item() for q in (0.0, 0.5, 1.0)]
    return found


def agreement(found: Mapping[str, Any]) -> float:
    """The largest |measured / predicted − 1| of any scale, kernel and equation, in float64, with eps.

    a = 1, against which all is held, is left out.
    """
    worst = 0.0
    for name, columns in found["deviations"].items():
        if name.startswith("float64/") and name.endswith("/eps"):
            for equation in EQUATIONS:
                measured, expected = np.array(columns[equation]), np.array(found["predicted"][equation])
                there = expected > 0
                worst = max(worst, float(np.abs(measured[there] / expected[there] - 1).max()))
    return worst


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in EQUATIONS}


def fc_layer(net: nn.Sequential, images: Tensor) -> Layer:
    """The second hidden layer of a batch-normalized `mlp`, with the sigmoids that enter it."""
    return _layer(net, "linear2", images)


def conv_layer(net: nn.Sequential, images: Tensor) -> Layer:
    """The second convolution of `conv_network`, with the feature maps that enter it."""
    return _layer(net, "conv2", images)


def _layer(net: nn.Module, name: str, images: Tensor) -> Layer:
    layer, caught = net.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda _, given: caught.append(given[0].detach().double()))
    with torch.no_grad():
        net(images)
    handle.remove()
    return Layer(caught[0], layer.weight.detach().double())


def conv_network(classes: int, normalize: Callable[[int], nn.Module], *, seed: int) -> nn.Sequential:
    """Two 3×3 convolutions of 8 and 16 maps with ``normalize`` and ReLU, each map's mean, and outputs."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential()
    for number, (inputs, maps) in enumerate(((1, 8), (8, 16)), start=1):
        net.add_module(f"conv{number}", nn.utils.skip_init(nn.Conv2d, inputs, maps, 3, padding=1, bias=False))
        net.add_module(f"norm{number}", normalize(maps))
        net.add_module(f"relu{number}", nn.ReLU())
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("output", nn.utils.skip_init(nn.Linear, 16, classes))
    for name, parameter in net.named_parameters():
        if name.startswith(("conv", "output")):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1, generator=generator)
            else:
                nn.init.zeros_(parameter)
    return net
