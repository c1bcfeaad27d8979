"""`choose`: honest trials on planted cases, and nothing of the user's touched."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from doctor.patients import digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import batchnorm as bn
from batchnorm import BatchNorm1d
from batchnorm.choosing import choose, trial
from batchnorm.choosing.candidates import CANDIDATES, Settings, Unsuited, build


def made(width: int = 32) -> nn.Module:
    """On vectors, where two examples normalized by themselves are 1 and −1 whatever they were."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def seeded(seed: int = 0, width: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    return made(width)


def small(**changes):
    """Arguments of short trials."""
    return {"batch_size": 16, "steps": 8, "repetitions": 2, "rates": (0.03,), **changes}


def data(num: int = 200):
    images, labels = digits()
    return images[:num], labels[:num]


def test_of_two_examples_a_batch_plain_is_not_recommended():
    choice = choose(
        made, digits(), batch_size=2, steps=120, repetitions=4, candidates=("plain", "group"), rates=(0.003,)
    )
    assert choice.recommended == "group"
    plain, group = (next(t for t in choice.tried if t.name == name) for name in ("plain", "group"))
    assert sum(group.final) / 4 > sum(plain.final) / 4 + 0.2
    assert choice.tried[0].name == "group"
    assert "take group: " in choice.sentence
    assert "better than plain" in str(choice)
    assert type(choice.apply(seeded())[2]) is nn.GroupNorm


def test_where_batches_hold_few_classes_plain_is_not_recommended():
    images, labels = digits()
    order = labels.argsort()
    choice = choose(
        made,
        (images[order], labels[order]),
        batch_size=16,
        steps=120,
        repetitions=4,
        candidates=("plain", "group"),
        rates=(0.003,),
        order="batches",
    )
    assert choice.recommended == "group"


def test_where_nothing_differs_it_cannot_tell():
    choice = choose(
        made, digits(), batch_size=64, steps=25, repetitions=3, candidates=("plain", "ghost"), rates=(0.03,)
    )
    assert choice.recommended is None
    assert choice.sentence.startswith("cannot tell ")
    assert "repetitions would" in choice.sentence
    with pytest.raises(ValueError, match=r"which is best \(cannot tell .*\)\. Name one that was tried: '"):
        choice.apply(seeded())
    ghosts = choice.apply(seeded(), "ghost")
    assert [layer.ghost_size for layer in ghosts.modules() if isinstance(layer, BatchNorm1d)] == [32, 32]


