"""Recalibration against the one truth: all the data as one batch in training mode."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNormPerActivation
from batchnorm.statistics import recalibrate

DATA = 40


class Deep(nn.Module):
    """Four normalizations in depth: convolutions with a shortcut, linear layers, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 5, 3, padding=1), BatchNorm2d(5, activation="relu")
        self.drop = nn.Dropout(0.5)
        self.linear1, self.bn3 = nn.Linear(5 * 16, 7), nn.BatchNorm1d(7)
        self.linear2, self.bn4 = nn.Linear(7, 3), BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.drop(self.bn2(self.conv2(x), residual=x))
        x = torch.sigmoid(self.bn3(self.linear1(x.flatten(1))))
        return self.bn4(self.linear2(x))


def deep(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    model = Deep().to(dtype)
    for norm in norms(model).values():  # as if it had trained on something else
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 9)
        norm.num_batches_tracked.fill_(77)
    return model


def images(num: int = DATA, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(num, 2, 1, 1, generator=generator, dtype=dtype) * 3
    return torch.randn(num, 2, 6, 6, generator=generator, dtype=dtype) * scale + 0.7


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def truth(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Statistics after one training-mode batch of all the data, without dropout."""
    model = copy.deepcopy(model).eval()
    for norm in norms(model).values():
        norm.train()
        norm.momentum = 1.0
    model(x)
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms(model).items()}


def assert_statistics(
    model: nn.Module, expected: dict[str, tuple[Tensor, Tensor]], **tolerances: float
) -> None:
    for name, (mean, var) in expected.items():
        got = norms(model)[name]
        torch.testing.assert_close(got.running_mean, mean, msg=lambda m, n=name: f"{n}: {m}", **tolerances)
        torch.testing.assert_close(got.running_var, var, msg=lambda m, n=name: f"{n}: {m}", **tolerances)


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "momentum": [n.momentum for n in norms(model).values()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "grad": [p.requires_grad for p in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, object], *, but_statistics: bool = False) -> None:
    after = snapshot(model)
    states = before.pop("state"), after.pop("state")
    rng = before.pop("rng"), after.pop("rng")
    assert after == before
    assert torch.equal(*rng)
    for key, value in states[0].items():
        if not (but_statistics and ("running" in key or "tracked" in key)):
            assert torch.equal(value, states[1][key]), key


SPLITS = {
    "one batch": [DATA],
    "ones": [1] * DATA,
    "last of one": [13, 13, 13, 1],
    "64 + 2 in small": [38, 2],
    "an empty batch between": [20, 0, 20],
}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_exact_equals_the_whole_data_as_one_batch(sizes):
    model, x = deep(), images()
    expected = truth(model, x)
    report = recalibrate(model, x.split(sizes))
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)
    assert report.converged
    assert report.residual <= 1e-12
    assert report.num_passes == len(expected) + 1
    assert report.num_batches == len(sizes)


@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(1, DATA - 1), max_size=12))
def test_any_split_gives_the_same_statistics_in_float32(cuts):
    edges = [0, *sorted(cuts), DATA]
    x = images(dtype=torch.float32)
    model = deep(torch.float32)
    expected = truth(deep(), x.double())
    recalibrate(model, [x[a:b] for a, b in itertools.pairwise(edges)])
    single = {name: (mean.float(), var.float()) for name, (mean, var) in expected.items()}
    assert_statistics(model, single, rtol=2e-5, atol=2e-6)


def test_running_statistics_before_do_not_matter_not_even_infinite_ones():
    model, x = deep(), images()
    expected = truth(model, x)
    model.bn1.running_mean.fill_(torch.inf)
    model.bn3.running_var.fill_(torch.nan)
    report = recalibrate(model, x.split(8))
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)
    assert report.layers[0].shift == torch.inf


def test_recalibrating_twice_changes_nothing():
    model, x = deep(), images()
    recalibrate(model, x.split(7))
    before = snapshot(model)
    report = recalibrate(model, x.split(7))
    assert_unchanged(model, before)
    assert max(layer.shift for layer in report.layers) == 0
    assert max(layer.stretch for layer in report.layers) == 1


def test_pooled_is_exact_for_the_first_layer_and_misses_the_next_by_batch_noise():
    model, x = deep(), images()
    expected = truth(model, x)
    report = recalibrate(model, x.split(8), method="pooled")
    assert report.num_passes == 1
    assert report.residual is None
    assert_statistics(model, {"bn1": expected["bn1"]}, rtol=1e-12, atol=1e-12)
    miss = (model.bn2.running_mean - expected["bn2"][0]).abs().max()
    assert 1e-6 < miss < 0.3


def test_pooled_in_one_batch_is_exact():
    model, x = deep(), images()
    expected = truth(model, x)
    recalibrate(model, [x], method="pooled")
    assert_statistics(model, expected, rtol=1e-12, atol=1e-12)


def test_paper_averages_batch_means_and_unbiased_batch_variances():
    model, x = nn.Sequential(nn.BatchNorm1d(3).double()), torch.randn(30, 3, dtype=torch.float64)
    parts = x.split(10)
    report = recalibrate(model, parts, method="paper")
    # Algorithm 2, line 10: E_B[μ_B] and m/(m − 1) E_B[σ²_B], m = 10.
    mean = sum(p.mean(0) for p in parts) / 3
    var = 10 / 9 * sum(p.var(0, correction=0) for p in parts) / 3
    assert_statistics(model, {"0": (mean, var)}, rtol=1e-12, atol=1e-14)
    pooled = x.var(0)
    gap = (((var + 1e-5) / (pooled + 1e-5)).sqrt() - 1).abs().max().item()
    assert report.layers[0].paper_gap == pytest.approx(gap, rel=1e-9)


def test_paper_note_where_batches_are_sorted_by_class():
    model = nn.Sequential(nn.BatchNorm1d(1))
    batches = [torch.randn(20, 1) + 10 * k for k in range(4)]
    report = recalibrate(model, batches, method="paper")
    assert model[0].running_var.item() == pytest.approx(1, rel=0.4)  # the pooled one is about 126
    assert report.layers[0].paper_gap > 0.8
    assert any("sorted by class" in note for note in report.notes)
    assert "paper's std off by" in str(report)


def test_paper_and_exact_agree_on_one_batch():
    model, other, x = deep(), deep(), images()
    recalibrate(model, [x], method="paper")
    recalibrate(other, [x], method="exact")
    assert_statistics(model, {n: (b.running_mean, b.running_var) for n, b in norms(other).items()})


# Rows of the table of defects in today's tools, one test each.


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


# Kinds of layers, batches and models.


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


def test_report_reads_as_a_table():
    model, x = deep(), images()
    lines = str(recalibrate(model, x.split(9))).splitlines()
    assert lines[0].startswith("recalibrated 4 layers, method 'exact': 5 batches, 5 passes, residual ")
    assert " ".join(lines[1].split()) == "layer channels samples/channel mean moved (std) std changed (×)"
    assert lines[3].split()[:3] == ["bn1", "5", str(DATA * 16)]
    assert {len(line) for line in lines[1:7]} == {len(lines[1])}


def test_progress_bar(capsys):
    recalibrate(deep(), list(images().split(9)), progress=True)
    assert "recalibrate, pass 5 ━" in capsys.readouterr().err


# Bad input: what, where, what to do; and nothing changed.


def poisoned(value: float) -> list[Tensor]:
    batches = [b.clone() for b in images().split(9)]
    batches[3][0, 0, 0, 0] = value
    return batches


BAD = {
    "a nan in one batch": (lambda: poisoned(torch.nan), {}, ValueError, r"batch 3, layer 'bn1'.*not finite"),
    "an inf, pooled": (
        lambda: poisoned(torch.inf),
        {"method": "pooled"},
        ValueError,
        r"batch 3, layer 'bn1'",
    ),
    "no batches": (lambda: [], {}, ValueError, "batches is empty"),
    "unknown method": (lambda: [], {"method": "ema"}, ValueError, "'exact', 'pooled', 'paper', got 'ema'"),
    "negative tolerance": (lambda: [], {"tolerance": -1}, ValueError, "zero or more deviations"),
    "a batch of strings": (lambda: ["x"], {}, TypeError, r"got str. Pass forward="),
    "an empty tuple": (lambda: [()], {}, TypeError, "an empty tuple"),
    "another device": (
        lambda: [images().to("meta")],
        {},
        RuntimeError,
        r"batch 0 is on meta and the model on cpu; move one",
    ),
}


@pytest.mark.parametrize(("batches", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_explained_and_leaves_no_trace(batches, options, error, message):
    model = deep()
    model.train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        recalibrate(model, batches(), **options)
    assert_unchanged(model, before)


def test_wrong_channel_count_names_batch_and_layer():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    with pytest.raises(ValueError, match=r"batch 1, layer '0': expected 4 channels"):
        recalibrate(model, [torch.randn(3, 4), torch.randn(3, 5)])


def test_one_sample_in_all_the_data_has_no_variance():
    with pytest.raises(ValueError, match=r"layer '0': 1 sample\(s\) a channel in all the data"):
        recalibrate(nn.Sequential(nn.BatchNorm1d(4)), [torch.randn(1, 4)])


def test_models_with_nothing_to_recalibrate():
    with pytest.raises(ValueError, match="Linear has no batch normalization"):
        recalibrate(nn.Linear(2, 2), [torch.randn(3, 2)])
    with pytest.raises(ValueError, match="no layer to recalibrate: '0' left alone: it keeps no running"):
        recalibrate(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), [torch.randn(3, 2)])
    with pytest.raises(ValueError, match="layer '0' is still lazy"):
        recalibrate(nn.Sequential(nn.LazyBatchNorm1d()), [torch.randn(3, 2)])
