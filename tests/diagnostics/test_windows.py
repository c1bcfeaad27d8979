"""Percentiles over many records: windows, the whole run, and how far they may be off."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchnorm.diagnostics import LayerHistory, Sketch, load_histories, watch
from batchnorm.diagnostics.sketch import sampling_error
from batchnorm.diagnostics.stream import Stream
from batchnorm.diagnostics.summary import Samples, _subset, summarize
from batchnorm.diagnostics.watched import given_to, gives_standardized
from batchnorm.layers import BatchNorm1d, BatchNorm2d

LEVELS = (15, 50, 85)


def recorded(num: int = 7, **options: object) -> tuple[object, np.ndarray]:
    """A recorder that has seen ``num`` batches of 10 at every second step, and what it saw."""
    model = nn.Sequential(nn.Identity())
    recorder = watch(model, "0", every=2, **options)
    batches = torch.randn(2 * num, 10, 3, generator=torch.Generator().manual_seed(0)).cumsum(0)
    for x in batches:
        model(x)
    recorder.close()
    return recorder, batches[::2].double().numpy()


def exactly(x: np.ndarray, **where: object) -> np.ndarray:
    return np.percentile(x, LEVELS, method="inverted_cdf", **where)


def test_one_window_covers_the_run():
    recorder, x = recorded()
    seen = recorder.history["0"]
    assert (seen.window_first.tolist(), seen.window_last.tolist()) == ([0], [12])
    assert seen.window_count.tolist() == [70]
    assert seen.window_error.tolist() == [0]  # all of it is held
    np.testing.assert_array_equal(seen.window_percentiles[0], exactly(x.reshape(-1, 3), axis=0))
    np.testing.assert_array_equal(seen.window_pooled[0], exactly(x))


def test_windows_are_cut_by_records_and_the_last_may_be_growing():
    recorder, x = recorded(window=3)
    seen = recorder.history["0"]
    assert seen.window_first.tolist() == [0, 6, 12]
    assert seen.window_last.tolist() == [4, 10, 12]
    assert seen.window_count.tolist() == [30, 30, 10]
    for found, part in zip(seen.window_percentiles, (x[:3], x[3:6], x[6:]), strict=True):
        np.testing.assert_array_equal(found, exactly(part.reshape(-1, 3), axis=0))
    # The run is there as well, for any level.
    whole = recorder.sketch("0")
    np.testing.assert_array_equal(whole.percentiles(LEVELS), exactly(x.reshape(-1, 3), axis=0))


def test_a_long_run_is_within_the_error_that_it_states():
    rng = np.random.default_rng(0)
    stream, rows = Stream(2, LEVELS, window=None, seed=0), []
    for step in range(300):
        rows.append(rng.standard_normal((100, 2)).astype(np.float32) + step / 100)
        stream.add(step, rows[-1])
    (window,) = stream.windows()
    assert (window.first, window.last, window.count) == (0, 299, 30_000)
    assert 0 < window.error < 0.01
    for u, unit in enumerate(np.concatenate(rows).T):
        shares = [(unit <= value).mean() for value in window.percentiles[:, u]]
        assert np.abs(np.array(shares) - np.array(LEVELS) / 100).max() <= window.error


def test_only_kept_units_are_streamed_and_asking_does_not_disturb():
    model, x = nn.Sequential(nn.Identity()), torch.randn(5, 8)
    with watch(model, "0", every=1, keep_units=2) as recorder:
        model(x)
        for _ in range(2):
            assert recorder.history["0"].window_percentiles.shape == (1, 3, 2)
        copy = recorder.sketch("0")
        model(x)
    assert recorder.sketch("0").count == 10
    assert copy.count == 5


def test_sketches_of_ranks_merge():
    parts = [recorded(seed=rank) for rank in range(2)]
    whole = parts[0][0].sketch("0").merge(parts[1][0].sketch("0"))
    both = np.concatenate([x for _, x in parts]).reshape(-1, 3)
    np.testing.assert_array_equal(whole.percentiles((50,))[0], np.sort(both, 0)[len(both) // 2 - 1])
    with pytest.raises(ValueError, match="coins of seed 0"):
        parts[0][0].sketch("0").merge(Sketch(3))


def test_sketches_that_are_not_there():
    recorder = watch(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="nothing of layer '0' has been recorded yet"):
        recorder.sketch("0")
    with pytest.raises(ValueError, match="'1' is not watched; watched are '0'"):
        recorder.sketch("1")


def test_records_state_their_own_sampling_error():
    model, x = nn.Sequential(nn.Identity()), torch.randn(4, 2, 8, 8)
    with (
        watch(model, "0", every=1, max_samples=100) as few,
        watch(model, "0", every=1, max_samples=256) as all_,
    ):
        model(x)
    assert few.history["0"].sampling_error == pytest.approx([(np.log(200) / 200) ** 0.5])
    assert all_.history["0"].sampling_error.tolist() == [0]
    assert few.history["0"].window_count.tolist() == [100]


def test_the_same_places_are_taken_of_every_batch_and_others_with_another_seed():
    model, x = nn.Sequential(nn.Identity()), torch.randn(4, 2, 8, 8)
    seen = {}
    for seed in (0, 1):
        with watch(model, "0", every=1, max_samples=50, seed=seed) as recorder:
            model(x)
            model(x)
        seen[seed] = recorder.history["0"]
        assert seen[seed].total_drift == 0
    assert (seen[0].percentiles != seen[1].percentiles).any()


def test_calls_of_different_sizes_count_by_what_they_have_seen():
    small, large = (Samples.of(t, channel_dim=1, mask=None, max_samples=100) for t in SIZES)
    for both in (small.merge(large), large.merge(small), small.merge(large).merge(small)):
        assert both.num_seen in (4040, 4080)
        share_of_ones = (both.rows == 1).mean()
        assert share_of_ones == pytest.approx(4000 / both.num_seen, abs=0.01)
        assert len(both.rows) == len(both.is_second)
        assert len(both.rows) >= 100
        assert sampling_error(len(both.rows), both.num_seen) <= sampling_error(100, 4000)
    everything = small.merge(Samples.of(SIZES[0], channel_dim=1, mask=None, max_samples=40))
    assert len(everything.rows) == everything.num_seen == 80
    none = Samples.of(torch.empty(0, 2), channel_dim=1, mask=None, max_samples=100)
    assert len(none.merge(small).rows) == 40
    assert np.isnan(summarize(none, LEVELS).noise)


def test_samples_of_samples_are_all_different_and_each_as_likely():
    counts = np.zeros(10)
    for seed in range(2000):
        chosen = _subset(10, 7, seed)
        assert len(chosen) == 7
        assert (np.diff(chosen) > 0).all()  # one of each of seven parts of ten might be the same twice
        counts[chosen] += 1
    assert np.abs(counts / 2000 - 0.7).max() < 0.05
    assert _subset(7, 7).tolist() == list(range(7))


SIZES = (torch.zeros(40, 2), torch.ones(40, 2, 10, 10))


def files(tmp_path, suffix: str) -> dict[str, object]:
    """Histories, among them a layer that was never called, and their file."""
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "unused": nn.Linear(2, 2)})
    model.forward = lambda x: model["a"](x)
    with watch(model, every=1, window=2) as recorder:
        for x in torch.randn(3, 5, 3):
            model(x)
    return {"recorder": recorder, "path": recorder.save(tmp_path / f"seen{suffix}")}


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_everything_comes_back_from_a_file_with_its_shape(tmp_path, suffix):
    found = files(tmp_path, suffix)
    loaded = load_histories(found["path"])
    assert list(loaded) == ["a", "unused"]
    assert loaded["unused"].window_percentiles.shape == (0, 3, 0)
    for name, layer in found["recorder"].history.items():
        for field, values in vars(layer).items():
            assert getattr(loaded[name], field).shape == values.shape, field
            np.testing.assert_array_equal(getattr(loaded[name], field), values, err_msg=field)


DAMAGED = {
    "no steps": ('{"a": {"mean": [[1]]}}', "no bias_rms, drift"),
    "an unknown field": ("extra", "unexpected keyword argument 'extra'"),
    "a shape that does not fit": ("shape", "cannot reshape"),
    "a list": ("[]", "'list' object"),
}


@pytest.mark.parametrize(("text", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused(tmp_path, text, message):
    plain = {f.name: [] for f in fields(LayerHistory)}
    if text == "extra":
        text = {"a": {**plain, "extra": []}}
    elif text == "shape":
        text = {"a": {**plain, "step": [0, 1], "noise": [0.1]}}
    (tmp_path / "seen.json").write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError, match=rf"does not hold histories of layers: .*{message}"):
        load_histories(tmp_path / "seen.json")


def image_batch(side: int) -> Tensor:
    """Locations of one image are alike, as those of a network are."""
    return torch.randn(32, 16, 1, 1) + 0.7 * torch.randn(32, 16, side, side)


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize("side", [1, 4, 16], ids="{0}x{0}".format)
def test_noise_is_the_drift_of_a_network_that_stands_still(side, is_normalized):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(16) if is_normalized else nn.Identity())
    with watch(model, "0", every=1) as recorder:
        for _ in range(40):
            model(image_batch(side))
    seen = recorder.history["0"]
    assert seen.noise.mean() == pytest.approx(seen.drift[1:].mean(), rel=0.12)


def test_noise_of_a_frozen_normalization_is_that_of_its_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(16).eval())
    with watch(model, "0", every=1, during="both") as recorder:
        for _ in range(40):
            model(image_batch(4))
    seen = recorder.history["0"]
    assert seen.noise.mean() == pytest.approx(seen.drift[1:].mean(), rel=0.12)


def test_noise_of_halves_that_are_unlike_in_size():
    model = nn.Sequential(nn.Identity())
    with watch(model, "0", every=1) as recorder:
        for x in torch.randn(200, 3, 50, 200, generator=torch.Generator().manual_seed(0)):
            model(x)  # two examples and one
    seen = recorder.history["0"]
    assert seen.noise.mean() == pytest.approx(seen.drift[1:].mean(), rel=0.03)


def test_noise_of_a_sum_is_that_of_its_residual_too():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, residual=3 * image_batch(4))

    torch.manual_seed(0)
    model = Sum()
    with watch(model, every=1) as recorder:
        for _ in range(40):
            model(image_batch(4))
    seen = recorder.history["norm"]
    assert seen.noise.mean() == pytest.approx(seen.drift[1:].mean(), rel=0.12)


class Shifted(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[:1]


def frozen() -> nn.Module:
    layer = BatchNorm1d(3)
    layer.frozen = True
    return layer


NORMALIZED = {
    "torch's": (lambda: nn.BatchNorm1d(3), {}, True),
    "torch's, which keeps no statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), {}, True),
    "ours": (lambda: BatchNorm1d(3), {"mask": torch.ones(2, dtype=torch.bool), "residual": None}, True),
    "ours, which keeps none": (lambda: BatchNorm1d(3, track_running_stats=False).eval(), {}, True),
    "in evaluation": (lambda: nn.BatchNorm1d(3).eval(), {}, False),
    "ours, in evaluation": (lambda: BatchNorm1d(3).eval(), {}, False),
    "frozen": (frozen, {}, False),
    "fused": (lambda: BatchNorm1d(3, activation="relu"), {}, False),
    "an activation of the call": (lambda: BatchNorm1d(3), {"activation": "relu"}, False),
    "a residual": (lambda: BatchNorm1d(3), {"residual": torch.ones(2, 3)}, False),
    "a subclass of the user's": (lambda: Shifted(3), {}, False),
    "by all ranks": (lambda: nn.SyncBatchNorm(3), {}, False),
    "of another kind": (lambda: nn.LayerNorm(3), {}, False),
}


@pytest.mark.parametrize(("layer", "extra", "expected"), NORMALIZED.values(), ids=NORMALIZED)
def test_which_layers_give_what_they_normalized_by_the_batch_and_no_more(layer, extra, expected):
    layer = layer()
    assert gives_standardized(layer, given_to(layer, (torch.ones(2, 3),), extra)) is expected


def test_noise_of_one_example_is_unknown():
    model = nn.Sequential(nn.Identity())
    with watch(model, "0", every=1) as recorder:
        model(torch.randn(1, 3, 8, 8))
    assert np.isnan(recorder.history["0"].noise).all()
    assert " - " in recorder.table()
