"""``batchnorm reproduce``: the paper's claims as experiments."""

import argparse
import importlib

CLAIMS = {
    "divergence": (
        "batchnorm.cli.claims.divergence",
        "section 2: a normalization that the gradient does not see, and where it leads",
    ),
    "invariance": (
        "batchnorm.cli.claims.invariance",
        "section 3.3: the scale of the weights moves neither output nor gradients, and steadies the rate",
    ),
    "jacobian": (
        "batchnorm.cli.claims.jacobian",
        "section 3.3: singular values of layers' Jacobians, and gradients through depth",
    ),
    "regularization": (
        "batchnorm.cli.claims.regularization",
        "section 3.4: whether BN makes dropout unnecessary, at several batch sizes",
    ),
    "activations": (
        "batchnorm.cli.claims.activations",
        "section 4.1, figure 1: accuracy and activations over training, with and without BN",
    ),
    "speedup": (
        "batchnorm.cli.claims.speedup",
        "section 4.2, figures 2 and 3: how many fewer steps a batch-normalized Inception needs",
    ),
    "ensemble": (
        "batchnorm.cli.claims.ensemble",
        "section 4.2.3, figure 4: what many crops and six networks add to one",
    ),
    "adaptation": (
        "batchnorm.cli.claims.adaptation",
        "beyond the paper: networks in other domains, before and after their statistics are adapted",
    ),
    "recurrent": (
        "batchnorm.cli.claims.recurrent",
        "section 5: sequential digits by a batch-normalized LSTM, and gradients through time",
    ),
}
"""Claim to the module that shows it and a line about it; imported only when its claim is called."""

DESCRIPTION = """\
Run an experiment of the paper and put our figures beside its own: numbers as JSON, pictures as
PNG, and a page, report.html, that opens offline. An experiment that was stopped goes on.

claims:
"""

EXAMPLES = """\
examples:
  batchnorm reproduce activations --steps 5000 --seeds 2
  batchnorm reproduce activations --data mnist --out results/activations
  batchnorm reproduce speedup --time 0.05 --seeds 1
  batchnorm reproduce divergence --data mnist --seeds 1 --steps 300
  batchnorm reproduce activations --help
"""


def run(argv: list[str]) -> None:
    """Find the claim and hand it the rest of ``argv``."""
    parser = argparse.ArgumentParser(
        prog="batchnorm reproduce",
        description=DESCRIPTION + "\n".join(f"  {name:14} {about}" for name, (_, about) in CLAIMS.items()),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "claim", choices=CLAIMS, metavar="CLAIM", help="one of the above; it has its own --help"
    )
    claim = parser.parse_args(argv[:1]).claim
    importlib.import_module(CLAIMS[claim][0]).run(argv[1:])
