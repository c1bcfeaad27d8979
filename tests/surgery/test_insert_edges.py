"""`insert` where models are awkward: it does the right thing, or says why it does not."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from batchnorm.layers import BatchNorm1d, BatchNorm2d
from batchnorm.surgery import fold, insert


def net(forward, **layers):
    """A module with the given layers whose class has the given forward."""
    cls = type("Net", (nn.Module,), {"forward": forward})
    module = cls()
    for name, layer in layers.items():
        setattr(module, name, layer)
    return module


def lines(items):
    return {item.where: getattr(item, "what", None) or item.reason for item in items}


X = torch.randn(6, 4)


def linear():
    return nn.Linear(4, 4)


# What is left alone, and why.

LEFT_ALONE = {
    "no affine layer": (
        nn.Sequential(nn.ReLU()),
        "0",
        "no affine layer before it: its input comes from argument input of the model",
    ),
    "two nonlinearities in a row": (
        nn.Sequential(nn.LayerNorm(4), nn.ReLU(), nn.Sigmoid()),
        "2",
        "no affine layer before it: its input comes from 1",
    ),
    "layer norm between": (
        nn.Sequential(linear(), nn.LayerNorm(4), nn.ReLU()),
        "2",
        "already normalized by 1",
    ),
    "function of norm between": (
        net(lambda self, x: F.relu(F.layer_norm(self.fc(x), (4,))), fc=linear()),
        "relu",
        "already normalized by layer_norm",
    ),
    "norm of one's own between": (
        nn.Sequential(
            linear(), type("MyRMSNorm", (nn.Module,), {"forward": lambda self, x: x * 1.5})(), nn.ReLU()
        ),
        "2",
        "already normalized by 1",
    ),
    "chunked": (
        net(lambda self, x: torch.sigmoid(self.fc(x).chunk(2, 1)[0]), fc=linear()),
        "sigmoid",
        "no affine layer before it: its input comes from getitem",
    ),
    "residual stream": (
        net(lambda self, x: (lambda y: F.relu(y + y.abs()))(self.fc(x)), fc=linear()),
        "relu",
        "no affine layer before it",
    ),
    "in place, input used again": (
        net(lambda self, x: (lambda y: F.relu_(y) + y)(self.fc(x)), fc=linear()),
        "relu_",
        "it works in place, and the value it overwrites is used again: use its result instead",
    ),
    "noise fixed by tracing": (
        net(lambda self, x: F.relu(self.fc(x)) + torch.randn(4), fc=linear()),
        "relu",
        "the forward of the model would have to be rewritten, but its forward makes a tensor of its own that",
    ),
    "never reached": (
        net(lambda self, x: self.fc(x), fc=linear(), act=nn.ReLU()),
        "act",
        "the example does not reach it",
    ),
    "transformer layer": (
        nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
        "0",
        "nn.TransformerEncoderLayer is one layer of torch's and is left whole",
    ),
    "hooks inside what would be inlined": (
        None,
        "block.act",
        "the forward of the model would have to be rewritten, but block has hooks",
    ),
}


@pytest.mark.parametrize(("model", "where", "reason"), LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_left_alone(model, where, reason):
    if model is None:
        block = nn.Sequential(linear())
        block.act = nn.ReLU()
        block = net(lambda self, x: self.act(self.fc(x)), fc=linear(), act=nn.ReLU())
        block.register_forward_hook(lambda *_: None)
        model = net(lambda self, x: self.block(self.block(x)), block=block)
    x = X if where != "0" or not isinstance(model[0], nn.TransformerEncoderLayer) else torch.randn(2, 3, 4)
    new, report = insert(model, x)
    assert report.changes == ()
    assert report.check is None
    assert lines(report.refusals)[where].startswith(reason)
    torch.manual_seed(0)
    expected = model.eval()(x)
    torch.manual_seed(0)
    assert torch.equal(new.eval()(x), expected)


# What is understood.


def test_activation_made_inside_forward():
    new, report = insert(net(lambda self, x: nn.ReLU()(self.fc(x)), fc=linear()), X)
    assert lines(report.changes)["fc_bn"] == "BatchNorm1d(4) on fc, before relu"
    assert (new(X) >= 0).all()


def test_auxiliary_head_of_training_gets_layers_too():
    def forward(self, x):
        y = self.act(self.fc(x))
        return (y, self.aux(y)) if self.training else y

    aux = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    new, report = insert(net(forward, fc=linear(), act=nn.ReLU(), aux=aux), X)
    assert {"act.bn", "aux.1_bn"} <= lines(report.changes).keys()
    assert len(new.train()(X)) == 2


def test_arguments_that_are_no_tensors_are_kept_or_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = linear()

        def forward(self, x, mask=None, *, double=False):
            x = F.relu(self.fc(x))
            x = x if mask is None else x * mask
            return x * 2 if double else x

    new, _ = insert(Scaled(), X)
    x = torch.randn(6, 4)
    torch.testing.assert_close(new(x), new(x, None, double=False))
    with pytest.raises(ValueError, match="argument double is True, but this forward was traced with False"):
        new(x, double=True)
    with pytest.raises(ValueError, match="argument mask"):
        new(x, torch.ones(4))
    masked, _ = insert(Scaled(), (X, torch.tensor([1.0, 0, 0, 0])))
    assert (masked(x, torch.tensor([0.0, 0, 0, 1]))[:, :3] == 0).all()


def test_lists_and_dicts_of_tensors():
    def inner(self, features, more):
        a, b = features
        return F.relu(self.fc(a + b)) + more["c"]

    def outer(self, x):
        return self.inner([x, x * 2], {"c": x})

    block = net(inner, fc=linear())
    block.__class__.__name__ = "Inner"
    new, report = insert(net(outer, inner=block), X)
    assert lines(report.changes)["inner.fc_bn"] == "BatchNorm1d(4) on inner.fc, before relu in inner"
    expected = F.relu(F.batch_norm(F.linear(3 * X, new.inner.fc.weight), None, None, training=True)) + X
    torch.testing.assert_close(new.train()(X), expected)


def test_several_inputs_as_star_arguments():
    new, _ = insert(net(lambda self, *xs: F.relu(self.fc(sum(xs))), fc=linear()), (X, X, X))
    torch.testing.assert_close(new.eval()(X, X, X), new(X * 3, X * 0, X * 0))


def test_constants_of_a_forward_come_along():
    new, _ = insert(net(lambda self, x: F.relu(self.fc(x)) * torch.tensor([1.0, 2, 3, 4]), fc=linear()), X)
    again, report = insert(new, X)
    assert lines(report.refusals)["relu"] == "already normalized by fc_bn"
    torch.testing.assert_close(again.eval()(X), new.eval()(X))
    assert not any("constant" in name for name in new.state_dict())


def test_inherited_forward_with_super():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = linear()

        def forward(self, x):
            return self.fc(x)

    class Derived(Base):
        def forward(self, x):
            return F.relu(super().forward(x))

    new, report = insert(Derived(), X)
    assert "fc_bn" in lines(report.changes)
    assert isinstance(new, Derived)
    assert type(new).__name__ == "Derived"


def test_hooks_of_a_rewritten_module_still_run():
    model = net(lambda self, x: F.relu(self.fc(x)), fc=linear())
    model.register_forward_hook(lambda m, args, y: y + 100)
    new, _ = insert(model, X)
    assert (new(X) >= 100).all()


def test_block_inlined_in_its_caller_keeps_its_mode():
    """Dropout written as a function in a block called twice follows the block's mode, not the caller's."""
    block = net(lambda self, x: F.dropout(F.relu(self.fc(x)), 0.5, self.training), fc=linear())
    new, _ = insert(net(lambda self, x: self.block(self.block(x)), block=block), X)
    new.train()
    new.block.eval()
    for layer in (new.block_fc_bn, new.block_fc_bn_2):
        layer.eval()
    assert torch.equal(new(X), new(X))
    new.block.train()
    assert not torch.equal(new(X), new(X))


def test_tied_modules_and_parameters_stay_tied():
    shared = linear()
    model = nn.Sequential(linear(), nn.ReLU(), linear(), nn.ReLU(), shared, nn.Tanh(), shared)
    model[2].weight = model[0].weight
    model[2].bias = model[0].bias
    new, report = insert(model, X)
    modules = dict(new.named_children())
    assert modules["0"].weight is modules["2"].weight
    assert modules["4"] is modules["6"] if "6" in modules else new[-1] is modules["4"]
    refused = lines(report.refusals)
    assert refused["0.bias"] == refused["2.bias"] == "kept: another layer uses the same parameter"
    assert refused["4.bias"] == "kept: its output is also returned"


BIASES = {
    "used elsewhere too": (
        net(lambda self, x: (lambda y: F.relu(y) + y)(self.fc(x)), fc=linear()),
        "kept: its output goes into add as it is",
    ),
    "forward of its own": (
        nn.Sequential(
            type(
                "Standardized", (nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight, self.bias)}
            )(4, 4),
            nn.ReLU(),
        ),
        "kept: Standardized has a forward of its own",
    ),
    "read by the forward": (
        net(lambda self, x: F.relu(self.fc(x)) + self.fc.bias, fc=linear()),
        "kept: the forward uses it by itself too",
    ),
    "average pooling between": (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.AvgPool2d(2), nn.ReLU()),
        "kept: its output goes into 1 as it is",
    ),
}


@pytest.mark.parametrize(("model", "reason"), BIASES.values(), ids=BIASES.keys())
def test_bias_that_is_not_provably_dead_stays(model, reason):
    x = (
        X
        if not isinstance(model, nn.Sequential) or isinstance(model[0], nn.Linear)
        else torch.randn(2, 1, 8, 8)
    )
    new, report = insert(model, x)
    path = "fc" if hasattr(model, "fc") else "0"
    assert lines(report.refusals) == {f"{path}.bias": reason}
    assert torch.equal(new.get_submodule(path).bias, model.get_submodule(path).bias)


def test_bias_behind_max_pooling_goes():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU())
    new, report = insert(model, torch.randn(2, 1, 8, 8))
    assert lines(report.changes).keys() == {"2_bn", "0.bias"}
    assert new[0].bias is None


def test_parametrized_layer_loses_its_bias_and_keeps_its_parametrization():
    new, report = insert(nn.Sequential(weight_norm(linear()), nn.ReLU()), X)
    assert "0.bias" in lines(report.changes)
    assert hasattr(new[0], "parametrizations")


RESHAPES = {
    "view": (lambda self, x: F.relu(self.conv(x).view(2, -1)), "view"),
    "flatten": (lambda self, x: F.relu(torch.flatten(self.conv(x), 1)), "flatten"),
    "permute": (lambda self, x: F.relu(self.conv(x).permute(0, 2, 3, 1)), "permute"),
    "pooling, then flatten": (
        lambda self, x: F.relu(F.adaptive_avg_pool2d(self.conv(x), 1).flatten(1)),
        "flatten",
    ),
}


@pytest.mark.parametrize(("forward", "name"), RESHAPES.values(), ids=RESHAPES.keys())
def test_goes_before_a_reshape_where_channels_are_known(forward, name):
    new, report = insert(net(forward, conv=nn.Conv2d(1, 5, 3)), torch.randn(2, 1, 6, 6))
    assert lines(report.changes)["conv_bn"] == f"BatchNorm2d(5) on conv, before {name}, for relu"
    assert isinstance(new.conv_bn, BatchNorm2d)


def test_pooling_over_features_that_sit_last_counts_as_a_reshape():
    model = nn.Sequential(nn.Linear(4, 6), nn.MaxPool1d(2), nn.ReLU())
    new, report = insert(model, torch.randn(3, 5, 4))
    assert lines(report.changes)["1_bn"] == "BatchNorm1d(6, channel_dim=-1) on 0, before 1, for 2"
    assert new[1].num_features == 6


def test_branch_that_ends_in_a_sequential_keeps_its_owner_s_forward():
    def forward(self, x):
        return self.act(self.branch(x) + x)

    model = net(forward, branch=nn.Sequential(linear(), nn.ReLU(), linear()), act=nn.ReLU())
    new, report = insert(model, X)
    assert lines(report.changes)["branch.2_bn"] == "BatchNorm1d(4) on branch.2, before the add, for act"
    assert type(new) is type(model)
    assert [name for name, _ in new.branch.named_children()] == ["0", "1_bn", "1", "2", "2_bn"]


def test_sum_of_three_branches():
    def forward(self, x):
        return F.relu(self.a(x) + self.b(x) + self.c(x))

    _, report = insert(net(forward, a=linear(), b=linear(), c=linear()), X)
    assert {"a_bn", "b_bn", "c_bn", "a.bias", "b.bias", "c.bias"} == lines(report.changes).keys()


def test_identity_branch_is_untouched_though_a_convolution_made_it():
    def forward(self, x):
        y = self.stem(x)
        return F.relu(y + self.fc(F.relu(y)))

    _, report = insert(net(forward, stem=linear(), fc=linear()), X)
    assert lines(report.changes)["stem_bn"] == "BatchNorm1d(4) on stem, before relu"
    assert lines(report.changes)["fc_bn"] == "BatchNorm1d(4) on fc, before the add, for relu"
    assert lines(report.refusals)["stem.bias"] == "kept: its output goes into add as it is"


def test_hard_swish_by_hand():
    def forward(self, x):
        y = self.fc(x)
        return y * F.relu6(y + 3) / 6

    new, report = insert(net(forward, fc=linear()), X)
    assert lines(report.changes)["fc_bn"] == "BatchNorm1d(4) on fc, before the product x·g(x), for relu6"
    normalized = F.batch_norm(F.linear(X, new.fc.weight), None, None, training=True)
    torch.testing.assert_close(new.train()(X), F.hardswish(normalized))


# After instead of before.


def test_after():
    model = nn.Sequential(linear(), nn.ReLU(), linear(), nn.Tanh(), nn.Linear(4, 2))
    new, report = insert(model, X, before="tanh", after=nn.ReLU)
    assert lines(report.changes) == {
        "1_bn": "BatchNorm1d(4) on 0, after 1",
        "3_bn": "BatchNorm1d(4) on 2, before 3",
        "2.bias": "removed: the normalization subtracts it, β takes its role",
    }
    assert [name for name, _ in new.named_children()] == ["0", "1", "1_bn", "2", "3_bn", "3", "4"]


def test_after_alone_leaves_the_others_without():
    def forward(self, x):
        y = F.relu(self.a(x))
        return torch.tanh(self.b(y)) + y

    new, report = insert(net(forward, a=linear(), b=linear()), X, after="relu")
    assert lines(report.changes) == {"a_bn": "BatchNorm1d(4) on a, after relu"}
    y = F.batch_norm(F.relu(new.a(X)), None, None, training=True)
    torch.testing.assert_close(new.train()(X), torch.tanh(new.b(y)) + y)


def test_after_as_a_module():
    def forward(self, x):
        return self.act(self.fc(x)) * 3

    new, report = insert(net(forward, fc=linear(), act=nn.ReLU()), X, after="all")
    assert lines(report.changes) == {"act.bn": "BatchNorm1d(4) on fc, after act"}
    assert [name for name, _ in new.act.named_children()] == ["act", "bn"]


def test_after_a_reshape_is_refused():
    model = net(lambda self, x: F.relu(self.fc(x).view(3, 8)), fc=linear())
    _, report = insert(model, X, after="relu")
    assert lines(report.refusals)["relu"].startswith("a reshape hides")


# Other steps in training.


class Variational(nn.Module):
    """Samples in training only, and has a head that only training uses."""

    def __init__(self):
        super().__init__()
        self.enc, self.mu, self.log_var = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.dec, self.out, self.aux = nn.Linear(2, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x):
        h = F.relu(self.enc(x))
        z = self.mu(h)
        if self.training:
            z = z + torch.randn_like(z) * torch.exp(0.5 * self.log_var(h))
        y = self.out(F.relu(self.dec(z)))
        return (y, torch.tanh(self.aux(h))) if self.training else y


def test_a_forward_with_other_steps_in_training_gets_a_graph_for_each_mode():
    new, report = insert(Variational(), X)
    layers = {"enc_bn": "enc, before relu", "dec_bn": "dec, before relu", "aux_bn": "aux, before tanh"}
    widths = {"enc_bn": 8, "dec_bn": 8, "aux_bn": 3}
    changes = lines(report.changes)
    assert {w: c for w, c in changes.items() if "bias" not in w} == {
        name: f"BatchNorm1d({widths[name]}) on {what}" for name, what in layers.items()
    }
    x = torch.randn(32, 4)
    y, aux = new.train()(x)
    assert aux.shape == (32, 3)
    assert not torch.equal(y, new(x)[0])
    new.eval()
    h = F.relu(new.enc_bn(new.enc(x)))
    torch.testing.assert_close(new(x), new.out(F.relu(new.dec_bn(new.dec(new.mu(h))))))
    assert torch.equal(new(x=x), new(x))


def test_steps_whose_twins_are_in_doubt_keep_a_forward_as_it_is():
    def forward(self, x):
        return F.relu(self.a(x)) if self.training else F.relu(self.b(x))

    model = net(forward, a=linear(), b=linear())
    new, report = insert(model, X)
    assert report.changes == ()
    assert "it is in doubt which of its steps in evaluation" in lines(report.refusals)["relu"]
    assert torch.equal(new.eval()(X), model.eval()(X))


# Choices.


@pytest.mark.parametrize(
    "before",
    ["relu", nn.ReLU, F.relu, torch.relu, ["relu"], (torch.relu_,)],
    ids=["name", "class", "functional", "function", "list", "in place"],
)
def test_one_kind_by_name_class_or_function(before):
    model = nn.Sequential(linear(), nn.ReLU(), linear(), nn.Tanh())
    _, report = insert(model, X, before=before)
    assert lines(report.changes).keys() == {"1_bn", "0.bias"}


def test_class_of_one_s_own():
    class Squared(nn.Module):
        def forward(self, x):
            return F.relu(x) ** 2

    model = nn.Sequential(linear(), Squared(), linear(), nn.Tanh())
    _, report = insert(model, X, before=[Squared, "tanh"])
    assert {"1_bn", "3_bn"} < lines(report.changes).keys()
    assert lines(report.changes)["1_bn"] == "BatchNorm1d(4) on 0, before 1"


def test_only_and_except():
    model = nn.ModuleDict({"a": nn.Sequential(linear(), nn.ReLU()), "b": nn.Sequential(linear(), nn.ReLU())})
    model = net(
        lambda self, x: F.relu(self.last(self.parts["b"](self.parts["a"](x)))), parts=model, last=linear()
    )
    _, report = insert(model, X, only="parts.a.*")
    assert {w for w in lines(report.changes) if "bn" in w} == {"parts.a.1_bn"}
    assert lines(report.refusals)["parts.b.1"] == "excluded: no pattern of only= matches"
    _, report = insert(model, X, except_=["*.b.0", "last"])
    assert {w for w in lines(report.changes) if "bn" in w} == {"parts.a.1_bn"}
    assert lines(report.refusals)["relu"] == "excluded by except_='last'"


# Shapes, dtypes.


def test_one_value_per_channel_is_noted():
    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]

    _, report = insert(net(forward, fc=linear()), torch.randn(1, 4, 3, 3))
    assert "one value per channel (shape (1, 4))" in lines(report.notes)["fc_bn"]


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (
            nn.Conv2d(1, 2, 3),
            (1, 8, 8),
            "the input of Conv2d has no batch dimension: give an example of 4 dimensions",
        ),
        (nn.Linear(4, 4), (4,), "the input of Linear has no batch dimension"),
    ],
    ids=["convolution", "linear"],
)
def test_unbatched_example(layer, shape, reason):
    _, report = insert(nn.Sequential(layer, nn.ReLU()), torch.randn(shape))
    assert lines(report.refusals)["1"].startswith(reason)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_of_the_affine_layer(dtype):
    model = nn.Sequential(linear(), nn.ReLU(), linear()).to(dtype)
    new, report = insert(model, X.to(dtype))
    assert new[1].weight.dtype == dtype
    assert report.check < 1e-14, "the proof runs in float64"
    assert new(X.to(dtype)).dtype == dtype


def test_frozen_parameters_and_modes_survive():
    model = nn.Sequential(linear(), nn.ReLU(), nn.Sequential(linear(), nn.ReLU()))
    model[0].weight.requires_grad_(False)
    model[2].eval()
    new, _ = insert(model, X)
    assert not new[0].weight.requires_grad
    modules = dict(new.named_modules())
    assert modules["1_bn"].training
    assert not modules["2.1_bn"].training


# Errors.


def wrong(name):
    if name == "not a module":
        return (
            lambda: insert(torch.relu, X),
            TypeError,
            "insert needs a torch.nn.Module, got builtin_function",
        )
    if name == "example of a wrong type":
        return (
            lambda: insert(linear(), [X]),
            TypeError,
            "one input tensor or a tuple of positional arguments, got list",
        )
    if name == "unknown name":
        return (
            lambda: insert(linear(), X, before="rellu"),
            ValueError,
            "before='rellu' is not a nonlinearity.*hardswish",
        )
    if name == "softmax":
        return lambda: insert(linear(), X, after=nn.Softmax), ValueError, "after='Softmax' is not"
    if name == "both sides":
        return (
            lambda: insert(linear(), X, before="relu", after=F.relu),
            ValueError,
            "relu is in before= and in after=",
        )
    if name == "pattern matches nothing":
        model = nn.Sequential(linear(), nn.ReLU())
        return (
            lambda: insert(model, X, only="layer1.*"),
            ValueError,
            "'layer1.*' matches no .*there are: 0, 1",
        )
    if name == "example does not fit":
        return (
            lambda: insert(linear(), torch.randn(2, 5)),
            ValueError,
            "the model fails on the example.*RuntimeError",
        )
    if name == "nan":
        return lambda: insert(linear(), X * math.nan), ValueError, "output on the example is not finite"
    if name == "data parallel":
        return lambda: insert(nn.DataParallel(linear()), X), ValueError, "give model.module"
    if name == "lazy":
        return lambda: insert(nn.LazyLinear(3), X), ValueError, "weight has no shape yet"
    model = linear()
    model.stream = (i for i in range(3))
    return lambda: insert(model, X), ValueError, "cannot be copied|structure"


@pytest.mark.parametrize(
    "name",
    [
        "not a module",
        "example of a wrong type",
        "unknown name",
        "softmax",
        "both sides",
        "pattern matches nothing",
        "example does not fit",
        "nan",
        "data parallel",
        "lazy",
        "not copyable",
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_bad_input(name):
    act, error, message = wrong(name)
    with pytest.raises(error, match=message):
        act()


def test_a_lost_no_grad_is_noticed():
    def forward(self, x):
        with torch.no_grad():
            x = self.fixed(x)
        return F.relu(self.fc(x))

    with pytest.raises(RuntimeError, match=r"learns other parameters than before \(fixed"):
        insert(net(forward, fixed=linear(), fc=linear()), X)


def test_a_wrong_model_is_never_handed_over():
    """What a forward counts is fixed by tracing, which no report could make right."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.calls = linear(), 0

        def forward(self, x):
            self.calls += 1
            return F.relu(self.fc(x)) * self.calls

    with pytest.raises(RuntimeError, match="differs from the original"):
        insert(Counting(), X)


