"""Recurrent layers equal a loop written by hand, step by step and sequence by sequence."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import assert_as_exact_as_eager
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import batchnorm as bn
from batchnorm import kernels
from batchnorm.layers import StepwiseBatchNorm

F, H, EPS, MOMENTUM = 3, 4, 1e-3, 0.3
KINDS = {"lstm": bn.BatchNormLSTM, "gru": bn.BatchNormGRU}
CELLS = {"lstm": bn.BatchNormLSTMCell, "gru": bn.BatchNormGRUCell}
THEIRS = {"lstm": nn.LSTM, "gru": nn.GRU}
both = pytest.mark.parametrize("kind", KINDS)


def stir(module: nn.Module) -> nn.Module:
    """γ, β and running statistics that are no zeros and ones, so that each one's part shows."""
    for m in module.modules():
        if isinstance(m, StepwiseBatchNorm):
            nn.init.uniform_(m.weight, 0.3, 1.2)
            if m.bias is not None:
                nn.init.normal_(m.bias, std=0.3)
            for step in m.steps:
                step.running_mean.normal_(std=0.2)
                step.running_var.uniform_(0.3, 1.5)
                step.num_batches_tracked.fill_(1)
    return module


def made(kind: str, max_length: int = 4, *, dtype=torch.float64, **options) -> nn.Module:
    torch.manual_seed(5)
    return stir(KINDS[kind](F, H, max_length, eps=EPS, momentum=MOMENTUM, dtype=dtype, **options))


class Loop:
    """The reference: one direction after the other, a dictionary of lists, no layer of ours in it.

    Sequences are a list of (T_i, F) tensors in any order. Statistics stand in ``mean`` and ``var``, by
    the name of the normalization and the time step.
    """

    def __init__(self, layer: nn.Module, kind: str) -> None:
        self.p = dict(layer.named_parameters())
        self.kind, self.layer, self.training = kind, layer, layer.training
        self.mean, self.var, self.moved = {}, {}, set()
        for name, m in layer.named_children():
            for t, step in enumerate(m.steps):
                self.mean[name, t] = step.running_mean.clone()
                self.var[name, t] = step.running_var.clone()

    def norm(self, name, t, rows):
        """Rows (n, C) of the sequences that live at step t."""
        slot = min(t, self.layer.max_length - 1)
        gamma, beta = self.p[name + ".weight"], self.p.get(name + ".bias", 0.0)
        if self.training and len(rows) > 1:
            mean = rows.sum(0) / len(rows)
            var = ((rows - mean) ** 2).sum(0) / len(rows)
            unbiased = var.detach() * len(rows) / (len(rows) - 1)
            self.mean[name, slot] = (1 - MOMENTUM) * self.mean[name, slot] + MOMENTUM * mean.detach()
            self.var[name, slot] = (1 - MOMENTUM) * self.var[name, slot] + MOMENTUM * unbiased
            self.moved.add((name, slot))
        else:
            mean, var = self.mean[name, slot], self.var[name, slot]
        return (rows - mean) / (var + EPS) ** 0.5 * gamma + beta

    def direction(self, sequences, begun, suffix):
        p, kind = self.p, self.kind
        w_x, w_h = p["weight_ih" + suffix], p["weight_hh" + suffix]
        b_x = p.get("bias_ih" + suffix, torch.zeros(len(w_x), dtype=w_x.dtype))
        b_h = p.get("bias_hh" + suffix, torch.zeros(len(w_x), dtype=w_x.dtype))
        states = [list(parts) for parts in begun]
        outputs = [[] for _ in sequences]
        for t in range(max(map(len, sequences), default=0)):
            alive = [i for i, s in enumerate(sequences) if t < len(s)]
            x = torch.stack([sequences[i][t] for i in alive])
            h = torch.stack([states[i][0] for i in alive])
            xs = self.norm("norm_ih" + suffix, t, x @ w_x.T) + b_x
            hs = self.norm("norm_hh" + suffix, t, h @ w_h.T) + b_h
            if kind == "lstm":
                c = torch.stack([states[i][1] for i in alive])
                i_, f, g, o = (xs + hs).split(H, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i_) * torch.tanh(g)
                new = [torch.sigmoid(o) * torch.tanh(self.norm("norm_c" + suffix, t, c)), c]
            else:
                (r_x, z_x, n_x), (r_h, z_h, n_h) = xs.split(H, 1), hs.split(H, 1)
                r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
                new = [(1 - z) * torch.tanh(n_x + r * n_h) + z * h]
            for place, i in enumerate(alive):
                states[i] = [part[place] for part in new]
                outputs[i].append(states[i][0])
        empty = torch.zeros(0, H, dtype=w_x.dtype)
        return [torch.stack(o) if o else empty for o in outputs], states

    def __call__(self, sequences, begun):
        """``begun``: for each direction of each layer, for each sequence, its parts of the state."""
        ended, begun = [], iter(begun)
        for layer in range(self.layer.num_layers):
            outputs, states = self.direction(sequences, next(begun), f"_l{layer}")
            ended.append(states)
            if self.layer.bidirectional:
                turned = [s.flip(0) for s in sequences]
                backward, states = self.direction(turned, next(begun), f"_l{layer}_reverse")
                ended.append(states)
                pairs = zip(outputs, backward, strict=True)
                outputs = [torch.cat([o, b.flip(0)], 1) for o, b in pairs]
            sequences = outputs
        return sequences, ended


