"""What each benchmark of ``batchnorm bench`` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from batchnorm.bench import adapt, kinds, recurrent, step, whitening
from batchnorm.bench.networks import NETWORKS, Network
from batchnorm.bench.timing import MEMORY, MemorySetting
from batchnorm.bench.zoo import Name


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every benchmark is told."""

    threads: int = 0
    """PyTorch's threads on the CPU; 0 leaves its own choice."""
    out: Path | None = None
    """Results file; by default benchmarks/results/KIND-PROCESSOR.json."""


@dataclass(frozen=True, kw_only=True)
class Kernels(Common):
    """BN, addition and ReLU, forward and backward, on every layer of BN-Inception and ResNet-50."""

    networks: tuple[Literal["inception", "resnet50", "small"], ...] = ("inception", "resnet50", "small")
    """Whose layers."""
    batch: int = 32
    """Examples."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    """Of the activations; statistics and parameters are float32."""
    layouts: tuple[Literal["contiguous", "channels_last"], ...] = ("contiguous", "channels_last")
    """Memory formats."""
    fusions: tuple[Literal["relu", "residual"], ...] = ("relu", "residual")
    """BN + ReLU, or BN + addition + ReLU."""
    rounds: int = 9
    """Samples of each contender."""
    memory: tuple[MemorySetting, ...] = MEMORY
    """Where the CPU's memory comes from: the C library as it is, huge pages (THP_MEM_ALLOC_ENABLE),
    or freed memory kept for reuse, as `accelerate` has it. Each in a process of its own."""
    compiled: bool = True
    """Let torch.compile take part: seconds of compilation for each case."""


@dataclass(frozen=True, kw_only=True)
class Step(Common):
    """A training step of BN-Inception: eager, at its best, accelerated, and with BN taken out."""

    batch: int = 32
    """Images."""
    network: step.Network = "inception"
    """BN-Inception at 224×224 pixels, or at the scale of CIFAR-10."""
    rounds: int = 7
    """Samples of each form."""
    compiled: bool = False
    """Let torch.compile take part, with and without accelerate: minutes of compilation."""
    memory: tuple[MemorySetting, ...] = MEMORY
    """Where the CPU's memory comes from: the C library as it is, huge pages (THP_MEM_ALLOC_ENABLE),
    or freed memory kept for reuse, as `accelerate` has it. Each in a process of its own."""


@dataclass(frozen=True, kw_only=True)
class Memory(Common):
    """What a training step of BN-Inception holds, each form in a process of its own."""

    batch: int = 32
    """Images."""
    side: int = 224
    """Pixels."""
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """Memory format."""


@dataclass(frozen=True, kw_only=True)
class Fold(Common):
    """Inference with and without `batchnorm.fold`, eager and compiled, of networks of several families."""

    networks: tuple[Name, ...] = ("cifar10", "resnet", "densenet", "mobilenet", "unet", "1d", "3d")
    """Which; "inception" is BN-Inception at 224×224 pixels, "cifar10" the same at the scale of CIFAR-10."""
    batches: tuple[int, ...] = (1, 32)
    """Images at a time."""
    rounds: int = 9
    """Samples of each form."""
    compiled: bool = True
    """Let torch.compile take part, with and without fold: minutes of compilation."""
    memory: MemorySetting = "kept"
    """Where the process gets memory from; at its default, fresh pages cost more than a normalization."""


@dataclass(frozen=True, kw_only=True)
class Loader(Common):
    """Random crops of JPEG files on one core: training's own loader beside a plain PyTorch data set."""

    data: Path
    """Folder of images: CLASS/IMAGE or train/CLASS/IMAGE. Photographs: nothing else is like them."""
    size: int = 224
    """Side of the crops, pixels."""
    batch: int = 32
    """Images."""
    images: int = 320
    """Of a sample."""
    rounds: int = 9
    """Samples of each contender."""
    threads: int = 1
    """PyTorch's threads; decoding has one."""


