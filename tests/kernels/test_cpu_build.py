"""Compiling, keeping and finding kernels; forks, threads that train at once, folders that refuse."""

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from cpu_cases import inputs, last, run

import batchnorm as bn
from batchnorm.kernels import cpu, cpu_build, cpu_threads
from batchnorm.kernels.cpu_build import Spec

pytest.importorskip("numba", reason="the CPU's kernels need numba")

SPEC = Spec("running", "move", "float32", ())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_build._say_uncached.cache_clear()
    return tmp_path / "batchnorm"


def works(kernel) -> bool:
    running, tracked = torch.zeros(2), torch.tensor(0)
    moments = torch.ones(2)
    given = {"splits": 1, "N": 5, "C": 2, "S": 1, "mean": moments.data_ptr(), "var": moments.data_ptr()}
    given |= {"running_mean": running.data_ptr(), "running_var": running.data_ptr(), "momentum": 0.5}
    given |= {"tracked": tracked.data_ptr()}
    block = cpu_threads.PACK(*(given.get(name, 0) for name in cpu_threads.FIELDS[4:]))
    cpu_threads.run(kernel, block, 1)
    return tracked.item() == 1


def test_machine_code_is_kept_and_found_by_the_next_process(cache, monkeypatch):
    assert works(cpu_build.compiled.__wrapped__(SPEC))
    (kept,) = cache.iterdir()
    monkeypatch.setattr(cpu_build, "_optimized", lambda spec: pytest.fail("compiled again"))
    assert works(cpu_build.compiled.__wrapped__(SPEC))
    assert kept.suffix == ".o"


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:40] + b"x" + b[41:], lambda b: b""])
def test_a_damaged_file_is_compiled_again(cache, damage):
    cpu_build.compiled.__wrapped__(SPEC)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert works(cpu_build.compiled.__wrapped__(SPEC))
    assert len(kept.read_bytes()) == len(whole)


def test_other_sources_are_other_files(cache, monkeypatch):
    cpu_build.compiled.__wrapped__(SPEC)
    monkeypatch.setattr(cpu_build, "_sources", lambda: b"another version")
    cpu_build.compiled.__wrapped__(SPEC)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("what", ["a file in its place", "no home"])
def test_a_folder_that_cannot_be_written_is_said_once_and_kernels_run(tmp_path, monkeypatch, caplog, what):
    cpu_build._say_uncached.cache_clear()
    if what == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(cpu_build.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        (tmp_path / "batchnorm").write_text("not a folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING, "batchnorm"):
        for _ in range(2):
            assert works(cpu_build.compiled.__wrapped__(SPEC))
    (record,) = caplog.records
    assert "not kept for later processes" in record.message


def in_process(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "2"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


STEP = """
import sys, torch, batchnorm as bn
assert not {"numba", "llvmlite", "triton"} & set(sys.modules), "imported before it is needed"
layer, x = bn.BatchNorm2d(4, activation="relu"), torch.randn(8, 4, 40, 40, requires_grad=True)
layer(x).backward(torch.randn(8, 4, 40, 40))
print(layer.num_batches_tracked.item(), "numba" in sys.modules)
"""


def test_importing_compiles_nothing_and_later_processes_do_without_numba():
    in_process(STEP)
    assert in_process(STEP) == "1 False"


def test_it_runs_on_torchs_openmp_and_loads_no_other():
    libraries = in_process(
        STEP + "print(*{l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.rsplit('/', 1)[-1]})"
    )
    assert len(libraries.splitlines()[-1].split()) == 1
    assert cpu_threads._openmp() is not None


def train_some(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    arguments = inputs((6, 5, 60, 61))
    return run(cpu, *arguments)[0]["dx"]


def test_two_python_threads_at_once_give_what_each_gives_alone():
    torch.set_num_threads(2)
    alone = {seed: train_some(seed) for seed in (1, 2)}
    arguments = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        arguments[seed] = inputs((6, 5, 60, 61))
    wrong = []

    def work(seed):
        for _ in range(30):
            if not torch.equal(run(cpu, *arguments[seed])[0]["dx"], alone[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


FORKED = """
import os, sys, torch, batchnorm as bn, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # that threads are running is the point
torch.set_num_threads(2)
layer, x = bn.BatchNorm2d(4), torch.randn(8, 4, 40, 40)
expected = layer(x)
child = os.fork()
if child == 0:
    y = layer(x)
    torch.set_num_threads(1)  # of PyTorch's own operations: their threads did not live on either
    os._exit(0 if torch.allclose(y, expected, atol=1e-6) else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_does_not_wait_for_threads_that_it_has_not():
    assert in_process(FORKED) == "0"


def test_without_torchs_pool_python_threads_give_the_same_bits(monkeypatch):
    torch.set_num_threads(2)
    for layout in (lambda t: t, last):
        arguments = inputs((6, 5, 60, 61), layout=layout)
        pooled, _ = run(cpu, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_threads, "_openmp", lambda: None)
            plain, _ = run(cpu, *arguments)
        assert all(torch.equal(plain[name], pooled[name]) for name in pooled)


def test_a_library_without_the_pool_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(cpu_threads.torch, "__file__", "/nowhere/torch/__init__.py")
    with caplog.at_level(logging.INFO, "batchnorm"):
        assert cpu_threads._openmp.__wrapped__() is None
    assert "Python threads" in caplog.text


def test_a_model_of_an_older_processor_runs(cache):
    # Code for a processor without AVX: what the compiler makes of it is judged by running it.
    code = """
from llvmlite import binding
binding.get_host_cpu_name = lambda: "x86-64"
binding.get_host_cpu_features = lambda: type("F", (), {"flatten": lambda self: ""})()
import torch
from batchnorm.kernels import cpu, reference
x = torch.randn(8, 5, 33)
y, _ = cpu.forward(x, None, None, None, None, 1e-5, "gelu")
expected, _ = reference.forward(x, None, None, None, None, 1e-5, "gelu")
print((y - expected).abs().max().item() < 1e-5)
"""
    if os.uname().machine != "x86_64":
        pytest.skip("names a processor of another architecture")
    assert in_process(code, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="") == "True"


def test_numba_missing_is_a_reason_not_an_error(monkeypatch):
    monkeypatch.setattr(cpu, "FOUND", False)
    x = torch.randn(64, 4, 40, 40, requires_grad=True)
    layer, plain = bn.BatchNorm2d(4, activation="relu"), torch.nn.BatchNorm2d(4)
    torch.testing.assert_close(layer(x), plain(x).relu())
    torch.testing.assert_close(layer.running_var, plain.running_var)
    with bn.kernels.use("cpu"), pytest.raises(ValueError, match="numba is not installed"):
        layer(x)


def test_a_later_process_is_ready_soon():
    code = STEP + "import time\n" + "\n"
    in_process(code)
    timed = """
import time, torch, batchnorm as bn
layer, x = bn.BatchNorm2d(4, activation="relu"), torch.randn(8, 4, 40, 40, requires_grad=True)
start = time.perf_counter()
layer(x)
print(time.perf_counter() - start)
"""
    assert float(in_process(timed)) < 5


def test_data_loader_workers_normalize():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(train_some, (3,)).get(120)
    torch.testing.assert_close(found, train_some(3), rtol=1e-4, atol=1e-5)
    assert time.monotonic() > 0
