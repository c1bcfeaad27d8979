"""Statistics of each time step: whose are used, when they move, and who finds them."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.layers import StepwiseBatchNorm
from batchnorm.layers.recurrent import StepBatchNorm

F, H = 3, 4
both = pytest.mark.parametrize("layer_class", [bn.BatchNormLSTM, bn.BatchNormGRU], ids=["lstm", "gru"])


class Reader(nn.Module):
    """A sequence, and a classifier of its last output."""

    def __init__(self, layer_class=bn.BatchNormLSTM, max_length: int = 3, **options) -> None:
        super().__init__()
        self.rnn = layer_class(F, H, max_length, **options)
        self.head = nn.Linear(H, 2)

    def forward(self, x, mask=None):
        out, _ = self.rnn(x, mask=mask) if mask is not None else self.rnn(x)
        return self.head(out[-1])


def stats(norm: StepwiseBatchNorm, step: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    layer = norm.steps[step]
    return layer.running_mean, layer.running_var, int(layer.num_batches_tracked)


def test_steps_beyond_the_last_share_it_and_move_it_once_by_all_their_samples():
    norm = StepwiseBatchNorm(2, 2, momentum=0.25, gamma=1.0).double()
    xs = [torch.randn(5, 2, dtype=torch.float64) + t for t in range(5)]
    with norm.together(5):
        ys = [norm(x, t) for t, x in enumerate(xs)]
    for x, y in zip(xs, ys, strict=True):
        expected = (x - x.mean(0)) / (x.var(0, unbiased=False) + norm.eps).sqrt()
        torch.testing.assert_close(y, expected)
    mean, var, moved = stats(norm, 0)
    torch.testing.assert_close(mean, 0.25 * xs[0].mean(0))
    assert moved == 1
    whole = torch.cat(xs[1:])
    mean, var, moved = stats(norm, 1)
    torch.testing.assert_close(mean, 0.25 * whole.mean(0))
    torch.testing.assert_close(var, 0.75 + 0.25 * whole.var(0))
    assert moved == 1
    assert "pending" not in norm.steps[1].__dict__


@both
def test_a_layer_moves_what_later_steps_share_once(layer_class):
    layer = layer_class(F, H, 2, momentum=None).double()
    x = torch.randn(7, 6, F, dtype=torch.float64)
    layer(x)
    product = (x @ layer.weight_ih_l0.T).detach()
    torch.testing.assert_close(stats(layer.norm_ih_l0, 0)[0], product[0].mean(0))
    mean, var, moved = stats(layer.norm_ih_l0, 1)
    torch.testing.assert_close(mean, product[1:].flatten(0, 1).mean(0))
    torch.testing.assert_close(var, product[1:].flatten(0, 1).var(0))
    assert moved == 1
    assert [stats(norm, 1)[2] for norm in layer.children()] == [1] * len(list(layer.children()))


@both
def test_a_piece_beyond_the_last_moves_it_once_too(layer_class):
    layer = layer_class(F, H, 2, momentum=None).double()
    x = torch.randn(2, 6, F, dtype=torch.float64)
    layer(x, first_step=2)
    mean, _, moved = stats(layer.norm_ih_l0, 1)
    assert moved == 1
    torch.testing.assert_close(mean, (x @ layer.weight_ih_l0.T).detach().flatten(0, 1).mean(0))


def test_a_failed_sequence_moves_nothing_that_is_shared():
    norm = StepwiseBatchNorm(2, 1)

    def fail():
        with norm.together(3):
            norm(torch.randn(4, 2), 0)
            norm(torch.randn(4, 3), 1)

    with pytest.raises(ValueError, match="2 channels"):
        fail()
    assert stats(norm, 0)[2] == 0
    norm(torch.randn(4, 2), 0)
    assert stats(norm, 0)[2] == 1


def test_one_living_sequence_is_normalized_by_what_was_learned_and_moves_nothing():
    norm = StepwiseBatchNorm(2, 2, eps=0.5, gamma=2.0).double()
    for _ in range(3):
        norm(torch.randn(6, 2, dtype=torch.float64) + 3, 0)
        norm(torch.randn(6, 2, dtype=torch.float64) - 3, 1)
    mean, var, moved = (t.clone() if isinstance(t, torch.Tensor) else t for t in stats(norm, 1))
    x = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    y = norm(x, 1, residual=torch.ones_like(x), activation="tanh")
    torch.testing.assert_close(y, torch.tanh(2 * (x - mean) / (var + 0.5).sqrt() + 1))
    assert stats(norm, 1)[2] == moved == 3
    assert torch.equal(stats(norm, 1)[0], mean)
    (y * torch.randn_like(y)).sum().backward()
    assert norm.weight.grad.abs().min() > 0


def test_a_step_no_sequence_has_reached_takes_the_last_that_one_has():
    norm = StepwiseBatchNorm(2, 5).double()
    for step in range(3):
        norm(torch.randn(6, 2, dtype=torch.float64) + step, step)
    norm.eval()
    x = torch.randn(4, 2, dtype=torch.float64)
    assert torch.equal(norm(x, 4), norm(x, 2))
    assert torch.equal(norm(x, 100), norm(x, 2))
    assert not torch.equal(norm(x, 1), norm(x, 2))
    norm.train()
    # Alone at a step without statistics, too.
    mean, var, _ = stats(norm, 2)
    torch.testing.assert_close(norm(x[:1], 3), 0.1 * (x[:1] - mean) / (var + norm.eps).sqrt())
    fresh = StepwiseBatchNorm(2, 5).double()
    fresh(x + 3, 0)
    assert torch.equal(fresh.eval()(x, 3), fresh(x, 0))
    fresh.reset_parameters()
    torch.testing.assert_close(fresh(x, 3), 0.1 * x / math.sqrt(1 + 1e-5))


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_what_is_not_finite_moves_nothing(layer_class, bad):
    layer = layer_class(F, H, 3)
    x = torch.randn(3, 5, F)
    layer(x)
    x[1, 2, 1] = bad
    layer(x)
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    moved = {
        name: [int(step.num_batches_tracked) for step in norm.steps] for name, norm in layer.named_children()
    }
    # Step 1 reads it; from step 2 on the state is spoilt, and what is read is sound again.
    assert moved.pop("norm_ih_l0") == [2, 1, 2]
    assert moved.pop("norm_hh_l0") == [2, 2, 1]
    assert moved.pop("norm_c_l0", [2, 1, 1]) == [2, 1, 1]
    assert not moved


@both
def test_masks_of_all_false_keep_the_state_and_move_nothing(layer_class):
    layer = layer_class(F, H, 2, num_layers=2, bidirectional=True)
    before = copy.deepcopy(layer.state_dict())
    x = torch.full((3, 4, F), math.nan)
    h = torch.randn(4, 4, H)
    hx = (h, h + 1) if layer_class is bn.BatchNormLSTM else h
    out, end = layer(x, hx, mask=torch.zeros(3, 4, dtype=torch.bool))
    assert out.shape == (3, 4, 2 * H)
    assert not out.any()
    for a, b in zip(
        end if isinstance(end, tuple) else (end,), hx if isinstance(hx, tuple) else (hx,), strict=True
    ):
        assert torch.equal(a, b)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@both
@pytest.mark.parametrize(
    "shape", [(0, 4, F), (3, 0, F), (0, 0, F)], ids=["no steps", "no sequences", "neither"]
)
def test_empty_sequences_and_batches(layer_class, shape):
    layer = layer_class(F, H, 2)
    x = torch.zeros(shape, requires_grad=True)
    out, end = layer(x)
    assert out.shape == (*shape[:2], H)
    end = end[0] if isinstance(end, tuple) else end
    assert end.shape == (1, shape[1], H)
    assert not end.any()
    assert all(not int(m.num_batches_tracked) for m in layer.modules() if isinstance(m, StepBatchNorm))


BAD = {
    "features": ({"input": torch.zeros(2, 3, F + 1)}, "3 features, last, got input"),
    "dimensions": ({"input": torch.zeros(2, 3, 4, F)}, "3-d"),
    "state": ({"input": torch.zeros(2, 3, F), "hx": torch.zeros(1, 2, H)}, r"state of shape \(1, 3, 4\)"),
    "mask shape": (
        {"input": torch.zeros(2, 3, F), "mask": torch.ones(3, 2).bool()},
        r"\(2, 3\), got \(3, 2\)",
    ),
    "mask dtype": ({"input": torch.zeros(2, 3, F), "mask": torch.ones(2, 3)}, "boolean"),
    "mask with a hole": (
        {"input": torch.zeros(3, 2, F), "mask": torch.tensor([[1, 1], [0, 1], [1, 0]]).bool()},
        "true again",
    ),
    "padding first": (
        {"input": torch.zeros(2, 2, F), "mask": torch.tensor([[0, 1], [1, 1]]).bool()},
        "padding on the right",
    ),
    "mask of one sequence": ({"input": torch.zeros(3, F), "mask": torch.ones(3).bool()}, "cut it"),
    "one sequence": ({"input": torch.zeros(3, 1, F)}, "two sequences"),
    "one beside an empty one": (
        {"input": torch.zeros(2, 2, F), "mask": torch.tensor([[1, 0], [1, 0]]).bool()},
        "two sequences",
    ),
    "first step": ({"input": torch.zeros(2, 3, F), "first_step": -1}, "0 or more"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_the_place(arguments, message):
    model = nn.ModuleDict({"reader": bn.BatchNormGRU(F, H, 2)})
    before = copy.deepcopy(model.state_dict())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, arguments):
            return self.parts["reader"](**arguments)

    with pytest.raises(ValueError, match=message) as caught:
        Model()(arguments)
    assert "BatchNormGRU() at 'parts.reader'" in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_bad_packed_input_and_integers():
    layer = bn.BatchNormLSTM(F, H, 2)
    packed = nn.utils.rnn.pack_sequence([torch.zeros(2, F), torch.zeros(1, F)])
    with pytest.raises(ValueError, match="knows its lengths"):
        layer(packed, mask=torch.ones(2, 2).bool())
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"dtype|floating"):
        layer(torch.zeros(2, 3, F, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "at least 1, got 0"),
        ({"max_length": 2.0}, "number of time steps"),
        ({"max_length": True}, "number of time steps"),
        ({"max_length": 2, "gamma": 0.0}, "positive, got 0"),
        ({"max_length": 2, "eps": -1.0}, "eps must not be negative"),
    ],
    ids=["no steps", "fraction", "flag", "gamma", "eps"],
)
@pytest.mark.parametrize(
    "kind", [bn.BatchNormLSTM, bn.BatchNormGRU, bn.BatchNormLSTMCell, bn.BatchNormGRUCell]
)
def test_bad_settings(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(F, H, **options)


def test_projections_are_refused_by_name():
    with pytest.raises(TypeError, match="proj_size"):
        bn.BatchNormLSTM(F, H, 2, proj_size=2)


@pytest.mark.parametrize("kind", [bn.BatchNormLSTMCell, bn.BatchNormGRUCell])
def test_bad_input_of_cells(kind):
    cell = kind(F, H, 2)
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        cell(torch.zeros(2, F + 1), step=0)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        cell(torch.zeros(2, F), step=-1)
    with pytest.raises(ValueError, match="two sequences"):
        cell(torch.zeros(1, F), step=0)
    bad = torch.zeros(3, H)
    with pytest.raises(ValueError, match=r"state of shape \(2, 4\), got \(3, 4\)"):
        cell(torch.zeros(2, F), (bad, bad) if kind is bn.BatchNormLSTMCell else bad, step=0)
    with pytest.raises(TypeError, match="step"):
        cell(torch.zeros(2, F))


def test_dropout_between_layers_and_not_after_the_last():
    torch.manual_seed(1)
    layer = bn.BatchNormLSTM(F, H, 2, num_layers=2, dropout=0.5)
    x = torch.randn(2, 50, F)
    seen = []
    layer.norm_ih_l1.steps[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(x)
    first = bn.BatchNormLSTM(F, H, 2)
    first.load_state_dict({k: v for k, v in layer.state_dict().items() if "_l0" in k})
    out, _ = first(x)
    torch.manual_seed(7)
    a, _ = layer(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(out.flatten(0, 1), 0.5)
    torch.testing.assert_close(seen[-1], (dropped @ layer.weight_ih_l1.T)[:50])
    assert a.ne(0).all()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@both
def test_the_last_of_a_batch_may_go_on_alone(layer_class):
    layer = layer_class(F, H, 4).double()
    x = torch.randn(4, 5, F, dtype=torch.float64)
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    out, _ = layer(x[2:, :1], first_step=2)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(out, layer.eval()(x[2:, :1], first_step=2)[0])
    cell_class = bn.BatchNormLSTMCell if layer_class is bn.BatchNormLSTM else bn.BatchNormGRUCell
    cell = cell_class(F, H, 4).double()
    cell.load_state_dict({name.replace("_l0", ""): value for name, value in before.items()})
    h = cell(x[2, :1], step=2)
    torch.testing.assert_close(h if torch.is_tensor(h) else h[0], out[0])


def test_a_batch_of_one_is_refused_unless_all_is_frozen():
    layer = bn.BatchNormGRU(F, H, 2)
    x = torch.randn(2, 1, F)
    bn.freeze(layer, except_="norm_hh_l0.steps.1")
    with pytest.raises(ValueError, match="two sequences"):
        layer(x)
    bn.freeze(layer)
    assert torch.equal(layer(x)[0], layer.eval()(x)[0])


# Everything that looks for normalizations.


@both
def test_copies_and_files_keep_their_own_scale(layer_class, tmp_path):
    layer = layer_class(F, H, 2)
    x = torch.randn(2, 5, F)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        nn.init.constant_(other.norm_hh_l0.weight, 5.0)
        assert other.norm_hh_l0.steps[1].affine_parameters()["weight"] is other.norm_hh_l0.weight
        assert layer.norm_hh_l0.weight.max().item() == pytest.approx(0.1)
        assert not torch.equal(other.eval()(x)[0], layer.eval()(x)[0])
    layer.train()(x)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    again = layer_class(F, H, 2)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.eval()(x)[0], layer.eval()(x)[0])
    with pytest.raises(RuntimeError, match=r"steps\.2"):
        layer_class(F, H, 3).load_state_dict(layer.state_dict())


def test_reset_begins_anew():
    torch.manual_seed(3)
    layer = bn.BatchNormLSTM(F, H, 2, gamma=0.2)
    layer(torch.randn(2, 5, F))
    nn.init.constant_(layer.norm_c_l0.bias, 3.0)
    nn.init.constant_(layer.norm_ih_l0.weight, 3.0)
    layer.reset_parameters()
    assert layer.norm_ih_l0.weight.tolist() == pytest.approx([0.2] * 16)
    assert not layer.norm_c_l0.bias.any()
    assert stats(layer.norm_hh_l0, 0)[2] == 0
    assert layer.weight_hh_l0.abs().max() <= 0.5
    cell = bn.BatchNormGRUCell(F, H, 2, gamma=0.3)
    nn.init.zeros_(cell.norm_hh.weight)
    cell.reset_parameters()
    assert cell.norm_hh.weight.tolist() == pytest.approx([0.3] * 12)


@both
def test_recalibrate_finds_the_population_of_every_step(layer_class):
    model = Reader(layer_class).double()
    batches = [torch.randn(3, n, F, dtype=torch.float64) for n in (4, 6, 2)]
    for batch in batches:
        model(batch)
    report = bn.recalibrate(model, batches)
    assert report.converged
    assert len(report.layers) == 3 * len(list(model.rnn.children()))
    # Exact: all the data as one batch in training, with the statistics of that batch.
    whole = torch.cat(batches, 1)
    once = copy.deepcopy(model)
    for m in once.modules():
        if isinstance(m, StepBatchNorm):
            m.momentum = 1.0
    once(whole)
    for name, buffer in once.named_buffers():
        if not name.endswith("tracked"):
            torch.testing.assert_close(buffer, model.get_buffer(name), rtol=1e-8, atol=1e-9)


def test_recalibrate_pools_steps_of_unequal_lengths():
    model = Reader().double()
    x = torch.randn(3, 5, F, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    model(x, mask=mask)
    last = stats(model.rnn.norm_ih_l0, 2)[0].clone()
    report = bn.recalibrate(model, [{"x": x, "mask": mask}], method="pooled")
    product = x @ model.rnn.weight_ih_l0.T
    torch.testing.assert_close(stats(model.rnn.norm_ih_l0, 1)[0], product[1, :4].mean(0).detach())
    # One sequence alone is no batch: as in training, it moves nothing.
    assert torch.equal(stats(model.rnn.norm_ih_l0, 2)[0], last)
    assert "rnn.norm_ih_l0.steps.2" not in report.layers


@both
def test_statistics_wait_for_the_optimizer(layer_class):
    model = Reader(layer_class, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 6, F)
    with bn.commit_on_step(model, optimizer) as handle:
        model(x).square().mean().backward()
        assert all(not int(m.num_batches_tracked) for m in model.modules() if isinstance(m, StepBatchNorm))
        product = (x @ model.rnn.weight_ih_l0.T).detach()
        optimizer.step()
        assert set(handle.moves.values()) == {1}
        mean, _, moved = stats(model.rnn.norm_ih_l0, 1)
        assert moved == 1
        torch.testing.assert_close(mean, 0.1 * product[1:].flatten(0, 1).mean(0))
        assert handle.batches["rnn.norm_ih_l0.steps.1"] == 3


def test_freeze_and_thaw():
    model = Reader()
    x = torch.randn(3, 5, F)
    model(x)
    model.rnn.norm_hh_l0.weight.requires_grad_(False)
    report = bn.freeze(model, affine=True)
    assert len(report.changes) == 9
    assert not model.rnn.norm_ih_l0.weight.requires_grad
    assert not model.rnn.norm_c_l0.bias.requires_grad
    trained, before = model(x), copy.deepcopy(model.state_dict())
    assert torch.equal(trained, model.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # Frozen, one sequence is as good as many.
    assert torch.equal(model.train()(x[:, :1]), model.eval()(x[:, :1]))
    bn.thaw(model)
    assert model.rnn.norm_ih_l0.weight.requires_grad
    assert model.rnn.norm_c_l0.bias.requires_grad
    assert not model.rnn.norm_hh_l0.weight.requires_grad
    model.train()(x)
    assert stats(model.rnn.norm_ih_l0, 0)[2] == 2


def test_other_kinds_are_refused_with_the_reason():
    model = Reader()
    same, report = bn.convert(model, to="torch", example=torch.randn(3, 5, F))
    assert not report.changes
    assert all("StepBatchNorm" in refusal.reason for refusal in report.refusals)
    assert type(same.rnn.norm_ih_l0.steps[0]) is StepBatchNorm


def test_surgery_leaves_the_layer_whole():
    model = nn.Sequential(nn.Linear(F, F), nn.ReLU(), First(bn.BatchNormLSTM(F, H, 3)), nn.Linear(H, 2))
    x = torch.randn(3, 5, F)
    model(x)
    model.eval()
    expected = model(x)
    new, _ = bn.insert(model, x)
    assert type(new[3].layer) is bn.BatchNormLSTM
    fast, _ = bn.accelerate(model, x)
    torch.testing.assert_close(fast(x), expected)
    folded, _ = bn.fold(model, x)
    torch.testing.assert_close(folded(x), expected)


class First(nn.Module):
    """The outputs alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def test_traced_as_one_step():
    graph = torch.fx.symbolic_trace(First(bn.BatchNormGRU(F, H, 2)).eval())
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["layer"]
    x = torch.randn(2, 5, F)
    assert torch.equal(graph(x), graph.layer(x)[0])
    cell = bn.BatchNormLSTMCell(F, H, 2).eval()

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            return self.cell(x, step=1)[0]

    assert torch.equal(torch.fx.symbolic_trace(One())(x[0]), cell(x[0], step=1)[0])


def test_weight_decay_spares_gamma_and_beta():
    model = Reader()
    decayed, others = (group["params"] for group in bn.parameter_groups(model, 0.1))
    assert {id(p) for p in decayed} == {
        id(p) for p in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0, model.head.weight)
    }
    assert any(p is model.rnn.norm_c_l0.weight for p in others)


def test_repr_is_short():
    shown = repr(bn.BatchNormLSTM(F, H, 700, batch_first=True))
    assert "3, 4, batch_first=True, max_length=700" in shown
    assert len(shown.splitlines()) == 6


def test_activation_checkpointing_counts_once():
    from torch.utils.checkpoint import checkpoint

    layer = bn.BatchNormLSTM(F, H, 2)
    x = torch.randn(4, 5, F, requires_grad=True)
    out, _ = checkpoint(layer, x, use_reentrant=False)
    out.backward(torch.randn_like(out))
    assert {stats(norm, step)[2] for norm in layer.children() for step in (0, 1)} == {1}
