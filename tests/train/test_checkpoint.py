import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from batchnorm.train import mlp
from batchnorm.train.build import build_optimizer
from batchnorm.train.checkpoint import (
    MODEL_FILE,
    STATE_FILE,
    TRAINING_FILE,
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    optimizer_state,
    prune,
    restore_optimizer,
    save_checkpoint,
)


def checkpoint(step, accuracy=None):
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(3, 4, generator=generator)
    return Checkpoint(
        step, {"weight": weights}, {"losses": weights[0]}, {"accuracy": accuracy, "seconds": 0.1 * step}
    )


def steps(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path):
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model = {
        "transposed": whole.T,
        "strided": whole[:, ::2],
        "one storage": whole,
        "a scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "bfloat16": whole.bfloat16(),
        "float64": whole.double() / 3,
        "not a number": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    facts = {"accuracy": 0.1 + 0.2, "seconds": 1e-300, "optimizer": {"0.x": None}}
    path = save_checkpoint(tmp_path / "checkpoints", Checkpoint(12, model, {"losses": whole[0]}, facts))
    assert path.name == "step-12"
    assert sorted(p.name for p in path.iterdir()) == sorted([MODEL_FILE, TRAINING_FILE, STATE_FILE])
    back = load_checkpoint(path)
    assert back.step == 12
    assert back.facts == facts
    assert list(back.model) == sorted(model) or set(back.model) == set(model)
    for name, tensor in model.items():
        assert back.model[name].dtype == tensor.dtype
        assert back.model[name].shape == tensor.shape
        bits = [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in (back.model[name], tensor)]
        assert bits[0] == bits[1], name


DAMAGES = {
    "model missing": lambda path: (path / MODEL_FILE).unlink(),
    "training state missing": lambda path: (path / TRAINING_FILE).unlink(),
    "state.json missing": lambda path: (path / STATE_FILE).unlink(),
    "folder empty": lambda path: [p.unlink() for p in path.iterdir()],
    "model cut short": lambda path: (path / MODEL_FILE).write_bytes((path / MODEL_FILE).read_bytes()[:-1]),
    "model empty": lambda path: (path / MODEL_FILE).write_bytes(b""),
    "a bit flipped": lambda path: (path / MODEL_FILE).write_bytes(
        (path / MODEL_FILE).read_bytes()[:-1] + bytes([(path / MODEL_FILE).read_bytes()[-1] ^ 1])
    ),
    "state.json cut short": lambda path: (path / STATE_FILE).write_bytes(
        (path / STATE_FILE).read_bytes()[:-5]
    ),
    "state.json empty": lambda path: (path / STATE_FILE).write_bytes(b""),
    "state.json a list": lambda path: (path / STATE_FILE).write_text("[]"),
    "state.json without files": lambda path: (path / STATE_FILE).write_text('{"format": 1, "step": 20}'),
    "of another format": lambda path: (path / STATE_FILE).write_text(
        json.dumps(json.loads((path / STATE_FILE).read_text()) | {"format": 99})
    ),
    "of another step": lambda path: (path / STATE_FILE).write_text(
        json.dumps(json.loads((path / STATE_FILE).read_text()) | {"step": 10})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_newest_is_passed_over_with_a_warning(tmp_path, damage):
    save_checkpoint(tmp_path, checkpoint(10))
    damage(save_checkpoint(tmp_path, checkpoint(20)))
    with pytest.raises(ValueError, match=r"step-20.* is missing or damaged"):
        load_checkpoint(tmp_path / "step-20")
    with pytest.warns(UserWarning, match=r"Passing over .*step-20"):
        found = newest_checkpoint(tmp_path)
    assert found.step == 10
    assert torch.equal(found.model["weight"], checkpoint(10).model["weight"])


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(10))
    (path / MODEL_FILE).unlink()
    save_checkpoint(tmp_path, checkpoint(10))
    assert newest_checkpoint(tmp_path).step == 10


def test_newest_is_by_number_not_by_name(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") is None
    for step in (9, 100, 20):
        save_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "step-1000x").mkdir()
    assert newest_checkpoint(tmp_path).step == 100


def test_newest_two_and_the_best_are_kept(tmp_path):
    accuracies = {10: 0.5, 20: 0.9, 30: 0.7, 40: None, 50: 0.9, 60: 0.8, 70: 0.1, 80: 0.2}
    left = []
    for step, accuracy in accuracies.items():
        save_checkpoint(tmp_path, checkpoint(step, accuracy))
        prune(tmp_path)
        left.append(steps(tmp_path))
    # At 50 the best is equalled, and the newer of the two is kept.
    assert left == [[10], [10, 20], [20, 30], [20, 30, 40], [40, 50], [50, 60], [50, 60, 70], [50, 70, 80]]


def test_pruning_removes_what_was_left_unfinished(tmp_path):
    save_checkpoint(tmp_path, checkpoint(10))
    (tmp_path / ".step-20.partial").mkdir()
    prune(tmp_path)
    assert steps(tmp_path) == [10]


def test_checkpoints_are_found_by_name(tmp_path):
    for step, accuracy in ((10, 0.9), (20, 0.5), (30, None)):
        save_checkpoint(tmp_path, checkpoint(step, accuracy))
    assert find_checkpoint(tmp_path, "newest").name == "step-30"
    assert find_checkpoint(tmp_path, "best").name == "step-10"
    assert find_checkpoint(tmp_path, "20").name == "step-20"
    with pytest.raises(FileNotFoundError, match=r"'15'.*newest, best, 30, 20, 10"):
        find_checkpoint(tmp_path, "15")
    with pytest.raises(FileNotFoundError, match="there are: none"):
        find_checkpoint(tmp_path / "absent", "newest")


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="sgd"),
        pytest.param({"momentum": 0.9, "weight_decay": 0.01}, id="sgd with momentum"),
        pytest.param({"optimizer": "adagrad"}, id="adagrad"),
        pytest.param({"optimizer": "adam", "weight_decay": 0.01}, id="adam"),
    ],
)
def test_restored_optimizer_takes_the_same_steps(tmp_path, variant):
    recipe = replace(mlp(), **variant)
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = build_optimizer(recipe, model)

    def take_steps(network, rule, batches):
        for x in batches:
            rule.zero_grad()
            network(x).square().sum().backward()
            rule.step()
        return [p.detach().clone() for p in network.parameters()]

    batches = [torch.randn(5, 3, generator=generator) for _ in range(6)]
    take_steps(model, optimizer, batches[:3])
    tensors, rest = optimizer_state(optimizer)
    path = save_checkpoint(tmp_path, Checkpoint(3, model.state_dict(), tensors, {"optimizer": rest}))
    back = load_checkpoint(path)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(back.model)
    again = build_optimizer(recipe, twin)
    restore_optimizer(again, back.training, back.facts["optimizer"])
    for got, expected in zip(
        take_steps(twin, again, batches[3:]), take_steps(model, optimizer, batches[3:]), strict=True
    ):
        assert torch.equal(got, expected)
