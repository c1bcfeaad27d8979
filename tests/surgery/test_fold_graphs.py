"""`fold`: traced and exported graphs, the proof and its reasons, weights, and what is left in a place."""

import pytest
import torch
import torch.nn.functional as F
from fold_cases import Net, each, norm1, norm2, seq, trained
from torch import nn

import batchnorm as bn
from batchnorm.layers.scale_shift import ScaleShift
from batchnorm.surgery.diagonal import Diagonal

# torch's own, when it copies an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3, padding="same")
        self.bn = norm2(8)
        self.up, self.bn_up = nn.ConvTranspose2d(8, 6, 3, 2, groups=2), norm2(6)
        self.fc, self.bn_fc, self.bn_out = nn.Linear(6, 5), norm1(5, affine=False), norm1(5)

    def forward(self, x):
        y = self.bn(torch.cat([self.a(x), self.b(x)[:, :, 1:-1, 1:-1]], 1)).relu()
        y = F.avg_pool2d(self.bn_up(self.up(y)), 2)
        return self.bn_out(F.relu(self.bn_fc(self.fc(y.mean((2, 3))))))


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def exported(model, x, dynamic=False):
    sizes = ({0: torch.export.Dim("n")},) if dynamic else None
    return torch.export.export(model, (x,), dynamic_shapes=sizes)


@pytest.mark.parametrize(
    "graph",
    [
        lambda m: m,
        torch.fx.symbolic_trace,
        lambda m: exported(m, X).module(),
        lambda m: exported(m, X, dynamic=True).module(),
    ],
    ids=["module", "traced", "exported", "exported, any batch"],
)
def test_graphs(graph):
    model = Model().double().eval()
    given = graph(model)
    before = {name: t.clone() for name, t in given.state_dict().items()}
    new, proof = bn.fold(given, X)
    assert [p.affine for p in proof.folds] == ["a, b", "up", "fc"]
    assert [p.norm for p in proof.alone] == ["bn_out"]
    assert isinstance(new.bn_out, ScaleShift)
    assert set(new.state_dict()) == {
        *(f"{layer}.{name}" for layer in ("a", "b", "up", "fc") for name in ("weight", "bias")),
        *("bn_out.scale", "bn_out.shift"),
    }
    torch.testing.assert_close(new(X + 3), model(X + 3), rtol=1e-11, atol=1e-11)
    assert all(torch.equal(t, before[name]) for name, t in given.state_dict().items())


def test_exported_program_is_asked_for_its_module():
    with pytest.raises(TypeError, match=r"give program\.module\(\)"):
        bn.fold(exported(Model().double().eval(), X), X)


def test_program_exported_in_training_mode():
    program = exported(Model().double().train(), X).module()
    with pytest.raises(ValueError, match="exported in training mode"):
        bn.fold(program, X)


def test_exported_layers_that_share_a_weight_are_not_folded():
    fc = nn.Linear(4, 4)
    model = Net(lambda m, x: m.bn(m.fc(x)) + m.fc(x + 1), fc=fc, bn=norm1(4)).eval()
    x = torch.randn(3, 4)
    new, proof = bn.fold(exported(model, x).module(), x)
    assert proof.folds == ()
    assert proof.refusals[0].reason.startswith("fc is called 2 times")
    torch.testing.assert_close(new(x), model(x))


