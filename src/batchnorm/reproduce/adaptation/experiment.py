"""What the experiment is: its settings, checked, and the domains."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from batchnorm.reproduce.adaptation.corruptions import STRENGTHS
from batchnorm.reproduce.parts import check_choices, check_counts

SOURCES = ("digits", "mnist", "usps", "cifar10")
PAIRS = {"mnist": "usps", "usps": "mnist"}
"""Another data set with the same classes."""
CORRUPTED = {
    "digits": ("noise", "blur", "contrast"),
    "mnist": ("noise", "blur", "contrast", "inversion", "rotation"),
    "usps": (),
    "cifar10": ("noise", "blur", "contrast"),
}
"""How the images of a source are changed to make other domains of them."""
EPOCHS = {"digits": 30, "mnist": 3, "usps": 20, "cifar10": 3}
"""Of training; those of a target are its source's, but of another data set its own."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Domain adaptation by `batchnorm.adapt`: accuracy before, after, and of training there.

    Convolutional networks are trained on a source and tested in other domains: MNIST on USPS and USPS on
    MNIST, and each source under corruptions of several strengths. Statistics are recomputed from batches of
    several sizes, or blended; γ and β learn by entropy; and the same network is trained in the domain itself,
    from as many labelled images. Adapted on unlabelled training images of the domain, and tested
    on its test images. Writes result.json, pictures and report.html into --out; a second call does only what
    is missing. A minute for digits; for mnist, usps and cifar10 together less than an hour on one core.
    """

    sources: tuple[str, ...] = ("digits",)
    """What networks are trained on: digits (comes with scikit-learn), mnist, usps, cifar10. mnist and usps
    together are each other's targets."""
    data_dir: Path | None = None
    """Folder that holds the data sets; else $BATCHNORM_DATA, else they are downloaded (usps is not)."""
    out: Path = Path("runs/adaptation")
    """Folder for results; made if missing."""
    seeds: int = 3
    """Number of seeds; each has its own initial weights, order of examples, and corruptions."""
    examples: tuple[int, ...] = (16, 64, 256, 1024)
    """Sizes of the single batch that "statistics" and "blended" adapt on."""
    stream: int = 4096
    """Examples that "entropy" goes through once, and "statistics" beside it."""
    stream_batches: tuple[int, ...] = (64, 256)
    """Sizes of its batches."""
    epochs: int | None = None
    """Epochs of training (default: 30 of digits, 3 of mnist, 20 of usps, 3 of cifar10)."""
    trained_there: Literal["middle", "all"] = "middle"
    """Strengths of each corruption at which a network is trained in the domain, too."""
    processes: int | None = None
    """Networks train in a process each; this many at once (default: one a core)."""

    def __post_init__(self) -> None:
        check_counts(self, "seeds", "stream", "epochs", "processes")
        check_choices("sources", self.sources, SOURCES)
        check_choices("examples", self.examples)
        check_choices("stream_batches", self.stream_batches)
        if min(self.examples) < 2 or min(self.stream_batches) < 2:
            raise ValueError("batches must have at least 2 examples: one alone has no variance")
        if max(self.stream_batches) > self.stream:
            raise ValueError(
                f"stream must be at least a batch, {max(self.stream_batches)}, got {self.stream}"
            )

    @property
    def data(self) -> str:
        """The first source, which is looked for before any process starts."""
        return self.sources[0]

    def targets(self, source: str) -> list[str]:
        """Domains that a source's network is tested in: "usps", or "mnist noise 0.4"."""
        other = [PAIRS[source]] if PAIRS.get(source) in self.sources else []
        family = "colour" if source == "cifar10" else "grey"
        return other + [
            f"{source} {kind} {strength:g}"
            for kind in CORRUPTED[source]
            for strength in STRENGTHS[family][kind]
        ]

    def trained(self, source: str) -> list[str]:
        """Those of them in which a network of their own is trained, beside the sources."""
        kinds = [t.split()[:2] for t in self.targets(source)]
        return [
            target
            for place, target in enumerate(self.targets(source))
            if target not in self.sources
            and (
                self.trained_there == "all"
                or place - kinds.index(kinds[place]) == kinds.count(kinds[place]) // 2
            )
        ]

    def num_epochs(self, domain: str) -> int:
        """Of training in a domain."""
        return self.epochs or EPOCHS[domain.split()[0]]
