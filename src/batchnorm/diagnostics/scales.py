"""How large a layer's gradients, weights and updates are: known only after the forward pass."""

import math
import weakref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Scales:
    """One layer at one recorded step, filled in by the backward pass and the optimizer.

    Values stay on their device until `found` is asked for. Neither activations nor the model are
    kept alive; a copy of the weight is, until `close`.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        # Norms and numbers of values.
        self._gradients: list[tuple[Tensor, int]] = []
        self._parameters: dict[str, tuple[Tensor, int]] = {}
        self._weight: weakref.ref[Tensor] | None = None
        self._before: Tensor | None = None
        self._version = 0

    def follow_activation(self, x: Tensor) -> None:
        """Note the gradients that reach ``x``, from now until `close`."""
        if x.requires_grad:
            self._handles.append(x.register_hook(self._see_gradient))

    @torch.no_grad()
    def follow_parameters(self, module: nn.Module) -> None:
        """Note the scale of the module's own ``weight`` and ``bias``, and what becomes of the weight."""
        # Only what is registered under the name: a parametrized weight is computed when it is read,
        # which for spectral normalization takes a step of its power iteration.
        weight, bias = (_floating(module._parameters.get(name)) for name in ("weight", "bias"))
        if bias is not None:
            self._note("bias_rms", bias)
        if weight is None:
            return
        self._note("weight_rms", weight)
        if not weight.requires_grad or weight.is_inference():
            return
        self._handles.append(weight.register_post_accumulate_grad_hook(self._see_weight_gradient))
        self._weight, self._before, self._version = weakref.ref(weight), weight.clone(), weight._version

    @property
    def has_weight(self) -> bool:
        """Whether there is a weight that an optimizer may yet move."""
        return self._before is not None

    @property
    def has_moved(self) -> bool:
        """Whether the weight was written to since."""
        weight = self._weight() if self._weight is not None else None
        if weight is None or self._before is None:
            return False
        if weight._version != self._version:
            return True
        # Fused optimizers do not count as writers; a weight that got no gradient need not be compared.
        return "weight_gradient_rms" in self._parameters and not torch.equal(weight, self._before)

    @torch.no_grad()
    def found(self, *, stepped: bool) -> dict[str, float]:
        """What is known by now, by the names of `LayerHistory`'s fields.

        Args:
            stepped: Whether the optimizer has stepped since, so that a weight that is the same was
                left so.
        """
        known = {name: _rms([norm]) for name, norm in self._parameters.items()}
        if self._gradients:
            known["gradient_rms"] = _rms(self._gradients)
        weight = self._weight() if self._weight is not None else None
        if stepped and weight is not None and self._before is not None:
            size, moved = known["weight_rms"], _rms([_norm(weight - self._before)])
            # A layer may begin at zero (the last γ of a residual branch): then any step is infinite.
            known["update"] = moved / size if size else math.inf if moved else 0.0
        return known

    def close(self) -> None:
        """Remove the hooks and forget the copy of the weight."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before = self._weight = None

    def _see_gradient(self, gradient: Tensor) -> None:
        self._gradients.append(_norm(gradient))

    def _see_weight_gradient(self, weight: Tensor) -> None:
        # All that has been accumulated by now; the last time is what the optimizer is given.
        if weight.grad is not None:
            self._note("weight_gradient_rms", weight.grad)

    def _note(self, name: str, values: Tensor) -> None:
        self._parameters[name] = _norm(values)


def _floating(parameter: Tensor | None) -> Tensor | None:
    """The parameter, unless it is quantized to integers (whose scale is elsewhere) or complex."""
    return parameter if parameter is not None and parameter.is_floating_point() else None


def _norm(values: Tensor) -> tuple[Tensor, int]:
    """The norm, still on its device, and how many values it is of."""
    num_values, values = values.numel(), values.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    if values.dtype.itemsize == 1:
        values = values.float()  # float8 is for storing only
    # Squares of half precision would overflow.
    dtype = None if values.dtype in (torch.float32, torch.float64) else torch.float32
    return torch.linalg.vector_norm(values, dtype=dtype), num_values


def _rms(norms: list[tuple[Tensor, int]]) -> float:
    total = math.hypot(*(float(norm) for norm, _ in norms))
    return total / math.sqrt(max(sum(num_values for _, num_values in norms), 1))
