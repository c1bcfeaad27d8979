"""Damage files without end and see that no reader fails in another way than it declares.

python tests/fuzz/fuzz_readers.py --seconds 3600     goes on where the last run stopped; see fuzz-log.json
"""

import argparse
import faulthandler
import hashlib
import json
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutations import damaged
from readers import READERS, Reader

HERE = Path(__file__).parent
CASES = 500
"""Of a round, which is a function of its number."""
SPARE_BYTES = 1 << 30
"""That a reader may take for a damaged file, beyond what the process has."""
SLOW_S = 10.0


class Slow(Exception):
    """A reader took too long."""


def attempt(reader: Reader, content: bytes, folder: Path) -> BaseException | None:
    """What a reader did with a file that it should not have done; None if it read or refused it."""
    path = folder / reader.name
    path.write_bytes(content)
    # Of this process alone: on a busy machine the clock on the wall would blame the reader.
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(path)
    except reader.errors:
        pass
    except (Exception, MemoryError) as error:
        return error
    taken = time.process_time() - start
    return Slow(f"{taken:.1f} seconds") if taken > SLOW_S else None


def run_round(reader: Reader, number: int, corpus: Path) -> tuple[int, str]:
    """One round: cases, and the crash that it ended with, if any, whose file is kept in the corpus."""
    cases, last = 0, [b"", ""]

    @seed(number)
    @settings(
        max_examples=CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(damaged(reader.seeds()))
    def every(content):
        nonlocal cases
        cases += 1
        with tempfile.TemporaryDirectory() as folder:
            error = attempt(reader, content, Path(folder))
        if error is not None:
            where = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
            at = f" at {Path(where.filename).name}:{where.lineno}" if where else ""
            last[:] = [content, f"{type(error).__name__}: {str(error)[:200]}{at}"]
            raise AssertionError(last[1])

    try:
        every()
    except AssertionError:
        kept = corpus / reader.name / hashlib.sha256(last[0]).hexdigest()[:12]
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(last[0])
        return cases, last[1]
    return cases, ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after this time")
    parser.add_argument("--readers", nargs="*", default=sorted(READERS), choices=sorted(READERS))
    parser.add_argument("--log", type=Path, default=HERE / "fuzz-log.json")
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus")
    options = parser.parse_args()
    faulthandler.enable()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    log = json.loads(options.log.read_text()) if options.log.exists() else {}
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        for name in options.readers:
            entry = log.setdefault(name, {"rounds": 0, "cases": 0, "seconds": 0.0, "crashes": []})
            start = time.monotonic()
            cases, crash = run_round(READERS[name], entry["rounds"], options.corpus)
            entry["rounds"] += 1
            entry["cases"] += cases
            entry["seconds"] = round(entry["seconds"] + time.monotonic() - start, 1)
            if crash and crash not in entry["crashes"]:
                entry["crashes"].append(crash)
                print(f"{name}: {crash}", flush=True)
            options.log.write_text(json.dumps(log, indent=1) + "\n")
            if time.monotonic() >= end:
                break
    total = sum(entry["cases"] for entry in log.values())
    print(f"{total:,} cases, {sum(len(entry['crashes']) for entry in log.values())} kinds of crash")


if __name__ == "__main__":
    main()
