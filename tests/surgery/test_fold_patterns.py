"""`fold` on every pattern, in random sizes: folded or refused with a reason, never something else."""

import copy

import fold_cases
import pytest
import torch
from fold_cases import FOLDED, LEFT, Sizes
from hypothesis import given, settings
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm.layers.scale_shift import ScaleShift
from batchnorm.surgery.kind import is_normalization

SIZES = st.builds(
    Sizes,
    n=st.integers(1, 3),
    c=st.sampled_from([2, 4, 6]),
    d=st.integers(1, 4),
    h=st.integers(4, 7),
    w=st.integers(4, 7),
)


def folded(case, sizes):
    torch.manual_seed(0)
    model, x, far = fold_cases.made(case, sizes)
    norms = {path for path, m in model.named_modules() if is_normalization(m)}
    before = copy.deepcopy(model.state_dict())
    new, proof = bn.fold(model, x.clone())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        for given_ in (x, far):
            torch.manual_seed(1)
            truth = model(given_.clone())
            torch.manual_seed(1)
            got = new(given_.clone())
            for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (truth, got)), strict=True):
                # Rounding scales with the terms: a large mean may cancel.
                scale = a.abs().max() + 1e4
                assert (a - b).abs().max() <= 1e-13 * scale, proof
    assert {p.norm for p in proof.folds} | {r.where for r in proof.refusals} == norms
    assert not {p.norm for p in proof.folds} & {r.where for r in proof.refusals}
    assert all(p.exact < 1e-13 and p.miss <= p.allowed for p in (*proof.folds, *proof.alone))
    assert all(r.reason for r in proof.refusals)
    return new, proof


@settings(deadline=None, max_examples=4, derandomize=True)
@given(sizes=SIZES)
@pytest.mark.parametrize("case", FOLDED.values(), ids=FOLDED.keys())
def test_folded(case, sizes):
    new, proof = folded(case, sizes)
    assert proof.refusals == ()
    assert not any(is_normalization(m) or isinstance(m, ScaleShift) for m in new.modules())


@settings(deadline=None, max_examples=4, derandomize=True)
@given(sizes=SIZES)
@pytest.mark.parametrize("case", LEFT.values(), ids=LEFT.keys())
def test_left_as_it_computes(case, sizes):
    new, proof = folded(case, sizes)
    # A single channel or a map that is the same everywhere may be folded all the same, and exactly.
    if sizes.d > 1 and proof.folds == ():
        assert len(proof.refusals) == 1
        assert not any(is_normalization(m) for m in new.modules()) or not proof.alone
