"""What today's folding tools get wrong, each run beside ours: theirs misses, ours is exact or refuses.

The rows of measured defects: PyTorch's ``fuse_conv_bn_eval`` and `torch.fx`'s ``fuse``, mmcv's
``fuse_conv_bn``, which goes by the order of registration, and ultralytics' ConvTranspose before 2026-07.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from fold_cases import Net, norm1, norm2
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import batchnorm as bn


def miss(model, other, x):
    """The largest difference of the outputs, relative to the largest output."""
    with torch.no_grad():
        truth = model.double().eval()(x.double())
        return ((other.double()(x.double()) - truth).abs().max() / truth.abs().max()).item()


def images(channels=4):
    return torch.randn(2, channels, 7, 6)


class TwoCallers(nn.Module):
    """One convolution, normalized in one of its two calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm2(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x.flip(-1))


def test_torch_fx_folds_a_convolution_with_two_callers_wrong_and_ours_leaves_it():
    model, x = TwoCallers().eval(), images()
    theirs = fuse(copy.deepcopy(model))
    new, proof = bn.fold(model, x)
    assert miss(model, theirs, x) > 0.1
    assert miss(model, new, x) < 1e-7
    assert "conv is called 2 times" in proof.refusals[0].reason


def test_linear_with_features_last_of_equal_length_is_wrong_in_torch_and_right_in_ours():
    """(N, L, C) with L == C: torch's layer normalizes dimension 1, its folding the features."""
    model = nn.Sequential(nn.Linear(5, 5), norm1(5)).eval()
    x = torch.randn(3, 5, 5)
    theirs = fuse_linear_bn_eval(copy.deepcopy(model[0]), copy.deepcopy(model[1]))
    new, proof = bn.fold(model, x)
    assert miss(model, theirs, x) > 0.1
    assert miss(model, new, x) < 1e-6
    assert not proof.folds
    assert proof.refusals


def test_linear_whose_normalization_is_on_the_features_is_folded():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5)).eval()
    model.append(bn.BatchNorm1d(5, channel_dim=-1).eval())
    model[-1].running_mean.normal_()
    x = torch.randn(3, 5, 4)
    new, proof = bn.fold(model, x)
    assert len(proof.folds) == 1
    assert miss(model, new, x) < 1e-6


def test_transposed_convolution_with_the_flag_forgotten_is_wrong_in_torch():
    model, x = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, 2), norm2(4)).eval(), images()
    theirs = fuse_conv_bn_eval(copy.deepcopy(model[0]), copy.deepcopy(model[1]))
    new, proof = bn.fold(model, x)
    assert miss(model, theirs, x) > 0.1
    assert miss(model, new, x) < 1e-6
    assert len(proof.folds) == 1


def test_grouped_transposed_convolution_fails_in_torch_and_is_folded_by_ours():
    model, x = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), norm2(6)).eval(), images()
    with pytest.raises(RuntimeError):
        fuse_conv_bn_eval(copy.deepcopy(model[0]), copy.deepcopy(model[1]), transpose=True)(x)
    new, proof = bn.fold(model, x)
    assert miss(model, new, x) < 1e-6
    assert len(proof.folds) == 1


def test_linear_without_scale_and_shift_raises_in_torch_and_is_folded_by_ours():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False)).eval()
    model[1].running_mean.normal_()
    with pytest.raises((AttributeError, TypeError, AssertionError)):
        fuse_linear_bn_eval(copy.deepcopy(model[0]), copy.deepcopy(model[1]))
    new, proof = bn.fold(model, torch.randn(3, 4))
    assert miss(model, new, torch.randn(3, 4)) < 1e-6
    assert len(proof.folds) == 1


def test_normalization_before_a_convolution_is_skipped_by_torch_and_folded_by_ours():
    model, x = nn.Sequential(nn.ReLU(), norm2(4), nn.Conv2d(4, 5, 3)).eval(), images()
    theirs = fuse(copy.deepcopy(model))
    new, proof = bn.fold(model, x)
    assert any(isinstance(m, nn.BatchNorm2d) for m in theirs.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in new.modules())
    assert len(proof.folds) == 1
    assert miss(model, new, x) < 1e-6


def test_normalization_before_a_padded_convolution_is_not_folded_as_the_border_sees_zeros():
    model, x = nn.Sequential(nn.ReLU(), norm2(4), nn.Conv2d(4, 5, 3, padding=1)).eval(), images()
    new, proof = bn.fold(model, x)
    naive = copy.deepcopy(model[2])
    scale = model[1].weight * (model[1].running_var + model[1].eps).rsqrt()
    shift = model[1].bias - model[1].running_mean * scale
    with torch.no_grad():
        naive.bias += (naive.weight.sum((2, 3)) * shift).sum(1)
        naive.weight *= scale[:, None, None]
    assert miss(model, nn.Sequential(nn.ReLU(), naive), x) > 0.05
    assert miss(model, new, x) < 1e-6
    assert "pads with zeros, which the map would shift" in proof.refusals[0].reason


def by_registration(model):
    """Folds as a tool that goes by the order of registration does."""
    last = None
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d) and last is not None:
            setattr(model, last, fuse_conv_bn_eval(getattr(model, last), child))
            setattr(model, name, nn.Identity())
            last = None
        elif isinstance(child, nn.Conv2d):
            last = name
    return model


def test_convolution_relu_normalization_goes_by_the_graph_and_not_by_registration():
    model, x = (
        Net(lambda m, x: m.norm(F.relu(m.conv(x))), conv=nn.Conv2d(4, 4, 3), norm=norm2(4)).eval(),
        images(),
    )
    new, proof = bn.fold(model, x)
    assert miss(model, by_registration(copy.deepcopy(model)), x) > 0.05
    assert miss(model, new, x) < 1e-6
    assert not proof.folds


def test_registered_beside_each_other_but_called_crosswise():
    """Each convolution is folded with the normalization that follows it, not with its neighbour."""
    model = Net(
        lambda m, x: m.norm1(m.conv2(F.relu(m.norm2(m.conv1(x))))),
        **{"conv1": nn.Conv2d(4, 4, 3), "norm1": norm2(4), "conv2": nn.Conv2d(4, 4, 3), "norm2": norm2(4)},
    ).eval()
    x = images()
    new, proof = bn.fold(model, x)
    assert miss(model, by_registration(copy.deepcopy(model)), x) > 0.05
    assert miss(model, new, x) < 1e-6
    assert len(proof.folds) == 2
