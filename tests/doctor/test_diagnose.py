"""What a diagnosis accepts, refuses, measures and leaves as it was."""

import json
import math
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from patients import Residual, batches, healthy
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.doctor import Effect, diagnose


def test_everything_is_left_as_it_was():
    model = healthy()
    model.bn2.train()
    model.bn3.running_var *= 1e4
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    random = torch.get_rng_state()
    diagnose(model, batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_losses_and_gap_are_those_of_plain_loops():
    model = healthy()
    model.bn3.running_var *= 4
    diagnosis = diagnose(model, batches(100))
    x, y = (torch.cat(parts) for parts in zip(*batches(100), strict=True))
    with torch.no_grad():
        expected = F.cross_entropy(model(x), y).item()
    assert diagnosis.num_examples == 500
    assert diagnosis.inference_loss == pytest.approx(expected, rel=1e-5)
    assert diagnosis.gap == pytest.approx(abs(expected - diagnosis.batch_loss))


def test_layers_tell_the_moments_of_the_data():
    model = healthy()
    diagnosis = diagnose(model, batches(100))
    x = torch.cat([x for x, _ in batches(100)]).double()
    first = F.conv2d(x, model.conv1.weight.double(), padding=1)
    facts = diagnosis.layers[0]
    assert [layer.name for layer in diagnosis.layers] == ["bn1", "bn2", "bn3", "bn4"]
    assert facts.mean == pytest.approx(first.mean((0, 2, 3)).tolist(), rel=1e-5, abs=1e-6)
    assert facts.var == pytest.approx(first.var((0, 2, 3), correction=0).tolist(), rel=1e-4)
    off = (model.bn1.running_mean - first.mean((0, 2, 3))) / (first.var((0, 2, 3)) + 1e-5).sqrt()
    assert facts.mean_off == pytest.approx(off.square().mean().sqrt().item(), rel=1e-3)


def test_loss_of_the_user():
    model = healthy()
    model.bn3.running_var *= 1e4
    diagnosis = diagnose(
        model, batches(), loss=lambda output, batch: (output.argmax(1) != batch[1]).float().mean()
    )
    assert diagnosis.inference_loss > 0.5 > 0.1 > diagnosis.batch_loss
    assert diagnosis.findings[0].effect.what == "gap of the loss"


def test_without_labels_the_outputs_are_compared():
    model = healthy()
    model.bn3.running_var *= 1e4
    diagnosis = diagnose(model, [x for x, _ in batches()])
    assert diagnosis.inference_loss is None
    assert diagnosis.gap == diagnosis.distance > 0.5
    effect = diagnosis.findings[0].effect
    assert effect.what == "distance of the outputs"
    assert effect.closed > 0.8


class Wordy(Residual):
    """Takes keywords and returns a dictionary, as transformers do."""

    def forward(self, pixels, labels=None):
        logits = super().forward(pixels)
        return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}


class Twofold(Residual):
    def forward(self, x):
        return super().forward(x), {"more": x.mean()}


def test_dictionaries_in_and_out():
    model = Wordy()
    model.load_state_dict(healthy().state_dict())
    model.eval().bn3.running_var.mul_(1e4)
    given = [{"pixels": x, "labels": y} for x, y in batches()]
    diagnosis = diagnose(model, given)
    assert diagnosis.findings[0].cause == "poisoned-statistics"
    assert diagnosis.inference_loss > 1 > diagnosis.batch_loss


def test_tuples_out():
    model = Twofold()
    model.load_state_dict(healthy().state_dict())
    diagnosis = diagnose(model.eval(), batches())
    assert diagnosis.healthy
    assert diagnosis.inference_loss < 0.1


def test_generator_of_batches_and_forward_of_the_user():
    calls = []

    def forward(model, batch):
        calls.append(len(batch["image"]))
        return model(batch["image"])

    given = ({"image": x} for x, _ in batches())
    assert diagnose(healthy(), given, forward=forward).healthy
    assert 64 in calls


def test_several_findings_are_ranked_by_what_the_cure_of_each_gains():
    model = healthy()
    model.bn2.reset_running_stats()
    model.bn3.running_var *= 1e4
    model.conv2.bias = nn.Parameter(torch.zeros(16))
    diagnosis = diagnose(model, batches())
    assert [f.cause for f in diagnosis.findings] == ["poisoned-statistics", "stale-statistics", "dead-bias"]
    poisoned, stale = (finding.effect for finding in diagnosis.findings[:2])
    assert poisoned.before == stale.before
    assert 0.8 < poisoned.closed < 1
    assert stale.closed < 0.5


def test_data_parallel_wrapper_is_looked_through():
    assert diagnose(nn.DataParallel(healthy()), batches()).healthy


def test_num_batches_limits_what_is_read():
    read = []

    def given():
        for pair in batches(32, limit=10):
            read.append(1)
            yield pair

    assert diagnose(healthy(), given(), num_batches=4).num_batches == 4
    assert len(read) == 4