def begin(layer: nn.Module, kind: str, num: int):
    """A random initial state as torch has it, and as the loop wants it."""
    rows = layer.num_layers * (1 + layer.bidirectional)
    parts = [torch.randn(rows, num, H, dtype=torch.float64) for _ in range(2 if kind == "lstm" else 1)]
    parts = [part.requires_grad_() for part in parts]
    by_sequence = [[[part[r, i] for part in parts] for i in range(num)] for r in range(rows)]
    return (tuple(parts) if kind == "lstm" else parts[0]), by_sequence


def parts_of(state) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def check(layer, kind, lengths, call, name):
    """Outputs, final states, gradients and running statistics of ``call`` are the loop's."""
    sequences = [torch.randn(n, F, dtype=torch.float64, requires_grad=True) for n in lengths]
    hx, begun = begin(layer, kind, len(lengths))
    loop = Loop(layer, kind)
    expected, ended = loop(sequences, begun)
    outputs, final = call(layer, sequences, hx)
    weights = [torch.randn_like(e) for e in expected]
    parts = [[torch.stack([s[k] for s in states]) for states in ended] for k in range(len(parts_of(final)))]
    true_final = [torch.stack(p) for p in parts]
    finals = [torch.randn_like(f) for f in true_final]

    def loss(out, end):
        return sum((a * w).sum() for a, w in zip(out, weights, strict=True)) + sum(
            (a * w).sum() for a, w in zip(end, finals, strict=True)
        )

    leaves = [*layer.parameters(), *sequences, *parts_of(hx)]
    true = torch.autograd.grad(loss(expected, true_final), leaves, allow_unused=True)
    got = torch.autograd.grad(loss(outputs, parts_of(final)), leaves, allow_unused=True)
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda m: f"{name}, output: {m}")
    for a, b in zip(parts_of(final), true_final, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda m: f"{name}, state: {m}")
    for a, b in zip(got, true, strict=True):
        a, b = (torch.zeros(()) if t is None or not t.numel() else t for t in (a, b))
        torch.testing.assert_close(
            a.double(), b.double(), rtol=1e-8, atol=1e-9, msg=lambda m: f"{name}, gradient: {m}"
        )
    for norm, m in layer.named_children():
        for t, step in enumerate(m.steps):
            torch.testing.assert_close(step.running_mean, loop.mean[norm, t], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(step.running_var, loop.var[norm, t], rtol=1e-9, atol=1e-10)
            assert int(step.num_batches_tracked) == 1 + ((norm, t) in loop.moved)


def as_mask(lengths: list[int], longest: int) -> torch.Tensor:
    return torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)


def by_mask(layer, sequences, hx):
    lengths = [len(s) for s in sequences]
    # Padding that is no number shows wherever it is used.
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=math.nan)
    mask = as_mask(lengths, padded.shape[1])
    if not layer.batch_first:
        padded, mask = padded.transpose(0, 1), mask.t()
    out, final = layer(padded, hx, mask=mask)
    out = out if layer.batch_first else out.transpose(0, 1)
    for o, n in zip(out, lengths, strict=True):
        assert not o[n:].any()
    return [o[:n] for o, n in zip(out, lengths, strict=True)], final


def by_packing(layer, sequences, hx):
    out, final = layer(nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False), hx)
    assert isinstance(out, PackedSequence)
    padded, lengths = pad_packed_sequence(out, batch_first=True)
    return [o[:n] for o, n in zip(padded, lengths.tolist(), strict=True)], final


def plainly(layer, sequences, hx):
    dim = 0 if layer.batch_first else 1
    out, final = layer(torch.stack(sequences, dim), hx)
    return list(out.unbind(dim)), final


