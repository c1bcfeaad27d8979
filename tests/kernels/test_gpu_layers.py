"""Layers and functions on the Triton kernels, as a user reaches them; and the benchmark's judge."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import DEVICE, need_device, small_tiles
from torch import nn

import batchnorm as bn
from batchnorm.kernels import use

need_device()


@pytest.fixture
def splits(monkeypatch):
    small_tiles(monkeypatch)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_layer_is_torchs_layer_and_relu(training, splits):
    theirs = nn.BatchNorm2d(6).to(DEVICE)
    nn.init.normal_(theirs.weight)
    theirs.running_mean.normal_()
    ours = bn.BatchNorm2d(6, activation="relu").to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    theirs.train(training)
    ours.train(training)
    x = torch.randn(5, 6, 7, 3, device=DEVICE).to(memory_format=torch.channels_last)
    dy = torch.randn_like(x)
    for _ in range(2):
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        with use("gpu"):
            y = ours(mine)
            y.backward(dy)
        expected = F.relu(theirs(other))
        expected.backward(dy)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-4)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("activation", "masked"), [(None, False), ("relu", True), ("gelu", False)])
def test_gradients_of_first_and_second_order(activation, masked):
    x, residual = (torch.randn(4, 2, 3, dtype=torch.float64, device=DEVICE).requires_grad_() for _ in "xr")
    weight, bias = (torch.randn(2, dtype=torch.float64, device=DEVICE).requires_grad_() for _ in "wb")
    mask = torch.rand(4, 3, device=DEVICE) > 0.3 if masked else None

    def f(x, weight, bias, residual):
        fused = {"residual": residual, "mask": mask, "activation": activation}
        return bn.functional.batch_norm(x, weight, bias, **fused)[0]

    with use("gpu"):
        assert torch.autograd.gradcheck(f, (x, weight, bias, residual), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, (x, weight, bias, residual), fast_mode=True)


def test_a_kernel_asked_for_that_cannot_run_says_why():
    x = torch.randn(4, 3, device=DEVICE).to(torch.float8_e5m2)
    with use("gpu"), pytest.raises(ValueError, match="'gpu' was asked for and cannot run: it has no kernel"):
        bn.functional.batch_norm(x)


def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", ["", "y", "dweight"])
def test_the_benchmark_times_no_wrong_numbers(fault):
    theirs = nn.BatchNorm2d(4).to(DEVICE)
    ours = bn.BatchNorm2d(4, activation="relu").to(DEVICE)
    if fault == "y":
        nn.init.constant_(ours.bias, 0.01)
    if fault == "dweight":
        ours.weight.register_hook(lambda gradient: gradient * 1.001)
    x = torch.randn(8, 4, 5, 5, device=DEVICE).requires_grad_()
    said = benchmark().judge(x, torch.randn_like(x), ours, theirs)
    assert said.startswith(f"{fault} is off by") if fault else said == ""
