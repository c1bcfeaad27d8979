"""The whole of it: parts, summary, pictures and page; a second call does only what is missing."""

from typing import Any

from batchnorm.data import load
from batchnorm.reproduce.adaptation.experiment import Adaptation
from batchnorm.reproduce.adaptation.job import names, num_steps, run_part
from batchnorm.reproduce.adaptation.page import write_report
from batchnorm.reproduce.adaptation.summary import summarize
from batchnorm.reproduce.parts import run_in_parts


def run_experiment(experiment: Adaptation) -> dict[str, Any]:
    """Run what is not yet done and return the summary, as `run_in_parts` does."""
    for source in experiment.sources[1:]:
        # Here, so that a download or its error comes before the work; the first is looked for by the parts.
        load(source, experiment.data_dir)
    return run_in_parts(
        experiment, names(experiment), run_part, num_steps, summarize, write_report, title="adaptation"
    )
