import errno
import re
import subprocess
import sys
import types
import warnings

import pytest

import batchnorm
from batchnorm.cli import main as main_function
from batchnorm.cli.main import COMMANDS


@pytest.fixture
def command(monkeypatch):
    """Install a command ``probe`` that does what the test says."""

    def install(action):
        module = types.ModuleType("batchnorm.cli.probe")
        module.run = action
        monkeypatch.setitem(sys.modules, "batchnorm.cli.probe", module)
        monkeypatch.setitem(COMMANDS, "probe", ("batchnorm.cli.probe", "a test's own"))

    return install


def fails_with(error):
    def action(argv):
        raise error

    return action


def test_arguments_reach_the_command_untouched(command):
    seen = []
    command(seen.extend)
    assert main_function(["probe", "a", "--help", "--version", "--x=1"]) == 0
    assert seen == ["a", "--help", "--version", "--x=1"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(ValueError("steps must be 1 or more"), "steps must be 1 or more", id="ValueError"),
        pytest.param(TypeError("uint8 needed"), "uint8 needed", id="TypeError"),
        pytest.param(FileNotFoundError("no run here"), "no run here", id="a message of ours"),
        pytest.param(
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"),
            "No such file or directory: /a/b",
            id="the system's message and file",
        ),
        pytest.param(
            OSError(errno.ENOSPC, "No space left: free some"), "No space left: free some", id="full disk"
        ),
        pytest.param(FloatingPointError("diverged"), "diverged", id="divergence"),
        pytest.param(
            ModuleNotFoundError("No module named 'tyro'", name="tyro"),
            'this command needs tyro, which is not installed: pip install "batchnorm[train]"',
            id="missing extra",
        ),
        pytest.param(ValueError(), "ValueError", id="without a message"),
    ],
)
def test_error_of_the_user_is_one_message_and_status_2(command, capsys, error, message):
    command(fails_with(error))
    assert main_function(["probe"]) == 2
    assert capsys.readouterr() == ("", f"batchnorm: error: {message}\n")


@pytest.mark.parametrize("arguments", [["--debug", "probe"], ["probe", "--debug"]], ids=["before", "after"])
def test_debug_shows_where_it_came_from(command, capsys, arguments):
    command(fails_with(ValueError("bad steps")))
    assert main_function(arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "test_main.py" in shown
    assert shown.endswith("batchnorm: error: bad steps\n")


def test_defect_of_ours_keeps_its_traceback(command):
    command(fails_with(KeyError("internal")))
    with pytest.raises(KeyError):
        main_function(["probe"])


@pytest.mark.parametrize("number", [2, 15], ids=["Ctrl-C", "SIGTERM"])
def test_stopped_training_has_the_shells_status(command, capsys, number):
    stop = KeyboardInterrupt("stopped after step 7")
    stop.signal_number = number
    command(fails_with(stop))
    assert main_function(["probe"]) == 128 + number
    assert capsys.readouterr().err == "batchnorm: stopped after step 7\n"


def test_plain_ctrl_c_is_130_too(command):
    command(fails_with(KeyboardInterrupt()))
    assert main_function(["probe"]) == 130


def test_warning_is_one_line_and_the_format_is_put_back(command, capsys):
    usual = warnings.formatwarning

    def action(argv):
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            # pytest records warnings instead of showing them; the format is what we set.
            sys.stderr.write(
                warnings.formatwarning(UserWarning("passing over step-3"), UserWarning, "f.py", 3)
            )

    command(action)
    main_function(["probe"])
    assert capsys.readouterr().err == "batchnorm: warning: passing over step-3\n"
    assert warnings.formatwarning is usual


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param([], "required: COMMAND", id="nothing"),
        pytest.param(
            ["trian"], "choose from train, evaluate|choose from 'train', 'evaluate'", id="unknown command"
        ),
        pytest.param(["--nonsense"], "required: COMMAND|nonsense", id="unknown flag"),
    ],
)
def test_what_cannot_be_understood_fails(capsys, arguments, says):
    with pytest.raises(SystemExit, match="2"):
        main_function(arguments)
    assert re.search(says, capsys.readouterr().err)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main_function(["--version"])
    assert capsys.readouterr().out == f"batchnorm {batchnorm.__version__}\n"


def test_help_lists_every_command_and_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main_function(["--help"])
    shown = capsys.readouterr().out
    for name, (_, about) in COMMANDS.items():
        assert f"{name} " in shown
        assert about in shown
    assert "batchnorm train bn-mlp --data digits" in shown


def test_help_does_not_wait_for_any_command():
    program = (
        "import sys\n"
        "from batchnorm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "loaded = {'tyro', 'rich', 'sklearn', 'batchnorm.cli.train'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_every_command_of_the_table_exists():
    import importlib

    for module, about in COMMANDS.values():
        assert callable(importlib.import_module(module).run)
        assert about
