"""Each sickness, planted in a healthy trained network, is found alone, at its layer, and cured."""

import copy
from functools import cache

import pytest
import torch
from patients import Residual, batches, digits, healthy, train, trained_with_dropout
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.doctor import Diagnosis, Finding, diagnose


def only(diagnosis: Diagnosis, cause: str, *layers: str) -> Finding:
    """The one finding, which is this, with these layers in front."""
    assert [f.cause for f in diagnosis.findings] == [cause], str(diagnosis)
    finding = diagnosis.findings[0]
    assert finding.layers[: len(layers)] == layers, str(diagnosis)
    return finding


def closes(finding: Finding, gap_at_least: float) -> None:
    """The cure was tried and took four fifths of a gap that is worth the name."""
    assert finding.effect is not None
    assert finding.effect.before > gap_at_least, str(finding.effect)
    assert finding.effect.closed >= 0.8, str(finding.effect)


def forwards(model: nn.Module, count: int, size: int = 64) -> None:
    model.train()
    with torch.no_grad():
        for x, _ in batches(size, train=True)[:count]:
            model(x)
    model.eval()


def test_healthy_network_yields_nothing():
    diagnosis = diagnose(healthy(), batches())
    assert diagnosis.healthy, str(diagnosis)
    assert diagnosis.gap < 0.01


@pytest.mark.parametrize("size", [16, 32, 48, 100, 250])
def test_healthy_network_yields_nothing_at_other_batch_sizes(size):
    assert diagnose(healthy(), batches(size)).healthy


@pytest.mark.parametrize("train_data", [True, False], ids=["training data", "test data"])
def test_healthy_network_of_our_layers(train_data):
    model, _ = bn.accelerate(healthy(), torch.zeros(2, 1, 8, 8))
    assert diagnose(model, batches(train=train_data)).healthy


def test_recalibrated_network_is_healthy():
    model = trained_with_dropout()
    bn.recalibrate(model, batches(train=True))
    assert diagnose(model, batches()).healthy


@pytest.mark.parametrize(("momentum", "steps"), [(0.1, 5), (0.01, 20)], ids=["few steps", "small momentum"])
def test_stale_statistics(momentum, steps):
    model = healthy()
    for layer in (model.bn2, model.bn3):
        layer.reset_running_stats()
        layer.momentum = momentum
    for layer in (model.bn1, model.bn4):
        layer.momentum = 0.0
    forwards(model, steps)
    for layer in (model.bn1, model.bn4):
        layer.momentum = 0.1
    finding = only(diagnose(model, batches()), "stale-statistics")
    assert set(finding.layers) == {"bn2", "bn3"}
    assert finding.numbers["leftover"] == pytest.approx((1 - momentum) ** steps)
    closes(finding, 0.02)


def test_statistics_that_never_moved():
    model = healthy()
    model.bn3.reset_running_stats()
    finding = only(diagnose(model, batches()), "stale-statistics", "bn3")
    assert finding.numbers["leftover"] == 1
    closes(finding, 0.02)


def test_momentum_of_the_wrong_side():
    model = healthy()
    for layer in (model.bn1, model.bn2, model.bn3, model.bn4):
        layer.momentum = 0.99
    forwards(model, 3, size=4)
    finding = only(diagnose(model, batches(16, limit=30)), "momentum")
    assert "bn4" in finding.layers
    closes(finding, 0.02)


def test_poisoned_by_a_spike():
    model = healthy()
    x, _ = batches(train=True)[0]
    model.bn1.momentum = model.bn2.momentum = model.bn3.momentum = 0.1
    model.train()
    with torch.no_grad():
        # One example a thousand times too large: it has the batch's variance for itself.
        model(torch.cat([x[:-1], x[-1:] * 1000]))
    model.eval()
    diagnosis = diagnose(model, batches())
    assert diagnosis.findings[0].cause == "poisoned-statistics", str(diagnosis)
    assert "bn1" in diagnosis.findings[0].layers
    closes(diagnosis.findings[0], 0.02)


def test_poisoned_for_ever_by_nan():
    model = healthy()
    model.bn3.running_mean[5] = torch.nan
    finding = only(diagnose(model, batches()), "poisoned-statistics", "bn3")
    assert finding.effect is not None
    assert finding.effect.after < 0.01


def test_inflated_variance_of_one_layer():
    model = healthy()
    model.bn3.running_var *= 1e4
    closes(only(diagnose(model, batches()), "poisoned-statistics", "bn3"), 1)


@pytest.mark.parametrize("size", [2, 4])
def test_small_batches(size):
    finding = only(diagnose(healthy(), batches(size, limit=32)), "small-batch", "bn4")
    assert finding.numbers["batch"] == size
    assert finding.numbers["noise"] == pytest.approx(size**-0.5, rel=0.2)
    closes(finding, 0.05)


def test_one_value_a_channel():
    given = [*batches(), batches(1)[0]]
    finding = only(diagnose(healthy(), given), "one-value", "bn4")
    assert finding.effect is not None
    assert (finding.effect.before, finding.effect.after) == (1, 0)


