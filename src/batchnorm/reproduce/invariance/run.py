"""The whole of it: parts, summary, pictures and page; a second call does only what is missing."""

from typing import Any

from batchnorm.reproduce.invariance.experiment import Invariance
from batchnorm.reproduce.invariance.job import names, num_steps, run_part
from batchnorm.reproduce.invariance.page import write_report
from batchnorm.reproduce.invariance.summary import summarize
from batchnorm.reproduce.parts import run_in_parts


def run_experiment(experiment: Invariance) -> dict[str, Any]:
    """Run what is not yet done and return the summary, as `run_in_parts` does."""
    return run_in_parts(
        experiment, names(experiment), run_part, num_steps, summarize, write_report, title="invariance"
    )
