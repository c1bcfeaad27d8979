"""How well the data determine the statistics, and stopping once they do so well enough."""

import itertools
import warnings

import pytest
import torch
from population import assert_statistics, deep, images, norms, truth
from torch import Tensor, nn
from torch.utils.data import DataLoader

from batchnorm.statistics import recalibrate


def expected_errors(batches: list[Tensor], eps: float = 1e-5) -> tuple[float, float]:
    """Largest standard errors over channels, from residuals of batch totals from the pooled moments."""
    whole = torch.cat(batches)
    mean, var = whole.mean(0), whole.var(0, correction=0)
    of_mean = sum((b - mean).sum(0).square() for b in batches)
    of_var = sum(((b - mean).square() - var).sum(0).square() for b in batches)
    num = len(batches)
    se_mean, se_var = ((s * num / (num - 1)).sqrt() / len(whole) for s in (of_mean, of_var))
    return (se_mean / (var + eps).sqrt()).max().item(), (se_var / (2 * (var + eps))).max().item()


def endless(seen: list[Tensor], size: int = 50):
    """Batches drawn from torch's random numbers, which the passes over the data replay."""
    while True:
        seen.append(torch.randn(size, 1, dtype=torch.float64) * 3 + 100)
        yield seen[-1]


@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_the_report_tells_the_error_by_definition(method):
    model = nn.Sequential(nn.BatchNorm1d(3)).double()
    batches = [torch.randn(n, 3, dtype=torch.float64) * 2 + 7 for n in (5, 2, 30, 11)]
    report = recalibrate(model, batches, method=method)
    got = (report.layers[0].mean_error, report.layers[0].std_error)
    assert got == pytest.approx(expected_errors(batches), rel=1e-9)
    assert report.standard_error == max(got)
    assert report.layers[0].standard_error == max(got)


def test_one_batch_tells_no_error():
    report = recalibrate(deep(), [images()])
    assert report.standard_error is None
    assert str(report).splitlines()[3].split()[-1] == "?"


def test_calls_of_a_layer_within_a_batch_are_no_independent_batches():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(x)

    batches = list(torch.randn(60, 1, dtype=torch.float64).split(6))
    report = recalibrate(Sum().double(), batches)
    assert report.layers[0].mean_error == pytest.approx(expected_errors(batches)[0], rel=1e-9)


@pytest.mark.parametrize("method", ["exact", "pooled", "paper"])
def test_stops_an_endless_generator_once_the_error_is_small_enough(method):
    seen = []
    model = nn.Sequential(nn.BatchNorm1d(1)).double()
    report = recalibrate(model, endless(seen), method=method, standard_error=0.02)
    assert report.standard_error <= 0.02
    # The mean takes 1 / 0.02² = 2500 samples, 50 batches; a few more as the estimate is uncertain.
    assert 30 < report.num_batches == len(seen) < 130
    x = torch.cat(seen)
    assert len(x.unique()) == len(x)  # drawn on, not replayed
    assert model[0].running_mean.item() == pytest.approx(x.mean().item(), rel=1e-12)
    if method != "paper":
        assert model[0].running_var.item() == pytest.approx(x.var().item(), rel=1e-12)
    assert abs(model[0].running_mean.item() - 100) < 4 * 0.02 * 3


def test_what_is_used_of_the_data_is_used_exactly():
    model, x = deep(), images(400)
    report = recalibrate(model, x.split(5), standard_error=0.12)
    num = report.num_batches
    assert 16 <= num < 80
    assert report.standard_error <= 0.12
    assert report.residual <= 1e-12
    assert_statistics(model, truth(model, x[: 5 * num]), rtol=1e-10, atol=1e-11)


def test_locations_within_an_image_do_not_count_as_samples():
    torch.manual_seed(0)
    # An image is one brightness: 64 pixels tell as much as one.
    x = torch.randn(4000, 1, 1, 1, dtype=torch.float64).expand(-1, -1, 8, 8)
    report = recalibrate(nn.Sequential(nn.BatchNorm2d(1)).double(), x.split(8), standard_error=0.05)
    # 400 images by their number; counting pixels, 7 would do.
    assert 300 < report.num_batches * 8 < 1200


def test_the_variance_has_an_error_of_its_own():
    # Half the batches wide, half narrow: their means agree, their variances do not.
    one = torch.tensor([[-1.0], [1.0]]).double()
    batches = [one * (1 + i % 2) for i in range(64)]
    report = recalibrate(nn.Sequential(nn.BatchNorm1d(1, eps=0.0)).double(), batches)
    assert report.layers[0].mean_error == 0
    # Variances 1 and 4, mean 2.5: deviation 1.5 · √(64/63), over √64, relative, halved for the root.
    assert report.layers[0].std_error == pytest.approx(1.5 * (64 / 63) ** 0.5 / 8 / 2.5 / 2, rel=1e-9)


def test_data_that_end_too_early_are_used_up_and_it_is_said():
    model, x = deep(), images()
    expected = truth(model, x)
    with pytest.warns(UserWarning, match="the data ended before the standard error was 0.001"):
        report = recalibrate(model, (part for part in x.split(2)), standard_error=1e-3)
    assert report.num_batches == 20
    assert any("Give more data, or ask for less" in note for note in report.notes)
    assert_statistics(model, expected, rtol=1e-10, atol=1e-11)


def test_data_whose_length_is_known_are_not_gone_through_twice_to_see_that_they_ended():
    model = nn.Sequential(nn.BatchNorm1d(1)).double()
    batches = list(torch.randn(32, 1, dtype=torch.float64).split(2))  # 16, as many as it begins with
    with pytest.warns(UserWarning, match="the data ended"):
        report = recalibrate(model, batches, standard_error=1e-3)
    assert report.num_passes == 2


def test_a_loader_whose_order_is_not_shuffled_is_noted_where_only_its_beginning_was_used():
    x = torch.randn(4000, 1)
    for shuffle in (False, True):
        report = recalibrate(
            nn.Sequential(nn.BatchNorm1d(1)), DataLoader(x, 10, shuffle=shuffle), standard_error=0.2
        )
        assert report.num_batches == 16
        assert any("does not shuffle" in note for note in report.notes) is not shuffle


def test_a_loader_over_a_stream_has_no_length_and_may_show_progress(capsys):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.randn(4000, 1))

    loader = DataLoader(Stream(), 10)
    report = recalibrate(nn.Sequential(nn.BatchNorm1d(1)), loader, standard_error=0.2, progress=True)
    assert report.num_batches == 16
    assert "recalibrate, pass 2 " in capsys.readouterr().err


def test_every_batch_count_that_is_enough_stops_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num in (2, 15, 16, 17):
            batches = itertools.repeat(torch.tensor([[-1.0], [1.0]]), num)
            report = recalibrate(nn.Sequential(nn.BatchNorm1d(1)), batches, standard_error=0.01)
            assert report.num_batches == min(num, 16)
            assert report.standard_error == 0


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_an_impossible_standard_error_is_refused(value):
    model = deep()
    with pytest.raises(ValueError, match="standard_error must be above zero"):
        recalibrate(model, [images()], standard_error=value)
    assert all((n.num_batches_tracked == 77).all() for n in norms(model).values())
