"""What an exported file answers beside the model it came from, on every test image, and how fast."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.timing import in_turns
from batchnorm.data import load
from batchnorm.deploy import export
from batchnorm.deploy.onnx_file import onnx_runner
from batchnorm.statistics import recalibrate
from batchnorm.surgery import fold
from batchnorm.train import get_recipe
from batchnorm.train.build import build_model
from batchnorm.train.inputs import evaluation_input

NETWORKS = {"mlp": "bn-mlp", "inception": "bn-x5"}
"""Network to the recipe that builds it, the second at the scale of CIFAR-10."""


def measure(
    network: str, model: nn.Module | None = None, *, batch: int = 32, num_images: int = 0, rounds: int = 9
) -> dict[str, Any]:
    """Hold onnxruntime's answers against ours, and time eager, folded, and onnxruntime in turns.

    Args:
        network: "mlp" or "inception".
        model: Trained, in evaluation mode; by default the recipe's initial weights with statistics of
            the training digits, whose answers are of as much use for a comparison.
        batch: Images of one timed call.
        num_images: Test digits that are compared; 0 for all.
        rounds: Samples of each contender.

    Returns:
        Images compared, how many got the same class, the largest difference of a logit and the largest
        logit, and milliseconds a call of each contender for one image and for ``batch``.
    """
    recipe = get_recipe(NETWORKS[network], "cifar10")
    data = load("digits", size=28 if network == "mlp" else 32)
    train, test = (
        evaluation_input(recipe, _coloured(torch.from_numpy(images), network))
        for images in (data.train_images, data.test_images[: num_images or None])
    )
    if model is None:
        shape = (28, 28) if network == "mlp" else (3, 32, 32)
        model = build_model(recipe, shape, 10).eval()
        recalibrate(model, [train[:256]], method="pooled")
    deployed, _ = fold(model, train[:2])
    with TemporaryDirectory(prefix="batchnorm-") as folder:
        path = Path(folder) / "model.onnx"
        report = export(deployed, train[:2], path)
        run = onnx_runner(path)
    with torch.no_grad():
        ours = torch.cat([model(part) for part in test.split(50)])
        theirs = torch.cat([run((part,))[0] for part in test.split(50)])
        timed = {size: _timed(model, deployed, run, test[:size], rounds) for size in (1, batch)}
    return {
        "network": network,
        "images": len(test),
        "same_class": int((ours.argmax(1) == theirs.argmax(1)).sum()),
        "largest_difference": float((ours - theirs).abs().max()),
        "largest_logit": float(ours.abs().max()),
        "onnx_bytes": report.num_bytes,
        "norms_left": report.num_norms,
        "ms": {str(size): dict(ms) for size, ms in timed.items()},
    }


def _coloured(images: Tensor, network: str) -> Tensor:
    return images if network == "mlp" else images.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


def _timed(model: nn.Module, deployed: nn.Module, run: Any, x: Tensor, rounds: int) -> Mapping[str, float]:
    contenders = {
        "eager": lambda: model(x),
        "folded, eager": lambda: deployed(x),
        "onnxruntime": lambda: run((x,)),
    }
    return {name: timing.median_s * 1e3 for name, timing in in_turns(contenders, rounds=rounds).items()}
