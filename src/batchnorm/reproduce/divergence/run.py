"""The whole of it: parts, summary, pictures and page; a second call does only what is missing."""

from typing import Any

from batchnorm.files import write_json
from batchnorm.reproduce.divergence.experiment import Divergence
from batchnorm.reproduce.divergence.job import names, num_steps, run_part
from batchnorm.reproduce.divergence.page import write_report
from batchnorm.reproduce.divergence.summary import summarize
from batchnorm.reproduce.parts import do_parts, footer, science


def run_experiment(experiment: Divergence) -> dict[str, Any]:
    """Run what is not yet done and return the summary, which also stands in ``result.json``.

    Raises:
        ValueError: The folder holds an experiment with other settings.
        FileNotFoundError, ConnectionError: The data are not to be had.
        OSError: The folder cannot be written; parts that were done stay done.
    """
    parts = names(experiment)
    settings = science(experiment)
    found = do_parts(
        experiment.out,
        settings,
        parts,
        run_part,
        source=experiment.data,
        data_dir=experiment.data_dir,
        num_steps=lambda name: num_steps(experiment, name),
        processes=experiment.processes,
        title="divergence",
    )
    summary = summarize(experiment, found)
    write_json(experiment.out / "result.json", summary)
    write_report(summary, experiment.out, footer(settings, experiment.processes, len(parts)))
    return summary