SETTINGS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "both ways": {"bidirectional": True},
    "two layers both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


@both
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_equal_lengths_are_the_loop(kind, options, training):
    layer = made(kind, 4, **options).train(training)
    check(layer, kind, [4] * 5, plainly, "equal lengths")


@both
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("call", [by_mask, by_packing], ids=["mask", "packed"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_unequal_lengths_are_the_loop(kind, options, call, training):
    layer = made(kind, 5, **options).train(training)
    # One sequence outlives the others by two steps; some end together.
    check(layer, kind, [2, 5, 3, 1, 3], call, "unequal lengths")


@both
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 4), min_size=2, max_size=6), twice=st.booleans(), learn=st.booleans())
def test_any_lengths_are_the_loop(kind, lengths, twice, learn):
    layer = made(kind, 4, bidirectional=twice).train(learn)
    if learn and sum(n > 0 for n in lengths) == 1:
        with pytest.raises(ValueError, match="two sequences"):
            by_mask(layer, [torch.zeros(n, F, dtype=torch.float64) for n in lengths], None)
        return
    check(layer, kind, lengths, by_mask, f"lengths {lengths}")


def normalizations(layer: nn.Module) -> dict[str, StepwiseBatchNorm]:
    return dict(layer.named_children())


def neutral(kind: str, **options) -> nn.Module:
    """A layer whose normalizations do nothing in evaluation: means of zero, γ the deviations."""
    layer = made(kind, 6, **options)
    for norm in normalizations(layer).values():
        var = torch.rand(norm.num_features, dtype=torch.float64) + 0.3
        norm.weight.data.copy_((var + EPS).sqrt())
        if norm.bias is not None:
            nn.init.zeros_(norm.bias)
        for step in norm.steps:
            step.running_mean.zero_()
            step.running_var.copy_(var)
    return layer.eval()