def by_class(size: int = 32) -> list[tuple[Tensor, Tensor]]:
    images, labels = digits()
    order = labels[1297:].argsort(stable=True) + 1297
    return [(images[part], labels[part]) for part in order.split(size) if len(part) == size]


def test_class_sorted_batches():
    finding = only(diagnose(healthy(), by_class()), "sorted-batches", "bn1")
    assert finding.numbers["classes_in_a_batch"] < 3
    closes(finding, 1)


def test_left_in_training_mode():
    finding = only(diagnose(healthy().train(), batches()), "training-mode")
    assert set(finding.layers) == {"bn1", "bn2", "bn3", "bn4"}
    closes(finding, 0.05)


def test_one_layer_left_in_training_mode():
    model = healthy()
    model.bn4.train()
    finding = only(diagnose(model, batches()), "training-mode", "bn4")
    assert (finding.level, finding.layers) == ("wrong", ("bn4",))
    closes(finding, 0.05)


def test_layer_without_running_statistics():
    model = healthy()
    model.bn4 = nn.BatchNorm1d(64, track_running_stats=False)
    model.bn4.load_state_dict(healthy().bn4.state_dict(), strict=False)
    model.eval()
    finding = only(diagnose(model, batches()), "no-running-statistics", "bn4")
    assert finding.numbers["by_company"] > 0.05


def test_frozen_by_requires_grad_and_moving():
    model = healthy()
    for parameter in model.bn2.parameters():
        parameter.requires_grad_(False)
    finding = only(diagnose(model, batches()), "frozen-layer-moves", "bn2")
    assert finding.layers == ("bn2",)
    assert finding.effect is not None
    assert finding.effect.after == 0 < finding.effect.before


def test_frozen_by_eval_and_thawed_by_train():
    model = healthy().train()
    model.bn2.eval()
    found = {f.cause: f for f in diagnose(model, batches()).findings}
    assert found["frozen-layer-moves"].layers == ("bn2",)
    assert found["training-mode"].layers == ("bn1", "bn3", "bn4")


def test_frozen_by_us_does_not_move():
    model = healthy()
    bn.freeze(model, only="bn2", affine=True)
    assert diagnose(model, batches()).healthy


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (lambda x: 1 - x, "bn1"),
        (lambda x: x / 50, "bn1"),
        (lambda x: x + 0.5, "bn1"),
        (lambda x: 3 * x, "bn1"),
    ],
    ids=["inverted", "fainter", "brighter", "more contrast"],
)
def test_other_domain(change, layer):
    given = [(change(x), y) for x, y in batches()]
    closes(only(diagnose(healthy(), given), "other-domain", layer), 0.02)


def test_other_domain_after_few_updates_is_not_called_stale():
    model = healthy()
    for layer in (model.bn1, model.bn2, model.bn3, model.bn4):
        layer.num_batches_tracked.fill_(20)  # the initial statistics would weigh 12 %, if these were averages
    given = [(1 - x, y) for x, y in batches()]
    closes(only(diagnose(model, given), "other-domain", "bn1"), 0.02)


def test_changed_weights():
    model = healthy()
    with torch.no_grad():
        model.conv3.weight.mul_(2)
    finding = only(diagnose(model, batches()), "changed-weights", "bn3")
    assert finding.layers == ("bn3",)
    closes(finding, 0.02)


def test_mean_far_beyond_the_deviation():
    model = healthy()
    model.conv3.bias = nn.Parameter(torch.full((32,), 1e5))
    model.bn3.running_mean += 1e5
    diagnosis = diagnose(model, batches())
    assert [f.cause for f in diagnosis.findings] == ["large-mean", "dead-bias"]
    finding = diagnosis.findings[0]
    assert finding.layers == ("bn3",)
    assert finding.numbers["ratio"] > 1e4
    closes(finding, 1e-3)


def test_variance_far_below_eps():
    model = healthy()
    with torch.no_grad():
        model.conv3.weight.mul_(1e-4)
        model.bn3.running_mean.mul_(1e-4)
        model.bn3.running_var.mul_(1e-8)
    bn.recalibrate(model, batches(train=True))
    finding = only(diagnose(model, batches()), "small-variance", "bn3")
    assert finding.layers == ("bn3",)
    closes(finding, 0.5)


@pytest.mark.parametrize("kind", ["gamma", "constant"])
def test_dead_channels(kind):
    model = healthy()
    with torch.no_grad():
        if kind == "gamma":
            model.bn3.weight[:8] = 0
        else:
            model.conv3.weight[:8] = 0
    bn.recalibrate(model, batches(train=True))
    finding = only(diagnose(model, batches()), "dead-channels", "bn3")
    assert finding.layers == ("bn3",)
    assert finding.numbers["dead"] == 8
    assert finding.numbers["silent" if kind == "gamma" else "constant"] == 8
    assert finding.numbers["outputs_change"] < 1e-6


