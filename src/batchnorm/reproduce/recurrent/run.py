"""The whole of it: parts, summary, pictures and page; a second call does only what is missing."""

from typing import Any

from batchnorm.reproduce.parts import run_in_parts
from batchnorm.reproduce.recurrent.experiment import Recurrent
from batchnorm.reproduce.recurrent.job import names, num_steps, run_part
from batchnorm.reproduce.recurrent.page import write_report
from batchnorm.reproduce.recurrent.summary import summarize


def run_experiment(experiment: Recurrent) -> dict[str, Any]:
    """Run what is not yet done and return the summary, as `run_in_parts` does."""
    return run_in_parts(
        experiment, names(experiment), run_part, num_steps, summarize, write_report, title="recurrent"
    )
