"""What synchronized layers must do on every rank; run by `test_synced`."""

import torch
from gloo_ranks import gathered, is_same_everywhere, summed
from judge import assert_as_exact_as_eager
from torch import nn

from batchnorm import kernels, layers

SPLITS = {
    1: [9],
    2: [7, 2],
    3: [4, 0, 5],
    4: [1, 0, 6, 2],
}
"""Examples on each rank: uneven, a single one, none."""


def mine(whole: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    return whole.split(SPLITS[num_ranks])[rank]


def a_layer(plain, synced, shape, *, dtype, channel_dim=1, mask=False, residual=False, shift=0.0, **options):
    """A case: the layer on every rank's part against the plain one on all of it."""

    def case(rank: int, num_ranks: int) -> None:
        torch.manual_seed(3)
        num_channels = shape[-1 if channel_dim == -1 else 0]
        size = shape if plain is layers.BatchNormPerActivation else num_channels
        if channel_dim == -1:
            options["channel_dim"] = -1
        whole = plain(size, dtype=dtype, **options)
        for parameter in whole.parameters():
            nn.init.normal_(parameter, 0.5, 0.5)
        part = synced(size, dtype=dtype, **options)
        part.load_state_dict(whole.state_dict())
        x = (torch.randn(9, *shape) * 2 + shift).to(dtype)
        dy = torch.randn(9, *shape).to(dtype)
        extra = torch.randn(9, *shape).to(dtype) if residual else None
        spatial = shape[:-1] if channel_dim == -1 else shape[1:]
        shown = None
        if mask:
            shown = torch.rand(9, *(() if plain is layers.BatchNormPerActivation else spatial)) > 0.3
            hidden = ~shown if plain is layers.BatchNormPerActivation else ~shown.unsqueeze(channel_dim)
            x = torch.where(hidden.reshape(hidden.shape + (1,) * (x.dim() - hidden.dim())), torch.nan, x)

        def run(layer, x, dy, extra, shown):
            x = x.clone().requires_grad_()
            extra = None if extra is None else extra.clone().requires_grad_()
            y = layer(x, extra, shown)
            y.backward(dy)
            found = {"y": y.detach(), "dx": x.grad}
            if extra is not None:
                found["dresidual"] = extra.grad
            grads = {name: p.grad for name, p in layer.named_parameters()}
            return found, grads, dict(layer.named_buffers())

        def run_whole(layer, *given):
            # By the operations of the paper: nothing that synchronized layers use themselves.
            with kernels.use("reference"):
                return run(layer, *given)

        # Twice: running statistics that have moved move again.
        for _ in range(2):
            parts = [None if t is None else mine(t, rank, num_ranks) for t in (x, dy, extra, shown)]
            got = run(part, *parts)
            eager = run_whole(whole, x, dy, extra, shown)
        exact = plain(size, dtype=torch.float64, **options)
        exact.load_state_dict({**part.state_dict(), **exact.state_dict(), **dict(whole.named_parameters())})
        for _ in range(2):
            truth = run_whole(
                exact, x.double(), dy.double(), None if extra is None else extra.double(), shown
            )

        condition = abs(shift) / 2
        found = {
            **{name: gathered(t, SPLITS[num_ranks]) for name, t in got[0].items()},
            **{f"d{name}": summed(t) for name, t in got[1].items()},
            **got[2],
        }
        expected = {**eager[0], **{f"d{name}": t for name, t in eager[1].items()}, **eager[2]}
        true = {**truth[0], **{f"d{name}": t for name, t in truth[1].items()}, **truth[2]}
        for name, t in found.items():
            if dtype == torch.float64 or not t.is_floating_point():
                torch.testing.assert_close(
                    t, true[name].to(t.dtype), rtol=1e-12, atol=1e-12 * (1 + condition), msg=name
                )
                continue
            assert_as_exact_as_eager(
                t,
                expected[name].to(t.dtype),
                true[name],
                condition=condition,
                name=name,
                terms=terms(name, dy),
            )
        for name, buffer in got[2].items():
            assert is_same_everywhere(buffer), name

    return case


def terms(name: str, dy: torch.Tensor) -> float:
    return dy.abs().sum().item() / dy.shape[1] if name in ("dweight", "dbias") else 3 * dy.abs().max().item()


f32, f64 = torch.float32, torch.float64
L1, S1 = layers.BatchNorm1d, layers.SyncedBatchNorm1d
L2, S2 = layers.BatchNorm2d, layers.SyncedBatchNorm2d
L3, S3 = layers.BatchNorm3d, layers.SyncedBatchNorm3d
LA, SA = layers.BatchNormPerActivation, layers.SyncedBatchNormPerActivation
CASES = {
    "1d float64": a_layer(L1, S1, (5,), dtype=f64),
    "2d float64": a_layer(L2, S2, (3, 4, 5), dtype=f64),
    "2d float32": a_layer(L2, S2, (3, 4, 5), dtype=f32),
    "far from zero": a_layer(L2, S2, (3, 4, 5), dtype=f32, shift=1e3),
    "3d": a_layer(L3, S3, (2, 3, 2, 2), dtype=f64),
    "one channel": a_layer(L1, S1, (1,), dtype=f64),
    "relu and residual": a_layer(L2, S2, (3, 4, 5), dtype=f64, activation="relu", residual=True),
    "silu and residual": a_layer(L2, S2, (3, 4, 5), dtype=f64, activation="silu", residual=True),
    "residual": a_layer(L2, S2, (3, 4, 5), dtype=f64, residual=True),
    "mask": a_layer(L1, S1, (3, 11), dtype=f64, mask=True),
    "mask, residual, gelu": a_layer(L1, S1, (3, 11), dtype=f32, mask=True, residual=True, activation="gelu"),
    "features last": a_layer(L1, S1, (7, 3), dtype=f64, channel_dim=-1, mask=True),
    "features last, plain": a_layer(L1, S1, (7, 3), dtype=f32, channel_dim=-1, activation="tanh"),
    "per activation": a_layer(LA, SA, (3, 4, 2), dtype=f64, activation="relu"),
    "per activation, mask": a_layer(LA, SA, (3, 4, 2), dtype=f64, mask=True),
    "not affine": a_layer(L2, S2, (3, 4, 5), dtype=f64, affine=False),
    "no bias": a_layer(L2, S2, (3, 4, 5), dtype=f64, bias=False),
    "bfloat16": a_layer(L2, S2, (3, 4, 5), dtype=torch.bfloat16),
    "cumulative": a_layer(L2, S2, (3, 4, 5), dtype=f64, momentum=None),
    "no statistics": a_layer(L2, S2, (3, 4, 5), dtype=f64, track_running_stats=False),
}