def test_dead_bias_before_normalization():
    model = healthy()
    model.conv2.bias = nn.Parameter(torch.zeros(16))
    finding = only(diagnose(model, batches()), "dead-bias", "conv2")
    assert finding.layers == ("conv2",)
    assert finding.numbers["biases"] == 16
    assert "'bn2'" in finding.evidence


class DroppedBefore(nn.Module):
    """Dropout right before the layers that are normalized, as in the networks of old."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 100, bias=False),
            nn.BatchNorm1d(100),
            nn.ReLU(),
            nn.Dropout(0.8),
            nn.Linear(100, 100, bias=False),
            nn.BatchNorm1d(100),
            nn.ReLU(),
            nn.Dropout(0.8),
            nn.Linear(100, 100, bias=False),
            nn.BatchNorm1d(100),
            nn.Linear(100, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@cache
def _dropped() -> nn.Module:
    torch.manual_seed(0)
    return train(DroppedBefore(), 150)


def test_dropout_before_normalization():
    finding = only(diagnose(copy.deepcopy(_dropped()), batches()), "dropout-before")
    assert set(finding.layers) == {"layers.6", "layers.10"}
    assert finding.numbers["dropout_ratio"] > 1.1
    closes(finding, 0.01)


def test_dropout_behind_all_normalizations_is_fine():
    model = DroppedBefore()
    model.layers[4].p = model.layers[8].p = 0.0
    model.layers.insert(11, nn.Dropout(0.5))
    assert diagnose(train(model, 150), batches()).healthy


class Shared(nn.Module):
    """One normalization for the features of an image and of its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Linear(32 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        both = [F.relu(self.bn(self.conv(part))) for part in (x, 3 - 3 * x)]
        return self.head(torch.cat(both, 1).flatten(1))


def test_one_layer_shared_by_unlike_inputs():
    finding = only(diagnose(train(Shared(), 100), batches()), "shared-layer", "bn")
    assert finding.numbers["calls"] == 2
    closes(finding, 0.05)


class Alike(Shared):
    def forward(self, x: Tensor) -> Tensor:
        both = [F.relu(self.bn(self.conv(part))) for part in (x, x.flip(-1))]
        return self.head(torch.cat(both, 1).flatten(1))


def test_one_layer_shared_by_like_inputs_is_fine():
    assert diagnose(train(Alike(), 100), batches()).healthy


def test_statistics_in_half_precision():
    model = healthy().bfloat16()
    for layer in (model.bn1, model.bn2, model.bn3, model.bn4):
        layer.running_var.mul_(20)
        layer.momentum = 0.003  # each move is below the last digit
    model.train()
    with torch.no_grad():
        for _ in range(20):
            for x, _ in batches(train=True):
                model(x.bfloat16())
    finding = only(diagnose(model.eval(), [(x.bfloat16(), y) for x, y in batches()]), "half-precision")
    assert set(finding.layers) == {"bn1", "bn2", "bn3", "bn4"}
    closes(finding, 0.02)


def test_averaged_weights_with_raw_statistics():
    model = Residual()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for steps in (2, 20, 100):  # an average that still remembers the beginning
        train(model, steps)
        averaged.update_parameters(model)
    averaged.eval()
    finding = only(diagnose(averaged, batches()), "averaged-weights")
    assert finding.layers[0].startswith("module.bn")
    closes(finding, 0.02)
    bn.recalibrate(averaged, batches(train=True))
    assert diagnose(averaged, batches()).healthy


class Checkpointed(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = checkpoint(lambda x: F.relu(x + self.bn2(self.conv2(x))), x, use_reentrant=False)
        x = F.relu(self.bn3(self.conv3(x)))
        return self.head(F.relu(self.bn4(self.hidden(x.flatten(1)))))


def test_double_update_under_checkpointing():
    model = Checkpointed()
    model.load_state_dict(healthy().state_dict())
    finding = only(diagnose(model.eval(), batches()), "double-update", "bn2")
    assert finding.layers == ("bn2",)
    assert finding.numbers["updates"] == 2
    assert finding.effect is not None
    assert (finding.effect.before, finding.effect.after) == (1, 0)


def test_decay_on_scale_and_shift():
    model = healthy()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=1e-4)
    finding = only(diagnose(model, batches(), optimizer=optimizer), "decay-on-scale")
    assert finding.numbers["lost_in_10000"] == pytest.approx(1 - (1 - 1e-5) ** 10_000)
    norms = [p for name, p in model.named_parameters() if "bn" in name]
    others = [p for name, p in model.named_parameters() if "bn" not in name]
    groups = [{"params": others, "weight_decay": 1e-4}, {"params": norms, "weight_decay": 0.0}]
    assert diagnose(model, batches(), optimizer=torch.optim.SGD(groups, 0.1)).healthy


def test_a_batch_that_is_not_finite():
    given = batches()
    spoilt = given[3][0].clone()
    spoilt[7, 0, 2, 2] = torch.nan
    given[3] = (spoilt, given[3][1])
    finding = only(diagnose(healthy(), given), "not-finite", "bn1")
    assert finding.numbers["batches"] == 1
    assert "(3)" in finding.evidence
