"""TensorBoard: the recorder's numbers, under names that can be read."""

import builtins

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.diagnostics import watch


def trained(**options: object) -> object:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, ["0.1", "1", ""], every=2, percentiles=(2.5, 50), **options) as recorder:
        for x in torch.randn(5, 20, 6):
            optimizer.zero_grad()
            (model(x) * torch.randn(20, 3)).sum().backward()
            optimizer.step()
    return recorder


def read(folder: object) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_events_hold_the_history(tmp_path):
    history = trained(tensorboard=tmp_path / "events").history
    written = read(tmp_path / "events")
    expected = {}
    for layer, path in (("0.1", "0.1"), ("1", "1"), ("", "model")):
        seen = history[layer]
        curves = {
            "mean": seen.mean.mean(1),
            "std": np.sqrt(seen.var).mean(1),
            "p2.5": seen.pooled[:, 0],
            "p50": seen.pooled[:, 1],
            **{name: getattr(seen, name) for name in ("drift", "noise", "num_nonfinite", "gradient_rms")},
        }
        if layer == "0.1":
            names = ("weight_rms", "bias_rms", "weight_gradient_rms", "update")
            names += ("running_mean_gap", "running_std_gap")
            curves |= {name: getattr(seen, name) for name in names}
        expected |= {f"{path}/{name}": values for name, values in curves.items()}
    assert set(written) == set(expected)
    for tag, values in expected.items():
        steps, found = zip(*written[tag], strict=True)
        assert steps == (0, 2, 4), tag
        np.testing.assert_allclose(found, values, rtol=1e-5, err_msg=tag)


def test_a_writer_of_the_users_stays_open(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        history = trained(tensorboard=writer).history
        assert read(tmp_path)["0.1/update"][0][1] == pytest.approx(
            history["0.1"].update[0], rel=1e-5
        )  # flushed
        writer.add_scalar("loss", 1.0, 7)
    assert read(tmp_path)["loss"] == [(7, 1.0)]


def test_without_tensorboard_there_is_a_way_out(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "batchnorm\[train\]", or watch without tensorboard='):
        watch(nn.Linear(2, 2), tensorboard=tmp_path)


def test_what_is_no_folder_and_no_writer_is_refused(tmp_path):
    with pytest.raises(TypeError, match="a folder or a SummaryWriter, got int: 3"):
        watch(nn.Linear(2, 2), tensorboard=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        watch(nn.Linear(2, 2), tensorboard=tmp_path / "file")
