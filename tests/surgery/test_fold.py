"""`fold`: equal where it folds, a reason where it does not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from batchnorm import layers
from batchnorm.surgery import absorbing, fold, freeze
from batchnorm.surgery.absorbing import fold_pair


def trained(norm):
    """Statistics, scale and shift as after training, no channel like another."""
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn_like(norm.running_mean) * 2)
        norm.running_var.copy_(torch.rand_like(norm.running_var) * 3 + 0.1)
        if norm.weight is not None:
            norm.weight.copy_(torch.randn_like(norm.weight))
        if norm.bias is not None:
            norm.bias.copy_(torch.randn_like(norm.bias))
    return norm.eval()


def net(forward, **children):
    module = type("Net", (nn.Module,), {"forward": forward})()
    for name, child in children.items():
        setattr(module, name, child)
    return module.eval()


def reasons(proof):
    return {refusal.where: refusal.reason for refusal in proof.refusals}


def conv(*args, **kwargs):
    return nn.Conv2d(3, 4, 3, *args, **kwargs)


FOLDED = {
    "conv1d": (nn.Conv1d(3, 4, 5, stride=2), nn.BatchNorm1d(4), (2, 3, 16)),
    "conv2d": (conv(), nn.BatchNorm2d(4), (2, 3, 7, 9)),
    "conv3d": (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), (2, 3, 4, 5, 6)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4), (3, 5)),
    "no bias": (conv(bias=False), nn.BatchNorm2d(4), (2, 3, 7, 7)),
    "norm without scale and shift": (nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), (3, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (2, 4, 7, 7)),
    "grouped, dilated, strided": (
        nn.Conv2d(4, 6, 3, groups=2, dilation=2, stride=2, padding=3),
        nn.BatchNorm2d(6),
        (2, 4, 9, 9),
    ),
    "same padding": (conv(padding="same"), nn.BatchNorm2d(4), (2, 3, 7, 7)),
    "reflected borders": (conv(padding=2, padding_mode="reflect"), nn.BatchNorm2d(4), (1, 3, 5, 5)),
    "circular borders": (conv(padding=1, padding_mode="circular"), nn.BatchNorm2d(4), (1, 3, 5, 5)),
    "torch fuse: transposed": (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 7, 7)),
    "torch fuse: grouped transposed": (
        nn.ConvTranspose2d(4, 6, 3, 2, groups=2, output_padding=1),
        nn.BatchNorm2d(6),
        (2, 4, 7, 7),
    ),
    "one example": (conv(), nn.BatchNorm2d(4), (1, 3, 3, 3)),
    "one channel": (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), (2, 1, 4, 4)),
    "large eps": (conv(), nn.BatchNorm2d(4, eps=0.1), (2, 3, 7, 7)),
    "ours": (conv(), layers.BatchNorm2d(4), (2, 3, 7, 7)),
    "ours, features last": (nn.Linear(5, 4), layers.BatchNorm1d(4, channel_dim=-1), (2, 4, 5)),
    "synchronized": (conv(), nn.SyncBatchNorm(4), (2, 3, 7, 7)),
}


@pytest.fixture(params=FOLDED.values(), ids=FOLDED.keys())
def pair(request):
    affine, norm, shape = request.param
    return copy.deepcopy(affine), trained(copy.deepcopy(norm)), shape


def test_folded_pair_equals_float64_truth(pair):
    affine, norm, shape = pair
    model = nn.Sequential(affine, norm, nn.ReLU()).eval()
    x = torch.randn(shape)
    new, proof = fold(model, x)
    assert [change.where for change in proof.changes] == ["1"]
    assert type(new[1]) is nn.Identity
    x = torch.randn(shape) * 3 + 1
    # In float64 the fold is exact but for its rounding to float32.
    truth = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(new.double()(x.double()), truth, rtol=0, atol=2e-6 * truth.abs().max().item())
    assert proof.folds[0].exact < 1e-14
    assert proof.folds[0].miss < proof.folds[0].allowed < 1e-5
    assert proof.check < 1e-6


def test_original_is_untouched(pair):
    affine, norm, shape = pair
    model = nn.Sequential(affine, norm).eval()
    before = copy.deepcopy(model.state_dict())
    fold(model, torch.randn(shape))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model[1] is norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_computed_in_float64_and_rounded_once(dtype):
    affine, norm = conv().to(dtype), trained(nn.BatchNorm2d(4))
    folded = fold_pair(affine, norm)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert torch.equal(folded.weight, (affine.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
    assert folded.bias.dtype == dtype
    new, proof = fold(nn.Sequential(affine, norm.to(dtype)).eval(), torch.randn(2, 3, 7, 7, dtype=dtype))
    assert len(proof.folds) == 1
    assert new[0].weight.dtype == dtype


@settings(deadline=None, max_examples=30)
@given(
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    mean=st.floats(-1e3, 1e3),
    log_var=st.floats(-6, 4),
)
def test_any_convolution(groups, kernel, stride, padding, dilation, mean, log_var):
    affine = nn.Conv1d(4, 6, kernel, stride, padding, dilation, groups)
    norm = trained(nn.BatchNorm1d(6))
    norm.running_mean.add_(mean)
    norm.running_var.mul_(10**log_var)
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    model = nn.Sequential(affine, norm).eval()
    new, proof = fold(model, x.float())
    assert len(proof.folds) == 1
    truth = model.double()(x)
    # Terms of the size of mean / deviation cancel in float32 weights.
    terms = truth.abs().max() + 10 ** (-log_var / 2) * (abs(mean) + 10) * 10
    assert (new.double()(x) - truth).abs().max() < 2**-22 * terms


@pytest.mark.parametrize(
    "activation", ["relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "hardswish"]
)
def test_activation_carried_by_a_layer_stays_in_its_place(activation):
    model = nn.Sequential(conv(), trained(layers.BatchNorm2d(4, activation=activation))).eval()
    x = torch.randn(2, 3, 7, 7)
    new, proof = fold(model, x)
    assert type(new[1]).__name__.lower() == activation.replace("_", "").replace("leakyrelu", "leakyrelu")
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)
    assert "folded into 0; nn." in proof.changes[0].what


def test_class_and_forward_of_the_user_stay():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), trained(nn.BatchNorm2d(3))
            self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), trained(nn.BatchNorm2d(3))

        def forward(self, x):
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)

    model, x = Block().eval(), torch.randn(2, 3, 6, 6)
    new, proof = fold(model, x)
    assert type(new) is Block
    assert [(p.affine, p.norm) for p in proof.folds] == [("conv1", "bn1"), ("conv2", "bn2")]
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)


def test_requires_grad_carries_over():
    affine = conv(bias=False).requires_grad_(False)
    new, _ = fold(nn.Sequential(affine, trained(nn.BatchNorm2d(4))).eval(), torch.randn(2, 3, 7, 7))
    assert not new[0].weight.requires_grad
    assert not new[0].bias.requires_grad


# What is refused. Rows of docs: torch's fuse utilities and others fold some of these, wrongly.


def shared_conv():
    """torch.fx's fuse changes the convolution for both callers: error 4.2."""
    return net(
        lambda self, x: self.bn(self.conv(x)) + self.conv(x), conv=conv(), bn=trained(nn.BatchNorm2d(4))
    )


