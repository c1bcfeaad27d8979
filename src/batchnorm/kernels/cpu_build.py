"""Compiling a kernel once, and keeping its machine code on disk for later processes.

numba turns the kernel into optimized LLVM code; llvmlite turns that into machine code, which is
kept in the user's cache folder. A process that finds it there needs llvmlite alone, which loads
in a tenth of numba's time.
"""

import ctypes
import hashlib
import os
import threading
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from batchnorm.files import write_bytes
from batchnorm.kernels.cpu_threads import LOG, Compiled

_ENTRY = "batchnorm_kernel"
_lock = threading.RLock()
_engines: list[Any] = []  # their code is called by address: they live as long as the process


class Spec(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        room: "planes", "rows" or "running": the module ``cpu_planes`` and so on.
        function: In that module, what makes the kernel: of ``kind`` and the ``options``.
        kind: What numbers are stored as: "float32", "float64", or "uint16" for the bits of bfloat16.
        options: Of a transform: the activation, whether there is a residual, of planes whether a mask.
    """

    room: str
    function: str
    kind: str
    options: tuple[str | bool, ...]


@cache
def compiled(spec: Spec) -> Compiled:
    """The kernel for ``spec``: from this process, from disk, or compiled now, which takes seconds."""
    with _lock:
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        cpu, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
        target = binding.Target.from_default_triple()
        machine = target.create_target_machine(cpu=cpu, features=features, opt=3, jit=True)
        path = _cache_path(f"{spec} {target.triple} {cpu} {features}")
        code = _read(path)
        if code is None:
            code = machine.emit_object(binding.parse_assembly(_optimized(spec)))
            _keep(path, code)
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _engines.append(engine)
        address = engine.get_function_address(_ENTRY)
    return Compiled(ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address), address)


def _optimized(spec: Spec) -> str:
    """LLVM code of the kernel behind the plain C entry ``void batchnorm_kernel(address)``."""
    from importlib import import_module

    import numba

    room = import_module(f"batchnorm.kernels.cpu_{spec.room}")
    kernel = getattr(room, spec.function)(getattr(numba, spec.kind), *spec.options)
    options: Any = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    inner: Any = numba.njit(numba.void(numba.int64), **options)(kernel)
    (overload,), (code,) = inner.overloads.values(), inner.inspect_llvm().values()
    # numba's own convention: addresses for a result and an exception, of which kernels have neither.
    return f"""{code}
define void @{_ENTRY}(i64 %block) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @"{overload.fndesc.llvm_func_name}"(ptr %result, ptr %exception, i64 %block)
  ret void
}}
"""


@cache
def _sources() -> bytes:
    folder = Path(__file__).parent
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    versions = f"{version('numba')} {version('llvmlite')}".encode()
    return hashlib.sha256(content + versions).digest()


def _cache_path(key: str) -> Path | None:
    name = hashlib.sha256(_sources() + key.encode()).hexdigest()
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home folder
        return None
    return Path(home) / "batchnorm" / f"{name}.o"


def _read(path: Path | None) -> bytes | None:
    """What `_keep` wrote; ``None`` where there is nothing, or something that another hand changed."""
    try:
        stored = path.read_bytes() if path is not None else b""
    except OSError:
        return None
    digest, code = stored[:32], stored[32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _keep(path: Path | None, code: bytes) -> None:
    reason = "there is no home folder"
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, hashlib.sha256(code).digest() + code)
            return
    except OSError as error:
        reason = str(error)
    _say_uncached(reason)


@cache
def _say_uncached(reason: str) -> None:
    LOG.warning("compiled kernels are not kept for later processes, which will compile again: %s", reason)