def test_a_trial_is_the_training_that_a_user_would_write():
    model, (images, labels) = nn.Sequential(seeded(), nn.Dropout(0.3)), data(100)
    held = digits()[0][300:340], digits()[1][300:340]
    choice = choose(
        model,
        (images, labels),
        held,
        **small(candidates=("plain",), order="given", repetitions=1, batch_size=20, steps=37, rates=(0.05,)),
    )
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05, momentum=0.9)
    expected = []
    torch.manual_seed(0)  # of dropout, through turns and evaluations
    for step in range(37):
        part = slice(20 * (step % 5), 20 * (step % 5) + 20)
        own.train()
        loss = F.cross_entropy(own(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in (10, 19, 28, 37):
            with torch.no_grad():
                expected.append((own.eval()(held[0]).argmax(1) == held[1]).double().mean().item())
    assert choice.tried[0].steps == (10, 19, 28, 37)
    assert choice.tried[0].scores == (tuple(expected),)
    assert choice.num_held_out == 40


def test_the_same_seed_gives_the_same_scores_and_another_does_not():
    net = nn.Sequential(made(), nn.Dropout(0.3))

    def scores(**changes):
        choice = choose(net, data(), **small(**changes))
        return {one.name: (one.rate, one.scores) for one in choice.tried}

    first = scores(rates=(0.03, 0.1))
    torch.rand(7)
    assert scores(rates=(0.03, 0.1)) == first
    assert scores(rates=(0.03, 0.1), seed=5) != first


def test_candidates_do_not_depend_on_each_others_company():
    def plain(*names):
        choice = choose(seeded, data(), **small(candidates=("plain", *names)))
        return next(one.scores for one in choice.tried if one.name == "plain")

    assert plain() == plain("group", "ghost")


def test_every_candidate_sees_the_same_batches():
    seen = {}

    def forward(model, batch):
        name = "group" if any(isinstance(m, nn.GroupNorm) for m in model.modules()) else "plain"
        if model.training:
            seen.setdefault(name, []).append(batch[0].double().sum().item())
        return model(batch[0])

    class Noisy(Dataset):
        """Changed at random whenever it is taken, by every generator there is."""

        def __len__(self):
            return 100

        def __getitem__(self, number):
            noise = torch.rand(()) + np.random.rand() + random.random()
            return digits()[0][number] + noise.float(), int(digits()[1][number])

    choose(seeded, Noisy(), **small(candidates=("plain", "group"), forward=forward))
    assert len(seen["plain"]) > 16
    assert seen["plain"][-16:] == seen["group"][-16:]  # two repetitions of eight steps
    assert seen["plain"][-8:] != seen["plain"][-16:-8]


@pytest.mark.parametrize("examples", [None, 60])
def test_what_gives_scores_is_never_learned_from_and_is_another_in_each_repetition(examples):
    ids = torch.arange(100)
    seen = []

    def forward(model, batch):
        seen.append((model.training, frozenset(batch[0][:, 0].int().tolist())))
        return model(batch[0])

    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    total = examples or 100
    choose(
        net,
        (torch.stack([ids, ids % 7], 1).float(), ids % 3),
        **small(candidates=("plain",), batch_size=8, steps=total // 10, examples=examples, forward=forward),
    )
    length = total // 10 + 4  # an epoch of steps, and four evaluations
    repetitions = []
    for part in (seen[-2 * length : -length], seen[-length:]):
        learned = frozenset().union(*(batch for training, batch in part if training))
        scored = {batch for training, batch in part if not training}
        assert len(learned) == 0.8 * total
        assert len(scored) == 1
        assert len(*scored) == 0.2 * total
        assert not learned & next(iter(scored))
        repetitions.append((learned, *scored))
    assert repetitions[0][1] != repetitions[1][1]
    # Of those that are used, if not all are: the same in both.
    assert repetitions[0][0] | repetitions[0][1] == repetitions[1][0] | repetitions[1][1]
    if examples:
        assert max(repetitions[0][0] | repetitions[0][1]) >= 60  # drawn from all


def test_nothing_of_the_users_is_touched():
    model = seeded()
    model[2].eval()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    kinds = [type(m) for m in model.modules()]
    images, labels = data()
    kept = images.clone()
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    choice = choose(model, (images, labels), **small())
    after = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(states[0], after[0])
    assert states[1:] == after[1:]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))
    assert torch.equal(images, kept)
    for name in ("plain", "ghost", "renorm", "group"):
        applied = choice.apply(model, name)
        assert all(torch.equal(a, b) for a, b in zip(applied.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any("every repetition starts from the weights of the model" in note for note in choice.notes)


def test_a_function_gives_every_repetition_other_weights():
    firsts = []

    def forward(model, batch):
        if model.training:
            firsts.append(model[1].weight[0, 0].item())
        return model(batch[0])

    choice = choose(made, data(), **small(candidates=("plain",), repetitions=3, steps=1, forward=forward))
    assert len(set(firsts[-3:])) == 3
    assert not any("every repetition starts" in note for note in choice.notes)


def test_each_candidate_takes_the_rate_that_is_best_for_it():
    choice = choose(
        seeded, data(400), batch_size=16, steps=30, repetitions=1, candidates=("plain",), rates=(1e-6, 0.05)
    )
    assert choice.tried[0].rate == 0.05
    assert any("0.05, the highest learning rate, was best for plain" in note for note in choice.notes)


def test_a_candidate_that_diverges_is_reported_and_never_recommended():
    class Fragile(nn.Module):
        """The loss is not finite in the fourth step of plain layers."""

        def __init__(self):
            super().__init__()
            self.net, self.calls = made(), 0

        def forward(self, x):
            self.calls += self.training
            group = any(isinstance(m, nn.GroupNorm) for m in self.modules())
            return self.net(x) * (math.nan if self.calls > 20 and not group else 1.0)

    choice = choose(Fragile, data(), **small(candidates=("plain", "group"), steps=24))
    plain = choice.tried[-1]
    assert (plain.name, plain.diverged, plain.final) == ("plain", 2, ())
    assert [len(row) for row in plain.scores] == [3, 3]
    assert choice.recommended == "group"
    assert "diverged in 2 of 2" in str(choice)
    assert json.loads(json.dumps(choice.to_json(), allow_nan=False))["tried"][1]["diverged"] == 2

    alone = choose(Fragile, data(), **small(candidates=("plain",), steps=24))
    assert (alone.recommended, alone.verdict.best) == (None, None)
    assert "every candidate diverged" in str(alone)


class FakeClock:
    """A step of training takes ``tick`` seconds, and nothing else any time."""

    def __init__(self, monkeypatch, tick: float):
        self.now, self.tick = 0.0, tick
        monkeypatch.setattr(trial, "clock", lambda: self.now)

    def forward(self, model, batch):
        if model.training:
            self.now += self.tick
        return model(batch[0])


def test_the_budget_is_kept_and_used(monkeypatch):
    clock = FakeClock(monkeypatch, 0.1)
    choice = choose(
        seeded,
        data(),
        batch_size=16,
        budget_s=60.0,
        repetitions=3,
        candidates=("plain", "group"),
        rates=(0.01, 0.03),
        forward=clock.forward,
    )
    assert 48.0 < clock.now <= 60.0
    assert (choice.repetitions, choice.seconds) == (3, clock.now)
    # First steps of both take at least 3 % of the time; a tenth is kept back; the search takes as long as
    # one repetition.
    assert choice.steps == pytest.approx(0.9 * 58 / (0.2 * 4), abs=4)
    assert [one.step_s for one in choice.tried] == pytest.approx([0.1, 0.1])
    assert choice.tried[0].seconds[0][-1] == pytest.approx(0.1 * choice.steps)
    assert not any("finished in time" in note for note in choice.notes)


def test_the_search_shows_how_long_steps_really_take(monkeypatch):
    clock = FakeClock(monkeypatch, 0.1)

    def forward(model, batch):
        clock.tick = 0.1 if clock.now < 2 else 0.2
        return clock.forward(model, batch)

    choice = choose(
        seeded,
        data(),
        batch_size=16,
        budget_s=60.0,
        candidates=("plain",),
        rates=(0.01, 0.03),
        forward=forward,
    )
    assert choice.repetitions == 5
    assert 48.0 < clock.now <= 60.0
    assert not any("finished in time" in note for note in choice.notes)


def test_steps_that_become_slower_cost_repetitions_and_not_time(monkeypatch):
    clock = FakeClock(monkeypatch, 0.1)

    def forward(model, batch):
        clock.tick = 0.1 if clock.now < 20 else 0.2
        return clock.forward(model, batch)

    choice = choose(
        seeded,
        data(),
        batch_size=16,
        budget_s=40.0,
        repetitions=4,
        rates=(0.03,),
        candidates=("plain",),
        forward=forward,
    )
    assert clock.now < 38.0  # the fourth, which would not end in time, is not begun
    assert choice.repetitions == 3
    assert [len(one.scores) for one in choice.tried] == [3]
    assert any("3 of 4 repetitions were finished in time" in note for note in choice.notes)


def test_a_budget_that_cannot_do_is_refused_with_the_least_that_would(monkeypatch):
    clock = FakeClock(monkeypatch, 0.1)
    few = {"batch_size": 16, "repetitions": 2, "rates": (0.03,), "candidates": ("plain",)}
    # Four first steps, and 2 · 20 with a reserve of a tenth: 4.84 s.
    says = r"a budget of 4.8 s is too little: 1 candidates with 2 repetitions of 20 steps need 5 s"
    with pytest.raises(ValueError, match=says):
        choose(seeded, data(), budget_s=4.8, forward=clock.forward, **few)
    clock.now = 0.0
    assert choose(seeded, data(), budget_s=5.0, forward=clock.forward, **few).steps == 20


def test_time_that_runs_out_before_one_repetition_is_an_error(monkeypatch):
    clock = FakeClock(monkeypatch, 0.1)

    def forward(model, batch):
        clock.tick = 0.1 if clock.now < 1 else 5.0
        return clock.forward(model, batch)

    with pytest.raises(ValueError, match="the time was up before one repetition was through"):
        choose(
            seeded,
            data(),
            batch_size=16,
            budget_s=20.0,
            rates=(0.03,),
            candidates=("plain",),
            forward=forward,
        )


def test_what_makes_no_sense_is_listed_with_the_reason():
    choice = choose(seeded, data(), **small(batch_size=2, steps=2))
    reasons = dict(choice.not_tried)
    assert set(reasons) == {"ghost", "frozen", "synced"}
    assert "a batch of 2 has not two of 2" in reasons["ghost"]
    assert "those of a new layer" in reasons["frozen"]
    assert "outside a process group it is plain" in reasons["synced"]
    assert "not tried: synced: " in str(choice)


def test_of_one_example_a_batch_plain_cannot_run_and_group_can():
    choice = choose(seeded, data(), **small(batch_size=1, candidates=("plain", "group")))
    assert [one.name for one in choice.tried] == ["group"]
    assert choice.recommended == "group"
    assert "it fails on the first batch: " in dict(choice.not_tried)["plain"]


def test_frozen_is_tried_on_a_trained_model():
    model = seeded()
    model.train()(digits()[0][:100])
    choice = choose(model, data(), **small(candidates=("plain", "frozen")))
    assert {one.name for one in choice.tried} == {"plain", "frozen"}
    frozen = choice.apply(model, "frozen")
    assert all(layer.frozen for layer in frozen.modules() if isinstance(layer, BatchNorm1d))


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name not in ("frozen", "synced")])
def test_every_candidate_can_be_built_and_trained(name):
    choice = choose(seeded, data(), **small(batch_size=8, steps=3, candidates=(name,)))
    assert [one.name for one in choice.tried] == [name]
    assert choice.tried[0].about
    assert choice.recommended == name
    assert all(0 <= score <= 1 for row in choice.tried[0].scores for score in row)


@pytest.mark.parametrize(
    ("batch_size", "ghost_size", "expected"),
    [(128, None, 32), (64, None, 32), (63, None, 31), (4, None, 2), (3, None, None), (8, 4, 4), (8, 5, None)],
)
def test_the_size_of_ghosts(batch_size, ghost_size, expected):
    settings = Settings(batch_size, ghost_size)
    if expected is None:
        with pytest.raises(Unsuited, match=f"a batch of {batch_size} has not two of"):
            build("ghost", seeded(), settings)
    else:
        assert build("ghost", seeded(), settings).model[2].ghost_size == expected


def test_a_loss_and_a_metric_of_the_users_own():
    images, labels = data()
    targets = F.one_hot(labels, 10).float()
    choice = choose(
        seeded,
        {"x": images, "t": targets},
        **small(
            candidates=("plain", "group"),
            forward=lambda model, batch: model(batch["x"]),
            loss=lambda output, batch: (output - batch["t"]).square().mean(),
        ),
    )
    assert (choice.score, choice.higher_is_better) == ("loss", False)
    assert all(0 < score < 2 for one in choice.tried for score in one.final)
    means = [sum(one.final) for one in choice.tried]
    assert means == sorted(means)
    judged = []

    def metric(model):
        judged.append(model.training)
        return torch.tensor(-model[1].weight.norm().item())

    choice = choose(
        seeded, data(), **small(metric=metric, candidates=("plain", "group"), higher_is_better=False)
    )
    assert (choice.score, choice.num_held_out) == ("metric", 0)
    assert judged
    assert not any(judged)


def test_outputs_with_a_loss_of_their_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = made()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    images, labels = data()
    choice = choose(Own, {"x": images, "labels": labels}, **small(candidates=("plain",)))
    assert choice.score == "loss"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"steps": None}, ValueError, "either budget_s, .* or steps"),
        ({"budget_s": 3.0}, ValueError, "either budget_s, .* or steps"),
        ({"steps": None, "budget_s": 0.0}, ValueError, "budget_s must be above 0"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"repetitions": 0}, ValueError, "repetitions must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": 161}, ValueError, "data hold 200 examples, of which 40 are held out .* batch of 161"),
        ({"rates": ()}, ValueError, "rates must be positive and different"),
        ({"rates": (0.1, 0.1)}, ValueError, "rates must be positive and different"),
        ({"rates": (math.nan,)}, ValueError, "rates must be positive and different"),
        ({"candidates": ("batch",)}, ValueError, "no candidate 'batch'; there are 'plain', 'ghost'"),
        ({"candidates": ()}, ValueError, "candidates must be at least one"),
        ({"candidates": ("plain", "plain")}, ValueError, "different from each other"),
        ({"candidates": ("synced",)}, ValueError, "no candidate can be tried: synced: outside"),
        ({"order": "sorted"}, ValueError, "order must be one of 'examples', 'batches', 'given'"),
        ({"confidence": 95}, ValueError, "confidence must be between 0 and 1"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"examples": 10}, ValueError, "data hold 10 examples"),
        ({"loss": lambda output, batch: 3.0}, TypeError, r"loss\(output, batch\) must be a tensor"),
        ({"metric": lambda model: "good"}, TypeError, r"metric\(model\) must return one number"),
    ],
    ids=lambda value: (
        ", ".join(f"{k}={v if not callable(v) else k}" for k, v in value.items())
        if isinstance(value, dict)
        else ""
    ),
)
def test_wrong_arguments_are_refused(change, error, says):
    with pytest.raises(error, match=says):
        choose(seeded, data(), **small(**change))


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (nn.Linear(64, 10), ValueError, "Linear has no batch normalization to choose a kind of: bn.insert"),
        (7, TypeError, "model must be a torch.nn.Module, or a function"),
        (lambda: 7, TypeError, "the function for the model returned int"),
        (nn.DataParallel(made()), ValueError, "choosing needs the model inside DataParallel"),
    ],
    ids=["no normalization", "a number", "makes a number", "wrapped"],
)
def test_wrong_models_are_refused(model, error, says):
    with pytest.raises(error, match=says):
        choose(model, data(), **small())


