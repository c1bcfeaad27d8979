"""The steps that a fold touches, run by themselves before and after it, on demanding inputs."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import Node

from batchnorm.layers import Normalization
from batchnorm.layers.scale_shift import ScaleShift
from batchnorm.surgery import absorbing
from batchnorm.surgery.absorbing import Taken, absorbed, fan_in, multiply_add
from batchnorm.surgery.graph import AFFINE, Trace
from batchnorm.surgery.passing import magnitude
from batchnorm.surgery.plan import Draft, FoldProof, State
from batchnorm.surgery.roles import input_of
from batchnorm.surgery.steps import residual_of, run, sources


@torch.no_grad()
def built(
    model: nn.Module, path: str, norms: Mapping[str, nn.Module], state: State, *, bare: bool
) -> nn.Module:
    """A layer as a state has it.

    Args:
        model: With the original layers.
        path: Of the layer.
        norms: The normalizations of ``model``, by path.
        state: What has become of them.
        bare: The linear map alone, without an activation that a normalization carries.
    """
    layer, taken = model.get_submodule(path), state.taken.get(path, Taken())
    if path not in norms:
        return absorbed(layer, taken) if taken != Taken() else layer
    if path in state.gone:
        return nn.Identity()
    if path in state.alone or taken != Taken():
        line = absorbing.line_of(layer)
        line = line if taken.ahead is None else absorbing.joined(taken.ahead, line)
        line = line if taken.behind is None else absorbing.joined(line, taken.behind)
        return multiply_add(layer, line, bare=bare)
    if bare and isinstance(layer, Normalization) and layer.activation is not None:
        layer = copy.deepcopy(layer)
        layer.activation = None
    return layer


@torch.no_grad()
def prove(
    model: nn.Module,
    trace: Trace,
    norms: Mapping[str, nn.Module],
    draft: Draft,
    before: State,
    after: State,
) -> FoldProof | str:
    """Compare the steps that a draft touches before and after it.

    Args:
        model: With the original layers.
        trace: Of the model, with shapes measured.
        norms: The normalizations of ``model``, by path.
        draft: Says which steps.
        before: State without it.
        after: State with it.

    Returns:
        The proof, or the reason why it must not be carried out.
    """
    called = dict.fromkeys(n.meta["call"].path for n in draft.steps if n.op == "call_module")
    paths = [p for p in called if p in norms or isinstance(model.get_submodule(p), AFFINE)]
    region = _Region(trace, draft, paths)
    if not all(value.meta["dtype"].is_floating_point for value in region.inputs):
        return "its input is not floating point"
    old = {p: built(model, p, norms, before, bare=True) for p in paths}
    new = {p: built(model, p, norms, after, bare=True) for p in paths}
    for layer in new.values():
        if not all(p.isfinite().all() for p in layer.parameters()):
            return f"the folded weights overflow {next(layer.parameters()).dtype}"
    wide_model = _Wide(model)
    wide_old = {p: built(wide_model, p, norms, before, bare=True) for p in paths}
    wide_new = {p: built(wide_model, p, norms, after, bare=True) for p in paths}
    terms = {p: _terms(layer, p in norms) for p, layer in wide_old.items()}
    sizes = [fan_in(m) for m in old.values() if isinstance(m, AFFINE)]
    room = 16 + 4 * max(0, len(region.steps) - 2) + (sum(sizes) + region.window) ** 0.5
    exact = miss = roundoff = 0.0
    # Convolutions may run in TF32, which would hide a wrong fold behind its own rounding.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        for inputs in region.demanding(model):
            roundoff = max(torch.finfo(x.dtype).eps for x in inputs.values())
            wide = {node: x.to("cpu", torch.float64) for node, x in inputs.items()}
            scales = region.run({node: x.abs() for node, x in wide.items()}, terms, absolute=True)
            exact = max(exact, _largest(region.run(wide, wide_old), region.run(wide, wide_new), scales))
            miss = max(miss, _largest(region.run(inputs, old), region.run(inputs, new), scales))
    allowed, wide_allowed = roundoff * room, torch.finfo(torch.float64).eps * room
    if not (exact <= wide_allowed and miss <= allowed):
        return (
            f"undone: folded, it differs by {exact:.1e} in float64 and {miss:.1e} in its own dtype "
            f"where rounding explains {wide_allowed:.1e} and {allowed:.1e}"
        )
    through = tuple(dict.fromkeys(draft.through))
    return FoldProof(", ".join(draft.targets), draft.norm, exact, miss, allowed, draft.forward, through)


class _Wide:
    """The layers of a model in float64 on the CPU, made when they are asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._made: dict[str, nn.Module] = {}

    def get_submodule(self, path: str) -> nn.Module:
        if path not in self._made:
            self._made[path] = copy.deepcopy(self._model.get_submodule(path)).to("cpu", torch.float64)
        return self._made[path]