@both
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_what_normalizes_nothing_is_torchs_layer_with_torchs_weights(kind, options):
    layer = neutral(kind, **options)
    theirs = THEIRS[kind](F, H, dtype=torch.float64, **options)
    missing = theirs.load_state_dict(layer.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert all(key.startswith("norm_") for key in missing.unexpected_keys)
    x = torch.randn(5, 4, F, dtype=torch.float64)
    hx, _ = begin(layer, kind, 4 if not layer.batch_first else 5)
    unsorted = [torch.randn(n, F, dtype=torch.float64) for n in (2, 4, 1, 4)]
    for one in (x, nn.utils.rnn.pack_sequence(unsorted, enforce_sorted=False)):
        state = hx if isinstance(one, torch.Tensor) else None
        (mine, my_state), (out, state) = layer(one, state), theirs(one, state)
        if isinstance(out, PackedSequence):
            assert torch.equal(mine.batch_sizes, out.batch_sizes)
            mine, out = mine.data, out.data
        torch.testing.assert_close(mine, out, rtol=1e-12, atol=1e-13)
        for a, b in zip(parts_of(my_state), parts_of(state), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@both
def test_torchs_weights_load_and_give_torchs_outputs(kind):
    theirs, layer = THEIRS[kind](F, H, 2, dtype=torch.float64), neutral(kind, num_layers=2)
    found = layer.load_state_dict(theirs.state_dict(), strict=False)
    assert not found.unexpected_keys
    x = torch.randn(6, 3, F, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], theirs(x)[0], rtol=1e-12, atol=1e-13)


@both
def test_one_sequence_without_batch_dimension_is_a_batch_of_one(kind):
    layer = made(kind).eval()
    x = torch.randn(4, 1, F, dtype=torch.float64)
    hx, _ = begin(layer, kind, 1)
    narrow = tuple(p[:, 0] for p in parts_of(hx))
    out, state = layer(x[:, 0], narrow if kind == "lstm" else narrow[0])
    expected, true = layer(x, hx)
    assert torch.equal(out, expected[:, 0])
    for a, b in zip(parts_of(state), parts_of(true), strict=True):
        assert torch.equal(a, b[:, 0])


@both
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_cells_and_pieces_of_a_sequence_are_the_whole(kind, training):
    layer = made(kind, 3).train(training)
    cell = CELLS[kind](F, H, 3, eps=EPS, momentum=MOMENTUM, dtype=torch.float64).train(training)
    state = {name.replace("_l0", ""): value for name, value in layer.state_dict().items()}
    cell.load_state_dict(state)
    pieces = made(kind, 3).train(training)
    pieces.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4, F, dtype=torch.float64)
    expected, _ = layer(x)
    h = None
    for step, one in enumerate(x):
        h = cell(one, h, step=step)
        torch.testing.assert_close(parts_of(h)[0], expected[step], rtol=1e-12, atol=1e-13)
    first, between = pieces(x[:2])
    second, _ = pieces(x[2:], between, first_step=2)
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=1e-12, atol=1e-13)
    for name, norm in normalizations(layer).items():
        for other in (cell.get_submodule(name.replace("_l0", "")), pieces.get_submodule(name)):
            for mine, theirs in zip(norm.buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(mine, theirs)


@both
def test_first_and_second_gradients(kind):
    layer = made(kind, 3)
    names = [name for name, _ in layer.named_parameters()]
    mask = as_mask([3, 2, 3], 3).t()

    def of(x, *parameters):
        fresh = dict(zip(names, parameters, strict=True))
        buffers = {name: b.clone() for name, b in layer.named_buffers()}
        out, state = torch.func.functional_call(layer, {**fresh, **buffers}, (x,), {"mask": mask})
        return (out, *parts_of(state))

    x = torch.randn(3, 3, F, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(of, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(of, (x, *parameters), atol=1e-4, fast_mode=True)


@both
@pytest.mark.parametrize("mean", [0.0, 300.0], ids=["centred", "far from zero"])
def test_float32_is_as_exact_as_plain_operations(kind, mean):
    truth = made(kind, 5)
    ours = made(kind, 5, dtype=torch.float32)
    ours.load_state_dict(truth.state_dict())
    for layer in (truth, ours):
        for p in layer.parameters():
            p.data = p.data.float().to(p.dtype)
    sequences = [torch.randn(5, F) + mean for _ in range(6)]
    plain, wide = Loop(ours, kind), Loop(truth, kind)
    nothing = [[[torch.zeros(H)] * 2 for _ in sequences]]
    eager = torch.stack(plain(sequences, nothing)[0])
    exact = torch.stack(
        wide([s.double() for s in sequences], [[[t.double() for t in n] for n in nothing[0]]])[0]
    )
    got = ours(torch.stack(sequences, 1))[0].transpose(0, 1)
    assert_as_exact_as_eager(got, eager, exact, condition=mean, name="outputs")


def test_bfloat16_layers_keep_statistics_in_float32():
    layer = made("lstm", 3, dtype=torch.float32).bfloat16()
    before = layer.norm_c_l0.steps[0].running_var.clone()
    with kernels.use("torch"):  # which nothing has to be built for
        out, (h, c) = layer(torch.randn(4, 5, F, dtype=torch.bfloat16))
    assert out.dtype == h.dtype == c.dtype == layer.norm_c_l0.weight.dtype == torch.bfloat16
    out.backward(torch.randn_like(out))
    assert layer.norm_hh_l0.weight.grad.isfinite().all()
    for buffer in layer.buffers():
        assert buffer.dtype in (torch.float32, torch.int64)
    # Digits that bfloat16 does not have.
    after = layer.norm_c_l0.steps[0].running_var
    assert not torch.equal(after, after.bfloat16().float())
    assert not torch.equal(after, before)


@both
def test_autocast_computes_products_in_bfloat16(kind):
    layer = made(kind, 3, dtype=torch.float32).eval()
    x = torch.randn(3, 5, F)
    expected, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = layer(x)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.02)
    assert not torch.equal(out.float(), expected)


@pytest.mark.parametrize(
    ("kind", "training", "backend"),
    [("lstm", True, "aot_eager"), ("gru", True, "eager"), ("gru", False, "aot_eager")],
    ids=["lstm in training", "gru in training", "gru in evaluation"],
)
def test_compiled_as_one_graph(kind, training, backend):
    layer = made(kind, 2, dtype=torch.float32).train(training)
    other = copy.deepcopy(layer)
    x, w = torch.randn(2, 4, F), torch.randn(2, 4, H)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    out, expected = compiled(x)[0], other(x)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    (out * w).sum().backward()
    (expected * w).sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# torch's own, where it takes up a graph after a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_sequences_longer_than_the_statistics_and_masks():
    layer = made("gru", 2, dtype=torch.float32)
    other = copy.deepcopy(layer)
    x = torch.randn(3, 4, F)
    mask = as_mask([3, 3, 2, 1], 3).t()
    out, expected = torch.compile(layer, backend="eager")(x, mask=mask)[0], other(x, mask=mask)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
