"""What every test can count on: fresh memory holds NaN, results repeat, real data are found or skipped."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _same_world():
    """A fixed seed, one thread, and uninitialized memory full of NaN, so that reading it shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    if "torch._dynamo" in sys.modules:
        # It compiles one function no more than eight times, whichever tests had it compiled before.
        torch.compiler.reset()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with MNIST as published: $BATCHNORM_DATA, or shared/data beside the repository."""
    for folder in (os.environ.get("BATCHNORM_DATA"), ROOT.parent / "shared" / "data"):
        if folder and (Path(folder) / "mnist").is_dir():
            return Path(folder)
    pytest.skip("no MNIST on this machine: set BATCHNORM_DATA to a folder that holds mnist/")


@pytest.fixture
def browser(chromium):
    """Headless Chromium, which logs its console and its requests, with nothing logged yet."""
    for log in ("browser", "performance"):
        chromium.get_log(log)
    return chromium


@pytest.fixture(scope="session")
def chromium():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --window-size=1000,2600"
    for flag in flags.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as driven:
        yield driven