class _Region:
    """The steps of a draft, in order; what they take from outside; what others see of them."""

    def __init__(self, trace: Trace, draft: Draft, layers: Collection[str]) -> None:
        self.trace, self.layers = trace, layers
        self.steps = [node for node in trace.graph.nodes if node in draft.steps]
        self.outputs = [node for node in self.steps if node not in draft.values]
        needed = dict.fromkeys(value for node in self.steps for value in self._inputs(node))
        self.inputs = [value for value in needed if value not in draft.steps]

    @property
    def window(self) -> int:
        """The most entries that a step without weights puts together."""
        sizes = [(self._inputs(node)[0].meta["shape"], node.meta["shape"]) for node in self.steps]
        return max(torch.Size(a).numel() // max(1, torch.Size(b).numel()) for a, b in sizes)

    def _is_layer(self, node: Node) -> bool:
        return node.op == "call_module" and node.meta["call"].path in self.layers

    def _inputs(self, node: Node) -> list[Node]:
        if not self._is_layer(node):
            return sources(node)
        return [value for value in (input_of(node), self._residual(node)) if value is not None]

    def _residual(self, node: Node) -> Node | None:
        # What is added last is the same before and after.
        return None if node in self.outputs else residual_of(node)

    def run(
        self, inputs: Mapping[Node, Tensor], layers: Mapping[str, nn.Module], *, absolute: bool = False
    ) -> list[Tensor]:
        """The outputs, with given layers; ``absolute`` lets every sum add and nothing cancel."""
        values = dict(inputs)
        for node in self.steps:
            given = {value: values[value] for value in self._inputs(node)}
            if self._is_layer(node):
                made = layers[node.meta["call"].path](given.pop(input_of(node)))
                values[node] = sum(given.values(), start=made)
            else:
                values[node] = (magnitude if absolute else run)(self.trace, node, given)
        return [values[node] for node in self.outputs]

    def demanding(self, model: nn.Module) -> Iterator[dict[Node, Tensor]]:
        """Inputs with borders, large means and small variances."""
        shapes = {value: value.meta["shape"] for value in self.inputs}
        affine = [model.get_submodule(n.meta["call"].path) for n in self.steps if n.op == "call_module"]
        convolutions = [m for m in affine if isinstance(m, AFFINE)]
        if len(self.steps) == 2 and len(convolutions) == 1 and len(self.inputs) == 1:
            shapes = {value: _small(convolutions[0], shape) for value, shape in shapes.items()}
        for kind in range(4):
            generator = torch.Generator().manual_seed(kind)
            yield {
                value: _demanding(kind, shape, value.meta["dtype"], generator).to(value.meta["device"])
                for value, shape in shapes.items()
            }


def _terms(layer: nn.Module, is_norm: bool) -> nn.Module:
    """A layer that sums the absolute values of all terms, given the absolute values of an input."""
    made = copy.deepcopy(layer)
    if is_norm and not isinstance(layer, nn.Identity | ScaleShift):
        scale, shift = absorbing.line_of(layer)
        beta = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach()
        made = multiply_add(layer, (scale, (shift - beta).abs() + beta.abs()), bare=True)
    for parameter in made.parameters():
        parameter.abs_()
    return made


def _small(affine: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as telling as ``shape`` and cheaper: two examples, all borders, a few positions inside."""
    if isinstance(affine, nn.Linear):
        return (2, *shape[1:])
    if len(shape) != affine.weight.dim():
        return shape
    reach = [d * (k - 1) + 1 for d, k in zip(affine.dilation, affine.kernel_size, strict=True)]
    pads = affine.padding if isinstance(affine.padding, tuple) else reach
    sizes = [
        min(size, 2 * max(r, p + 1) + 3 * s)
        for size, r, p, s in zip(shape[2:], reach, pads, affine.stride, strict=True)
    ]
    return (2, shape[1], *sizes)


def _demanding(kind: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == 3 and len(shape) > 2:
        inside = (slice(None), slice(None), *[slice(1, -1)] * (len(shape) - 2))
        noise = torch.ones(shape, dtype=torch.float64)
        noise[inside] = 0
    # Half precision overflows where others only round.
    far = 30.0 if dtype == torch.float16 else 1e3
    return (noise + far if kind == 1 else noise * 1e-3 if kind == 2 else noise).to(dtype)


def _largest(before: Sequence[Tensor], after: Sequence[Tensor], scales: Sequence[Tensor]) -> float:
    worst = 0.0
    for old, new, scale in zip(before, after, scales, strict=True):
        if not old.numel():
            continue
        gap = (old - new).where(old.isfinite(), torch.zeros_like(old)).to("cpu", torch.float64).abs()
        share = (gap / scale.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
        worst = max(worst, share if share == share else float("inf"))
    return worst
