"""Examples from whatever holds them, and the order in which they come."""

import collections

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from batchnorm.choosing.examples import Batches, divided, examples_of

X, Y = torch.arange(20.0).view(10, 2), torch.arange(10)


class Items(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, number):
        return {"x": X[number], "y": int(Y[number])}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(X, Y))


class Fields(collections.UserDict):
    """A mapping that is no dict, such as a tokenizer's."""


def batches():
    return zip(X.split(3), Y.split(3), strict=True)


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, drop_last=True),
        DataLoader(Stream(), batch_size=4),
        DataLoader(list(batches()), batch_size=None),
        list(batches()),
        batches(),
        [[X[:5], Y[:5]], [X[5:], Y[5:]]],
    ],
    ids=["tensors", "dataset", "loader", "stream", "loader of batches", "batches", "iterator", "lists"],
)
def test_examples_are_taken_by_number_wherever_they_come_from(data):
    examples = examples_of(data, None)
    assert len(examples) == 10
    x, y = examples.take(torch.tensor([7, 0, 9]))
    assert torch.equal(x, X[[7, 0, 9]])
    assert torch.equal(y, Y[[7, 0, 9]])


@pytest.mark.parametrize(
    "data",
    [{"x": X, "y": Y}, Fields(x=X, y=Y), Items(), [Fields(x=X[:4], y=Y[:4]), Fields(x=X[4:], y=Y[4:])]],
    ids=["mapping", "user's mapping", "dataset of mappings", "batches of mappings"],
)
def test_mappings_stay_mappings(data):
    batch = examples_of(data, None).take(torch.tensor([3, 1]))
    assert torch.equal(batch["x"], X[[3, 1]])
    assert batch["y"].tolist() == [3, 1]


def test_a_loaders_own_way_to_make_batches_is_used():
    def collate(items):
        return torch.stack([x for x, _ in items]) * 10, torch.tensor([int(y) for _, y in items])

    x, _ = examples_of(DataLoader(TensorDataset(X, Y), collate_fn=collate), None).take(torch.tensor([2]))
    assert x.tolist() == [[40.0, 50.0]]


def test_an_endless_iterable_is_read_no_further_than_asked():
    read = []

    def endless():
        while True:
            read.append(1)
            yield X[:4], Y[:4]

    assert len(examples_of(endless(), 9)) == 12
    assert len(read) == 3


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (X, TypeError, "data must be a tuple"),
        (7, TypeError, "got int"),
        ([], ValueError, "data is empty"),
        ((X, Y[:4]), ValueError, "its tensors hold 10, 4 examples|its tensors hold 4, 10 examples"),
        ([(X, "a")], TypeError, "batch 0: tensors with examples"),
        ([(X, torch.tensor(1.0))], TypeError, "batch 0: tensors with examples"),
        ([(X, Y), X], ValueError, "batch 1 is built otherwise"),
        ([(X, Y), (X.view(5, 4), Y[:5])], ValueError, r"batch 1 have shapes \[\(4,\), \(\)\]"),
    ],
    ids=["a tensor", "a number", "nothing", "uneven", "text", "a scalar", "another structure", "shapes"],
)
def test_what_holds_no_examples_is_refused(data, error, says):
    with pytest.raises(error, match=says):
        examples_of(data, None)


def test_orders():
    numbers = torch.tensor([10, 11, 12, 13, 14, 15, 16])
    given = Batches(numbers, 2, "given", seed=3)
    assert [given.at(step).tolist() for step in range(4)] == [[10, 11], [12, 13], [14, 15], [10, 11]]
    kept = Batches(numbers, 2, "batches", seed=3)
    epochs = [[tuple(kept.at(3 * epoch + k).tolist()) for k in range(3)] for epoch in range(6)]
    assert all(sorted(epoch) == [(10, 11), (12, 13), (14, 15)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    mixed = Batches(numbers, 2, "examples", seed=3)
    first = [mixed.at(step).tolist() for step in range(3)]
    assert len({n for batch in first for n in batch}) == 6
    assert first == [Batches(numbers, 2, "examples", seed=3).at(step).tolist() for step in range(3)]
    assert first != [Batches(numbers, 2, "examples", seed=4).at(step).tolist() for step in range(3)]


def test_nothing_is_both_learned_and_held_out():
    learned, held_out = divided(50, 12, seed=1)
    assert len(held_out) == 12
    assert sorted([*learned.tolist(), *held_out.tolist()]) == list(range(50))
    assert learned.tolist() == sorted(learned.tolist())
    assert not torch.equal(held_out, divided(50, 12, seed=2)[1])
