"""`commit_on_step`: what the statistics move by, and when, against float64 formulas of the pooled batch."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import layers
from batchnorm.layers import pending, small
from batchnorm.statistics import commit_on_step


@pytest.fixture(autouse=True, params=["small", "large", "as on a device"])
def _road(request, monkeypatch):
    """The short road of small inputs, the usual one, and as on a GPU, where no value may be looked at."""
    if request.param != "small":
        monkeypatch.setattr(small, "normalize", lambda *_: None)
    if request.param == "as on a device":
        monkeypatch.setattr(pending, "may_look_at", lambda tensor: False)
        monkeypatch.setattr("batchnorm.statistics.commit.may_look_at", lambda tensor: False)


def moved(layer, before, *batches, momentum=0.1):
    """Where the running statistics have to be after a step on the samples, channels in dimension 1."""
    rows = torch.cat([x.detach().double().movedim(1, -1).flatten(0, -2) for x in batches])
    mean, var = (t.double() for t in before)
    return mean.lerp(rows.mean(0), momentum), var.lerp(rows.var(0), momentum)


def assert_at(layer, expected):
    for got, want in zip((layer.running_mean, layer.running_var), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


def statistics(layer):
    return layer.running_mean.clone(), layer.running_var.clone()


def everything(model):
    return {
        f"{path}.{name}": value.clone()
        for path, layer in model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for name, value in layer.named_buffers()
    }


def assert_same(model, before):
    for name, value in everything(model).items():
        assert torch.equal(value, before[name]), name


KINDS = {
    "torch 1d": (lambda: nn.BatchNorm1d(5), (64, 5)),
    "torch 1d of three dimensions": (lambda: nn.BatchNorm1d(5), (64, 5, 3)),
    "torch 2d": (lambda: nn.BatchNorm2d(5), (64, 5, 4, 3)),
    "torch 3d": (lambda: nn.BatchNorm3d(5), (64, 5, 2, 3, 2)),
    "ours, small": (lambda: layers.BatchNorm2d(5, activation="relu"), (64, 5, 4, 3)),
    "ours, large": (lambda: layers.BatchNorm2d(5), (64, 5, 60, 60)),
    "not affine": (lambda: nn.BatchNorm2d(5, affine=False), (64, 5, 4, 3)),
    "mean far from zero": (lambda: nn.BatchNorm2d(5), (64, 5, 4, 3)),
}


@pytest.mark.parametrize(("make", "shape"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("sizes", [[64], [16] * 4, [2, 30, 1, 31]], ids=["one", "four of 16", "unequal"])
def test_accumulated_batches_move_the_statistics_as_one_batch_of_all_samples(make, shape, sizes, request):
    if 1 in sizes and len(shape) == 2:
        sizes = [2, 30, 2, 30]
    far = 1000.0 if "far" in request.node.callspec.id else 2.0
    layer = make()
    scale = nn.Parameter(torch.ones(()))  # the layer may have none of its own
    model = nn.ModuleList([layer, nn.ParameterList([scale])])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with commit_on_step(model, optimizer) as handle:
        for _ in range(3):
            before = statistics(layer)
            parts = (torch.randn(shape) * 3 + far).split(sizes)
            for part in parts:
                y = layer(part) * scale
                y.backward(torch.randn_like(y))
                assert torch.equal(layer.running_mean, before[0])
            optimizer.step()
            optimizer.zero_grad()
            expected = moved(layer, before, *parts)
            tolerance = 1e-3 if far == 1000 else 1e-6  # float32's own: its spacing there is 6e-5
            torch.testing.assert_close(layer.running_mean.double(), expected[0], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(layer.running_var.double(), expected[1], rtol=tolerance, atol=1e-7)
        assert layer.num_batches_tracked.item() == 3
        assert handle.moves == {"0": 3}
        assert handle.batches == {"0": 3 * len(sizes)}
        assert handle.skipped == handle.dropped == handle.waiting == {"0": 0}


def test_steps_of_one_batch_give_what_the_layer_gives_without_a_handle():
    def train(commits):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 5), layers.BatchNorm1d(5), nn.ReLU(), layers.BatchNorm1d(5))
        optimizer = torch.optim.Adam(model.parameters())
        if commits:
            commit_on_step(model, optimizer)
        for _ in range(10):
            optimizer.zero_grad()
            y = model(torch.randn(8, 4) + 1)
            y.backward(torch.randn_like(y))
            optimizer.step()
        return model.state_dict()

    without, with_handle = train(False), train(True)
    for name in without:
        torch.testing.assert_close(with_handle[name], without[name], rtol=1e-6, atol=1e-7)


def test_momentum_none_averages_the_steps():
    layer = nn.BatchNorm1d(3, momentum=None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    commit_on_step(layer, optimizer)
    means = []
    for num in (2, 3):
        parts = torch.randn(num, 6, 3)
        for part in parts:
            layer(part)
        optimizer.step()
        means.append(parts.double().mean((0, 1)))
    torch.testing.assert_close(layer.running_mean.double(), (means[0] + means[1]) / 2, rtol=1e-6, atol=1e-7)


def test_masks_features_last_and_statistics_per_activation():
    masked, last = layers.BatchNorm1d(3), layers.BatchNorm1d(3, channel_dim=-1)
    each = layers.BatchNormPerActivation((3, 2))
    model = nn.ModuleList([masked, last, each])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [statistics(layer) for layer in model]
    commit_on_step(model, optimizer)
    x, mask = torch.randn(8, 3, 6) + 1, torch.arange(6) < torch.tensor([6, 5, 1, 2, 3, 6, 1, 4])[:, None]
    # The third part shows one sample: alone it has no variance, together with the others it counts.
    parts = [slice(0, 2), slice(3, 6), slice(6, 7), slice(7, 8)]
    for part in parts:
        masked(x[part], mask=mask[part])
        last(x[part].mT)
    each(x[:4, :, :2])
    each(x[4:, :, :2])
    optimizer.step()
    seen = torch.cat([x[part].mT[mask[part]] for part in parts])
    assert_at(masked, moved(masked, before[0], seen))
    assert_at(last, moved(last, before[1], *(x[part] for part in parts)))
    flat = [t.flatten() for t in before[2]]
    expected = [t.view(3, 2) for t in moved(each, flat, x[:, :, :2].flatten(1))]
    assert_at(each, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, layers.BatchNorm1d], ids=["torch", "ours"])
def test_activation_checkpointing_counts_each_batch_once(kind, reentrant):
    torch.manual_seed(0)
    first, norm, second = nn.Linear(4, 3), kind(3), kind(3)
    model = nn.ModuleList([first, norm, second])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer)
    before = statistics(norm)
    x = torch.randn(12, 4)
    inputs = first(x).detach()
    for part in x.split(6):
        part.requires_grad_()
        hidden = checkpoint(lambda t: norm(first(t)), part, use_reentrant=reentrant)
        y = checkpoint(second, hidden, use_reentrant=reentrant)
        y.backward(torch.randn_like(y))
    optimizer.step()
    assert_at(norm, moved(norm, before, inputs))
    assert handle.batches == {"1": 2, "2": 2}
    assert handle.dropped == {"1": 0, "2": 0}
    assert norm.num_batches_tracked.item() == 1


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), layers.BatchNorm1d(3)
    )


def clear_before(model, optimizer, backward):
    optimizer.zero_grad()
    backward()


def clear_by_the_model(model, optimizer, backward):
    model.zero_grad()
    backward()


def clear_to_zeros(model, optimizer, backward):
    optimizer.zero_grad(set_to_none=False)
    backward()


ORDERS = {"zero_grad": clear_before, "model.zero_grad": clear_by_the_model, "to zeros": clear_to_zeros}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "fused adam": lambda p: torch.optim.Adam(p, fused=True),
}


@pytest.mark.parametrize("clear", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("when", ["at the start", "before backward"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("bad", ["overflow in the gradient", "NaN in the batch"])
def test_a_step_that_the_scaler_skips_leaves_no_trace(bad, make, when, clear):
    """The forward of the first is finite, so that every layer has moments of it; all must be dropped."""
    batches = torch.randn(4, 8, 4) + 1

    def train(skipped):
        model = network()
        optimizer = make(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
        handle = commit_on_step(model, optimizer)
        for i, x in enumerate(batches):
            if i == 1 and not skipped:
                continue
            if i == 1 and bad == "NaN in the batch":
                x = x.clone()
                x[3, 2] = torch.nan
            before = everything(model)
            if when == "at the start":
                clear(model, optimizer, lambda: None)
            generator = torch.Generator().manual_seed(i)
            y = model(x)
            cotangent = torch.randn(y.shape, generator=generator)
            if i == 1 and bad == "overflow in the gradient":
                cotangent[0, 0] = torch.inf
            loss = scaler.scale((y * cotangent).sum())
            if when == "at the start":
                loss.backward()
            else:
                clear(model, optimizer, loss.backward)
            scaler.step(optimizer)
            scaler.update()
            if i == 1:
                assert_same(model, before)
        return handle, everything(model)

    handle, got = train(skipped=True)
    _, expected = train(skipped=False)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    lost = {path: handle.skipped[path] + handle.dropped[path] for path in handle.layers}
    assert lost == {"1": 1, "4": 1}
    assert handle.moves == {"1": 3, "4": 3}


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_a_part_that_is_not_finite_is_left_out_and_counted_by_layer(poison):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = commit_on_step(model, optimizer)
    before = statistics(model[1])
    parts = [torch.randn(6, 4) for _ in range(3)]
    hidden = [model[0](part) for part in parts]
    parts[1][0, 0] = poison
    for part in parts:
        y = model(part)
        y.backward(torch.randn_like(y))
    # Behind the second layer only: its input alone is spoiled.
    model[4](torch.full((6, 3), poison))
    optimizer.step()
    assert_at(model[1], moved(model[1], before, hidden[0], hidden[2]))
    assert handle.skipped == {"1": 1, "4": 2}
    assert handle.moves == {"1": 1, "4": 1}
    assert str(handle).splitlines() == [
        "layer  moves  batches  not finite  dropped  waiting",
        "1          1        3           1        0        0",
        "4          1        4           2        0        0",
    ]


def test_a_step_on_nothing_finite_moves_nothing():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer)
    before = everything(model)
    for num in (1, 2):
        for _ in range(num):
            model(torch.full((6, 4), torch.nan))
        optimizer.step()
    assert_same(model, before)
    assert handle.skipped == {"1": 3, "4": 3}
    assert handle.moves == {"1": 0, "4": 0}


def test_a_forward_without_gradients_counts_with_the_next_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer)
    before, x = statistics(model[1]), torch.randn(3, 6, 4)
    expected = moved(model[1], before, *(model[0](part) for part in x))
    with torch.no_grad():
        model(x[0])
    with torch.inference_mode():
        model(x[1])
    y = model(x[2])
    y.backward(torch.randn_like(y))
    assert handle.waiting == {"1": 3, "4": 3}
    optimizer.step()
    assert_at(model[1], expected)


def test_many_batches_without_a_step_are_merged_and_kept():
    layer = nn.BatchNorm1d(3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = commit_on_step(layer, optimizer)
    before, parts = statistics(layer), torch.randn(200, 5, 3).unbind()
    for i, part in enumerate(parts):
        y = layer(part)
        if i % 3 == 0:
            y.backward(torch.randn_like(y))
    assert len(layer.pending._waiting) <= 65
    assert handle.waiting == {"": 200}
    optimizer.step()
    assert_at(layer, moved(layer, before, *parts))


def test_of_the_calls_of_a_closure_the_last_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    handle = commit_on_step(model, optimizer)
    before, x, target, inputs = statistics(model[1]), torch.randn(12, 4), torch.randn(12, 1), []
    model[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(inputs) > 2
    assert_at(model[1], moved(model[1], before, inputs[-1]))
    assert handle.dropped == {"1": len(inputs) - 1}
    assert model[1].num_batches_tracked.item() == 1


def test_two_optimizers_of_one_model_commit_once_a_step():
    model = network()
    halves = [
        torch.optim.SGD(model[:3].parameters(), lr=0.1),
        torch.optim.SGD(model[3:].parameters(), lr=0.1),
    ]
    handle = commit_on_step(model, halves)
    before, x = statistics(model[1]), torch.randn(16, 4)
    expected = moved(model[1], before, model[0](x))
    for part in x.split(8):
        y = model(part)
        y.backward(torch.randn_like(y))
    for optimizer in halves:
        optimizer.step()
    assert_at(model[1], expected)
    assert handle.moves == {"1": 1, "4": 1}


def test_a_gans_two_models_move_by_what_each_learns_from():
    torch.manual_seed(0)
    maker = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    judge = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    of_maker, of_judge = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (maker, judge))
    handles = commit_on_step(maker, of_maker), commit_on_step(judge, of_judge)
    seen = []
    judge[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    before = statistics(judge[1])
    real = torch.randn(8, 4)
    for _ in range(2):
        of_judge.zero_grad()
        loss = judge(real).mean() - judge(maker(torch.randn(8, 2)).detach()).mean()
        loss.backward()
        of_judge.step()
        of_maker.zero_grad()
        judge(maker(torch.randn(8, 2))).mean().backward()  # gradients that the judge never applies
        of_maker.step()
    halfway = moved(judge[1], before, *seen[:2])
    assert_at(judge[1], moved(judge[1], halfway, *seen[3:5]))
    assert handles[1].dropped == {"1": 1}
    assert handles[1].waiting == {"1": 1}
    # What the maker made for the judge's step was not learned from, but no gradient of it was dropped.
    assert handles[0].moves == {"1": 2}
    assert handles[0].batches == {"1": 4}


def test_half_precision_statistics_come_back_as_they_were():
    layer = nn.BatchNorm1d(3).bfloat16()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with commit_on_step(layer, optimizer):
        parts = torch.randn(2, 16, 3).bfloat16()
        for part in parts:
            layer(part)
        optimizer.step()
        assert_at(layer, moved(layer, (torch.zeros(3), torch.ones(3)), *parts))
    assert layer.running_mean.dtype == torch.bfloat16
    assert layer(parts[0]).dtype == torch.bfloat16
