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
    assert {name for name in RECIPES if "mlp" in name} == {"mlp", "bn-mlp"}


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
        ("rate_decay", 0.0, "above 0 and at most 1"),
        ("rate_decay", 1.5, "above 0 and at most 1"),
        ("decay_every", 0, "at least 1"),
        ("shard_size", 0, "at least 1"),
        ("shuffle", "epochs", "one of all, shards.within, shards, within, none"),
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


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("heads", 3, "0, 1 or 2"),
        ("dropout", 1.0, "below 1"),
        ("width", 0.0, "above 0"),
        ("init_scale", float("inf"), "above 0"),
        ("distortion", 1.5, "between 0 and 1"),
        ("head_weight", -0.1, "between 0 and 1"),
        ("image_size", 7, "8 or more"),
        ("projection", 64, "one of 96, 128"),
        ("crops", "centre", "one of area, shift, none"),
        ("per_activation", True, "false without normalize"),
    ],
)
def test_bad_value_for_inception_is_refused_by_name(field, value, says):
    with pytest.raises(ValueError, match=rf"Recipe\.{field} must be .*{says}.*got"):
        replace(get_recipe("inception"), **{field: value})


def test_values_that_do_not_go_together():
    with pytest.raises(ValueError, match="momentum must be 0 with adam"):
        replace(mlp(), optimizer="adam", momentum=0.9)
    with pytest.raises(ValueError, match="batch_size must be at least 2 with normalize"):
        replace(bn_mlp(), batch_size=1)
    assert replace(mlp(), batch_size=1).batch_size == 1


def test_recipe_itself_trains_nothing():
    with pytest.raises(TypeError, match="use one of mlp, inception"):
        Recipe(model="mlp")


def test_rate_decays_in_steps():
    recipe = replace(mlp(), learning_rate=0.5, rate_decay=0.5, decay_every=10)
    assert [recipe.rate_at(step) for step in (0, 9, 10, 19, 20, 30)] == [0.5, 0.5, 0.25, 0.25, 0.125, 0.0625]


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        mlp().steps = 3


def test_json_with_other_fields_is_refused_by_their_names():
    with pytest.raises(ValueError, match="does not know: dropout, warmup"):
        Recipe.from_json(mlp().to_json() | {"warmup": 1, "dropout": 0.4})
    with pytest.raises(ValueError, match="model is 'vgg'; this version knows mlp, inception"):
        Recipe.from_json(mlp().to_json() | {"model": "vgg"})
    lacking = mlp().to_json()
    del lacking["seed"]
    with pytest.raises(ValueError, match="lacks seed"):
        Recipe.from_json(lacking)


def test_older_json_gets_what_came_later():
    older = get_recipe("bn-x5").to_json()
    del older["precision"], older["eval_examples"]
    assert Recipe.from_older_json(older) == get_recipe("bn-x5")
    with pytest.raises(ValueError, match="does not know: warmup"):
        Recipe.from_older_json(older | {"warmup": 1})
    with pytest.raises(ValueError, match="model is None"):
        Recipe.from_older_json({})


def test_differences_name_the_fields_and_both_values():
    other = replace(mlp(), seed=3, hidden=(50,))
    assert mlp().differences(other) == [
        "seed (asked for 0, there 3)",
        "hidden (asked for [100, 100, 100], there [50])",
    ]


def test_unknown_recipe_lists_the_known_and_the_closest():
    with pytest.raises(ValueError, match=r"'bn_mlp'; known are mlp, bn-mlp, .*\. Did you mean bn-mlp\?"):
        get_recipe("bn_mlp")
    assert get_recipe("mlp") == mlp()


PAPERS_CHANGES = {"learning_rate", "steps", "normalize"} | {
    "dropout", "weight_decay", "decay_every", "response_norm", "shuffle", "distortion",
}  # fmt: skip
"""Of section 4.2.1, all that BN-x5 changes of Inception."""


def changed(recipe, other):
    mine, theirs = recipe.to_json(), other.to_json()
    return {name for name in mine if mine[name] != theirs[name]}


@pytest.mark.parametrize("scale", ["imagenet", "cifar10"])
def test_recipes_are_section_4_2(scale):
    plain, baseline, x5, x30, sigmoid = (
        get_recipe(name, scale) for name in ("inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid")
    )
    assert (plain.learning_rate, plain.batch_size, plain.dropout, plain.momentum) == (0.0015, 32, 0.4, 0.9)
    assert (plain.response_norm, plain.normalize, plain.shuffle) == (True, False, "shards")
    assert changed(baseline, plain) == {"normalize", "steps"}
    assert changed(x5, plain) == PAPERS_CHANGES
    assert (x5.learning_rate, x30.learning_rate) == (0.0075, 0.045)
    assert (x5.dropout, x5.response_norm, x5.shuffle) == (0.0, False, "shards+within")
    assert x5.weight_decay == plain.weight_decay / 5
    assert plain.decay_every / x5.decay_every == pytest.approx(6, rel=0.01)
    assert 0 < x5.distortion < plain.distortion
    assert changed(x30, x5) == {"learning_rate"}
    assert changed(sigmoid, x5) == {"activation"}


def test_paper_scale_is_the_papers():
    plain, x30 = get_recipe("inception"), get_recipe("bn-x30")
    assert (plain.steps, x30.steps) == (31_000_000, 6_000_000)
    # 8 epochs of 1,281,167 images in batches of 32.
    assert (plain.rate_decay, plain.decay_every) == (0.96, 320_288)
    assert (plain.image_size, plain.width, plain.stem, plain.crops) == (224, 1.0, "imagenet", "area")


def test_members_of_the_ensemble_change_what_the_paper_names():
    x30 = get_recipe("bn-x30")
    members = [get_recipe(f"ensemble-{n}") for n in range(1, 7)]
    allowed = {"init_scale", "dropout", "per_activation"}
    for number, member in enumerate(members, start=1):
        assert changed(member, x30) - {"seed"} <= allowed
        assert changed(member, x30) - {"seed"}
        assert member.seed == number
        assert member.init_scale >= 1
        assert member.dropout in (0.0, 0.05, 0.1)
    assert len({str(replace(member, seed=0)) for member in members}) == 6


@pytest.mark.parametrize("name", [name for name in RECIPES if "mlp" not in name])
def test_scale_changes_only_what_it_must(name):
    small, paper = get_recipe(name, "cifar10"), get_recipe(name)
    how = {"log_every", "eval_every", "eval_examples", "checkpoint_every", "recalibrate_examples", "threads"}
    assert changed(small, paper) - how == {"stem", "image_size", "width", "crops", "steps", "decay_every"}
    # The rate decays after as many epochs, of 1,281,167 and of 50,000 images.
    assert small.decay_every / 50_000 == pytest.approx(paper.decay_every / 1_281_167, rel=0.01)


def test_scale_leaves_the_fully_connected_networks_alone():
    assert get_recipe("bn-mlp", "cifar10") == bn_mlp()
