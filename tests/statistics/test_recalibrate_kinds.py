"""Kinds of layers, batches and models; the report."""

import pytest
import torch
from population import DATA, assert_statistics, deep, images, truth
from torch import Tensor, nn

from batchnorm.layers import BatchNorm1d, BatchNormPerActivation
from batchnorm.statistics import recalibrate


def test_layers_per_activation_and_features_last():
    torch.manual_seed(0)
    x = torch.randn(30, 6, 4, dtype=torch.float64) * 3 + torch.arange(24.0).double().view(6, 4)
    model = nn.Sequential(BatchNorm1d(4, channel_dim=-1), BatchNormPerActivation((6, 4))).double()
    expected = truth(model, x)
    recalibrate(model, x.split([11, 18, 1]))
    assert model[1].running_mean.shape == (6, 4)
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 1)))


def test_masks_given_to_our_layers_are_honoured():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNorm1d(4, channel_dim=-1)

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.norm(tokens, mask=mask)

    torch.manual_seed(0)
    tokens = torch.randn(8, 5, 4, dtype=torch.float64)
    mask = torch.rand(8, 5) < 0.6
    tokens[~mask] = torch.nan  # padding may hold anything
    batches = [{"tokens": t, "mask": m} for t, m in zip(tokens.split(3), mask.split(3), strict=True)]
    model = Masked().double()
    report = recalibrate(model, batches)
    real = tokens[mask]
    assert_statistics(model, {"norm": (real.mean(0), real.var(0))}, rtol=1e-11, atol=1e-12)
    assert report.layers[0].count == mask.sum()


FEEDS = {
    "tensors": lambda x: x.split(9),
    "(input, label) tuples": lambda x: [(p, torch.zeros(len(p))) for p in x.split(9)],
    "lists": lambda x: [[p, None] for p in x.split(9)],
    "dicts of keywords": lambda x: [{"x": p} for p in x.split(9)],
    "a one-shot generator": lambda x: (p for p in x.split(9)),
    "a shuffling loader": lambda x: torch.utils.data.DataLoader(x, batch_size=9, shuffle=True),
}


@pytest.mark.parametrize("batches", FEEDS.values(), ids=FEEDS)
def test_kinds_of_batches(batches):
    model, x = deep(), images()
    expected = truth(model, x)
    before = torch.get_rng_state()
    assert recalibrate(model, batches(x)).converged
    assert_statistics(model, expected, rtol=1e-10, atol=1e-11)
    assert torch.equal(torch.get_rng_state(), before)  # which a loader draws from when it is iterated


def test_data_drawn_from_torchs_random_numbers_are_the_same_in_every_pass():
    class Augmented:
        def __iter__(self):
            return (part + torch.randn_like(part) for part in images().split(9))

    model = deep()
    torch.manual_seed(5)
    expected = truth(model, torch.cat(list(Augmented())))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    report = recalibrate(model, Augmented())
    assert report.residual <= 1e-12
    assert_statistics(model, expected, rtol=1e-10, atol=1e-11)
    assert torch.equal(torch.get_rng_state(), before)


def test_own_forward_gets_model_and_batch():
    model, x = deep(), images()
    expected = truth(model, x)
    recalibrate(model, enumerate(x.split(9)), forward=lambda m, batch: m(batch[1]))
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)


def test_a_model_that_catches_exceptions_does_not_swallow_the_early_end():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.num_failures = deep(), 0

        def forward(self, x: Tensor) -> Tensor | None:
            try:
                return self.inner(x)
            except Exception:
                self.num_failures += 1
                return None

    model, x = Careful(), images()
    expected = truth(model, x)
    recalibrate(model, x.split(9))
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)
    assert model.num_failures == 0


def test_a_compiled_model_is_run_eagerly():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).double()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(20, 3, dtype=torch.float64)
    with torch.no_grad():  # compiled for just what recalibration runs, before there are hooks
        compiled.eval()(x)
    expected = truth(model, x)
    recalibrate(compiled, [x])
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)