@pytest.mark.parametrize("kind", ["conv1d", "conv3d", "conv_transpose1d", "conv_transpose3d"])
def test_exported_convolutions(kind):
    d = int(kind[-2])
    cls = getattr(nn, f"ConvTranspose{d}d" if "transpose" in kind else f"Conv{d}d")
    model = seq(cls(4, 6, 3, 2, 1, groups=2), trained(getattr(nn, f"BatchNorm{d}d")(6))).double().eval()
    x = torch.randn(2, 4, *[7] * d, dtype=torch.float64)
    new, proof = bn.fold(exported(model, x).module(), x)
    assert len(proof.folds) == 1
    torch.testing.assert_close(new(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "between",
    [
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ReflectionPad2d(1),
        nn.AdaptiveAvgPool2d(2),
        nn.Dropout(),
        nn.AvgPool2d(2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_exported_steps_between(between):
    model = seq(nn.Conv2d(3, 4, 3), between, norm2(4)).double().eval()
    new, proof = bn.fold(exported(model, X).module(), X)
    assert [p.affine for p in proof.folds] == ["0"]
    torch.testing.assert_close(new(X), model(X), rtol=1e-11, atol=1e-11)


def test_normalization_that_is_a_function():
    def run(m, x):
        return F.batch_norm(m.a(x), m.mean.mean, m.mean.var)

    holder = nn.Module()
    holder.register_buffer("mean", torch.zeros(4))
    holder.register_buffer("var", torch.ones(4))
    model, x = Net(run, a=nn.Linear(3, 4), mean=holder).eval(), torch.randn(2, 3)
    _, proof = bn.fold(model, x)
    assert [(r.where, r.reason) for r in proof.refusals] == [
        ("batch_norm", "it is a function here, not a layer that could be replaced")
    ]


# Weights and proofs.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_maps_in_one_layer_are_rounded_once(dtype):
    one, two = norm2(3), norm2(4)
    conv = nn.Conv2d(3, 4, 3)
    model = seq(one, conv, two).to(dtype).eval()
    new, proof = bn.fold(model, X.to(dtype))
    assert len(proof.folds) == 2
    scales, shifts = [], []
    for norm in (model[0], model[2]):
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        scales.append(scale)
        shifts.append(norm.bias.double() - norm.running_mean.double() * scale)
    weight, bias = model[1].weight.double(), model[1].bias.double()
    bias = (bias + torch.einsum("oihw,i->o", weight, shifts[0])) * scales[1] + shifts[1]
    weight = weight * scales[0][None, :, None, None] * scales[1][:, None, None, None]
    torch.testing.assert_close(new[1].weight, weight.to(dtype), rtol=2e-7, atol=0)
    torch.testing.assert_close(new[1].bias.double(), bias, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert new[1].weight.dtype == new[1].bias.dtype == dtype


def test_proof_names_the_way():
    model = seq(norm2(3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3 * 16, 4)).double().eval()
    _, proof = bn.fold(model, X)
    fold = proof.folds[0]
    assert (fold.affine, fold.norm, fold.forward, fold.through) == ("3", "0", True, ("1", "2"))
    assert proof.changes[0].what == "folded forward into 3 through 1, 2; nn.Identity is in its place"
    assert "\n  0 + 3  " in str(proof)


def test_large_means_and_small_variances_are_within_what_rounding_explains():
    norm = norm2(4)
    norm.running_mean.fill_(1e4)
    norm.running_var.fill_(1e-6)
    _, proof = bn.fold(seq(nn.Conv2d(3, 4, 3, padding=1), norm).eval(), X.float())
    assert proof.folds[0].exact < 1e-15
    assert 0 < proof.folds[0].miss <= proof.folds[0].allowed


REASONS = {
    "zeros at the border": (
        lambda: seq(norm2(3), nn.Conv2d(3, 4, 3, padding=1)),
        "0",
        "it follows argument input of the model, not a convolution or linear layer; forward: 1 pads with "
        "zeros, which the map would shift; a multiply-add costs less than to pad with -shift/scale in place "
        "of them",
    ),
    "transposed": (
        lambda: seq(norm2(3), nn.ConvTranspose2d(3, 4, 3, 2)),
        "0",
        "it follows argument input of the model, not a convolution or linear layer; forward: the shift would "
        "reach the outputs of 1 (ConvTranspose2d) in unequal numbers",
    ),
    "transposed, overlapping at the border": (
        lambda: seq(norm2(3), nn.ConvTranspose2d(3, 4, 3)),
        "0",
        "it follows argument input of the model, not a convolution or linear layer; forward: the shift would "
        "reach the outputs of 1 (ConvTranspose2d) in unequal numbers",
    ),
    "transposed, with holes": (
        lambda: seq(norm2(3), nn.ConvTranspose2d(3, 4, 1, 2)),
        "0",
        "it follows argument input of the model, not a convolution or linear layer; forward: the shift would "
        "reach the outputs of 1 (ConvTranspose2d) in unequal numbers",
    ),
    "dropout at work": (
        lambda: Net(lambda m, x: m.bn(F.dropout(m.a(x), 0.5, True)), a=nn.Conv2d(3, 4, 3), bn=norm2(4)),
        "bn",
        "dropout is at work in evaluation too",
    ),
    "another map in each call": (
        lambda: Net(lambda m, x: m.bn(torch.cat([m.a(x), m.a(-x)], 1)), a=nn.Conv2d(3, 2, 1), bn=norm2(4)),
        "bn",
        "a is called 2 times, not always followed by it",
    ),
    "written into": (
        lambda: Net(
            lambda m, x: (lambda y, _: m.fc(y))(m.bn(x), x.mul_(2)), bn=norm2(3), fc=nn.Conv2d(3, 4, 1)
        ),
        "bn",
        "it follows argument args_0 of the model, not a convolution or linear layer; forward: mul_ writes "
        "into its input or output",
    ),
    "max pool": (
        lambda: seq(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), norm2(4)),
        "2",
        "1 would choose other values where the scale is not positive",
    ),
    "average of padding": (
        lambda: seq(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, 1), norm2(4)),
        "2",
        "1 counts zeros of its own, or its weights do not sum to one",
    ),
    "padding layer": (
        lambda: seq(nn.Conv2d(3, 4, 3), nn.ZeroPad2d(1), norm2(4)),
        "2",
        "it follows 1, not a convolution or linear layer, which pads with a number that the map would change",
    ),
    "pieces in a container": (
        lambda: Net(
            lambda m, x: m.bn(torch.cat(torch.split(m.a(x), 2, 1)[::-1], 1)),
            a=nn.Conv2d(3, 4, 3),
            bn=norm2(4),
        ),
        "bn",
        "it follows cat, not a convolution or linear layer",
    ),
    "hook": (
        lambda: hooked(),
        "1.0",
        "0 has hooks, which would see other values",
    ),
    "other type": (
        lambda: Net(lambda m, x: m.bn(m.a(x.double()).float().double()), a=nn.Conv2d(3, 4, 3), bn=norm2(4)),
        "bn",
        "double changes the type",
    ),
    "forward set on the object": (
        lambda: own_forward(),
        "1",
        "it has a forward of its own, set on the object",
    ),
}


def hooked():
    model = seq(seq(nn.Conv2d(3, 4, 3)), seq(norm2(4), nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, out: None)
    return model


def own_forward():
    model = seq(nn.Conv2d(3, 4, 3), norm2(4))
    model[1].forward = lambda x: x * 2
    return model


@pytest.mark.parametrize(("make", "where", "reason"), REASONS.values(), ids=REASONS.keys())
def test_reasons(make, where, reason):
    model = make().double().eval()
    new, proof = bn.fold(model, X.clone())
    assert proof.folds == ()
    assert [(r.where, r.reason.split("; forward: its")[0]) for r in proof.refusals] == [(where, reason)]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        got = new(X.clone())
        torch.manual_seed(1)
        torch.testing.assert_close(got, model(X.clone()), rtol=1e-6, atol=1e-6)


def test_a_shape_that_hides_what_is_mixed():
    """On one location a reshape keeps channels apart; on two it does not, and there the fold is wrong."""
    model = Net(lambda m, x: m.bn(m.a(x).reshape(-1, 4)), a=nn.Conv1d(3, 4, 1), bn=norm1(4)).double().eval()
    new, proof = bn.fold(model, torch.randn(1, 3, 1, dtype=torch.float64))
    assert proof.refusals[0].reason.startswith("undone: with it the model's output differs by")
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(new(x), model(x))


def test_folding_again_changes_nothing():
    model = Model().double().eval()
    once, _ = bn.fold(model, X)
    twice, proof = bn.fold(once, X)
    assert (proof.changes, proof.refusals, proof.folds) == ((), (), ())
    assert all(torch.equal(t, twice.state_dict()[name]) for name, t in once.state_dict().items())


def test_a_normalization_takes_up_what_follows_it():
    model = Net(
        lambda m, x: (lambda y: (m.two(y + m.fc(x)), y.relu() * 0 + x))(m.one(x.relu())),
        one=norm1(4),
        two=norm1(4),
        fc=nn.Linear(4, 4),
    )
    x = torch.randn(3, 4, dtype=torch.float64)
    new, proof = bn.fold(model.double().eval(), x)
    assert proof.folds == ()
    model = Net(lambda m, x: m.two(m.one(x.relu()) + m.fc(x)), one=norm1(4), two=norm1(4), fc=nn.Linear(4, 4))
    new, proof = bn.fold(model.double().eval(), x)
    assert [(p.affine, p.norm) for p in proof.folds] == [("one, fc", "two")] or [
        (p.affine, p.norm) for p in proof.folds
    ] == [("fc, one", "two")]
    assert isinstance(new.one, ScaleShift)
    torch.testing.assert_close(new(x), model(x), rtol=1e-12, atol=1e-12)


def test_shared_layers_with_different_maps_stay():
    """One linear layer, normalized by another layer in each of two calls."""
    model = Net(lambda m, x: m.one(m.fc(x)) * m.two(m.fc(x)), fc=nn.Linear(4, 4), one=norm1(4), two=norm1(4))
    x = torch.randn(3, 4, dtype=torch.float64)
    new, proof = bn.fold(model.double().eval(), x)
    assert proof.folds == ()
    assert all(r.reason.startswith("fc is called 2 times") for r in proof.refusals)
    torch.testing.assert_close(new(x), model(x), rtol=1e-12, atol=1e-12)


# What is left in a place.


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (bn.BatchNorm1d(4), (3, 4)),
        (bn.BatchNorm1d(4), (3, 4, 5)),
        (bn.BatchNorm1d(4, channel_dim=-1), (3, 5, 4)),
        (bn.BatchNorm2d(4), (3, 4, 5, 6)),
        (bn.BatchNormPerActivation((4, 5)), (3, 4, 5)),
        (bn.BatchNorm2d(4), (3, 4, 128, 96)),
        (bn.BatchNorm1d(64, channel_dim=-1), (3, 800, 64)),
        (bn.BatchNormPerActivation((4, 100, 121)), (3, 4, 100, 121)),
    ],
    ids=[
        *("rows", "texts", "features last", "images", "per activation"),
        *("large images", "large, features last", "large, per activation"),
    ],
)
def test_multiply_add(layer, shape, activation):
    layer = trained(layer).eval()
    scale = (layer.running_var + layer.eps).rsqrt() * layer.weight.detach()
    shift = layer.bias.detach() - layer.running_mean * scale
    left = ScaleShift(scale, shift, channel_dim=layer.channel_dim, activation=activation)
    x, residual = torch.randn(shape), torch.randn(shape)
    for given in ((x,), (x, residual)):
        truth = layer(*given)
        truth = truth if activation is None else truth.relu()
        torch.testing.assert_close(left(*given), truth, rtol=1e-5, atol=1e-5)
        program = torch.export.export(left, given).module()
        torch.testing.assert_close(program(*given), truth, rtol=1e-5, atol=1e-5)
        kinds = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert not any("batchnorm" in kind for kind in kinds), "every runtime must know the operators"
    assert left(x.bfloat16()).dtype == torch.bfloat16


def test_multiply_add_learns_as_the_layer_did():
    layer = trained(nn.BatchNorm2d(3)).eval()
    layer.weight.requires_grad_(False)
    new, _ = bn.fold(seq(nn.ReLU(), layer).eval(), X.float())
    assert not new[1].scale.requires_grad
    x = X.float().requires_grad_()
    new[1](x).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_half_precision_is_left_in_float32():
    model = seq(nn.ReLU(), norm2(3)).bfloat16().eval()
    new, proof = bn.fold(model, X.bfloat16())
    assert new[1].scale.dtype == torch.float32
    assert len(proof.alone) == 1
    assert new(X.bfloat16()).dtype == torch.bfloat16


# The law of maps: moved through a step and back, a map is what it was; two in a row are their composition.


def test_maps_compose_and_move():
    shape, value = (2, 4, 3), torch.randn(2, 4, 3, dtype=torch.float64)

    def random(dim):
        size = shape[dim]
        return Diagonal.along(torch.randn(size).double(), torch.randn(size).double(), [dim], 3)

    def apply(a, x):
        scale, shift = a.at(x.shape, range(x.dim()))
        return x * scale + shift

    one, two = random(1), random(2)
    both = one.then(two)
    torch.testing.assert_close(apply(both, value), apply(two, apply(one, value)))
    assert both.varies == [1, 2]
    origin = torch.arange(24).view(shape).permute(2, 0, 1).flatten(1)[:, 1:]
    moved = one.after(origin, [shape], [0])
    step = apply(one, value).permute(2, 0, 1).flatten(1)[:, 1:]
    torch.testing.assert_close(apply(moved, value.permute(2, 0, 1).flatten(1)[:, 1:]), step)
    (back,) = moved.before(origin, [shape])
    for seen in (True, False):
        changed = apply(back.settled(seen=seen), value)
        torch.testing.assert_close(changed.permute(2, 0, 1).flatten(1)[:, 1:], step)
        untouched = changed.flatten()[0] == value.flatten()[0]
        assert untouched == seen, "what the step leaves out is free, if nothing else looks at it"
    assert back.settled(seen=False).varies == [1]
    assert back.settled(seen=True).varies == [0, 1]
    assert random(2).before(torch.zeros(2, 4, 3, dtype=torch.long), [(1,)]) is None
    assert each(4).shape == (4,)
