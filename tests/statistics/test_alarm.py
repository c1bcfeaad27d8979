"""The alarm: as many false ones as it says, others found, and everything left as it was."""

import warnings

import pytest
import torch
from population import assert_unchanged, deep, images, snapshot
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.layers import BatchNorm1d, BatchNormPerActivation
from batchnorm.statistics import DriftAlarm, recalibrate
from batchnorm.statistics.per_example import Listener, per_example


def source(num: int, seed: int) -> Tensor:
    """Images whose brightness and contrast differ, as photographs' do."""
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(num, 1, 1, 1, generator=generator) + 0.5
    level = torch.randn(num, 2, 1, 1, generator=generator)
    return torch.randn(num, 2, 8, 8, generator=generator) * contrast + level


def trained(kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        kind(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        kind(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 5),
    ).eval()
    recalibrate(model, [source(500, 0)])
    return model


@pytest.fixture(scope="module")
def alarm():
    return DriftAlarm(trained(), source(2000, 1).split(100), false_alarm_rate=0.05)


@pytest.mark.parametrize("size", [1, 7, 32, 128])
def test_as_many_false_alarms_as_promised_on_fresh_batches(alarm, size):
    fresh = source(300 * size, 100 + size).split(size)
    rows = alarm._rows(torch.cat(fresh), 0).split(size)  # examples do not meet in evaluation: once is enough
    assert torch.equal(rows[3], alarm._rows(fresh[3], 0)) or torch.allclose(
        rows[3], alarm._rows(fresh[3], 0), atol=1e-5
    )
    num = sum(alarm._judge(part).alarm for part in rows)
    # 15 of 300 expected; of a binomial number 99.9 % lie within 5 and 29, and the source is a sample, too.
    assert 3 <= num <= 33, num


def test_other_domains_are_found(alarm):
    x = source(64, 50)
    assert not alarm.check(x).alarm
    for other in (x + 1.0, 2 * x, 0.4 * x, x.roll(1, 1) + 0.7, torch.randn_like(x)):
        found = alarm.check(other)
        assert found.alarm
        assert found.score > found.threshold
    assert alarm.check(x[:1] + 6).alarm  # a single example, if it is far enough
    assert alarm.check(torch.full_like(x, torch.nan)).alarm


def test_one_example_over_and_over_is_far_though_it_is_of_the_source(alarm):
    assert alarm.check(source(1, 9).expand(128, 2, 8, 8)).alarm


def test_distances_by_hand():
    model = trained()
    x, reference = source(40, 3), source(400, 1)
    alarm = DriftAlarm(model, [reference])
    check = alarm.check(x)

    def statistics(images):
        """Mean and mean square of every image's normalized values at the first layer, in float64."""
        z = model.double()[0](images.double())
        model.float()
        norm = model[1]
        shape = (1, -1, 1, 1)
        z = (z - norm.running_mean.double().view(shape)) / (
            norm.running_var.double().view(shape) + norm.eps
        ).sqrt()
        return torch.cat([z.mean((2, 3)), z.square().mean((2, 3))], 1)

    with torch.no_grad():
        of_source, of_batch = statistics(reference), statistics(x)
    of_source = of_source[::2]
    spread = of_source.var(0) + 1e-4
    squares = (of_batch.mean(0) - of_source.mean(0)).square() / (spread * (1 / 40 + 1 / 200))
    usual, threshold = alarm._of_source(40)
    assert check.layers["1"] == pytest.approx((squares.mean() / usual[0]).item(), rel=1e-3)
    assert check.shifts["1"] == pytest.approx(of_batch.mean(0)[:6].abs().max().item(), rel=1e-4)
    assert check.score == max(check.layers.values())
    assert (check.threshold, check.num_examples) == (threshold, 40)
    # Squares in units of their expectation: about 1 in usual batches.
    assert usual.tolist() == pytest.approx([0.8, 0.8], abs=0.2)


def test_thresholds_fall_as_false_alarms_are_allowed():
    model, x = trained(), source(2000, 1)
    thresholds = [
        DriftAlarm(model, [x], false_alarm_rate=rate).threshold(32) for rate in (0.002, 0.01, 0.1, 0.5)
    ]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > 1.5 * thresholds[-1]


def test_checking_leaves_everything_as_it_was(alarm):
    model = deep(torch.float32)
    model.train()
    before = snapshot(model)
    mine = DriftAlarm(model, images(400, torch.float32).split(100))
    mine.check((images(32, torch.float32), torch.zeros(32)))
    assert_unchanged(model, before)


def test_the_same_whatever_the_batches_of_the_source_and_the_class_of_the_layers():
    x, batch = source(400, 1), source(32, 7) + 0.3
    found = [
        DriftAlarm(trained(kind), x.split(size)).check(batch)
        for kind in (nn.BatchNorm2d, bn.BatchNorm2d)
        for size in (400, 37)
    ]
    for other in found[1:]:
        assert other.score == pytest.approx(found[0].score, rel=1e-3)
        assert other.threshold == pytest.approx(found[0].threshold, rel=1e-3)


def test_attached_it_checks_what_goes_through(alarm):
    model = alarm._network
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    found = []
    x, far = source(32, 60), source(32, 61) + 2
    with alarm.attach(found.append) as handle, torch.no_grad():
        y = model(x)
        model(far)
        assert [check.alarm for check in found] == [False, True]
        assert (handle.num_checks, handle.num_alarms) == (2, 1)
        assert handle.last is found[1]
        assert [len(m._forward_pre_hooks) for m in model.modules()][1:] == hooks[1:]
        with pytest.raises(RuntimeError):
            model(torch.zeros(4, 3, 8, 8))  # does not fit, and leaves no hook behind
        assert [len(m._forward_pre_hooks) for m in model.modules()][1:] == hooks[1:]
        model(x)
        assert found[2] == found[0]
    assert torch.equal(model(x), y)
    assert len(found) == 3
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    direct = alarm.check(far)
    assert direct.score == pytest.approx(found[1].score, rel=1e-6)


def test_attached_it_warns_and_checks_every_so_many(alarm):
    model, far = alarm._network, source(32, 61) + 2
    with alarm.attach(every=3) as handle:
        with pytest.warns(UserWarning, match="ALARM: distance .* of 32 examples, threshold .* at layer '"):
            model(far)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(far)
            model(far)
        model.train()
        model(far)
        model.eval()
        recalibrate_back(model)
        with pytest.warns(UserWarning, match="ALARM"):
            model(far)
        assert handle.num_checks == 2
        model(far), model(far)
        with pytest.warns(
            UserWarning, match="not checked: a batch to be checked has 1 to 250 examples.* got 300"
        ):
            model(source(300, 4))
        model(far), model(far)
        model(source(300, 4))
        assert handle.num_checks == 2


def recalibrate_back(model: nn.Module) -> None:
    """Statistics of before the batch in training mode."""
    for name, value in trained().named_buffers():
        model.get_buffer(name).copy_(value)


def test_statistics_that_have_changed_since_are_told():
    model = trained()
    alarm = DriftAlarm(model, [source(600, 1)])
    report = bn.adapt(model, [source(64, 5) + 1], trust=True)
    with pytest.raises(
        ValueError, match=r"layer '1': the stored statistics have changed since the alarm was"
    ):
        alarm.check(source(64, 5))
    report.rollback()
    assert not alarm.check(source(64, 5)).alarm


@pytest.mark.parametrize("kind", ["plain", "mask", "features last", "per activation", "features"])
def test_rows_are_each_examples_own(kind):
    x = torch.randn(6, 4, 5, dtype=torch.float64) * 2 + 1
    mask = None
    if kind == "per activation":
        layer, dims = BatchNormPerActivation((4, 5)), ()
        expected = (x - 3) / 2
        expected = torch.cat([expected.flatten(1), expected.square().flatten(1)], 1)
    elif kind == "features":
        layer, x = nn.BatchNorm1d(4), x[..., 0]
        expected = torch.cat([(x - 3) / 2, ((x - 3) / 2).square()], 1)
    else:
        last = kind == "features last"
        layer, dims = BatchNorm1d(5 if last else 4, channel_dim=-1 if last else 1), 1 if last else 2
        z = (x - 3) / 2
        if kind == "mask":
            mask = torch.rand(6, 5) < 0.6
            mask[2] = False
            rows = [z[i, :, mask[i]] for i in range(6)]
            pairs = [
                (r.mean(1), r.square().mean(1)) if r.shape[1] else (torch.zeros(4), torch.zeros(4))
                for r in rows
            ]
            expected = torch.stack([torch.cat(pair).double() for pair in pairs])
        else:
            expected = torch.cat([z.mean(dims), z.square().mean(dims)], 1)
    layer.eps = 0.0
    mean = torch.full_like(layer.running_mean, 3.0, dtype=torch.float64)
    torch.testing.assert_close(per_example(layer, x, mask, mean, torch.full_like(mean, 4.0)), expected)


def test_means_far_from_zero_lose_no_digits():
    x = torch.randn(4, 2, 50, dtype=torch.float64) + 1e4
    layer = nn.BatchNorm1d(2)
    mean, var = torch.full((2,), 1e4), torch.ones(2)
    found = per_example(layer, x.float(), None, mean, var)
    z = (x.float().double() - 1e4) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(
        found.double(), torch.cat([z.mean(2), z.square().mean(2)], 1), rtol=1e-4, atol=1e-6
    )


def test_rows_of_calls_and_of_times_are_averaged():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.step = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:  # (N, T, C)
            self.norm(x[:, 0])
            self.norm(x[:, 1])
            return self.step(x.flatten(0, 1))

    model, x = Twice().eval(), torch.randn(5, 4, 3)
    listener = Listener({"norm": model.norm, "step": model.step})
    with listener.listening():
        model(x)
    rows = listener.rows(5)
    scale = (1 + 1e-5) ** -0.5
    torch.testing.assert_close(rows["norm"][:, :3], x[:, :2].mean(1) * scale)
    torch.testing.assert_close(rows["step"][:, 3:], x.square().mean(1) * scale**2)
    with listener.listening():
        model(x)
    with pytest.raises(ValueError, match="layer 'norm' receives 5 rows for 2 examples"):
        listener.rows(2)
    with listener.listening(), pytest.raises(ValueError, match="layer 'norm' was not reached"):
        listener.rows(5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num": 399}, "a false alarm rate of 0.01 needs at least 400 examples of the source, got 399"),
        ({"num": 0}, "needs at least 400 examples of the source, got 0"),
        ({"false_alarm_rate": 0.0}, "false_alarm_rate must be between 0 and 1, got 0"),
        ({"false_alarm_rate": 1.5}, "false_alarm_rate must be between 0 and 1, got 1.5"),
        ({"num": 15, "false_alarm_rate": 0.9}, "at least 16 examples"),
        ({"value": torch.inf}, "values that are not finite"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_sources_that_tell_nothing_are_refused(options, says):
    x = source(options.pop("num", 500), 1) + options.pop("value", 0.0)
    with pytest.raises(ValueError, match=says):
        DriftAlarm(trained(), x.split(100) if len(x) else [], **options)


def test_batches_that_cannot_be_checked_are_refused(alarm):
    for num in (0, 251):
        with pytest.raises(ValueError, match=rf"1 to 250 examples, an 8th of the 2000 .* got {num}"):
            alarm.check(source(num, 1))
        with pytest.raises(ValueError, match="1 to 250 examples"):
            alarm.threshold(num)
    with pytest.raises(TypeError, match="a batch must be a tensor"):
        alarm.check("abc")
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        alarm.attach(every=0)
    with pytest.raises(ValueError, match="Linear has no batch normalization with stored statistics"):
        DriftAlarm(nn.Linear(2, 2), [])


def test_a_channel_that_never_moves_is_measured_against_a_hundredth_of_a_deviation():
    model = trained()
    model[0].weight.data[2] = 0
    model[0].bias.data[2] = 1.0
    recalibrate(model, [source(500, 0)])
    model[1].running_var[2] = 4.0
    alarm = DriftAlarm(model, [source(1000, 1)], false_alarm_rate=0.05)
    assert 1 < alarm.threshold(32) < 100
    x = source(32, 3)
    found = []
    for moved in (0.0, 1e-5, 0.2):  # deviations
        model[0].bias.data[2] = 1.0 + 2 * moved
        found.append(alarm.check(x))
    assert [check.alarm for check in found] == [False, False, True]
    # Mean squares move by 0.04, which is less than means by 0.2: squares in units of 0.01² (1/32 + 1/500).
    usual = alarm._of_source(32)[0][0].item()
    gained = (0.2**2 + 0.04**2) / (0.01**2 * (1 / 32 + 1 / 500)) / 12
    assert found[2].layers["1"] - found[0].layers["1"] == pytest.approx(gained / usual, rel=1e-2)
