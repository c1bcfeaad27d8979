"""``batchnorm reproduce CLAIM`` where a claim comes in parts: flags in, table and page out."""

import json

import pytest

from batchnorm.cli import main
from batchnorm.cli.reproduce import CLAIMS

TINY = {
    "divergence": "--rates 1 --steps 3 --bias-steps 2 --bias-examples 20 --activations relu",
    "invariance": "--rates 0.5 --init-stds 0.1 --steps 3 --prior-steps 2 --examples 4 --decades 1",
    "recurrent": "--row-steps 2 --pixel-steps 2 --pixel-side 2 --evaluations 1 --hidden-size 4 --gammas 0.1",
    "jacobian": "--init-stds 0.1 --steps 2 --deep-steps 2 --depth 3 --whole-batch 3 --activations relu",
    "regularization": "--dropouts 0 0.5 --batch-sizes 4 8 --rates 0.1 --examples 16 --held-out 8 --epochs 1",
}


@pytest.mark.parametrize("claim", TINY)
def test_a_claim_runs_from_the_command_line_and_a_second_call_only_reports(claim, tmp_path, capsys):
    out = tmp_path / claim
    arguments = ["reproduce", claim, *TINY[claim].split(), "--seeds", "1", "--processes", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert f"Report: {out / 'report.html'}" in shown.out
    assert (out / "report.html").stat().st_size > 1_000_000
    first = json.loads((out / "result.json").read_text())
    assert main([*arguments, "--out", str(out)]) == 0
    assert "parts are already done" in capsys.readouterr().err
    assert json.loads((out / "result.json").read_text()) == first
    assert main([*arguments, "--seeds", "2", "--out", str(out)]) == 2
    assert "other settings (seeds 1 there, 2 asked)" in capsys.readouterr().err


@pytest.mark.parametrize("claim", TINY)
def test_help_teaches(claim, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["reproduce", claim, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Section" in shown
    assert "--data-dir" in shown
    assert "a second call does only what is missing" in shown


def test_every_claim_is_listed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["reproduce", "--help"])
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown and about in shown for name, (_, about) in CLAIMS.items())
