import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from batchnorm.data import ImageData
from batchnorm.train import bn_mlp, mlp
from batchnorm.train.build import build_model
from batchnorm.train.checkpoint import to_safetensors
from batchnorm.train.run import data_facts, environment, load_model, open_run, read_run

CPU = torch.device("cpu")


def images(seed=0, name="noise"):
    random = np.random.default_rng(seed)
    train, test = (random.integers(0, 256, (n, 3, 4), dtype=np.uint8) for n in (6, 2))
    return ImageData(name, train, np.arange(6), test, np.arange(2), tuple("abcdef"))


DATA = data_facts(images(), mlp())


def start(folder, recipe=None, data=None):
    with open_run(folder, recipe or mlp(), data or images(), CPU):
        pass


def test_new_folder_is_made_and_says_what_it_is(tmp_path):
    folder = tmp_path / "deep" / "run"
    start(folder, bn_mlp())
    assert read_run(folder) == (bn_mlp(), data_facts(images(), mlp()))
    assert json.loads((folder / "environment.json").read_text()) == environment(CPU)
    assert sorted(p.name for p in folder.iterdir()) == ["environment.json", "recipe.json", "run.lock"]


def test_environment_has_what_bits_depend_on():
    facts = environment(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu_capability"]
    assert all(facts.values())


def test_other_recipe_is_refused_by_the_fields_that_differ(tmp_path):
    start(tmp_path / "run")
    before = (tmp_path / "run" / "recipe.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"steps \(asked for 7, there 50000\), seed \(asked for 3, there 0\)\. Give"
    ) as e:
        start(tmp_path / "run", replace(mlp(), seed=3, steps=7))
    assert "learning_rate" not in str(e.value)
    assert (tmp_path / "run" / "recipe.json").read_bytes() == before


def test_other_data_are_refused(tmp_path):
    start(tmp_path / "run")
    with pytest.raises(ValueError, match=r"data name \(asked for 'snow', there 'noise'\)"):
        start(tmp_path / "run", data=images(name="snow"))
    changed = images()
    changed.test_images[1, 2, 3] ^= 1
    with pytest.raises(ValueError, match="data sha256"):
        start(tmp_path / "run", data=changed)


def test_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis\.tex but no recipe\.json, so it is not a run"):
        start(tmp_path)
    assert not (tmp_path / "recipe.json").exists()


def test_leftover_of_a_kill_during_the_first_write_is_no_obstacle(tmp_path):
    (tmp_path / ".recipe.json.partial").write_bytes(b'{"for')
    (tmp_path / "run.lock").write_text("pid 1\n")
    start(tmp_path)
    assert read_run(tmp_path)[0] == mlp()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("", "Expecting value", id="empty"),
        pytest.param("{", "Expecting", id="cut off"),
        pytest.param("[]", "an object with format, recipe and data", id="a list"),
        pytest.param('{"format": 1, "recipe": {}}', "an object with format", id="no data"),
        pytest.param('{"format": 2, "recipe": {}, "data": {}}', "format is 2", id="of a later format"),
        pytest.param(
            '{"format": 1, "recipe": {"model": "mlp"}, "data": DATA}'.replace("DATA", json.dumps(DATA)),
            "lacks activation",
            id="no fields",
        ),
        pytest.param(
            json.dumps({"format": 1, "recipe": mlp().to_json() | {"dropout": 0.4}, "data": DATA}),
            "does not know: dropout",
            id="an extra field",
        ),
        pytest.param(
            json.dumps({"format": 1, "recipe": mlp().to_json() | {"model": "resnet"}, "data": DATA}),
            "model is 'resnet'; this version knows mlp, inception",
            id="an unknown model",
        ),
        pytest.param(
            json.dumps({"format": 1, "recipe": mlp().to_json(), "data": {"name": "digits"}}),
            "data one with image_shape, name, num_test, num_train, sha256",
            id="facts about the data missing",
        ),
        pytest.param(
            '{"format": 1, "recipe": [1], "data": {}}', "recipe must be an object", id="a list for a recipe"
        ),
    ],
)
def test_damaged_recipe_is_named(tmp_path, content, says):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=rf"recipe\.json cannot be used: .*{says}"):
        read_run(tmp_path)


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent is not a run: it has no recipe\.json"):
        read_run(tmp_path / "absent")


def test_second_process_is_refused_and_told_who_is_there(tmp_path):
    program = (
        "import fcntl, sys\n"
        f"file = open({str(tmp_path / 'run.lock')!r}, 'r')\n"
        "try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(17)\n"
    )
    with open_run(tmp_path, mlp(), images(), CPU):
        assert subprocess.run([sys.executable, "-c", program]).returncode == 17
        # The same in this process: a lock belongs to one opening of the file.
        with pytest.raises(BlockingIOError, match=rf"pid {os.getpid()}.*is training in .*another folder"):
            start(tmp_path)
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    start(tmp_path)


def test_lock_ends_with_an_error_too(tmp_path):
    def fail():
        with open_run(tmp_path, mlp(), images(), CPU):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="middle"):
        fail()
    start(tmp_path)


def test_changed_environment_is_a_warning_that_says_what(tmp_path):
    start(tmp_path)
    path = tmp_path / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 99}))
    with pytest.warns(UserWarning, match=rf"threads 99 → {torch.get_num_threads()}\)"):
        start(tmp_path)
    start(tmp_path)
    path.write_text("{")
    start(tmp_path)
    assert json.loads(path.read_text()) == environment(CPU)


def write_model(folder, model):
    (folder / "model.safetensors").write_bytes(to_safetensors(model.state_dict()))


def test_model_is_loaded_or_refused_by_name(tmp_path):
    recipe = replace(mlp(), hidden=(5,))
    model, other = (build_model(replace(recipe, seed=seed), (3, 4), 6) for seed in (0, 1))
    with pytest.raises(FileNotFoundError, match="is not finished"):
        load_model(tmp_path, model)
    write_model(tmp_path, other)
    load_model(tmp_path, model)
    assert all(p.equal(q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the network"):
        load_model(tmp_path, build_model(mlp(), (3, 4), 6))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*Delete it"):
        load_model(tmp_path, model)