def features_last_by_accident():
    """Linear on (N, L, C) with L == C: the norm is over L, torch's fuse takes it for C: error 2.3."""
    return net(lambda self, x: self.bn(self.fc(x)), fc=nn.Linear(4, 4), bn=trained(nn.BatchNorm1d(4)))


def relu_between():
    """mmcv folds by the order of registration: error 1.4."""
    return net(lambda self, x: self.bn(F.relu(self.conv(x))), conv=conv(), bn=trained(nn.BatchNorm2d(4)))


def output_used_twice():
    return net(
        lambda self, x: (lambda y: self.bn(y) + y)(self.conv(x)), conv=conv(), bn=trained(nn.BatchNorm2d(4))
    )


def norm_twice():
    return net(
        lambda self, x: self.bn(self.a(x)) + self.bn(self.b(x).relu()),
        a=conv(),
        b=conv(),
        bn=trained(nn.BatchNorm2d(4)),
    )


def shared_weight():
    a, b = conv(), conv()
    b.weight = a.weight
    return net(lambda self, x: self.bn(self.a(x)) + self.b(x), a=a, b=b, bn=trained(nn.BatchNorm2d(4)))


def registered_twice():
    a = conv()
    return net(lambda self, x: self.bn(self.a(x)), a=a, again=a, bn=trained(nn.BatchNorm2d(4)))


def weight_read():
    def forward(self, x):
        return self.bn(self.a(x)) + self.a.weight.square().mean()

    return net(forward, a=conv(), bn=trained(nn.BatchNorm2d(4)))


def with_statistics(change):
    norm = trained(nn.BatchNorm2d(4))
    change(norm)
    return nn.Sequential(conv(), norm).eval()


def hooked():
    model = nn.Sequential(conv(), trained(nn.BatchNorm2d(4))).eval()
    model[0].register_forward_hook(lambda m, a, y: y * 2)
    return model


def own_conv():
    cls = type(
        "Standardized", (nn.Conv2d,), {"_conv_forward": lambda self, x, w, b: F.conv2d(x, w - w.mean(), b)}
    )
    return nn.Sequential(cls(3, 4, 3), trained(nn.BatchNorm2d(4))).eval()


