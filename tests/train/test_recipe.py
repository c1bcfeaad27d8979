import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.train import RECIPES, Recipe, bn_mlp, get_recipe, mlp


def test_recipes_are_section_4_1():
    plain, normalized = mlp(), bn_mlp()
    assert plain.hidden == (100, 100, 100)
    assert (plain.activation, plain.binarize) == ("sigmoid", True)
    assert (plain.batch_size, plain.steps) == (60, 50_000)
    assert (plain.normalize, normalized.normalize) == (False, True)
    assert replace(normalized, normalize=False) == plain
    assert set(RECIPES) == {"mlp", "bn-mlp"}


@settings(deadline=None, max_examples=30)
@given(
    hidden=st.lists(st.integers(1, 500), min_size=1, max_size=4).map(tuple),
    rate=st.floats(0, 1e38, exclude_min=True),
    momentum=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**63),
)
def test_json_brings_back_every_bit(hidden, rate, momentum, seed):
    recipe = replace(bn_mlp(), hidden=hidden, learning_rate=rate, momentum=momentum, seed=seed)
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert not again.differences(recipe)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("model", "resnet", "one of mlp"),
        ("activation", "swish", "one of sigmoid, tanh, relu"),
        ("optimizer", "lion", "one of sgd, adagrad, adam"),
        ("device", "cuda:0", "one of auto, cpu, cuda"),
        ("steps", 0, "at least 1"),
        ("steps", 10.0, "an integer"),
        ("steps", True, "an integer"),
        ("batch_size", 0, "at least 1"),
        ("log_every", 0, "at least 1"),
        ("eval_every", -1, "at least 1"),
        ("checkpoint_every", 0, "at least 1"),
        ("recalibrate_examples", -1, "0 or more"),
        ("threads", -1, "0 or more"),
        ("seed", -1, "0 or more"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("learning_rate", float("inf"), "within float32"),
        ("learning_rate", 1e300, "within float32"),
        ("learning_rate", "0.1", "a number"),
        ("momentum", 1.0, "below 1"),
        ("momentum", float("nan"), "below 1"),
        ("weight_decay", -1e-9, "0 or more"),
        ("init_std", float("inf"), "finite"),
        ("normalize", 1, "true or false"),
        ("hidden", (), "one or more"),
        ("hidden", (100, 0), "at least 1"),
        ("hidden", [100], "a tuple"),
    ],
)
def test_bad_value_is_refused_by_name(field, value, says):
    with pytest.raises(ValueError, match=rf"Recipe\.{field} must be .*{says}.*got"):
        replace(mlp(), **{field: value})


def test_values_that_do_not_go_together():
    with pytest.raises(ValueError, match="momentum must be 0 with adam"):
        replace(mlp(), optimizer="adam", momentum=0.9)
    with pytest.raises(ValueError, match="batch_size must be at least 2 with normalize"):
        replace(bn_mlp(), batch_size=1)
    assert replace(mlp(), batch_size=1).batch_size == 1


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        mlp().steps = 3


def test_json_with_other_fields_is_refused_by_their_names():
    with pytest.raises(ValueError, match="does not know: dropout, warmup"):
        Recipe.from_json(mlp().to_json() | {"warmup": 1, "dropout": 0.4})
    lacking = mlp().to_json()
    del lacking["seed"]
    with pytest.raises(ValueError, match="lacks seed"):
        Recipe.from_json(lacking)


def test_differences_name_the_fields_and_both_values():
    other = replace(mlp(), seed=3, hidden=(50,))
    assert mlp().differences(other) == [
        "hidden (asked for [100, 100, 100], there [50])",
        "seed (asked for 0, there 3)",
    ]


def test_unknown_recipe_lists_the_known_and_the_closest():
    with pytest.raises(ValueError, match=r"'bn_mlp'; known are mlp, bn-mlp\. Did you mean bn-mlp\?"):
        get_recipe("bn_mlp")
    assert get_recipe("mlp") == mlp()