def test_bias_that_only_evaluation_uses_stays():
    def forward(self, x):
        y = self.fc(x)
        return F.relu(self.other(F.relu(y))) if self.training else F.relu(self.other(F.relu(y))) + y

    new, report = insert(net(forward, fc=linear(), other=linear()), X)
    assert lines(report.refusals) == {"fc.bias": "kept: evaluation has a use for it that training has not"}
    assert {w for w in lines(report.changes) if "bias" in w} == {"other.bias"}
    assert new.fc.bias is not None
    assert report.check < 1e-14


def test_layers_are_ours():
    new, _ = insert(nn.Sequential(linear(), nn.ReLU()), X)
    assert type(new[1]) is BatchNorm1d


def test_two_graphs_compile_copy_and_fold():
    new, _ = insert(Variational(), X)
    new.train()(torch.randn(64, 4))
    new.eval()
    x = torch.randn(5, 4)
    expected = new(x)
    assert torch.equal(copy.deepcopy(new)(x), expected)
    compiled = torch.compile(copy.deepcopy(new), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    folded, proof = fold(new, x)
    assert {p.norm for p in proof.folds} == {"enc_bn", "dec_bn"}
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)


def test_activation_with_parameters_keeps_its_name_in_the_state_dict():
    model = net(lambda self, x: self.act(self.fc(x)) * 2, fc=linear(), act=nn.PReLU(4))
    new, report = insert(model, X)
    assert "fc_bn" in lines(report.changes)
    assert "act.weight" in new.state_dict()


