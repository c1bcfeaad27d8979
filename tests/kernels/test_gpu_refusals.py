"""Where no GPU or no Triton is, the GPU kernels say so, and importing them costs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from gpu_cases import INTERPRETED

from batchnorm.kernels import gpu


def test_a_tensor_elsewhere_is_refused_with_its_device():
    x = torch.randn(4, 3, device="meta" if INTERPRETED else "cpu")
    reason = gpu.refuses(x, None, None, None, None, "relu")
    assert reason == f"it runs on CUDA devices, and the input is on {x.device}"


def test_without_triton_it_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "_has_triton", lambda: False)
    reason = gpu.refuses(torch.randn(4, 3), None, None, None, None, "relu")
    assert reason.startswith("Triton is not installed")


def test_importing_the_host_part_imports_no_triton():
    code = "import sys, batchnorm.kernels.gpu; assert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_benchmark_says_that_it_needs_a_gpu():
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, script], env=hidden, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert "needs a CUDA device" in run.stdout
