"""What all batch-normalized layers share: which statistics are used, and when they move."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.functional import batch_norm, normalize_with
from batchnorm.kernels.activations import check_activation
from batchnorm.layers import recompute, small
from batchnorm.layers.running import commit, is_recomputation
from batchnorm.moments import Moments

if TYPE_CHECKING:
    from batchnorm.layers.pending import Pending

_is_compiling = torch.compiler.is_compiling


class Normalization(_BatchNorm):
    """Base of the layers; takes the arguments of `torch.nn.BatchNorm2d` and a few more.

    Args:
        num_features: Channels C.
        eps: Added to the variance (squared units of the input).
        momentum: Weight of the newest batch in the running statistics; ``None`` averages all
            batches equally.
        affine: Whether the layer has γ (``weight``) and β (``bias``).
        track_running_stats: Whether it keeps running statistics for inference.
        device: Of parameters and buffers.
        dtype: Of parameters; running statistics stay in float32 or wider.
        bias: Whether an affine layer has β.
        activation: One of `batchnorm.functional.ACTIVATIONS`, applied after the normalization.
        channel_dim: 1, or -1 where features sit last: (N, L, C), as a ``Linear`` leaves them.

    Raises:
        ValueError: ``eps`` is negative, ``activation`` unknown or ``channel_dim`` neither 1 nor -1.
    """

    pending: "Pending | None" = None
    """What takes the moments of a training batch in place of the running statistics, if anything."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        channel_dim: int = 1,
    ) -> None:
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 or -1 (features last), got {channel_dim}")
        check_activation(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._become(activation, channel_dim)

    def _become(self, activation: str | None, channel_dim: int) -> None:
        self.activation = activation
        self.channel_dim = channel_dim
        self.frozen = False
        self._widen_statistics()

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        activation: str | None = None,
    ) -> Tensor:
        """``activation(BN(x) + residual)``.

        In training, by the moments of this batch, which also move the running statistics: once,
        even where activation checkpointing runs the layer again, and never from a batch that is
        not finite. In evaluation, or when frozen, by the running statistics.

        Args:
            x: Shape (N, C, *spatial), or (N, *spatial, C) with ``channel_dim=-1``.
            residual: Added before the activation, shape of ``x``.
            mask: Boolean, the shape of ``x`` without channels; true where a sample counts.
                The others (padding) take no part in the statistics and give zeros.
            activation: One of `batchnorm.functional.ACTIVATIONS`, for this call only, of a layer
                that has none of its own.

        Returns:
            A tensor with the shape, dtype and memory layout of ``x``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: A shape does not fit, a batch has one value per channel in training, or
                the layer has an activation of its own and is given another.
        """
        if isinstance(x, torch.fx.Proxy):
            return stay_whole(self, x, residual=residual, mask=mask, activation=activation)
        try:
            self._check_input_dim(x)
            return self._normalize(x, residual, mask, self._activation(activation))
        except (ValueError, TypeError) as error:
            if torch.compiler.is_compiling():
                raise
            raise type(error)(f"{where(self)}: {error}") from None

    def _activation(self, given: str | None) -> str | None:
        if given is not None and self.activation is not None:
            raise ValueError(
                f"the layer has activation={self.activation!r} and is called with activation={given!r}: "
                f"give it in one place only"
            )
        if given is None:
            return self.activation
        check_activation(given)
        return given

    def _normalize(
        self, x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None
    ) -> Tensor:
        weight, bias, mean, var = self._vectors()
        by_running = mean is not None and (self.frozen or not self.training)
        moves = not by_running and self.track_running_stats and mean is not None and not is_recomputation()
        pending = self.pending if moves else None
        # First what is not worth more words than arithmetic.
        plain = mean is not None and mask is None and not _is_compiling() and x.is_cpu
        if plain and self._is_plain(x, by_running):
            running = (mean, var, self._buffers["num_batches_tracked"] if moves else None, self.momentum)
            if pending is not None:
                running = pending.blank()
            given = (x, weight, bias, *running, self.eps, activation, residual)
            y = (small.normalize_with if by_running else small.normalize)(*given)
            if y is not None:
                if pending is not None:
                    pending.take_blank(running, x.numel() // mean.numel())
                return y
        options: dict[str, Any] = {
            "eps": self.eps,
            "activation": activation,
            "residual": residual,
            "mask": mask,
            "channel_dim": self.channel_dim,
        }
        if by_running:
            return self._by_running(x, mean, var, weight, bias, **options)
        y, moments = self._by_batch(x, weight, bias, **options)
        if moves and (pending is None or not pending.take(moments, is_silent=not x.numel())):
            self.move(moments)
        return y

    # What another kind of normalization does in its own way.

    def _by_batch(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> tuple[Tensor, Moments]:
        """Output in training, and the moments of this batch, which are to move the running statistics."""
        y, moments = batch_norm(x, weight, bias, **options)
        recompute.offer(y, x, [moments.mean, moments.var, weight, bias], **options)
        return y, moments

    def _by_running(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> Tensor:
        """Output in evaluation."""
        y = normalize_with(x, mean, var, weight, bias, **options)
        recompute.offer(y, x, [mean, var, weight, bias], **options)
        return y

    def _is_plain(self, x: Tensor, by_running: bool) -> bool:
        """Whether the output is that of plain batch normalization of (N, C, *spatial)."""
        return self.channel_dim == 1 or x.dim() == 2

    @property
    def mixes(self) -> str:
        """Why the layer, in evaluation, is not one fixed map of every channel by itself; empty if it is."""
        return ""

    def move(self, moments: Moments) -> None:
        """Move the running statistics towards the moments of one batch, flat, in their dtype."""
        mean, var = self._vectors()[2:]
        commit(mean, var, self.num_batches_tracked, moments, self.momentum)

    def _vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        parameters, buffers = self._parameters, self._buffers
        if "weight" in parameters and "bias" in parameters and len(buffers) >= 2:
            # Past Module.__getattr__, which takes as long for these four as a small layer's arithmetic.
            mean, var = buffers.get("running_mean"), buffers.get("running_var")
            return parameters["weight"], parameters["bias"], mean, var
        return self.weight, self.bias, self.running_mean, self.running_var

    def affine_parameters(self) -> dict[str, nn.Parameter]:
        """γ and β by name, as far as there are any; of a layer that shares them, those of its owner."""
        return dict(self.named_parameters(recurse=False))

    def moments(self, x: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Moments:
        """Moments of an input of this layer, channel by channel, as the layer counts them.

        Args:
            x: An input of the layer.
            mask: As in `forward`.
            dtype: What to compute in.
        """
        return Moments.of(x.detach(), channel_dim=self.channel_dim, mask=mask, dtype=dtype)

    def no_moments(self) -> Moments:
        """Moments of no samples, flat, of the kind that `move` takes."""
        zeros = torch.zeros_like(self.running_mean).detach().flatten()
        return Moments(zeros, zeros.clone(), 0)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[self.channel_dim] != self.num_features:
            place = "last" if self.channel_dim == -1 else "in dimension 1"
            hint = ""
            if x.dim() > 2 and self.channel_dim == 1 and x.shape[-1] == self.num_features:
                hint = "; for features that sit last, as a Linear leaves them, give channel_dim=-1"
            raise ValueError(
                f"expected input with {self.num_features} channels {place}, got shape {tuple(x.shape)}{hint}"
            )

    def extra_repr(self) -> str:
        """What `repr` shows of the layer's settings."""
        extra = super().extra_repr()
        if self.activation is not None:
            extra += f", activation={self.activation!r}"
        if self.channel_dim != 1:
            extra += f", channel_dim={self.channel_dim}"
        return extra + (", frozen" if self.frozen else "")

    # Statistics in float32 or wider, whatever becomes of the parameters.

    def _statistics(self) -> dict[str, Tensor]:
        named = {name: self._buffers.get(name) for name in ("running_mean", "running_var")}
        return {name: buffer for name, buffer in named.items() if buffer is not None}

    def _widen_statistics(self) -> None:
        for name, buffer in self._statistics().items():
            self._buffers[name] = buffer.to(torch.promote_types(buffer.dtype, torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self._statistics()
        super()._apply(fn, recurse)
        for name, after in self._statistics().items():
            wide = torch.promote_types(after.dtype, torch.float32)
            if after.dtype != wide:
                # From the value before the cast: a trip through half precision loses digits.
                lost = after.device.type == "meta" or before[name].device.type == "meta"
                self._buffers[name] = after.to(wide) if lost else before[name].to(after.device, wide)
        return self

    # A freeze is saved beside the tensors, in the state dict's metadata: its keys stay torch's.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.frozen and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["frozen"] = True

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        self.frozen = bool(local_metadata.get("frozen", self.frozen))
        self._widen_statistics()


def stay_whole(layer: nn.Module, x: Any, **options: Any) -> Any:
    """One call_module node under any `torch.fx` tracer, as torch's own layers are."""
    extra = {name: value for name, value in options.items() if value is not None}
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), extra)


def where(layer: nn.Module) -> str:
    """The layer's path in the outermost model whose forward is running, for error messages."""
    path, frame = "", inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and caller is not layer:
            path = next((name for name, module in caller.named_modules() if module is layer), path)
        frame = frame.f_back
    kind = f"{type(layer).__name__}({getattr(layer, 'num_features', '')})"
    return f"{kind} at {path!r}" if path else kind
