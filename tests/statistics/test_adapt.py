"""Adaptation: statistics against float64 references, Tent against its definition, everything put back."""

import copy
import math
from contextlib import suppress
from fractions import Fraction

import pytest
import torch
from population import assert_unchanged, deep, images, norms, snapshot, truth
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.layers import BatchNorm1d, BatchNormPerActivation
from batchnorm.statistics import adapt, recalibrate
from batchnorm.statistics.entropy import collapsed
from batchnorm.statistics.predictions import Predictions, entropies
from batchnorm.statistics.trust import is_one_sided, mean_error, one_sided, too_few


def classifier(dtype: torch.dtype = torch.float64, classes: int = 3) -> nn.Sequential:
    """A convolution, ours and torch's normalizations, and statistics of another domain."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        bn.BatchNorm2d(8, activation="relu"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        nn.Linear(8, classes),
    ).to(dtype)
    for norm in norms(model).values():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.num_batches_tracked.fill_(77)
    return model.eval()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def pooled_by_hand(model: nn.Module, batches) -> dict[str, tuple[Tensor, Tensor]]:
    """Float64 mean and unbiased variance of all that each layer receives, each batch normalized by itself."""
    model = copy.deepcopy(model).double().eval()
    received = {name: [] for name in norms(model)}
    for name, norm in norms(model).items():
        norm.train()
        norm.register_forward_pre_hook(lambda _, args, name=name: received[name].append(args[0]))
    for x in batches:
        model(x.double())
    found = {}
    for name, inputs in received.items():
        rows = torch.cat([x.movedim(1, -1).reshape(-1, x.shape[1]) for x in inputs])
        found[name] = rows.mean(0), rows.var(0)
    return found


def assert_near(model: nn.Module, expected: dict[str, tuple[Tensor, Tensor]], rtol: float) -> None:
    for name, (mean, var) in expected.items():
        norm = norms(model)[name]
        scale = var.sqrt().max().item()
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=rtol, atol=rtol * scale)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=rtol, atol=rtol * scale**2)


# Statistics.


@pytest.mark.parametrize("sizes", [[40], [20, 20], [16, 24], [37, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_statistics_are_the_pooled_ones_of_batches_normalized_by_themselves(sizes, dtype):
    model, x = deep(dtype), images(dtype=dtype)
    model.train()
    before = snapshot(model)
    expected = pooled_by_hand(model, x.split(sizes))
    report = adapt(model, x.split(sizes), logits=None)
    assert_near(model, expected, 1e-11 if dtype is torch.float64 else 2e-5)
    assert_unchanged(model, before, but_statistics=True)
    assert (report.num_examples, report.num_batches) == (40, len(sizes))
    assert [layer.count for layer in report.layers] == [640, 640, 40, 40]
    if len(sizes) == 1:
        for name, (mean, var) in truth(deep(dtype), x).items():
            norm = norms(model)[name]
            torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-4)


def test_statistics_of_large_inputs_by_the_fused_kernels_and_far_from_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), bn.BatchNorm2d(3), nn.Flatten(1), nn.Linear(3 * 48 * 48, 2))
    x = torch.randn(64, 3, 48, 48) + 1e4
    expected = pooled_by_hand(model, x.split(32))
    adapt(model, x.split(32), trust=True)
    assert_near(model, expected, 1e-3)
    assert model[0].running_var.sub(1).abs().max() < 0.01  # 0.0 where E[x²] − E[x]² is computed


def test_statistics_with_masks_features_last_and_per_activation():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = BatchNorm1d(4, channel_dim=-1)
            self.b = BatchNormPerActivation((5, 4))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(self.a(x, mask=mask))

    x = torch.randn(32, 5, 4, dtype=torch.float64) * 3 + 2
    mask = torch.rand(32, 5) < 0.7
    model = Padded().double()
    adapt(model, [{"x": x, "mask": mask}], logits=None)
    real = x[mask]
    torch.testing.assert_close(model.a.running_mean, real.mean(0))
    torch.testing.assert_close(model.a.running_var, real.var(0))
    inner = torch.where(mask[..., None], (x - real.mean(0)) / (real.var(0, unbiased=False) + 1e-5).sqrt(), 0)
    torch.testing.assert_close(model.b.running_mean, inner.mean(0))
    torch.testing.assert_close(model.b.running_var, inner.var(0))


class Subclass(nn.BatchNorm2d):
    """Neither torch's nor ours: its own forward decides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("kind", ["subclass", "bfloat16", "compiled", "called twice"])
