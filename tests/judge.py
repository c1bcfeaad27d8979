"""The numerical judge: how far a result may be from the float64 truth."""

import torch
from torch import Tensor

ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_as_exact_as_eager(
    got: Tensor, eager: Tensor, truth: Tensor, *, condition: float, name: str, terms: float = 0.0
) -> None:
    """``got`` may miss the float64 ``truth`` by twice what eager PyTorch does, plus rounding.

    The rounding is float32's (float64's for float64 results) magnified by ``condition``, the
    largest |mean| / deviation of the input, plus one rounding into the result's own dtype. It
    is relative to the largest value, or to the largest of the ``terms`` whose sum the value
    is: where they cancel, as in the gradient of a batch of two, their roundings remain.
    """

    def miss(t: Tensor) -> float:
        return (t.double() - truth).abs().max().item() if t.numel() else 0.0

    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    compute = ROUNDOFF[torch.float64 if got.dtype == torch.float64 else torch.float32]
    largest = truth.abs().max().item() if truth.numel() else 0.0
    allowed = 2 * miss(eager) + ROUNDOFF[got.dtype] * largest
    allowed += 4 * compute * (1 + condition) * max(largest, terms)
    assert miss(got) <= allowed, f"{name}: off by {miss(got):.2e}, allowed {allowed:.2e}"
