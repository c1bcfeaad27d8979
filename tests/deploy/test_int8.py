"""A folded model in int8 by onnxruntime, calibrated with the batches of recalibration."""

import math

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.data import load, to_input

ort = pytest.importorskip("onnxruntime", reason='pip install "batchnorm[export]"')
onnx = pytest.importorskip("onnx", reason='pip install "batchnorm[export]"')

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static  # noqa: E402


class Batches(CalibrationDataReader):
    def __init__(self, batches):
        self.batches = iter(batches)

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch.numpy()}


def accuracy(path, images, labels):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": images.numpy()})[0]
    return float((logits.argmax(1) == labels).mean()), session


def test_int8_of_a_folded_model_on_digits(tmp_path):
    data = load("digits", size=16)
    images = to_input(torch.from_numpy(data.train_images)).unsqueeze(1)
    labels = torch.from_numpy(data.train_labels)
    test = to_input(torch.from_numpy(data.test_images)).unsqueeze(1)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for _ in range(120):
        chosen = torch.randint(len(images), (64,), generator=order)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()

    batches = list(images.split(64))
    bn.recalibrate(model.eval(), batches)
    deployed, proof = bn.fold(model, images[:4])
    assert len(proof.folds) == 2
    bn.export(deployed, images[:4], tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Batches(batches),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    before, _ = accuracy(tmp_path / "float.onnx", test, data.test_labels)
    after, session = accuracy(tmp_path / "int8.onnx", test, data.test_labels)
    with torch.no_grad():
        ours = float((model(test).argmax(1).numpy() == data.test_labels).mean())
    assert before == ours > 0.95
    assert after > before - 0.01
    initializers = onnx.load(tmp_path / "int8.onnx").graph.initializer
    in_int8 = [math.prod(i.dims) for i in initializers if i.data_type == onnx.TensorProto.INT8]
    assert sum(in_int8) >= 12 * 9 + 24 * 12 * 9 + 24 * 16 * 10
    assert session.get_inputs()[0].shape[0] == "batch"