def test_statistics_of_layers_off_the_usual_road(kind):
    torch.manual_seed(0)
    x = torch.randn(48, 2, 6, 6)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Subclass(4) if kind == "subclass" else nn.BatchNorm2d(4))
    rtol = 2e-5
    if kind == "bfloat16":
        model, x, rtol = model.bfloat16(), x.bfloat16(), 2e-2
    if kind == "called twice":
        model.append(model[1])
    expected, buffers = pooled_by_hand(model, x.split(24)), list(model.buffers())
    run = torch.compile(model, backend="eager") if kind == "compiled" else model
    report = adapt(run, x.split(24), logits=None)
    assert_near(model, expected, rtol)
    assert type(model[1]) is (Subclass if kind == "subclass" else nn.BatchNorm2d)
    assert model[1].running_mean.dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert report.layers[0].num_calls == (4 if kind == "called twice" else 2)


def test_pooled_recalibration_and_statistics_agree():
    one, other, x = deep(), deep(), images()
    adapt(one, x.split(20), logits=None)
    recalibrate(other, x.split(20), method="pooled")
    for (name, a), b in zip(bits(one).items(), bits(other).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_what_waits_for_an_optimizer_goes_on_waiting():
    model, x = classifier(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    with bn.commit_on_step(model, optimizer) as handle:
        model(x)
        adapt(model, [x], trust=True)
        adapt(model, [x], trust=True, method="entropy")
        assert handle.batches == {"1": 1, "4": 1, "8": 1}
        assert handle.waiting == {"1": 1, "4": 1, "8": 1}
    assert type(model[1]) is nn.BatchNorm2d


def test_iterators_loaders_and_lists_give_the_same():
    data = torch.utils.data.TensorDataset(images(96), torch.arange(96))
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    found = []
    for make in (lambda: loader, lambda: iter(list(loader)), lambda: (b for b in list(loader))):
        for method in ("statistics", "blended", "entropy"):
            model = classifier()
            torch.manual_seed(1)
            adapt(model, make(), trust=True, check=33, method=method)
            found.append(bits(model))
    # A loader draws its order where it is iterated, so its own comes first and the lists' agree.
    for method in range(3):
        assert all(
            torch.equal(a, b)
            for a, b in zip(found[3 + method].values(), found[6 + method].values(), strict=True)
        )
    model, state = classifier(), torch.get_rng_state()
    adapt(model, loader, trust=True)
    assert torch.equal(torch.get_rng_state(), state)


# Blended.


def blended_by_hand(model: nn.Sequential, x: Tensor, prior: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer after layer of a sequential model, by the formula."""
    found, n = {}, len(x)
    for name, module in copy.deepcopy(model).requires_grad_(False).named_children():
        if isinstance(module, _BatchNorm):
            rows = x.movedim(1, -1).reshape(-1, x.shape[1])
            mean = (prior * module.running_mean + n * rows.mean(0)) / (prior + n)
            var = (prior * module.running_var + n * rows.var(0)) / (prior + n)
            found[name] = mean, var
            module.running_mean, module.running_var = mean, var
        x = module.eval()(x)
    return found


@pytest.mark.parametrize("num", [2, 16, 40])
@pytest.mark.parametrize("prior", [None, 4.0, 100.0])
def test_blended_is_the_formula_for_any_split(num, prior):
    x = images(num)
    for sizes in ([num], [1] * num, [num - 1, 1]):
        model = classifier()
        report = adapt(model, x.split(sizes), method="blended", prior=prior, trust=True)
        assert_near(model, blended_by_hand(classifier(), x, prior or 16.0), 1e-11)
        assert report.num_examples == num


def test_a_single_image_is_blended_in_a_convolutional_network():
    model, x = classifier()[:5].eval(), images(1)
    model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    expected = blended_by_hand(model, x, 16.0)
    adapt(model, [x], method="blended")
    assert_near(model, expected, 1e-11)


def test_blended_statistics_that_are_not_finite_are_refused():
    model = classifier()
    model[4].running_var[3] = torch.inf
    with pytest.raises(ValueError, match=r"layer '4': the stored statistics are not finite.*\"statistics\""):
        adapt(model, [images()], method="blended", trust=True)
    adapt(model, [images()], trust=True)  # which replaces them
    assert model[4].running_var.isfinite().all()


# Entropy.


def test_entropies_are_of_the_softmax():
    logits = torch.randn(7, 5, dtype=torch.float64) * 3
    p = logits.softmax(1)
    torch.testing.assert_close(entropies(logits), -(p * p.log()).sum(1))
    assert entropies(torch.zeros(1, 4)).item() == pytest.approx(math.log(4))
    assert entropies(torch.tensor([[1e4, 0.0]])).item() == 0.0
    assert torch.autograd.gradcheck(entropies, logits.requires_grad_())


@pytest.mark.parametrize("epochs", [1, 2])
def test_entropy_steps_gamma_and_beta_down_as_tent_defines_it(epochs):
    x = images(60)
    batches = x.split(20)
    reference = classifier()
    params = []
    for norm in norms(reference).values():
        norm.train()
        params += [norm.weight, norm.bias]
    optimizer, course = torch.optim.Adam(params, lr=1e-3), []
    for batch in batches * epochs:
        logs = reference(batch).log_softmax(1)
        loss = -(logs.exp() * logs).sum() / len(batch)
        course.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = classifier()
    for p in model.parameters():
        p.requires_grad_(False)  # as deployed networks are
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = snapshot(model)
    report = adapt(model, batches, method="entropy", epochs=None if epochs == 1 else epochs, trust=True)
    assert report.entropies == pytest.approx(course, rel=1e-10)
    for name, norm in norms(reference).items():
        torch.testing.assert_close(norms(model)[name].weight, norm.weight.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(norms(model)[name].bias, norm.bias.detach(), rtol=1e-9, atol=1e-10)
    assert torch.equal(report.layers[0].old_mean, classifier()[1].running_mean)
    # Statistics are those under the γ and β that were learned.
    assert_near(model, pooled_by_hand(model, batches), 1e-11)
    assert torch.equal(model[0].weight, classifier()[0].weight)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    after = snapshot(model)
    assert all(
        torch.equal(after[k], before[k]) if k == "rng" else after[k] == before[k]
        for k in before
        if k != "state"
    )
    report.rollback()
    assert_same_bits(model, classifier().state_dict())


def test_another_optimizer_takes_the_parameters():
    given = []

    def make(parameters):
        given.extend(parameters)
        return torch.optim.SGD(parameters, lr=0.0)

    model = classifier()
    adapt(model, [images()], method="entropy", optimizer=make, trust=True)
    assert [id(p) for p in given] == [id(p) for n in norms(model).values() for p in (n.weight, n.bias)]
    assert torch.equal(model[1].weight, classifier()[1].weight)


def test_a_collapse_is_found_and_everything_put_back():
    model = recognizing()
    before, x = bits(model), bright([0, 1, 2] * 40) + 0.5 * torch.randn(120, 3, 4, 4)
    with pytest.warns(UserWarning, match="learning collapsed"):
        report = adapt(model, x.split(30), method="entropy", rate=3.0, epochs=20)
    assert_same_bits(model, before)
    assert "effective classes fall on" in report.undone
    assert "undone: learning collapsed" in str(report)
    assert report.after.effective_classes < 1.5


def test_collapse_is_less_than_half_of_the_classes():
    even = Predictions(1.0, (10, 10, 10, 10))
    assert collapsed(even, Predictions(0.1, (20, 20, 0, 0))) is None  # 2 of 4: half are left
    assert "class 1 has 52% of them" in collapsed(even, Predictions(0.1, (19, 21, 0, 0)))


# Trust.


def binomial_tail(most: int, num: int, share: Fraction) -> Fraction:
    return sum(math.comb(num, k) * share**k * (1 - share) ** (num - k) for k in range(most, num + 1))  # exact


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("num", [1, 5, 8, 16, 64, 512])
def test_one_sided_is_the_exact_binomial_test(classes, num):
    limit = Fraction(classes + 1, 2 * classes)
    for most in {num, num // 2, int(num * limit), int(num * limit + 1.2 * math.sqrt(num)), num * 9 // 10}:
        if not 0 < most <= num:
            continue
        rest = [0] * (classes - 1)
        rest[0] = num - most
        if rest[0] > most:
            continue
        expected = binomial_tail(most, num, limit) < Fraction(1, 100)
        assert is_one_sided((most, *rest)) == expected, most


def test_one_sided_counts_by_hand():
    assert not is_one_sided((7, *[0] * 9))  # 0.55**7 = 0.015: might be chance
    assert is_one_sided((8, *[0] * 9))  # 0.55**8 = 0.008
    assert not is_one_sided((0, 0, 0))
    assert is_one_sided((100_000, 0))  # no overflow


def test_batches_of_one_class_each_are_sorted_data():
    batches = tuple(tuple(30 * (i == k) for i in range(3)) for k in range(3))
    sorted_by_class = Predictions(0.1, (30, 30, 30), batches)
    assert "3 of 3 batches are of one class each" in one_sided(sorted_by_class)
    assert one_sided(Predictions(0.1, (30, 30, 30), ((10, 10, 10),) * 3)) is None
    assert "28 of 30 examples are predicted to be of class 2" in one_sided(Predictions(0.1, (1, 1, 28)))


def test_standard_errors_that_are_trusted():
    assert mean_error(16) == 0.25
    assert mean_error(16, 16) == 0.125
    assert too_few(16, 1, None) is None
    assert "15 example(s) leave a layer's mean a standard error of 0.26" in too_few(15, 1, None)
    assert "batches of 4 examples" in too_few(400, 100, None)
    assert too_few(1, 1, 16) is None
    message = too_few(1, 1, 2)
    assert "1 example(s) with a prior of 2 leave a layer's mean a standard error of 0.33" in message
    assert "a prior of at least 3" in message
    assert too_few(1, 1, 3) is None


def test_the_standard_error_of_a_mean_is_that_of_random_examples():
    draws = torch.randn(20_000, 16, dtype=torch.float64).mean(1)
    assert draws.std().item() == pytest.approx(mean_error(16), rel=0.02)
    assert (16 * draws / (16 + 9)).std().item() == pytest.approx(mean_error(16, 9), rel=0.02)


def recognizing(classes: int = 3) -> nn.Sequential:
    """A model that says of an image which of its channels is bright; normalization changes nothing of it."""
    model = nn.Sequential(
        nn.BatchNorm2d(classes), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(classes, classes)
    )
    model[3].weight.data.copy_(20 * torch.eye(classes))
    model[3].bias.data.zero_()
    return model.eval()


def bright(labels: list[int]) -> Tensor:
    x = torch.randn(len(labels), 3, 4, 4) * 0.1
    x[range(len(labels)), labels] += 1.0
    return x


def test_one_class_only_is_refused_with_the_reason_unless_trusted():
    model = recognizing()
    before = bits(model)
    for batches in ([bright([1] * 64)], bright([1] * 64).split(16), bright([0] * 60 + [2] * 4).split(32)):
        for method in ("statistics", "blended", "entropy"):
            with pytest.raises(
                ValueError, match=r"nothing was changed: 6\d of 64 examples are predicted to be"
            ):
                adapt(model, batches, method=method)
            assert_same_bits(model, before)
    with pytest.raises(ValueError, match="3 of 4 batches are of one class each"):
        adapt(model, [bright([c] * 20) for c in range(3)] + [bright([0, 1, 2] * 7)])
    report = adapt(model, [bright([1] * 64)], trust=True)
    assert any("trusted all the same: 64 of 64 examples" in note for note in report.notes)
    assert report.before.counts == (0, 64, 0)
    adapt(model, [bright([0, 1, 2] * 20)])


def test_only_the_first_examples_are_looked_at():
    model = recognizing()
    report = adapt(model, bright([0, 1, 2] * 40).split(24), check=50)
    assert report.before.num_examples == report.after.num_examples == 72
    assert len(report.before.batch_counts) == 3
    assert report.before.counts == (24, 24, 24)


# Reports and rollback.


@pytest.mark.parametrize("method", ["statistics", "blended", "entropy"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_rollback_restores_every_bit_and_the_block_does_so_on_leaving(method, training):
    model, x = classifier(), images(64)
    model.train(training)
    flags = bits(model)

    def assert_as_it_was() -> None:
        assert_same_bits(model, flags)
        assert all(m.training == training for m in model.modules())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert type(model[1]) is nn.BatchNorm2d

    report = adapt(model, x.split(32), method=method, trust=True)
    assert not torch.equal(model[1].running_mean, flags["1.running_mean"])
    learned = not torch.equal(model[1].weight, flags["1.weight"])
    assert learned == (method == "entropy")
    report.rollback()
    assert_as_it_was()
    with adapt(model, x.split(32), method=method, trust=True) as inside:
        assert inside.method == method
        assert not torch.equal(model[1].running_mean, flags["1.running_mean"])
    assert_as_it_was()
    block = adapt(model, x.split(32), method=method, trust=True)
    with suppress(KeyError), block:
        raise KeyError
    assert_as_it_was()
    report.rollback()
    assert_as_it_was()


def test_rollback_finds_the_layers_where_they_are_now():
    model = classifier(torch.float32)
    before = bits(model)
    report = adapt(model, [images(dtype=torch.float32)], trust=True)
    model.double()  # buffers are other tensors now
    report.rollback()
    assert all(
        torch.equal(t.float() if t.is_floating_point() else t, before[n])
        for n, t in model.state_dict().items()
    )


def test_statistics_roll_back_and_leave_what_was_trained_since():
    model = classifier()
    report = adapt(model, [images()], trust=True)
    model[1].weight.data.fill_(7)
    report.rollback()
    assert model[1].weight.eq(7).all()
    assert model[1].running_mean.equal(classifier()[1].running_mean)


def test_the_report_tells_what_moved_and_what_was_predicted():
    model, x = classifier(), images(64)
    with torch.no_grad():
        old = model(x)
    report = adapt(model, x.split(32), trust=True)
    with torch.no_grad():
        new = model(x)
    for found, logits in ((report.before, old), (report.after, new)):
        p = logits.softmax(1)
        assert found.entropy == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-10)
        assert found.counts == tuple(logits.argmax(1).bincount(minlength=3).tolist())
        assert sum(found.shares) == pytest.approx(1)
        assert sum(map(torch.tensor, found.batch_counts)).tolist() == list(found.counts)
    source = classifier()
    layer = report.layers[0]
    assert layer.name == "1"
    shift = (
        (model[1].running_mean - source[1].running_mean).abs() / (model[1].running_var + 1e-5).sqrt()
    ).max()
    assert layer.shift == pytest.approx(shift.item())
    assert layer.count == 64 * 16
    text = str(report)
    assert text.startswith("adapted 3 layers, method 'statistics': 64 examples in 2 batches")
    assert "before: mean entropy" in text
    assert "effective classes of 3" in text


def test_effective_classes_and_shares():
    found = Predictions(0.5, (6, 2, 0))
    assert found.shares == (0.75, 0.25, 0.0)
    assert found.effective_classes == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert found.favourite == 0
    assert str(found) == "mean entropy 0.5 nats, 1.75 effective classes of 3, class 0 most often (75% of 8)"


def test_frozen_layers_are_left_alone_and_listed():
    model, x = classifier(), images()
    model[4].frozen = True
    model.train()
    model[1].eval()
    before = bits(model)
    report = adapt(model, [x], method="entropy", trust=True)
    assert [layer.name for layer in report.layers] == ["8"]
    assert [note.partition(" left")[0] for note in report.notes if "left alone" in note] == ["'1'", "'4'"]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n[0] in "14")


def test_a_network_that_is_no_classifier_says_so():
    model, x = deep(), images()
    model.bn4.register_forward_hook(lambda *_: x)
    with pytest.raises(
        TypeError, match=r"no table of logits \(N, K\).*logits=callable\(output\).*logits=None"
    ):
        adapt(model, [x])
    report = adapt(model, [x], logits=None)
    assert report.before is report.after is None
    found = adapt(model, [x], logits=lambda out: out.flatten(1)[:, :3], trust=True)
    assert len(found.before.counts) == 3


def test_outputs_in_tuples_and_dicts_and_examples_with_labels():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = classifier()

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(image), image

    model, x = Both().eval(), images()
    first = adapt(model, [(x, torch.zeros(40))], trust=True)
    first.rollback()
    again = adapt(model, [{"image": x}], trust=True)
    assert again.after == first.after
    assert again.num_examples == 40


# Bad input.


@pytest.mark.parametrize("method", ["statistics", "blended", "entropy"])
@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "batches is empty"),
        ([images()[:0]], "sample"),
        ([images() / 0], "not finite"),
        ([images(), torch.full((20, 2, 6, 6), torch.nan, dtype=torch.float64)], "batch 1.* not finite"),
        ([images(), "abc"], "must be a tensor"),
        ([torch.zeros(20, 3, 6, 6, dtype=torch.float64)], "channels"),
    ],
    ids=["none", "empty", "infinite", "NaN", "no tensor", "wrong channels"],
)
def test_bad_batches_are_refused_and_leave_the_model_as_it_was(method, batches, says):
    model = classifier()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=says):
        adapt(model, batches, method=method, trust=True)
    assert_unchanged(model, before)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_single_example_is_refused_with_the_number():
    model = classifier()
    before = bits(model)
    with pytest.raises(
        ValueError, match=r"1 example\(s\) leave .* standard error of 1.00 deviations, and at most"
    ):
        adapt(model[:7].eval(), [images(1)])
    with pytest.raises(ValueError, match=r"batches of 4 examples leave .* takes 16 examples in each batch"):
        adapt(model, images().split(4), method="entropy")
    with pytest.raises(
        ValueError, match=r"layer '8': 1 sample\(s\) a channel"
    ):  # a linear layer has one value
        adapt(model, [images(1)], method="blended")
    with pytest.raises(ValueError, match="at '8'"):
        adapt(model, [images(1)], trust=True)
    assert_same_bits(model, before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "tent"}, "method must be one of 'statistics', 'blended', 'entropy', got 'tent'"),
        ({"prior": 4}, "prior is of method='blended'; 'statistics' has no use for it"),
        ({"rate": 1e-3, "method": "blended"}, "rate is of method='entropy'; 'blended' has no use for it"),
        ({"epochs": 0, "method": "entropy"}, "epochs must be above zero, got 0"),
        ({"prior": -1.0, "method": "blended"}, "prior must be above zero, got -1.0"),
        ({"rate": math.nan, "method": "entropy"}, "rate must be above zero, got nan"),
        ({"rate": 0.1, "optimizer": torch.optim.SGD, "method": "entropy"}, "rate is that of the default"),
        ({"check": 0}, "check must be at least 1 example, got 0"),
        ({"logits": None, "method": "entropy"}, 'method="entropy" needs logits'),
    ],
    ids=lambda value: str(value)[:30],
)
def test_options_that_mean_nothing_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        adapt(classifier(), [images()], **options)


def test_models_without_anything_to_adapt_are_refused():
    with pytest.raises(ValueError, match="Linear has no batch normalization"):
        adapt(nn.Linear(3, 2), [torch.zeros(20, 3)])
    bare = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="none of the layers '0' has γ or β"):
        adapt(bare, [torch.randn(20, 3)], method="entropy")


def test_an_entropy_that_is_not_finite_ends_it_and_nothing_is_changed():
    model = classifier()
    before = bits(model)

    def spoil(_, args, output):
        return output * (torch.inf if torch.is_grad_enabled() else 1.0)

    model.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="batch 0: the entropy of its predictions, or its gradient, is not"):
        adapt(model, [images()], method="entropy", trust=True)
    assert_same_bits(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_stored_statistics_that_predict_nothing_are_replaced():
    model = classifier()
    model[1].running_var.fill_(torch.nan)
    report = adapt(model, [images()])
    assert report.before is None
    assert report.after.num_examples == 40


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_entropy_learns_inside_contexts_without_gradients(context):
    expected, model, x = classifier(), classifier(), images()
    adapt(expected, [x], method="entropy", trust=True)
    with context():
        adapt(model, [x], method="entropy", trust=True)
    assert not torch.equal(model[1].weight, classifier()[1].weight)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["statistics", "blended", "entropy"])
def test_what_fails_at_the_very_end_leaves_nothing_behind(method):
    model, x = classifier(), images(64)
    before, weights = bits(model), []

    def fails_once_adapted(output):
        adapted = not torch.equal(model[1].running_mean, before["1.running_mean"])
        weights.append(adapted and not model[1].training)
        if weights[-1] and (method != "entropy" or not torch.equal(model[1].weight, before["1.weight"])):
            raise TypeError("mine")
        return output

    with pytest.raises(TypeError, match="mine"):
        adapt(model, x.split(32), method=method, logits=fails_once_adapted, trust=True)
    assert any(weights)
    assert_same_bits(model, before)