@pytest.mark.parametrize(
    ("model", "given", "error", "words"),
    [
        (nn.Linear(2, 2), [torch.zeros(4, 2)], ValueError, r"no batch normalization.*bn\.insert"),
        ("not a model", [torch.zeros(4, 2)], TypeError, r"needs a torch\.nn\.Module"),
        (nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)), [torch.zeros(4, 2)], ValueError, "no shape yet"),
        (nn.BatchNorm1d(3, device="meta"), [torch.zeros(4, 3)], ValueError, "weight is on the meta device"),
        (nn.BatchNorm1d(3), [], ValueError, "batches is empty"),
        (nn.BatchNorm1d(3), torch.zeros(4, 3), TypeError, "put a single batch in a list"),
        (
            nn.BatchNorm1d(3),
            [torch.full((4, 3), torch.nan)],
            ValueError,
            r"batch 0, layer '\(model\)'.*not finite",
        ),
        (nn.BatchNorm1d(3), [torch.zeros(4, 3, device="meta")], RuntimeError, "on meta and the model on cpu"),
        (
            nn.BatchNorm1d(3),
            [{"image": torch.zeros(4, 3)}],
            TypeError,
            r"batch 0 does not fit BatchNorm1d\.forward.*forward=",
        ),
        (nn.BatchNorm1d(3), [7], TypeError, "a batch must be a tensor"),
    ],
    ids=[
        "no BN",
        "no model",
        "lazy",
        "meta",
        "empty",
        "bare tensor",
        "nan",
        "device",
        "arguments",
        "no batch",
    ],
)
def test_bad_input(model, given, error, words):
    with pytest.raises(error, match=words):
        diagnose(model, given)


def test_a_loader_that_raises_leaves_the_model_alone():
    model = healthy()

    def given():
        yield batches()[0]
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        diagnose(model, given())
    assert not model.training
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_batches_that_cannot_be_mixed_are_looked_at_as_they_are():
    conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)).train()
    given = [torch.randn(16, 1, side, side) for side in (8, 9, 10, 8)]
    with torch.no_grad():
        for _ in range(60):
            for x in given:
                conv(x)
    diagnosis = diagnose(conv.eval(), given)
    assert diagnosis.healthy
    assert any("could not be cut and mixed" in note for note in diagnosis.notes)


def test_one_batch_that_is_not_finite_among_others_is_named_and_left_out():
    given = [(x.clone(), y) for x, y in batches()]
    given[2][0][0] = torch.inf
    diagnosis = diagnose(healthy(), given)
    assert [f.cause for f in diagnosis.findings] == ["not-finite"]
    assert math.isfinite(diagnosis.inference_loss)


def test_effect_of_nothing_is_no_division_by_zero():
    assert Effect("gap", 0.0, 0.0).closed == 0
    assert Effect("gap", 2.0, 0.5).closed == 0.75


def test_text_and_json_say_the_same(tmp_path):
    model = healthy()
    model.bn3.running_mean[0] = torch.nan
    diagnosis = diagnose(model, batches())
    text = str(diagnosis)
    assert "1. poisoned-statistics (wrong) at 'bn3'" in text
    assert "cure: bn.recalibrate" in text
    found = json.loads(diagnosis.save(tmp_path / "diagnosis.json").read_text())
    assert found["healthy"] is False
    assert found["inference_loss"] is None  # not a number
    assert found["findings"][0]["cause"] == "poisoned-statistics"
    assert found["findings"][0]["layers"] == ["bn3"]
    assert found["layers"][2]["running_mean"][0] is None
    assert [stop["name"] for stop in found["route"]][:3] == ["conv1", "bn1", "conv2"]


def _rank(rank: int, world: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    try:
        model = healthy()
        spread = {"alike": 0.0, "apart": 3.0 * rank}
        for name, shift in spread.items():
            model.bn3.running_mean[:] = healthy().bn3.running_mean + shift * model.bn3.running_var.sqrt()
            found = diagnose(model, batches(), group=dist.group.WORLD).findings
            with open(os.path.join(folder, f"{name}-{rank}.json"), "w") as file:
                json.dump(
                    [[f.cause, f.layers, f.effect and [f.effect.before, f.effect.after]] for f in found], file
                )
    finally:
        dist.destroy_process_group()


def test_ranks_that_disagree():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (2, os.path.join(folder, "meet"), folder), nprocs=2)

        def read(name: str, rank: int):
            with open(os.path.join(folder, f"{name}-{rank}.json")) as file:
                return json.load(file)

        for rank in (0, 1):
            assert read("alike", rank) == []
            found = {cause: (layers, effect) for cause, layers, effect in read("apart", rank)}
            layers, (before, after) = found["ranks-disagree"]
            assert layers == ["bn3"]
            assert before == pytest.approx(3, rel=1e-3)
            assert after == 0


def test_our_fused_layers_and_features_last():
    model = nn.Sequential(nn.Linear(6, 8, bias=False), bn.BatchNorm1d(8, channel_dim=-1, activation="relu"))
    given = [torch.randn(16, 5, 6) for _ in range(20)]
    model.train()
    with torch.no_grad():
        for x in given * 5:
            model(x)
    diagnosis = diagnose(model.eval(), given)
    assert diagnosis.healthy, str(diagnosis)
    assert diagnosis.layers[0].channels == 8
