"""Runs the tests of the Triton kernels in Triton's interpreter, which needs no GPU.

In processes of their own: the interpreter is chosen when Triton is imported, for good.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", ["test_gpu.py", "test_gpu_edges.py", "test_gpu_layers.py"])
def test_in_the_interpreter(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / name)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no CUDA device" not in run.stdout, f"the interpreter did not take over:\n{run.stdout}"
