"""Finds the subcommand, and turns its errors into one message and an exit status."""

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from batchnorm import __version__

COMMANDS = {
    "train": ("batchnorm.cli.train", "train a network by a recipe; goes on with a run that was stopped"),
    "evaluate": (
        "batchnorm.cli.evaluate",
        "top-1 and top-5 accuracy of one run, or of several as an ensemble",
    ),
    "doctor": (
        "batchnorm.cli.doctor",
        "what is wrong with a model's normalizations, where, and how much each cure helps",
    ),
    "choose": (
        "batchnorm.cli.choose",
        "which kind of normalization to take at a batch size: short trials, or that they cannot tell",
    ),
    "recalibrate": (
        "batchnorm.cli.recalibrate",
        "population statistics for a saved model, from data of yours",
    ),
    "adapt": (
        "batchnorm.cli.adapt",
        "statistics of another domain for a saved model, without labels; several domains beside one model",
    ),
    "fold": ("batchnorm.cli.fold", "take a saved model's normalizations into the layers before them, proved"),
    "export": ("batchnorm.cli.export", "a saved model to ONNX or torch.export, checked before and after"),
    "shards": (
        "batchnorm.cli.shards",
        "pack a folder of images into tar files, verified; goes on if stopped",
    ),
    "bench": ("batchnorm.cli.bench", "speed and memory beside PyTorch's own, and the machine's limit"),
    "reproduce": ("batchnorm.cli.reproduce", "the paper's claims as experiments, ours beside its figures"),
}
"""Subcommand to the module that has it and a line about it. The module has `run(argv: list[str]) -> None`
and is imported only when its command is called, so that `--help` does not wait for the others."""

TRAIN_EXTRA = {
    "jinja2",
    "matplotlib",
    "PIL",
    "plotly",
    "pooch",
    "rich",
    "sklearn",
    "tensorboard",
    "tyro",
}
"""Packages, by the name they are imported under, that come with `batchnorm[train]`."""

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
"""What input, files, network or a diverging training can cause; anything else is a defect of ours."""

EXAMPLES = """\
examples:
  batchnorm train bn-mlp --data digits --steps 2000 --out runs/first
  batchnorm evaluate runs/first
  batchnorm export runs/first --fold --out first.onnx
  batchnorm reproduce activations --steps 5000 --seeds 2
  batchnorm train --help

exit status: 0 done, 2 an error (one message; --debug shows where it came from),
130 or 143 stopped by Ctrl-C or SIGTERM after saving
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None takes this process's own.

    Returns:
        The exit status: 0, 2 after an error of the user's or the machine's, 128 + n after signal n.

    Raises:
        SystemExit: After `--help`, `--version` or arguments that cannot be understood.
    """
    status = _run(list(sys.argv[1:] if argv is None else argv))
    if argv is None and "RANK" in os.environ and "torch.distributed" in sys.modules:
        # DDP keeps gloo's threads, and one that drops the last collective's tensors while Python ends
        # aborts the process (torch 2.13): so Python does not end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(arguments: list[str]) -> int:
    # Understood before and after the subcommand, whose own flags are derived from dataclasses.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    command, rest = _parse(arguments)
    try:
        with _short_warnings():
            importlib.import_module(COMMANDS[command][0]).run(rest)
    except KeyboardInterrupt as stop:
        if not _is_told_elsewhere(stop):
            _say(str(stop) or "stopped")
        return 128 + getattr(stop, "signal_number", 2)
    except USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        if not _is_told_elsewhere(error):
            _say(f"error: {_message(error)}")
        return 2
    return 0


def _parse(arguments: list[str]) -> tuple[str, list[str]]:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="batchnorm",
        description=f"Batch Normalization for PyTorch: train, evaluate, reproduce.\n\ncommands:\n{listing}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"batchnorm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="one of the above; it has its own --help"
    )
    # Only the command itself is parsed here: what follows belongs to it.
    parsed = parser.parse_args(arguments[:1])
    return parsed.command, arguments[1:]


def _is_told_elsewhere(error: BaseException) -> bool:
    # Of several ranks that fail together one tells why. This module imports no command's modules.
    return getattr(error, "told_elsewhere", False)


def _message(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in TRAIN_EXTRA:
        return f'this command needs {error.name}, which is not installed: pip install "batchnorm[train]"'
    if isinstance(error, OSError) and error.strerror:
        # Without "[Errno 28]", and with the file that most of them name.
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


@contextmanager
def _short_warnings() -> Iterator[None]:
    """One line for each warning, without the line of our source that it came from."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"batchnorm: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _say(text: str) -> None:
    print(f"batchnorm: {text}", file=sys.stderr)