def own_norm():
    cls = type("Doubled", (nn.BatchNorm2d,), {"forward": lambda self, x: 2 * nn.BatchNorm2d.forward(self, x)})
    return nn.Sequential(conv(), trained(cls(4))).eval()


def untraceable():
    return net(
        lambda self, x: self.bn(self.conv(x)) if x.sum() < 1e9 else x,
        conv=conv(),
        bn=trained(nn.BatchNorm2d(4)),
    )


IMAGE = (2, 3, 7, 7)
REFUSED = {
    "torch fuse: one convolution, two callers": (shared_conv, IMAGE, "bn", "conv is called 2 times"),
    "torch fuse: linear on (N, L, C) with L == C": (
        features_last_by_accident,
        (3, 4, 4),
        "bn",
        "it normalizes dimension 1 of the output (3, 4, 4) of fc, whose features are in the last",
    ),
    "torch fuse: norm before a padded convolution": (
        lambda: nn.Sequential(trained(nn.BatchNorm2d(3)), conv(padding=1)).eval(),
        IMAGE,
        "0",
        "it follows argument input of the model, not a convolution or linear layer; forward: 1 pads with "
        "zeros, which the map would shift",
    ),
    "mmcv: relu between": (relu_between, IMAGE, "bn", "it follows relu, not a convolution or linear layer"),
    "output used elsewhere": (output_used_twice, IMAGE, "bn", "the output of conv is also used by add"),
    "norm called twice, once behind a nonlinearity": (
        norm_twice,
        IMAGE,
        "bn",
        "it follows relu, not a convolution or linear layer",
    ),
    "weight shared": (shared_weight, IMAGE, "bn", "a shares a parameter with another module"),
    "registered twice": (registered_twice, IMAGE, "bn", "a is registered under 2 names"),
    "weight read by the forward": (
        weight_read,
        IMAGE,
        "bn",
        "the forward uses parameters of a by itself too",
    ),
    "no running statistics": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)).eval(),
        IMAGE,
        "1",
        "it has no running statistics",
    ),
    "negative variance": (
        lambda: with_statistics(lambda n: n.running_var[1].fill_(-1e-6)),
        IMAGE,
        "1",
        "its running variance is negative: recalibrate it first",
    ),
    "parametrized": (
        lambda: nn.Sequential(weight_norm(conv()), trained(nn.BatchNorm2d(4))).eval(),
        IMAGE,
        "1",
        "0 is parametrized",
    ),
    "hooks": (hooked, IMAGE, "1", "0 has hooks, which would see other values"),
    "convolution of one's own": (own_conv, IMAGE, "1", "0 (Standardized) has a forward of its own"),
    "norm of one's own": (own_norm, IMAGE, "1", "Doubled has a forward of its own"),
    "per activation": (
        lambda: nn.Sequential(conv(), trained(layers.BatchNormPerActivation((4, 5, 5)))).eval(),
        IMAGE,
        "1",
        "it has another scale at every location of the values of 0",
    ),
    "unbatched convolution": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 1), trained(nn.BatchNorm1d(5))).eval(),
        (3, 5),
        "1",
        "0 runs without a batch dimension, so that it normalizes a location",
    ),
    "never called": (
        lambda: net(lambda self, x: self.conv(x), conv=conv(), bn=trained(nn.BatchNorm2d(4))),
        IMAGE,
        "bn",
        "it is not called when the example runs",
    ),
    "untraceable": (
        untraceable,
        IMAGE,
        "bn",
        "the model's forward cannot be traced (TraceError: symbolically",
    ),
}


