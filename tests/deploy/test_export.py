"""bn.export: what the gate stops, what the written file computes, and what stays when something fails."""

import json
import re
import zipfile

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn
from batchnorm.deploy.compare import resized

onnx = pytest.importorskip("onnx", reason='pip install "batchnorm[export]"')
ort = pytest.importorskip("onnxruntime", reason='pip install "batchnorm[export]"')

FORMATS = ["onnx", "pt2"]


def network(activation="relu"):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        bn.BatchNorm2d(4, activation=activation),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(54, 5),
    )


def trained(model=None):
    model = network() if model is None else model
    model.train()
    for _ in range(3):
        model(3 + 2 * torch.randn(16, 3, 8, 8))
    return model.eval()


def session_of(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", FORMATS)
def test_file_computes_what_the_model_does_at_any_batch_size(tmp_path, kind):
    model, path = trained(), tmp_path / f"net.{kind}"
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = bn.export(
        model,
        X,
        path,
        classes=list("abcde"),
        normalization={"range": [0, 1], "mean": [0.5]},
        provenance={"recipe": {"seed": 3}},
    )
    assert [c.batch_size for c in report.comparisons] == [2, 1, 3, 4]
    assert all(c.relative <= c.allowed < 1e-4 for c in report.comparisons)
    assert report.largest == max(c.relative for c in report.comparisons)
    assert report.inputs == (("batch", 3, 8, 8),)
    assert report.num_norms == 2
    assert "bn.fold" in str(report)
    assert report.num_bytes == path.stat().st_size
    assert not model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    many = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        expected = model(many)
    if kind == "onnx":
        session = session_of(path)
        got = torch.from_numpy(session.run(["output"], {"input": many.numpy()})[0])
        metadata = session.get_modelmeta().custom_metadata_map
        assert session.get_inputs()[0].shape == ["batch", 3, 8, 8]
    else:
        extra = {"metadata.json": ""}
        got = torch.export.load(path, extra_files=extra).module()(many)
        metadata = json.loads(extra["metadata.json"])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert json.loads(metadata["classes"]) == list("abcde")
    assert json.loads(metadata["normalization"]) == {"range": [0, 1], "mean": [0.5]}
    about = json.loads(metadata["provenance"])
    assert about["recipe"] == {"seed": 3}
    assert (about["batchnorm"], about["torch"]) == (bn.__version__, torch.__version__)


@pytest.mark.parametrize("kind", FORMATS)
def test_file_holds_no_paths_of_this_machine(tmp_path, kind):
    path = tmp_path / f"net.{kind}"
    bn.export(trained(), X, path)
    content = path.read_bytes()
    if kind == "pt2":
        with zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    for word in (b"/batchnorm/layers/", b"site-packages", bytes(tmp_path.parent), b'File "'):
        assert word not in content


def test_folded_model_has_no_normalization_left(tmp_path):
    folded, _ = bn.fold(trained(), X)
    report = bn.export(folded, X, tmp_path / "net.onnx")
    assert report.num_norms == 0
    kinds = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds


class Several(nn.Module):
    """Two batched inputs, one that is not, a number; a dict comes out."""

    def __init__(self):
        super().__init__()
        self.norm = bn.BatchNorm1d(4, channel_dim=-1)

    def forward(self, x, y, table, power=2):
        z = self.norm(x) ** power + y.unsqueeze(1)
        return {"z": z @ table, "mean": z.mean(dim=(1, 2))}


@pytest.mark.parametrize("kind", FORMATS)
def test_several_inputs_and_outputs(tmp_path, kind):
    model = Several()
    model(torch.randn(8, 5, 4), torch.randn(8, 4), torch.randn(4, 3))
    args = (torch.randn(6, 5, 4), torch.randn(6, 4), torch.randn(4, 3), 3)
    report = bn.export(model.eval(), args, tmp_path / f"m.{kind}")
    assert report.inputs == (("batch", 5, 4), ("batch", 4), (4, 3))
    assert [c.batch_size for c in report.comparisons] == [6, 1, 3, 12]


def test_a_batch_of_one_as_example_is_no_constant(tmp_path):
    report = bn.export(trained(), X[:1], tmp_path / "m.pt2")
    assert [c.batch_size for c in report.comparisons] == [1, 3, 2]


def test_other_rows_than_those_of_the_example_come_first():
    (x, table), first = resized((torch.arange(4.0), torch.zeros(3)), 6), torch.tensor([3.0, 0, 1, 2, 3, 0])
    assert torch.equal(x, first)
    assert table.shape == (3,)


# The gate.


def spoilt(name):
    model = trained()
    if name == "training":
        model.train()
    elif name == "one layer in training":
        model[3].train()
    elif name == "dropout in training":
        model[6].train()
    elif name == "batch statistics":
        model[3] = nn.BatchNorm2d(6, track_running_stats=False).eval()
    elif name == "nan statistics":
        model[3].running_var[2] = torch.nan
    elif name == "infinite mean":
        model[1].running_mean[0] = torch.inf
    elif name == "negative variance":
        model[3].running_var[2] = -1e-3
    elif name == "nan weight":
        with torch.no_grad():
            model[0].weight[0, 0, 0, 0] = torch.nan
    elif name == "never updated":
        model = network().eval()
    elif name == "averaged weights":
        average = AveragedModel(model)
        average.update_parameters(trained())
        model = average.eval()
    return model


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("training", r"training: \(model\), 1, 3, 6: in training mode.*Cure: model\.eval\(\)"),
        ("one layer in training", r"training: 3: in training mode"),
        ("dropout in training", r"training: 6: in training mode"),
        ("batch statistics", r"batch-statistics: 3: no running statistics.*track_running_stats=True"),
        ("nan statistics", r"not-finite: 3\.running_var: .*bn\.recalibrate"),
        ("infinite mean", r"not-finite: 1\.running_mean"),
        ("negative variance", r"not-finite: 3\.running_var"),
        ("nan weight", r"not-finite: 0\.weight: .*an older checkpoint"),
        ("never updated", r"never-updated: 1, 3: .*never trained.*bn\.recalibrate\(model, batches\)"),
        ("averaged weights", r"averaged-weights: \(model\): .*bn\.recalibrate\(averaged, batches\)"),
    ],
)
def test_gate_stops_before_writing_and_names_layer_and_cure(tmp_path, name, says):
    with pytest.raises(ValueError, match=says):
        bn.export(spoilt(name), X, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_train_mode_batch_norm_is_not_exported_without_a_word(tmp_path):
    """The row of peers.md: torch.export takes a train-mode BN, and its module refuses .eval()."""
    model = network().train()
    silent = torch.export.export(model, (X,)).module()
    with pytest.raises(NotImplementedError):
        silent.eval()
    with pytest.raises(ValueError, match="training: "):
        bn.export(model, X, tmp_path / "m.pt2")


class CallsFunctions(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.inner = nn.Module()
        self.what = what
        self.inner.forward = self.apply_it

    def apply_it(self, x):
        if self.what == "dropout":
            return nn.functional.dropout(x, 0.5)
        if self.what == "native":
            return torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0]
        return nn.functional.batch_norm(x, None, None, training=True)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("what", ["batch_norm", "native", "dropout"])
def test_a_forward_that_calls_training_functions_is_found_in_the_graph(tmp_path, what):
    with pytest.raises(ValueError, match=r"training: inner: its forward calls \w+ in\s+training mode"):
        bn.export(CallsFunctions(what).eval(), X, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_averaged_weights_pass_once_recalibrated_until_the_next_update(tmp_path):
    model, batches = trained(), [3 + 2 * torch.randn(16, 3, 8, 8) for _ in range(4)]
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    average.eval()
    bn.recalibrate(average, batches)
    assert bn.export(average, X, tmp_path / "a.pt2").allowed == ()
    average.update_parameters(trained())
    average.eval()
    with pytest.raises(ValueError, match="averaged-weights"):
        bn.export(average, X, tmp_path / "b.pt2")
    report = bn.export(average, X, tmp_path / "b.pt2", allow=["averaged-weights"])
    assert [problem.kind for problem in report.allowed] == ["averaged-weights"]
    assert "let through: averaged-weights" in str(report)


def test_with_data_statistics_of_other_weights_are_found(tmp_path):
    torch.manual_seed(0)
    model, batches = trained(), [3 + 2 * torch.randn(16, 3, 8, 8) for _ in range(8)]
    bn.recalibrate(model, batches)
    assert bn.export(model, X, tmp_path / "a.pt2", batches=batches).num_bytes
    with torch.no_grad():
        model[2].weight.mul_(30)
    bn.export(model, X, tmp_path / "b.pt2")  # no look at the model alone can tell
    with pytest.raises(ValueError, match=r"changed-weights: 3: .*bn\.recalibrate"):
        bn.export(model, X, tmp_path / "c.pt2", batches=batches)
    assert not (tmp_path / "c.pt2").exists()


def test_frozen_layers_in_training_mode_are_fixed_and_pass(tmp_path):
    model = trained()
    bn.freeze(model)
    model[1].train()
    assert bn.export(model, X, tmp_path / "m.pt2").num_bytes


def test_never_updated_may_be_meant(tmp_path):
    model = network().eval()
    assert bn.export(model, X, tmp_path / "m.pt2", allow=["never-updated"]).num_bytes
    with pytest.raises(ValueError, match="allow may hold"):
        bn.export(model, X, tmp_path / "n.pt2", allow=["training"])


# What cannot be written, and what stays.


class Solves(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(4, 4), Eigen())

    def forward(self, x):
        return self.head(x)


class Eigen(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x.unsqueeze(1) * x.unsqueeze(2) + torch.eye(4)).real


def test_operator_that_onnx_lacks_is_named_with_its_layer(tmp_path):
    with pytest.raises(
        ValueError, match=r"ONNX has no operator for aten\.linalg_eig\w*.*layer 'head\.1'.*pt2"
    ):
        bn.export(Solves().eval(), torch.randn(2, 4), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return x + self.count


def test_a_forward_for_one_batch_size_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)batches of any size.*dynamic_batch=False"):
        bn.export(FixedBatch().eval(), X, tmp_path / "m.pt2")
    report = bn.export(FixedBatch().eval(), X, tmp_path / "m.pt2", dynamic_batch=False)
    assert [c.batch_size for c in report.comparisons] == [2]
    assert report.inputs == ((2, 3, 8, 8),)


def test_a_forward_that_branches_on_values_cannot_be_captured(tmp_path):
    with pytest.raises(ValueError, match="captured as one graph"):
        bn.export(Branches().eval(), X, tmp_path / "m.pt2")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_computes_something_else_gets_no_name(tmp_path, kind):
    path = tmp_path / f"m.{kind}"
    path.write_bytes(b"older")
    with pytest.raises(ValueError, match=r"does not compute what the model does.*differs by"):
        bn.export(Noise().eval(), X, path, force=True)
    assert path.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"older")
    with pytest.raises(FileExistsError, match="kept"):
        bn.export(trained(), X, path)
    assert path.read_bytes() == b"older"
    report = bn.export(trained(), X, path, force=True)
    assert path.stat().st_size == report.num_bytes > 1000


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        pytest.param("m.bin", {}, ValueError, "ends in neither .onnx nor .pt2", id="ending"),
        pytest.param("m.pt2", {"format": "tflite"}, ValueError, "'onnx', 'pt2', got 'tflite'", id="format"),
        pytest.param("no/m.pt2", {}, FileNotFoundError, "no such folder", id="no folder"),
        pytest.param(".", {"format": "pt2"}, IsADirectoryError, "folder", id="a folder"),
        pytest.param("m.pt2", {"normalization": {"mean": {1}}}, ValueError, "as JSON", id="not JSON"),
    ],
)
def test_what_is_refused(tmp_path, name, options, error, says):
    with pytest.raises(error, match=says):
        bn.export(trained(), X, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("batchnorm.files.os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="cannot be written to"):
        bn.export(trained(), X, tmp_path / "m.pt2")


def test_a_failing_example_is_said_so(tmp_path):
    with pytest.raises(ValueError, match="fails on the example"):
        bn.export(trained(), torch.randn(2, 4, 8, 8), tmp_path / "m.pt2")
    with pytest.raises(TypeError, match="example must be"):
        bn.export(trained(), [X], tmp_path / "m.pt2")


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=re.escape('pip install "batchnorm[export]"')):
        bn.export(trained(), X, tmp_path / "m.onnx")
