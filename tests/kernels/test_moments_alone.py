"""Every kernel's `moments` are those that its `forward` gives."""

import pytest
import torch

from batchnorm.kernels import dispatch

LAYOUTS = {
    "features": lambda: torch.randn(33, 7),
    "planes": lambda: torch.randn(5, 7, 6, 3),
    "channels last": lambda: torch.randn(5, 7, 6, 3).contiguous(memory_format=torch.channels_last),
    "strided": lambda: torch.randn(5, 7, 6, 6)[..., ::2],
    "one channel": lambda: torch.randn(40, 1),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["reference", "torch", "cpu"])
def test_moments_without_the_output(name, make, masked, threads):
    kernel = dispatch.KERNELS[name]
    x = make() + 3
    mask = torch.rand(x.shape[:1] + x.shape[2:]) > 0.3 if masked else None
    torch.set_num_threads(threads)
    got = kernel.moments(x, mask)
    if name == "torch":
        kernel = dispatch.KERNELS["reference"]
    _, expected = kernel.forward(x, None, None, None, mask, 1e-5, "identity")
    assert torch.equal(got.mean, expected.mean)
    assert torch.equal(got.var, expected.var)
    assert int(got.count) == int(expected.count)
