"""What other tools get wrong, one named test a row."""

import copy
import re

import pytest
import torch
from population import assert_statistics, assert_unchanged, deep, images, norms, snapshot, truth
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.statistics import recalibrate


def test_swa_update_bn_row_batches_of_unequal_size_are_weighted_by_count():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(64, 1, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64) + 100])
    for method in ("exact", "pooled"):
        model = nn.Sequential(nn.BatchNorm1d(1).double())
        recalibrate(model, [x[:64], x[64:]], method=method)
        assert model[0].running_var.item() == pytest.approx(x.var().item(), rel=1e-12)
        assert model[0].running_var.item() > 290  # batches weighted equally give about 1


@pytest.mark.parametrize("method", ["exact", "pooled", "paper"])
def test_swa_update_bn_row_frozen_layers_stay_frozen_and_normalize_with_their_own(method):
    model, x = deep(), images()
    model.train()
    model.bn1.eval()  # frozen the usual way: evaluation mode inside a model in training mode
    model.bn2.frozen = True
    before = snapshot(model)
    expected = copy.deepcopy(model)
    report = recalibrate(model, [x], method=method)
    for name in ("bn1", "bn2"):
        assert torch.equal(norms(model)[name].running_mean, norms(expected)[name].running_mean)
        assert norms(model)[name].num_batches_tracked == 77
    assert_unchanged(model, before, but_statistics=True)
    assert [layer.name for layer in report.layers] == ["bn3", "bn4"]
    assert any("'bn1' left alone" in note for note in report.notes)
    assert any("'bn2' left alone" in note for note in report.notes)
    # What bn3 received: the frozen layers' outputs from their stored statistics.
    expected.eval()
    received = []
    expected.bn3.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    expected(x)
    assert_statistics(model, {"bn3": (received[0].mean(0), received[0].var(0))}, rtol=1e-11, atol=1e-12)


def test_a_model_in_evaluation_mode_has_no_frozen_layers_but_marked_ones():
    model, x = deep(), images()
    model.eval()
    assert len(recalibrate(model, [x]).layers) == 4
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("method", ["exact", "pooled", "paper"])
def test_swa_update_bn_row_dropout_is_off_and_random_state_untouched(method):
    model, x = deep(), images()
    expected = truth(model, x)
    model.train()
    before = snapshot(model)
    recalibrate(model, [x], method=method)
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)
    assert_unchanged(model, before, but_statistics=True)


@pytest.mark.parametrize("method", ["pooled", "paper"])
def test_swa_update_bn_row_last_batch_of_one_raises_and_restores(method):
    model, x = deep(), images()
    model.train()
    for norm in norms(model).values():
        norm.momentum = 0.3
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"batch 1, layer 'bn3': 1 sample\(s\) a channel.*method=\"exact\""):
        recalibrate(model, x.split([39, 1]), method=method)
    assert_unchanged(model, before)


def test_swa_update_bn_row_a_last_batch_of_one_is_a_sample_like_any_other():
    model, x = deep(), images()
    model.train()
    for norm in norms(model).values():
        norm.momentum = 0.3
    expected = truth(model, x)
    before = snapshot(model)
    recalibrate(model, x.split([39, 1]))
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)
    assert_unchanged(model, before, but_statistics=True)  # momentum among them


def test_flax_and_equinox_rows_running_variance_is_unbiased_and_moments_are_biased_as_they_say():
    x = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)  # squares around the mean 3: 4 + 1 + 9
    for method in ("exact", "pooled", "paper"):
        model = nn.Sequential(nn.BatchNorm1d(1)).double()
        recalibrate(model, [x], method=method)
        assert model[0].running_var.item() == pytest.approx(14 / 2, rel=1e-12)
    assert Moments.of(x).var.item() == pytest.approx(14 / 3, rel=1e-12)
    assert Moments.of(x).unbiased().item() == pytest.approx(14 / 2, rel=1e-12)
    assert re.search(r"variance stored is unbiased", re.sub(r"\s+", " ", recalibrate.__doc__))
    assert "Biased variance" in Moments.__doc__


def test_fvcore_row_variance_one_at_mean_ten_thousand():
    torch.manual_seed(0)
    x = torch.randn(4096, 1) + 1e4
    model = nn.Sequential(nn.BatchNorm1d(1))
    recalibrate(model, x.split(100))
    assert model[0].running_var.item() == pytest.approx(x.double().var().item(), rel=1e-6)


@pytest.mark.parametrize("method", ["exact", "pooled", "paper"])
def test_fvcore_row_loader_that_breaks_off_leaves_no_trace(method):
    model, x = deep(), images()
    model.train()
    before = snapshot(model)

    class Breaks:
        def __iter__(self):
            yield x[:20]
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        recalibrate(model, Breaks(), method=method)
    assert_unchanged(model, before)


class Twice(nn.Module):
    """One normalization used at two depths, with another between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.shared, self.between = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(self.a(x)))
        x = torch.tanh(self.between(self.b(x)))
        return self.shared(self.c(x))


def test_fvcore_row_a_layer_used_twice_pools_both_calls_to_a_fixed_point():
    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(50, 4, dtype=torch.float64) * 2 + 1
    report = recalibrate(model, x.split([20, 29, 1]), tolerance=1e-9)
    assert report.converged
    assert report.layers[0].count == 100
    assert model.shared.num_batches_tracked == 6
    received = {"shared": [], "between": []}
    for name, seen in received.items():
        getattr(model, name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        # The fixed point is that of the biased variance, as in one training-mode batch.
        norm = getattr(model, name)
        norm.running_var *= 1 - 1 / (100 if name == "shared" else 50)
    model.eval()(x)
    for name, seen in received.items():
        both = torch.cat(seen)
        assert_statistics(model, {name: (both.mean(0), both.var(0, correction=0))}, rtol=1e-8, atol=1e-8)


def test_where_nothing_converges_the_best_that_was_found_is_kept():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(x)

    scales = iter([1, 2, 2.1, 4, 8, 16])

    class Changes:
        def __iter__(self):
            return iter([next(scales) * torch.arange(1, 11, dtype=torch.float64).view(10, 1)])

    model = Sum().double()
    with pytest.warns(UserWarning, match=r"not converged.* a layer is called several times"):
        report = recalibrate(model, Changes())
    # The second pass's statistics were nearest to what the next pass found.
    assert model.norm.running_mean.item() == pytest.approx(2 * 5.5)
    assert report.num_passes == 5
    assert report.residual == pytest.approx(0.1 * 5.5 / (2.1 * 8.25**0.5), rel=1e-4)


def test_timm_row_variance_between_parts_is_not_lost():
    model = nn.Sequential(nn.BatchNorm1d(1).double())
    parts = [torch.tensor([[-1.0], [1.0]]).double() + 3 * side for side in (-1, 1)]
    recalibrate(model, parts * 500)
    assert model[0].running_var.item() == pytest.approx(10 * 2000 / 1999)  # averaged variances: 1 or 2
