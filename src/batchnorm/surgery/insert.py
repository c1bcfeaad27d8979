"""Batch normalization put into a network that has none: Algorithm 2, lines 1 to 5."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from batchnorm.distributed import alone
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.surgery import biases, nonlinearities, patterns, places
from batchnorm.surgery.graph import Trace
from batchnorm.surgery.identity import prove
from batchnorm.surgery.install import Site, put_all
from batchnorm.surgery.models import as_args, check_example, check_model, copied
from batchnorm.surgery.outcome import Change, Note, Refusal, SurgeryReport
from batchnorm.surgery.pieces import traces

_KINDS = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
_WHOLE = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
    nn.RNNCellBase,
)


@alone()  # what is tried out here is no other rank's business
def insert(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    *,
    before: nonlinearities.Choice | None = None,
    after: nonlinearities.Choice = (),
    only: patterns.Patterns = None,
    except_: patterns.Patterns = None,
) -> tuple[nn.Module, SurgeryReport]:
    """Put batch normalization directly before (or after) nonlinearities that follow affine layers.

    The kind and the dimension follow from the affine layer's output: ``BatchNorm1d``, ``2d`` or
    ``3d`` after convolutions, ``BatchNorm1d`` after ``Linear`` on (N, C), and
    ``BatchNorm1d(channel_dim=-1)`` after ``Linear`` on (N, …, C). A bias is removed where it
    provably has no effect any more; β takes its role. The result starts out like a freshly
    initialized batch-normalized network: train it, or at least recalibrate it, before use.

    Args:
        model: Not changed; in either mode.
        example: An input tensor, or a tuple of positional arguments, on the model's device.
        before: Nonlinearities that get one directly before them: ``"all"``, names such as
            ``"relu"``, classes such as ``nn.ReLU``, functions such as ``torch.tanh``, module
            classes of your own, or several of these. All known ones when neither this nor
            ``after`` is given.
        after: Those that get one directly after them instead.
        only: Glob patterns; a nonlinearity is served only if its path, the path of the module
            that calls it as a function, or that of its affine layer matches one.
        except_: Glob patterns likewise; what matches is left alone.

    Returns:
        The new model and the report: every change, everything left alone with its reason, and
        the largest output difference when the new layers are set to do nothing, relative to the
        largest output, in float64 where the model runs in it.

    Raises:
        TypeError: ``model`` or ``example`` has the wrong type.
        ValueError: A nonlinearity is unknown, a pattern matches nothing, the model cannot be
            copied, or it fails or is not finite on the example.
        RuntimeError: The result would compute something else than the model; nothing is returned.

    Source: Ioffe & Szegedy (2015), Algorithm 2 and section 3.2.
    """
    check_model(model, "insert")
    args = as_args(example)
    before_kinds, after_kinds, own = _choices(before, after)
    check_example(model, args)
    found, refusals, called = traces(model, args, own)
    only, except_ = patterns.as_list(only), patterns.as_list(except_)
    sites: list[Site] = []
    seen: set[str] = set()
    for trace in found:
        new_sites, left = _survey(trace, before_kinds, after_kinds, own, only, except_, seen)
        sites += new_sites
        refusals += left
    patterns.check([*only, *except_], seen, "nonlinearity, caller of one or affine layer before one")
    refusals += _unreached(model, found, called, before_kinds | after_kinds, own)

    new = copied(model)
    remarks = put_all(new, sites, own)
    refusals += [Refusal(s.trace.describe(s.nonlinearity), s.reason) for s in sites if s.reason]
    sites = [site for site in sites if not site.reason]
    removed, kept = biases.remove(new, found, [site.place for site in sites])
    miss = None
    if sites:
        miss, needed = prove(model, new, args, sites, removed, bool(remarks))
        removed = [path for path in removed if path not in needed]
        kept |= dict.fromkeys(needed, "kept: evaluation has a use for it that training has not")
    changes = [_change(site) for site in sites]
    changes += [
        Change(f"{path}.bias", "removed: the normalization subtracts it, β takes its role")
        for path in removed
    ]
    notes = [Note(path, remark) for path, remark in remarks.items()]
    notes += [Note(s.path, _single(s)) for s in sites if _single(s)]
    refusals += [Refusal(f"{path}.bias", reason) for path, reason in kept.items()]
    return new, SurgeryReport(tuple(changes), tuple(refusals), tuple(notes), miss)


def _choices(
    before: nonlinearities.Choice | None, after: nonlinearities.Choice
) -> tuple[frozenset[str], frozenset[str], tuple[type, ...]]:
    after_kinds, own_after = nonlinearities.chosen(after, "after")
    if before is None:
        before = () if after_kinds else "all"
    before_kinds, own_before = nonlinearities.chosen(before, "before")
    both = before_kinds & after_kinds
    if both and before != "all":
        raise ValueError(f"{', '.join(sorted(both))} is in before= and in after=: choose one side for each")
    return before_kinds - after_kinds, after_kinds, own_before + own_after


def _survey(
    trace: Trace,
    before_kinds: frozenset[str],
    after_kinds: frozenset[str],
    own: tuple[type, ...],
    only: Sequence[str],
    except_: Sequence[str],
    seen: set[str],
) -> tuple[list[Site], list[Refusal]]:
    """Sites of one trace, and what is left alone in it; ``seen`` collects names that patterns can match."""
    sites: list[Site] = []
    refusals: list[Refusal] = []
    edges: set[tuple[Node, tuple[Node, ...]]] = set()

    def kind_of(node: Node) -> str | None:
        return nonlinearities.kind_of(node, trace.module(node), own)

    for node in trace.graph.nodes:
        kind = kind_of(node)
        if kind not in before_kinds | after_kinds:
            continue
        find = places.after if kind in after_kinds else places.before
        wanted, reason = find(trace, node, lambda n: kind_of(n) is not None)
        if not reason and kind in before_kinds:
            reason = _overwrites(trace, node)
        own_name = node.meta["call"].path
        if reason:
            seen.add(own_name)
            refusals.append(Refusal(trace.describe(node), reason))
            continue
        for place in wanted:
            names = {own_name, place.affine.meta["call"].path}
            seen |= names
            if (place.producer, place.consumers) in edges:
                continue
            reason = patterns.excluded(names, only, except_)
            layer = None if reason else _layer(trace, place)
            if isinstance(layer, nn.Module):
                edges.add((place.producer, place.consumers))
                sites.append(Site(trace, place, layer, node))
            else:
                refusals.append(Refusal(trace.describe(node), reason or str(layer)))
    return sites, refusals


def _overwrites(trace: Trace, node: Node) -> str:
    """Why a nonlinearity that works in place must keep its input, if it must."""
    if not nonlinearities.works_in_place(node, trace.module(node)):
        return ""
    order = {n: i for i, n in enumerate(trace.graph.nodes)}
    value = places.input_of(node)
    if value is not None and any(order[user] > order[node] for user in value.users):
        return "it works in place, and the value it overwrites is used again: use its result instead"
    return ""


def _layer(trace: Trace, place: places.Place) -> nn.Module | str:
    """The normalization for a place, or the reason why there can be none."""
    shape, dtype = place.producer.meta["shape"], place.producer.meta["dtype"]
    device = place.producer.meta["device"]
    affine = trace.module(place.affine)
    weight = getattr(affine, "weight", None)
    if isinstance(weight, Tensor):
        dtype, device = weight.dtype, weight.device
    if not dtype.is_floating_point:
        return f"its input is {dtype}, which cannot be normalized"
    name = type(affine).__name__ if affine is not None else getattr(place.affine.target, "__name__", "")
    spatial = places.spatial_dims(trace, place.affine)
    if spatial == 0:
        if len(shape) < 2:
            return f"the input of {name} has no batch dimension: give an example of shape (N, C) or (N, …, C)"
        last = {"channel_dim": -1} if len(shape) > 2 else {}
        return BatchNorm1d(shape[-1], device=device, dtype=dtype, **last)
    if len(shape) != spatial + 2:
        return f"the input of {name} has no batch dimension: give an example of {spatial + 2} dimensions"
    return _KINDS[spatial](shape[1], device=device, dtype=dtype)


def _change(site: Site) -> Change:
    describe, place = site.trace.describe, site.place
    layer = site.layer
    last = ", channel_dim=-1" if layer.channel_dim == -1 else ""
    kind = f"{type(layer).__name__}({layer.num_features}{last})"
    side = f"{place.because}, for" if place.because else "after" if place.after else "before"
    return Change(site.path, f"{kind} on {describe(place.affine)}, {side} {describe(site.nonlinearity)}")


def _single(site: Site) -> str:
    shape = site.place.producer.meta["shape"]
    if math.prod(shape) != site.layer.num_features:
        return ""
    return f"the example gives one value per channel (shape {shape}); in training it needs a larger batch"


def _unreached(
    model: nn.Module,
    found: Sequence[Trace],
    called: Collection[str],
    kinds: frozenset[str],
    own: tuple[type, ...],
) -> list[Refusal]:
    """Nonlinearities, and layers of torch's with some inside, that no trace shows."""
    traced = {call.path for trace in found for call in trace.calls}
    refusals = []
    whole: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in whole):
            continue
        if isinstance(module, _WHOLE):
            whole.append(path)
            refusals.append(
                Refusal(path, f"nn.{type(module).__name__} is one layer of torch's and is left whole")
            )
        elif nonlinearities.kind_of_module(module, own) in kinds and path not in traced:
            seen = (
                "it runs inside a forward that cannot be traced"
                if path in called
                else "the example does not reach it"
            )
            refusals.append(Refusal(path, seen))
    return refusals