def test_activation_known_by_two_names_stays_one():
    act = nn.ReLU()
    new, report = insert(net(lambda self, x: self.act(self.fc(x)) * 2, fc=linear(), act=act, alias=act), X)
    assert "fc_bn" in lines(report.changes)
    assert new.act is new.alias


def test_block_that_begins_with_a_nonlinearity_keeps_its_identity_branch():
    """Before the block as a whole, the layer would normalize the identity too."""
    block = net(lambda self, x: x + self.fc(F.relu(x)), fc=linear())
    new, report = insert(nn.Sequential(linear(), block), X)
    assert lines(report.changes) == {"1.relu_bn": "BatchNorm1d(4) on 0, before relu in 1"}
    assert lines(report.refusals) == {"0.bias": "kept: its output goes into add in 1 as it is"}
    y = new[0](X)
    expected = y + new[1].fc(F.relu(F.batch_norm(y, None, None, training=True)))
    torch.testing.assert_close(new.train()(X), expected)


def test_piece_whose_inside_is_called_from_elsewhere_is_left_alone():
    def forward(self, x):
        y = self.body(x)
        return y + self.body[0](x) if x.sum() < 1e9 else y

    new, report = insert(net(forward, body=nn.Sequential(linear(), nn.ReLU())), X)
    assert report.changes == ()
    assert lines(report.refusals)["body.1"] == "it runs inside a forward that cannot be traced"
    assert new.body[0].bias is not None


def test_module_in_place_whose_input_is_used_again():
    model = net(
        lambda self, x: (lambda y: self.act(y) + y)(self.fc(x)), fc=linear(), act=nn.ReLU(inplace=True)
    )
    _, report = insert(model, X)
    assert lines(report.refusals)["act"].startswith("it works in place")
