"""A few seconds of the fuzzing that tests/fuzz/fuzz_readers.py does for hours, and all that it ever found."""

from pathlib import Path

import pytest
from fuzz_readers import attempt
from hypothesis import HealthCheck, given, settings
from mutations import damaged
from readers import READERS

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*/*"))


@pytest.mark.parametrize("name", READERS)
def test_well_formed_files_are_read(tmp_path, name):
    """Else the fuzzing would damage what is refused for another reason."""
    for content in READERS[name].seeds():
        path = tmp_path / name
        path.write_bytes(content)
        READERS[name].read(path)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(tmp_path, name):
    reader = READERS[name]

    @settings(
        max_examples=25,
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(reader.seeds()))
    def every(content):
        error = attempt(reader, content, tmp_path)
        assert error is None, repr(error)

    every()


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_fuzzing_found_stays_fixed(tmp_path, path):
    error = attempt(READERS[path.parent.name], path.read_bytes(), tmp_path)
    assert error is None, repr(error)