def test_a_model_that_fails_on_the_data_says_so_as_it_would():
    with pytest.raises(RuntimeError, match="batch 0: Sequential fails on it: mat1 and mat2"):
        choose(seeded, (torch.rand(50, 3), torch.zeros(50, dtype=torch.long)), **small())


def test_without_classes_or_loss_one_is_asked_for():
    with pytest.raises(ValueError, match=r"loss=callable\(output, batch\) is needed"):
        choose(seeded, (digits()[0][:50], torch.rand(50)), **small())


def test_the_progress_bar_counts_all_steps(capsys):
    choose(seeded, data(), **small(candidates=("plain",), rates=(0.01, 0.03), progress=True))
    assert "24 of 24 steps of each" in " ".join(capsys.readouterr().err.split())


def test_the_choice_is_saved_whole_and_shown_as_a_page(tmp_path):
    choice = choose(seeded, data(), **small())
    saved = json.loads(choice.save(tmp_path / "choice.json").read_text())
    assert saved == choice.to_json()
    assert [one["name"] for one in saved["tried"]] == [one.name for one in choice.tried]
    assert saved["verdict"]["sentence"] == choice.sentence
    difference = saved["verdict"]["differences"]["group"]
    assert difference["values"] == list(choice.verdict.differences["group"].values)
    assert bn.choose is choose
