"""What would be launched compiles for a GPU, with wide loads and next to no spilled registers.

The compiler needs no device: launches are recorded on tensors without memory, and each kernel is
compiled for compute capability 9.0 (H100, H200) and 8.0 (A100) as a launch would specialize it.
"""

import re
import subprocess

import pytest
import torch
from gpu_cases import INTERPRETED

from batchnorm.kernels import gpu
from batchnorm.moments import Moments

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int64: "i64",
}


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """What `gpu` would have launched on a chip of 132 multiprocessors, each kind of kernel once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu, "_num_processors", lambda device: 132)
    recorded = {}

    def record(job, kernel, programs, *args, **kwargs):
        recorded[kernel, kwargs.get("GIVEN")] = (kernel, args, kwargs)

    monkeypatch.setattr(gpu._Job, "_run", record)
    return recorded.values()


def both_ways(x, *, activation="relu", with_residual=False, with_mask=False):
    """Training, then evaluation, forward and backward."""
    gamma = torch.empty(x.shape[1], device="meta", dtype=torch.promote_types(x.dtype, torch.float32))
    residual = torch.empty_like(x) if with_residual else None
    mask = x.new_empty(x.shape[:1] + x.shape[2:], dtype=torch.bool) if with_mask else None
    fused = (gamma, gamma, residual, mask)
    y, moments = gpu.forward(x, *fused, 1e-5, activation)
    gpu.backward(y, x, None, *fused, Moments(gamma, gamma, moments.count), 1e-5, activation)
    gpu.apply(x, gamma, gamma, *fused, 1e-5, activation)
    gpu.apply_backward(y, x, None, gamma, gamma, *fused, 1e-5, activation)


def specialization(launch):
    """Types, constants and divisibilities by which a launch is compiled: ones and multiples of 16 count."""
    name, args, kwargs = launch
    function = getattr(gpu._kernels(), name)
    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    assert values.keys() == set(function.arg_names), f"{name} is launched with other arguments"
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(function.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compiled(launch, capability):
    """The assembly of one launch."""
    source = triton.compiler.ASTSource(getattr(gpu._kernels(), launch[0]), *specialization(launch))
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": gpu.NUM_WARPS}).asm["ptx"]


def channels_last(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)


def contiguous(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


BOTH = {"with_residual": True, "with_mask": True}
CASES = {
    "float32": (contiguous, (32, 64, 56, 56), torch.float32, 90, {}),
    "float32 on an A100": (contiguous, (32, 64, 56, 56), torch.float32, 80, {}),
    "channels last": (channels_last, (32, 64, 56, 56), torch.bfloat16, 90, {}),
    "channels last on an A100": (channels_last, (32, 64, 56, 56), torch.float16, 80, {}),
    "short channels": (contiguous, (32, 512, 14, 14), torch.float32, 90, {}),
    "short channels of 16 bits": (contiguous, (32, 512, 14, 14), torch.float16, 90, {}),
    "residual": (contiguous, (32, 256, 56, 56), torch.bfloat16, 90, {"with_residual": True}),
    "mask and residual": (channels_last, (32, 64, 56, 56), torch.float32, 90, BOTH),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiles_with_wide_loads_and_next_to_no_spills(case, launches, tmp_path):
    layout, shape, dtype, capability, fusion = case
    both_ways(layout(*shape, dtype=dtype), **fusion)
    assert launches
    for launch in launches:
        assembly = compiled(launch, capability)
        # The assembler gives up a register or two of a thread to let more threads run.
        assert spilled_bytes(assembly, capability, tmp_path) <= 16, launch[0]
        if not launch[0].startswith("merge"):
            # 14 × 14 planes of 16-bit values begin at multiples of 8 bytes only.
            width = "v2" if shape[-1] == 14 and dtype.itemsize == 2 else "v4"
            assert re.search(rf"ld\.global\.{width}\.b32", assembly), launch[0]


def spilled_bytes(assembly, capability, folder):
    from triton import knobs

    (folder / "kernel.ptx").write_text(assembly)
    command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{capability}{'a' * (capability == 90)}"]
    command += [str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", said)[1])


AWKWARD = {
    "ones everywhere": (contiguous, (1, 1, 1), torch.float32),
    "float64": (contiguous, (9, 5), torch.float64),
    "nothing divides": (contiguous, (7, 3, 41, 7), torch.float32),
    "more than 2³¹ values": (contiguous, (128, 64, 1024, 1024), torch.bfloat16),
    "more than 2³¹ rows": (contiguous, (2**31 + 5, 1), torch.bfloat16),
    "one plane of more than 2³¹ values": (contiguous, (1, 1, 2**31 + 5), torch.bfloat16),
}


@pytest.mark.parametrize("case", AWKWARD.values(), ids=AWKWARD)
def test_awkward_sizes_compile(case, launches):
    layout, shape, dtype = case
    x = layout(*shape, dtype=dtype)
    both_ways(x, with_mask=True, activation="gelu")
    for launch in launches:
        compiled(launch, 90)
        if not launch[0].startswith("merge"):
            assert launch[2]["INDEX"] == (tl.int64 if x.numel() >= 2**31 else tl.int32)


@pytest.mark.parametrize("activation", sorted(gpu._kernels().KNOWN))
def test_activations_compile_forward_and_backward(activation, launches):
    x, gamma = contiguous(4, 8, 5, dtype=torch.float32), contiguous(8, dtype=torch.float32)
    y, moments = gpu.forward(x, gamma, gamma, None, None, 1e-5, activation)
    gpu.backward(y, x, None, gamma, gamma, None, None, moments, 1e-5, activation)
    for launch in launches:
        compiled(launch, 90)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_another_batch_size_compiles_nothing_new(layout, launches):
    kinds = []
    for batch in (24, 33, 64):
        both_ways(layout(batch, 64, 56, 56, dtype=torch.float16))
        kinds.append({launch[0]: specialization(launch) for launch in launches if "merge" not in launch[0]})
    assert kinds[0] == kinds[1] == kinds[2]
