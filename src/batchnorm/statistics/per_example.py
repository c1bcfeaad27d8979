"""What each example of a batch adds to the statistics of every layer, read while the network runs."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import Normalization


class Listener:
    """Means and mean squares of each example's normalized values, channel by channel.

    Values are normalized by the statistics that the layers have when the listener is made: by a copy.

    Args:
        layers: With running statistics, by path.
    """

    def __init__(self, layers: dict[str, _BatchNorm]) -> None:
        self.layers = layers
        self.sizes = {name: layer.running_mean.numel() for name, layer in layers.items()}
        self._stored = {
            name: (layer.running_mean.detach().clone(), layer.running_var.detach().clone())
            for name, layer in layers.items()
        }
        self._calls: dict[str, list[Tensor]] = {}

    def changed(self) -> str | None:
        """Path of a layer whose statistics are no longer those; ``None`` if there is none."""
        for name, (mean, var) in self._stored.items():
            layer = self.layers[name]
            if not (_equal(layer.running_mean, mean) and _equal(layer.running_var, var)):
                return name
        return None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, every call of the layers is read; earlier ones are forgotten."""
        with ExitStack() as stack:
            self.begin(stack)
            yield

    def begin(self, stack: ExitStack) -> None:
        """Register the hooks, which ``stack`` removes."""
        self._calls.clear()
        for name, layer in self.layers.items():

            def hook(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                self._hear(name, module, args, kwargs)

            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)

    @torch.no_grad()
    def _hear(self, name: str, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        mean, var = self._stored[name]
        rows = per_example(layer, next(iter(given.values())), given.get("mask"), mean, var)
        self._calls.setdefault(name, []).append(rows)

    def rows(self, num_examples: int) -> dict[str, Tensor]:
        """What was heard, by path: shape (N, 2 C), means before mean squares, float32 or wider; once.

        Calls of a layer are averaged. Where it has several rows for an example (time folded into the batch,
        the example's rows together), they are averaged, too.

        Raises:
            ValueError: A layer has rows that are no multiple of the examples, or was not reached.
        """
        found = {}
        for name in self.layers:
            calls = self._calls.pop(name, [])
            if not calls:
                raise ValueError(
                    f"layer {name!r} was not reached in evaluation mode: its drift cannot be seen"
                )
            for call in calls:
                if num_examples == 0 or len(call) % num_examples:
                    raise ValueError(
                        f"layer {name!r} receives {len(call)} rows for {num_examples} examples: which belong "
                        "to which is not known"
                    )
            each = [call.unflatten(0, (num_examples, -1)).mean(1) for call in calls]
            found[name] = torch.stack(each).mean(0)
        return found


def per_example(layer: _BatchNorm, x: Tensor, mask: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
    """Mean and mean square of each row's normalized values, shape (N, 2 C), float32 or wider.

    Args:
        layer: That receives ``x``.
        x: Its input, shape (N, C, *spatial), or with the channels last.
        mask: As in our layers' ``forward``.
        mean: That values are measured from.
        var: Whose root, with the layer's eps, they are measured in.
    """
    last = isinstance(layer, Normalization) and layer.channel_dim == -1
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    C, N = mean.numel(), x.shape[0]
    if last:
        x = x.movedim(-1, 1)
    # Channels, or all activations of their own, and what is pooled over.
    x = x.reshape(N, C, -1)
    z = (x - mean.reshape(C, 1)) * (var.reshape(C, 1) + layer.eps).rsqrt()
    if mask is None:
        num = z.shape[2]
        return torch.cat([z.sum(2), torch.linalg.vector_norm(z, dim=2).square()], 1) / max(num, 1)
    counts = mask.reshape(N, 1, -1)
    z = torch.where(counts, z, 0)
    return torch.cat([z.sum(2), z.square().sum(2)], 1) / counts.sum(2).clamp(min=1)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
