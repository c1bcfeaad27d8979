"""How batches reach a model, and what is said of one that cannot."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], object]


def feed(model: nn.Module, batch: Any) -> object:
    """Call ``model`` with a tensor, with the first item of a tuple or list, or with a dict's keywords.

    Raises:
        TypeError: ``batch`` is something else, or an empty tuple or list.
    """
    args, kwargs = _arguments(batch)
    return model(*args, **kwargs)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list) and batch:
        return (batch[0],), {}
    came = "an empty " + type(batch).__name__ if isinstance(batch, tuple | list) else type(batch).__name__
    raise TypeError(
        "a batch must be a tensor, a tuple or list whose first item is the model's input, or a dict of "
        f"keyword arguments; got {came}. Pass forward=callable(model, batch) to call the model your own way"
    )


def run(forward: Forward, model: nn.Module, batch: Any, index: int) -> object:
    """Call ``forward(model, batch)``; where batch number ``index`` does not fit the model, say why."""
    try:
        return forward(model, batch)
    except (RuntimeError, TypeError) as error:
        better = explained(error, model, batch, index, forward)
        if better is error:
            raise
        raise better from error


def num_examples(batch: Any) -> int:
    """Examples in a batch: the leading dimension of the first tensor in what `feed` takes.

    Raises:
        TypeError: There is no such tensor.
    """
    items = list(batch.values()) if isinstance(batch, Mapping) else batch
    first = [items] if isinstance(items, Tensor) else list(items) if isinstance(items, tuple | list) else []
    for item in first:
        if isinstance(item, Tensor) and item.dim():
            return item.shape[0]
    raise TypeError(
        "a batch must be a tensor, a tuple or list that begins with one, or a dict with one, whose first "
        f"dimension is that of the examples; got {type(batch).__name__}"
    )


def explained(error: Exception, model: nn.Module, batch: Any, index: int, forward: Forward) -> Exception:
    """``error``, or one that says why batch number ``index`` does not fit the model.

    Explained are a batch on another device, and one that `feed` cannot make the model's arguments of.
    """
    if isinstance(error, RuntimeError):
        return _of_devices(error, model, batch, index)
    if isinstance(error, TypeError) and forward is feed:
        return _of_arguments(error, model, batch, index)
    return error


def _of_devices(error: RuntimeError, model: nn.Module, batch: Any, index: int) -> Exception:
    if isinstance(batch, Mapping):
        items = list(batch.values())
    else:
        items = list(batch) if isinstance(batch, tuple | list) else [batch]
    of_batch = {str(item.device) for item in items if isinstance(item, Tensor)}
    of_model = {str(t.device) for t in (*model.parameters(), *model.buffers())}
    if of_batch <= of_model:
        return error
    return RuntimeError(
        f"batch {index} is on {', '.join(sorted(of_batch))} and the model on {', '.join(sorted(of_model))}; "
        f"move one of them (batches are used where they are). torch said: {error}"
    )


def _of_arguments(error: TypeError, model: nn.Module, batch: Any, index: int) -> Exception:
    try:
        args, kwargs = _arguments(batch)
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return error  # says itself what is wrong with the batch, or forward cannot be looked at
    try:
        signature.bind(*args, **kwargs)
    except TypeError as misfit:
        return TypeError(
            f"batch {index} does not fit {type(model).__name__}.forward{signature}: {misfit}. Of a tuple or "
            "list only the first item is given to the model; let batches be dicts of all its keyword "
            "arguments and of nothing else, or pass forward=callable(model, batch)"
        )
    return error


def length(batches: Iterable[Any]) -> int | None:
    """How many batches there are, where that is known."""
    try:
        return len(batches)
    except TypeError:  # also of a DataLoader over an IterableDataset, which has a __len__ that raises
        return None


@contextmanager
def shown(batches: Iterable[Any], total: int | None, title: str) -> Iterator[Iterable[Any]]:
    """``batches`` with a progress bar around them."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError('progress=True draws with rich: pip install "batchnorm[train]"') from error
    with Progress(console=Console(stderr=True)) as bar:
        yield bar.track(batches, total=total, description=title)
