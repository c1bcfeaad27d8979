"""The format ONNX: translated by torch.onnx, stripped of what names this machine, run by onnxruntime."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from batchnorm.deploy.compare import Runner
from batchnorm.deploy.gate import where
from batchnorm.deploy.program import quiet

MAX_BYTES = 2**31 - 1
"""Of a protobuf message, and so of a model in one file."""

MISSING = 'ONNX needs onnx, onnxscript and onnxruntime: pip install "batchnorm[export]"'


def check_installed() -> None:
    """Fail early, and in one line, without the packages of the extra.

    Raises:
        ImportError: One is missing.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(f"{MISSING} ({error})") from error


def write_onnx(program: Any, metadata: Mapping[str, str]) -> bytes:
    """The content of an .onnx file.

    Args:
        program: Exported.
        metadata: Entries of the file's metadata_props.

    Raises:
        ValueError: An operator has no translation (operator and layer are named), or the model has more
            than 2 GiB.
    """
    try:
        with quiet(), _silent():
            translated = torch.onnx.export(program, (), dynamo=True, external_data=False, verbose=False)
        assert translated is not None
        proto = translated.model_proto
    except Exception as error:  # the exporter's own kinds are private
        raise _explained(error, program) from error
    _tidy(proto)
    if not metadata.keys().isdisjoint(entry.key for entry in proto.metadata_props):
        raise ValueError(f"metadata may not name {[entry.key for entry in proto.metadata_props]}")
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    if proto.ByteSize() > MAX_BYTES:
        raise ValueError(
            f"the model has {proto.ByteSize():,} bytes, and one ONNX file holds at most {MAX_BYTES:,}: "
            'use format="pt2"'
        )
    return proto.SerializeToString(deterministic=True)


def onnx_runner(path: Path) -> Runner:
    """What runs an .onnx file on the CPU.

    Raises:
        ValueError: onnxruntime refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # pybind's kinds, of which there are many
        raise ValueError(f"onnxruntime cannot run the file: {error}") from error
    names = [given.name for given in session.get_inputs()]

    def run(args: tuple[Any, ...]) -> list[Tensor]:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        try:
            found = session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
        except Exception as error:
            raise ValueError(f"onnxruntime fails on the file: {error}") from error
        return [torch.from_numpy(np.array(array)) for array in found]

    return run


def _tidy(proto: Any) -> None:
    """Readable names of what goes in and out, and none of the source's lines and folders."""
    graph = proto.graph
    for holder in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del holder.metadata_props[:]
    for function in proto.functions:
        for node in function.node:
            del node.metadata_props[:]
    for kind, values in (("input", graph.input), ("output", graph.output)):
        if len(values) == 1:
            _rename(graph, values[0].name, kind)
    first = next((d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim if d.dim_param), "")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if first and dim.dim_param == first:
                dim.dim_param = "batch"


def _rename(graph: Any, old: str, new: str) -> None:
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    if new in taken or any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
    for value in (*graph.input, *graph.output):
        if value.name == old:
            value.name = new


def _explained(error: Exception, program: Any) -> Exception:
    text, at = "", error
    while at is not None:
        text, at = f"{text}\n{at}", at.__cause__ or at.__context__  # type: ignore[assignment]
    found = re.search(r"translating node %(\w+) .*?target=torch\.ops\.([\w.]+)\]", text)
    if found is None:
        found = re.search(r"No ONNX function found for <OpOverload\(op='()([\w.]+)'", text)
    if found is None:
        return ValueError(f"torch.onnx cannot translate the model: {type(error).__name__}: {error}")
    name, operator = found.groups()
    layer = _layer(program, name, operator)
    layer = f" (in layer {layer!r})" if layer else ""
    return ValueError(
        f"ONNX has no operator for {operator}{layer}. Write that part with other operations, leave it to the "
        'program that runs the file, or use format="pt2", which keeps all of PyTorch\'s operators'
    )


def _layer(program: Any, name: str, operator: str) -> str:
    """Where the node of an operator comes from, as it is or as one that others are made of."""
    with quiet():
        graphs = (program.graph, program.run_decompositions().graph)
    for graph in graphs:
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        for node in nodes:
            if (node.name == name or operator in str(node.target)) and "nn_module_stack" in node.meta:
                return where(node)
    return ""


@contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's remarks that a package is missing which the model does not use."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
