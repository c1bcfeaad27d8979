"""Parts of the data that are measured apart, saved, merged, and stored in the model."""

import copy
import itertools
import json
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from population import assert_statistics, assert_unchanged, deep, images, norms, snapshot
from torch import nn
from torch.optim.swa_utils import AveragedModel

from batchnorm.layers import BatchNormPerActivation
from batchnorm.statistics import Population, recalibrate


def statistics_of(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms(model).items()}


@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(1, 19), max_size=6), order=st.randoms(use_true_random=False))
def test_any_split_into_files_in_any_order_gives_what_one_process_finds(tmp_path_factory, cuts, order):
    folder = tmp_path_factory.mktemp("parts")
    batches = images().split(2)
    alone = deep()
    whole = recalibrate(alone, batches, method="pooled")
    paths = []
    for a, b in itertools.pairwise([0, *sorted(cuts), 20]):
        paths.append(folder / f"{a}.safetensors")
        Population.of(deep(), batches[a:b]).save(paths[-1])
    order.shuffle(paths)
    model = deep()
    report = Population.merged(map(Population.load, paths)).store_in(model)
    assert_statistics(model, statistics_of(alone), rtol=1e-12, atol=1e-13)
    assert [norm.num_batches_tracked.item() for norm in norms(model).values()] == [20] * 4
    assert report.num_batches == 20
    assert [layer.count for layer in report.layers] == [layer.count for layer in whole.layers]
    assert report.standard_error == pytest.approx(whole.standard_error, rel=1e-6)


def test_processes_that_share_nothing_but_files(tmp_path):
    program = """
        import sys, torch
        from torch import nn
        from batchnorm.statistics import Population
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        Population.of(model, [torch.load(sys.argv[1], weights_only=True)]).save(sys.argv[2])
    """
    parts = [torch.randn(30, 2), torch.randn(5, 2) + 4]
    saved = []
    for i, part in enumerate(parts):
        torch.save(part, tmp_path / f"{i}.pt")
        saved.append(tmp_path / f"{i}.safetensors")
        arguments = [sys.executable, "-c", textwrap.dedent(program), tmp_path / f"{i}.pt", saved[-1]]
        subprocess.run(arguments, check=True, timeout=120)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    Population.load(saved[0]).merge(Population.load(saved[1])).store_in(model)
    with torch.no_grad():
        received = model[0](torch.cat(parts)).double()
    torch.testing.assert_close(model[1].running_mean.double(), received.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), received.var(0), rtol=1e-6, atol=1e-6)


def test_a_file_gives_back_every_bit(tmp_path):
    population = Population.of(deep(), images().split(8))
    population.save(tmp_path / "a.safetensors")
    back = Population.load(tmp_path / "a.safetensors")
    back.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for name, moments in population.moments.items():
        assert torch.equal(back.moments[name].mean, moments.mean)
        assert torch.equal(back.moments[name].var, moments.var)
        assert back.moments[name].count == moments.count


def test_measuring_changes_nothing():
    model = deep().train()
    before = snapshot(model)
    Population.of(model, images().split(8))
    assert_unchanged(model, before)


def test_layers_per_activation_and_a_model_that_is_the_layer_itself(tmp_path):
    model, x = BatchNormPerActivation((3, 2)), torch.randn(20, 3, 2)
    Population.of(model, x.split(10)).save(tmp_path / "a.safetensors")
    Population.load(tmp_path / "a.safetensors").store_in(model)
    torch.testing.assert_close(model.running_mean, x.mean(0))
    torch.testing.assert_close(model.running_var, x.var(0))


def test_a_layer_that_only_some_of_the_data_reach():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.wide = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wide(x) if x.max() > 5 else self.always(x)

    model = Sometimes()
    one, other = torch.randn(10, 1), torch.randn(6, 1) + 20
    narrow, wide = Population.of(model, [one]), Population.of(model, [other])
    for merged in (narrow.merge(wide), wide.merge(narrow)):
        twin = copy.deepcopy(model)
        merged.store_in(twin)
        assert twin.always.running_mean.item() == pytest.approx(one.mean().item(), abs=1e-6)
        assert twin.wide.running_var.item() == pytest.approx(other.var().item(), rel=1e-5)
    report = narrow.store_in(model)
    assert "'wide' unchanged: the population has nothing of it" in report.notes
    assert model.wide.num_batches_tracked == 0


def test_frozen_layers_are_left_alone_and_wrappers_looked_through():
    model = deep()
    population = Population.of(AveragedModel(model), images().split(8))
    model.train()
    model.bn2.eval()
    old = model.bn2.running_mean.clone()
    report = population.store_in(model)
    assert [layer.name for layer in report.layers] == ["bn1", "bn3", "bn4"]
    assert torch.equal(model.bn2.running_mean, old)


def test_the_metric_decides_here_too():
    model = deep()
    population = Population.of(model, images().split(8))
    before = snapshot(model)
    report = population.store_in(model, metric=lambda m: m.bn1.num_batches_tracked.item(), keep_better=True)
    assert (report.metric.old, report.metric.new, report.kept_old) == (77, 5, True)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="keep_better needs a metric"):
        population.store_in(model, keep_better=True)


def test_other_weights_are_refused():
    model, other = deep(), deep()
    with torch.no_grad():
        other.linear1.weight[3, 5] += 1e-9
    population, foreign = (Population.of(m, [images()]) for m in (model, other))
    with pytest.raises(ValueError, match="merge only if they were measured on the same weights"):
        population.merge(foreign)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"measured on weights .* and Deep has .* load the checkpoint"):
        foreign.store_in(model)
    assert_unchanged(model, before)


def test_statistics_before_are_no_part_of_the_weights():
    model = deep()
    population = Population.of(model, [images()])
    model.bn1.running_mean.fill_(5)
    population.store_in(model)
    assert not (model.bn1.running_mean == 5).any()


def test_merging_no_parts_is_refused():
    with pytest.raises(ValueError, match="at least one part"):
        Population.merged([])


def damaged(path, how):
    data = path.read_bytes()
    tensors = safetensors.torch.load(data)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["population"])
    metadata = {"population": json.dumps(how(tensors, header) or header)}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


DAMAGE = {
    "a tensor is missing": (lambda t, h: t.pop("bn1.mean") is None, "bn1.mean"),
    "not finite": (
        lambda t, h: t["bn1.mean"].fill_(torch.nan) is None,
        "'bn1' has values that are not finite",
    ),
    "negative variance": (lambda t, h: t["bn2.biased_var"].neg_() is None, "negative variance"),
    "other shapes": (lambda t, h: t.update({"bn2.biased_var": torch.ones(3)}), "layer 'bn2' has shapes"),
    "a newer format": (lambda t, h: {**h, "format": 2}, "it has format 2, and this version reads 1"),
    "no layers": (lambda t, h: {k: v for k, v in h.items() if k != "layers"}, "layers"),
}


@pytest.mark.parametrize(("how", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, how, says):
    path = tmp_path / "a.safetensors"
    Population.of(deep(), [images()]).save(path)
    damaged(path, how)
    with pytest.raises(ValueError, match="a.safetensors is not a population that can be read.*" + says):
        Population.load(path)


def test_a_file_that_is_absent_cut_short_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="absent"):
        Population.load(tmp_path / "absent")
    path = tmp_path / "a"
    Population.of(deep(), [images()]).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a population that can be read"):
        Population.load(path)
    path.write_bytes(safetensors.torch.save({"weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"no entry 'population': Population\.save did not write it"):
        Population.load(path)