def test_a_wrapper_for_data_parallelism_is_looked_through():
    model, x = deep(), images()
    expected = truth(model, x)
    recalibrate(nn.DataParallel(model), x.split(9))
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)


def test_a_constant_channel_has_variance_zero_and_converges():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    x = torch.stack([torch.randn(30), torch.full((30,), 1e4)], 1)
    report = recalibrate(model, x.split(7))
    assert report.converged
    assert model[0].running_var[1] == 0
    assert model[0].running_mean[1] == 1e4


def test_num_batches_tracked_lets_a_cumulative_average_go_on():
    model = nn.Sequential(nn.BatchNorm1d(1, momentum=None)).double()
    x = torch.randn(40, 1, dtype=torch.float64)
    recalibrate(model, x.split(10))
    assert model[0].num_batches_tracked == 4
    before = model[0].running_mean.clone()
    model.train()(x[:10] + 5)
    torch.testing.assert_close(model[0].running_mean, before * 4 / 5 + (x[:10] + 5).mean(0) / 5)


def test_a_layer_that_no_batch_reaches_is_noted_and_unchanged():
    model, x = deep(), images()
    model.spare = nn.BatchNorm2d(3)
    model.spare.running_mean.fill_(2)
    expected = truth(deep(), x)
    report = recalibrate(model, x.split(9))
    assert "'spare' unchanged: no batch reached it in evaluation mode" in report.notes
    assert (model.spare.running_mean == 2).all()
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)


def test_a_layer_without_running_statistics_is_noted():
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2))
    report = recalibrate(model, [torch.randn(9, 2)])
    assert any("'0' left alone: it keeps no running statistics" in note for note in report.notes)


def test_data_that_change_from_pass_to_pass_are_reported():
    class Changes:
        scale = 1.0

        def __iter__(self):
            Changes.scale *= 2
            yield torch.arange(10.0).view(10, 1) * Changes.scale

    model = nn.Sequential(nn.BatchNorm1d(1))
    with pytest.warns(UserWarning, match="batches differ from pass to pass"):
        report = recalibrate(model, Changes())
    assert not report.converged
    assert report.num_passes == 2  # more of them could not help
    assert "NOT CONVERGED" in str(report)


class Pyramid(nn.Module):
    """One normalization for maps of three sizes, as in a detector's head; a dict and a tuple come out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, ...]]:
        sizes = [x, x[..., ::2, ::2], x[..., :3, :3]]
        return {"levels": tuple(self.norm(self.conv(level)) for level in sizes)}


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_a_shared_layer_called_on_several_sizes_counts_every_location_and_outputs_may_be_anything(method):
    model, x = Pyramid().double(), images()
    with torch.no_grad():
        seen = [model.conv(v).movedim(1, -1).reshape(-1, 3) for v in (x, x[..., ::2, ::2], x[..., :3, :3])]
    whole = torch.cat(seen)
    report = recalibrate(model, x.split([17, 3, 20]), method=method)
    assert report.layers[0].count == len(whole) == DATA * (16 + 1 + 1)
    assert report.layers[0].num_calls == 9
    # The exact method settles it on the first call of each batch, and then on all of them.
    assert report.num_passes == (3 if method == "exact" else 1)
    assert report.converged
    assert_statistics(model, {"norm": (whole.mean(0), whole.var(0))}, rtol=1e-12, atol=1e-12)


def test_report_reads_as_a_table():
    model, x = deep(), images()
    lines = str(recalibrate(model, x.split(9))).splitlines()
    assert lines[0].startswith("recalibrated 4 layers, method 'exact': 5 batches, 5 passes, residual ")
    header = "layer channels samples/channel mean moved (std) std changed (×) std. error"
    assert " ".join(lines[1].split()) == header
    assert lines[3].split()[:3] == ["bn1", "5", str(DATA * 16)]
    assert {len(line) for line in lines[1:7]} == {len(lines[1])}


def test_progress_bar(capsys):
    recalibrate(deep(), list(images().split(9)), progress=True)
    assert "recalibrate, pass 5 ━" in capsys.readouterr().err