def affine(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(("make", "shape", "where", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(make, shape, where, reason):
    model, x = make(), torch.randn(shape)
    new, proof = fold(model, x)
    assert proof.folds == ()
    assert all("multiply-add" in change.what for change in proof.changes)
    assert reasons(proof).keys() == {where}
    assert reasons(proof)[where].startswith(reason)
    assert all(m.weight.equal(n.weight) for m, n in zip(affine(model), affine(new), strict=True))
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5, equal_nan=True)
    if not proof.changes:
        assert proof.check is None
        assert new(x).equal(model(x))


def test_linear_norm_without_scale_and_shift_where_torch_raises():
    model = nn.Sequential(nn.Linear(5, 4), trained(nn.BatchNorm1d(4, affine=False))).eval()
    x = torch.randn(3, 5)
    new, _ = fold(model, x)
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_refused_pair_does_not_keep_the_others_from_being_folded():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        trained(nn.BatchNorm2d(4)),
        nn.Conv2d(4, 4, 3, padding=1),
        trained(nn.BatchNorm2d(4)),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    new, proof = fold(model, x)
    assert [(p.affine, p.norm) for p in proof.folds] == [("3", "4")]
    assert reasons(proof).keys() == {"2"}
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)


# Proofs.


def forget_eps(norm):
    scale = norm.running_var.double().rsqrt() * norm.weight.double()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def forget_shift(norm):
    scale = (norm.running_var.double() + norm.eps).rsqrt() * norm.weight.double()
    return scale, -norm.running_mean.double() * scale


@pytest.mark.parametrize("mutant", [forget_eps, forget_shift], ids=lambda f: f.__name__)
def test_proof_of_a_pair_catches_a_wrong_fold(monkeypatch, mutant):
    monkeypatch.setattr(absorbing, "line_of", mutant)
    model = nn.Sequential(conv(), trained(nn.BatchNorm2d(4, eps=1e-3))).eval()
    new, proof = fold(model, torch.randn(IMAGE))
    assert proof.folds == ()
    assert reasons(proof)["1"].startswith("undone: folded, it differs by ")
    assert type(new[1]) is nn.BatchNorm2d


def test_proof_of_the_whole_undoes_what_only_the_model_shows():
    """A forward that looks at a layer's class takes another branch once the layer is folded."""

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        y = y if isinstance(self.bn1, nn.BatchNorm2d) else y + 1
        return self.bn2(self.conv2(y))

    model = net(
        forward,
        conv1=nn.Conv2d(3, 4, 1),
        bn1=trained(nn.BatchNorm2d(4)),
        conv2=nn.Conv2d(4, 4, 1),
        bn2=trained(nn.BatchNorm2d(4)),
    )
    x = torch.randn(IMAGE)
    new, proof = fold(model, x)
    assert [p.norm for p in proof.folds] == ["bn2"]
    assert reasons(proof)["bn1"].startswith("undone: with it the model's output differs by")
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)


def test_proof_prints_as_a_table():
    model = nn.Sequential(conv(), trained(nn.BatchNorm2d(4)), nn.ReLU(), trained(nn.BatchNorm2d(4))).eval()
    _, proof = fold(model, torch.randn(IMAGE))
    lines = str(proof).splitlines()
    assert lines[0] == "changed (2)"
    assert lines[1] == "  1  folded into 0; nn.Identity is in its place"
    assert lines[2] == "  3  one multiply-add, batchnorm's ScaleShift, is in its place"
    assert lines[3] == "left alone (1)"
    assert lines[4] == "  3  it follows 2, not a convolution or linear layer"
    assert lines[5].startswith("largest output difference, relative: ")
    assert lines[6] == "proved, differences relative to the terms summed (2)"
    assert lines[7].split() == ["fold", "in", "float64", "own", "dtype", "allowed"]
    assert lines[8].startswith("  0 + 1  ")
    assert lines[9].startswith("  3 alone  ")


# Errors.


def test_training_mode_is_named():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4))
    with pytest.raises(
        ValueError, match=r"the model \(Sequential\) is in training mode: call model.eval\(\) first"
    ):
        fold(model, torch.randn(IMAGE))
    model.eval()[1].train()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm2d\) is in training mode"):
        fold(model, torch.randn(IMAGE))


def test_frozen_layers_fold_like_others():
    model = nn.Sequential(conv(), trained(nn.BatchNorm2d(4))).eval()
    freeze(model)
    x = torch.randn(IMAGE)
    new, proof = fold(model, x)
    assert len(proof.folds) == 1
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)


def test_statistics_that_are_not_finite():
    model = with_statistics(lambda n: n.running_mean[0].fill_(float("inf")))
    with pytest.raises(ValueError, match="output on the example is not finite"):
        fold(model, torch.randn(IMAGE))
    # Where they do not reach the output, the pair alone is refused.
    quiet = net(lambda self, x: self.model(x).nan_to_num(0, 0, 0), model=model)
    _, proof = fold(quiet, torch.randn(IMAGE))
    assert reasons(proof)["model.1"] == "its running statistics are not finite: recalibrate it first"


def test_folded_weights_that_overflow():
    affine, norm = nn.Linear(4, 2, dtype=torch.float16), trained(nn.BatchNorm1d(2, eps=1e-9))
    affine.weight.data.fill_(100)
    norm.running_var.fill_(1e-7)
    norm.weight.data.fill_(1)
    new, proof = fold(nn.Sequential(affine, norm).eval(), torch.randn(3, 4).half() * 1e-3)
    assert reasons(proof)["1"] == "the folded weights overflow torch.float16"
    assert torch.equal(new[0].weight, affine.weight)


def test_model_that_is_a_normalization_itself():
    model = trained(nn.BatchNorm1d(4))
    new, proof = fold(model, torch.randn(3, 4))
    assert reasons(proof)[""].startswith("the model's forward cannot be traced")
    assert type(new) is nn.BatchNorm1d
