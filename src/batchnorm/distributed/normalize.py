"""Batch Normalization over the samples of several ranks, as a function of tensors."""

from torch import Tensor

from batchnorm.distributed import operators
from batchnorm.functional import as_rows, check_arguments
from batchnorm.kernels import dispatch
from batchnorm.moments import Moments


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_name: str,
    place: str = "",
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Moments]:
    """`batchnorm.functional.batch_norm` by the moments of all ranks' samples.

    Every rank of the group has to call it, and to run its backward: each is one collective.
    Gradients are those of the sum of all ranks' losses; those of weight and bias are this rank's
    share, which data-parallel training adds up. Twice differentiable.

    Args:
        x: As in `batchnorm.functional.batch_norm`; a rank may have no samples, or one.
        weight: As there; so are the other arguments not listed here.
        group_name: What `batchnorm.distributed.name_of` gives.
        place: The layer's path in the model, for the watchdog.

    Returns:
        This rank's ``y``, and the moments of all ranks' samples: the same bits on every rank.

    Raises:
        ValueError: As `batchnorm.functional.batch_norm`; and, on the CPU, all ranks together have a
            single sample per channel.
        RuntimeError: A function transform (`torch.func`) or forward-mode differentiation is on.
    """
    name = check_arguments(x, weight, bias, eps, activation, residual, mask, channel_dim)
    if dispatch.is_transformed():
        raise RuntimeError(
            "normalization over several ranks runs under no torch.func transform and no forward-mode "
            "differentiation: let each rank use its own batch there, with batchnorm.distributed.alone()"
        )
    shape = x.shape
    if channel_dim == -1:
        x, residual, mask = as_rows(x, residual, mask)
    if residual is not None:
        residual = residual.to(x.dtype)
    y, mean, var, count = operators.normalize(x, weight, bias, residual, mask, eps, name, group_name, place)
    return y.reshape(shape), Moments(mean, var, count)