@dataclass(frozen=True, kw_only=True)
class Watch(Common):
    """Training with a recorder at its defaults beside the same training without, one step of each in turn."""

    networks: tuple[Network, ...] = NETWORKS
    """The paper's first network, BN-Inception at the scale of CIFAR-10, a small residual network."""
    every: int = 100
    """Steps from one record to the next; 100 is the recorder's default."""
    seconds: float = 60.0
    """For each network; at least three records."""
    threads: int = 1
    """PyTorch's threads; 0 leaves its own choice."""


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Folded, exported to ONNX, and run in onnxruntime on the test digits: answers and speed."""

    networks: tuple[Literal["mlp", "inception"], ...] = ("mlp", "inception")
    """That of section 4.1, and BN-Inception at the scale of CIFAR-10."""
    run: Path | None = None
    """Folder of a trained run of the (one) network named; by default initial weights."""
    batch: int = 32
    """Images of a timed call; one by one they are timed, too."""
    images: int = 0
    """Test digits whose answers are compared; 0 for all."""
    rounds: int = 9
    """Samples of each contender."""
    threads: int = 1
    """Of PyTorch and of onnxruntime."""


@dataclass(frozen=True, kw_only=True)
class Kinds(Common):
    """Ghosts, a loop over them, renormalization and torch.nn's layer beside the plain one, in training."""

    shapes: tuple[tuple[int, int, int, int], ...] = kinds.SHAPES
    """Inputs, N C H W for each, float32."""
    ghost_size: int = 32
    """Examples in a virtual batch."""
    layouts: tuple[Literal["contiguous", "channels_last"], ...] = ("contiguous", "channels_last")
    """Memory formats."""
    rounds: int = 21
    """Samples of each contender."""
    memory: tuple[MemorySetting, ...] = ("default", "kept")
    """Where the CPU's memory comes from: the C library as it is, huge pages (THP_MEM_ALLOC_ENABLE),
    or freed memory kept for reuse, as `accelerate` has it. Each in a process of its own."""
    threads: int = 1
    """PyTorch's threads; 0 leaves its own choice."""


@dataclass(frozen=True, kw_only=True)
class Whitening(Common):
    """Groups of channels whitened by Newton's iteration and by eigenvectors, beside the plain layer."""

    channels: tuple[int, ...] = whitening.CHANNELS
    """Of the inputs; multiples of the groups."""
    groups: tuple[int, ...] = whitening.GROUPS
    """Channels that are whitened together."""
    batch: int = 32
    """Images."""
    side: int = 16
    """Pixels."""
    iterations: int = 5
    """Of Newton's method."""
    rounds: int = 15
    """Samples of each contender."""
    threads: int = 1
    """PyTorch's threads; 0 leaves its own choice."""


@dataclass(frozen=True, kw_only=True)
class Adapt(Common):
    """Adaptation by each method, and inference with an alarm, beside plain inference on the same batches."""

    networks: tuple[adapt.Network, ...] = adapt.NETWORKS
    """BN-Inception at the scale of CIFAR-10, a small residual network, that of reproduce adaptation."""
    batch: int = 128
    """Images in a batch."""
    batches: int = 16
    """How many are adapted on."""
    rounds: int = 9
    """Samples of each contender."""
    threads: int = 1
    """PyTorch's threads; 0 leaves its own choice."""


@dataclass(frozen=True, kw_only=True)
class Recurrent(Common):
    """Forward and backward of batch-normalized LSTM and GRU layers, torch's, and a loop over cells."""

    cases: tuple[recurrent.Case, ...] = recurrent.CASES
    """Sequences of 28 rows, of 196 pixels, and of 50 steps with 256 hidden units."""
    rounds: int = 9
    """Samples of each contender."""
    threads: int = 1
    """PyTorch's threads; 0 leaves its own choice."""


@dataclass(frozen=True, kw_only=True)
class Ranks(Common):
    """Training steps of several gloo processes on this machine: local and synced BN beside torch.nn's."""

    networks: tuple[Network, ...] = ("resnet", "cifar10")
    """A small residual network, BN-Inception at the scale of CIFAR-10; also mlp."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes, 1 among them."""
    rounds: int = 9
    """Samples of each form."""
    steps: int = 3
    """Training steps of a sample."""
    threads: int = 1
    """PyTorch's threads in each process."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Step times of 1 to 1,024 GPUs by the model of docs/scaling.md. No GPU has confirmed them."""

    network: Literal["inception", "resnet50"] = "inception"
    """BN-Inception or ResNet-50, 224×224."""
    gpu: Literal["p100", "a100", "h100"] = "a100"
    """Nodes of 8: P100 and Ethernet, A100 or H100 and InfiniBand."""
    batch: int = 32
    """Images of a GPU."""
    group_size: int = 8
    """GPUs of a subgroup; a power of 2."""


KINDS: dict[str, type[Common | Scaling]] = {
    "kernels": Kernels,
    "step": Step,
    "memory": Memory,
    "kinds": Kinds,
    "whitening": Whitening,
    "fold": Fold,
    "loader": Loader,
    "watch": Watch,
    "export": Export,
    "adapt": Adapt,
    "recurrent": Recurrent,
    "ranks": Ranks,
    "scaling": Scaling,
}
"""By the name of the benchmark."""
