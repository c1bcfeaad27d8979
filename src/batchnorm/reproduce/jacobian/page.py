"""The report: section 3.3's conjecture beside what was measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.report import Claim, Page, Section, Table, draw, figure_of, write_page
from batchnorm.reproduce.jacobian.charts import NAMES, depth_chart, gradient_chart, spectrum_chart
from batchnorm.reproduce.jacobian.experiment import KINDS, NETWORKS
from batchnorm.reproduce.jacobian.job import PERCENTILES

INTRO = """\
Section 3.3 of Ioffe & Szegedy (2015) conjectures that Batch Normalization may lead layers' Jacobians to have
singular values close to 1: take two consecutive layers with normalized inputs and the map between them,
ẑ = F(x̂); if both are Gaussian and uncorrelated with unit covariance and F(x̂) ≈ J x̂, then I = J Jᵀ.

Data: {data}, binary images. Networks, fully connected: the paper's 784-100-100-100-10 ({steps:,} steps of
plain SGD at rate {rate:g}) and one of {depth} hidden layers of 100 ({deep_steps:,} steps at rate
{deep_rate:g}); Gaussian weights of deviation {stds}; {seeds} seeds. Figures are medians over seeds unless a
range is given.
"""

DEFINITION = """\
The Jacobian is that of F: from x̂ of one hidden layer, normalized and before γ and β, through γ, β and the
nonlinearity, W and the normalization, to x̂ of the next. Without BN, from W h + b to W h + b. Of single
examples with the statistics held fixed, as in the paper's F, which is a map between vectors and whose
statistics are a population's: {examples} examples of a batch of {batch_size}, all their singular values
together.

A batch also meets in its statistics. Through them the Jacobian of a batch as one vector is what its examples
do by themselves, less the common shift of every unit and the stretch along x̂: two of {whole_batch}
directions of a unit, in a batch of {whole_batch}, become zero (the second but for eps), and no singular value
can grow.

In the tables, loss is that of the batch whose Jacobians are taken, in nats; zero, the share of singular
values that are none; condition, the largest over the smallest.

For comparison, a large square matrix of independent Gaussians with root mean square 1 has {share:.0%} of its
singular values in [0.5, 2], 90 % from {low:.2f} to {high:.2f}. Plots, and the last two tables here, are of
networks that start from deviation {headline_std:g}.
"""

DEPTH = """\
The gradient of the loss in x̂ of each layer, for a batch as training sees it. For a wide layer of independent
weights after BN the gradient grows, a layer back, by sqrt(E[g′²]/Var[g]), g being the nonlinearity of a
standard Gaussian: {growth}. It is never below 1, and 1 only for straight lines (the Poincaré inequality), and
the scale of the weights has no part in it. Yang et al. (2019), A Mean Field Theory of Batch Normalization,
derive it for ReLU. Curves end where a gradient falls below 10⁻¹².
"""


def write_report(summary: Mapping[str, Any], out: Path, environment: Mapping[str, object]) -> Path:
    """Write the pictures and ``report.html`` into ``out``; returns the page's path.

    Raises:
        OSError: A file cannot be written.
    """
    settings, gaussian = summary["experiment"], summary["gaussian"]
    sections = [Section("The claims", claims=claims(summary))]
    figures, tables = [], []
    for activation in settings["activations"]:
        chart = spectrum_chart(summary, activation)
        draw(chart, out / f"{activation}-singular-values.png", size=(8, 4.2))
        figures.append(figure_of(chart.title, chart))
        tables.append(spectrum_table(summary, "paper", activation))
    text = DEFINITION.format(**settings, share=gaussian["share"], low=gaussian["5th"], high=gaussian["95th"])
    tables += [whole_table(summary), conditions_table(summary)]
    sections.append(Section("The paper's network", text, figures=figures, tables=tables))
    figures, tables = [], []
    for activation in settings["activations"]:
        for name, chart in (
            ("gradients", gradient_chart(summary, activation)),
            ("depth", depth_chart(summary, activation)),
        ):
            draw(chart, out / f"{activation}-{name}.png", size=(9, 4.2))
            figures.append(figure_of(chart.title, chart))
        tables.append(gradient_table(summary, activation))
        tables.append(spectrum_table(summary, "deep", activation))
    growth = ", ".join(f"{value:.3f} for {name}" for name, value in summary["growth_at_start"].items())
    sections.append(
        Section(f"{settings['depth']} layers", DEPTH.format(growth=growth), figures=figures, tables=tables)
    )
    stds = ", ".join(f"{std:g}" for std in settings["init_stds"])
    page = Page(
        "Singular values of layers' Jacobians", INTRO.format(**settings, stds=stds), sections, environment
    )
    return write_page(page, out / "report.html")


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """Section 3.3's conjecture, its conditions and its consequence, with what was measured."""
    activations = summary["experiment"]["activations"]
    made = [_near_1(summary, activation) for activation in activations]
    made += [_scale(summary)]
    made += [_conditions(summary, activation) for activation in activations]
    made += [_level(summary, activation) for activation in activations]
    return made


def found_at(
    summary: Mapping[str, Any], which: str, activation: str, kind: str
) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Initial deviation and what was found, for all initial deviations and points."""
    for network in summary["networks"][f"{which}/{activation}/{kind}"]:
        for point in network["points"]:
            yield network["init_std"], point


def _near_1(summary: Mapping[str, Any], activation: str) -> Claim:
    values = {
        kind: {
            name: [
                value
                for _, point in found_at(summary, "paper", activation, kind)
                for value in point["singular"][name]
            ]
            for name in ("share", "rms", "percentiles")
        }
        for kind in KINDS
    }
    share, rms = values["bn"]["share"], values["bn"]["rms"]
    ends = np.array(values["bn"]["percentiles"], dtype=float)[:, [0, -1]]
    level = min(rms) > 0.75 and max(rms) < 1.33 and min(share) > max(values["plain"]["share"])
    gaussian = summary["gaussian"]["share"]
    return Claim(
        f"Layer Jacobians have singular values close to 1: {activation}, the paper's network.",
        "a conjecture: J Jᵀ = I",
        f"{_to(share, '.0%')} in [0.5, 2] (without BN {_to(values['plain']['share'], '.0%')}); 90 % within "
        f"{ends[:, 0].min():.2f} to {ends[:, 1].max():.2f}; root mean square {_to(rms, '.2f')} (without "
        f"{_to(values['plain']['rms'], '.2f')})",
        "holds" if min(share) >= 0.9 else "partly" if level else "misses",
        f"all layers, points of training, initial deviations; independent Gaussians: {gaussian:.0%}; partly: "
        "root mean squares from 0.75 to 1.33 and always more in [0.5, 2] than without",
    )


def _scale(summary: Mapping[str, Any]) -> Claim:
    worst = dict.fromkeys(NETWORKS, 0.0)
    for which in NETWORKS:
        for activation in summary["experiment"]["activations"]:
            firsts = [
                np.array(network["points"][0]["singular"]["rms"])
                for network in summary["networks"][f"{which}/{activation}/bn"]
            ]
            worst[which] = max(worst[which], *(float(np.abs(one / firsts[0] - 1).max()) for one in firsts))
    stds = ", ".join(f"{std:g}" for std in summary["experiment"]["init_stds"])
    return Claim(
        "The scale of the weights does not affect the layer Jacobian.",
        "follows from BN(aWu) = BN(Wu)",
        f"root mean squares of layers differ by at most {worst['paper']:.1e} (the paper's network) and "
        f"{worst['deep']:.1e} ({summary['experiment']['depth']} layers) between initial deviations {stds}",
        "holds" if max(worst.values()) < 0.01 else "partly" if worst["paper"] < 0.01 else "misses",
        "before training; eps makes the first difference, and depth enlarges it, as it does any",
    )


def _conditions(summary: Mapping[str, Any], activation: str) -> Claim:
    rows = [one for _, point in found_at(summary, "paper", activation, "bn") for one in point["conditions"]]
    of = {name: [row[name] for row in rows] for name in rows[0]}
    met = min(of["linear"]) > 0.9 and min(of["directions"]) > 90 and max(map(abs, of["kurtosis"])) < 0.5
    some = min(of["linear"]) > 0.9 or max(map(abs, of["kurtosis"])) < 0.5
    return Claim(
        f"x̂ and ẑ are Gaussian and uncorrelated and F is straight: {activation}.",
        "the conditions of the conjecture",
        f"excess kurtosis {_to(of['kurtosis'], '.2f')}; {_to(of['directions'], '.0f')} effective directions "
        f"of 100; a linear map explains {_to(of['linear'], '.0%')} of ẑ",
        "holds" if met else "partly" if some else "misses",
        "BN normalizes each unit and leaves units correlated; only whitening would not",
    )


def _level(summary: Mapping[str, Any], activation: str) -> Claim:
    depth = summary["experiment"]["depth"]
    with_bn = [
        f for _, p in found_at(summary, "deep", activation, "bn") for f in p["factor"] if f is not None
    ]
    first = [
        f for _, p in found_at(summary, "deep", activation, "bn") if p["step"] == 0 for f in p["factor"] if f
    ]
    ratios = {
        kind: [
            (std, np.median([np.nan if r is None else r for r in point["ratio"]]))
            for std, point in found_at(summary, "deep", activation, kind)
            if point["step"] == 0
        ]
        for kind in KINDS
    }
    plain = ", ".join(f"{_ratio(ratio)} (from {std:g})" for std, ratio in ratios["plain"])
    low, high = min(r for _, r in ratios["bn"]), max(r for _, r in ratios["bn"])
    expected = summary["growth_at_start"][activation]
    return Claim(
        f"So gradients stay level through {depth} layers: {activation}.",
        "what singular values near 1 would bring",
        f"with BN the first layer's gradient is {_ratio(low)} to {_ratio(high)} times the last's before "
        f"training, {_to(first, '.3f')} a layer (calculated: {expected:.3f}), and {_to(with_bn, '.3f')} at "
        f"all points; without BN {plain}",
        "holds" if max(with_bn) < 1.01 else "partly" if max(with_bn) < 1.05 else "misses",
        "gradients in x̂; all seeds and initial deviations; partly: below 1.05 a layer",
    )


def _to(values: Sequence[float], form: str) -> str:
    low, high = _signed(min(values), form), _signed(max(values), form)
    return low if low == high else f"{low} to {high}"


def _signed(value: float, form: str) -> str:
    """With a minus that is one, and none before what is rounded to zero."""
    return f"{value:z{form}}".replace("-", "−")


def _ratio(value: float) -> str:
    """Two digits, without a power of ten where that is short."""
    return f"{float(f'{value:.2g}'):,.0f}" if 10 <= value < 1e6 else f"{value:.2g}"


def _percentiles(point: Mapping[str, Any]) -> str:
    return _levels(np.median(np.array(point["singular"]["percentiles"], dtype=float), axis=0).tolist())


def _levels(percentiles: Sequence[float]) -> str:
    low, middle, high = (percentiles[PERCENTILES.index(level)] for level in (5, 50, 95))
    return f"{low:.2g} – {middle:.2g} – {high:.3g}"


def spectrum_table(summary: Mapping[str, Any], which: str, activation: str) -> Table:
    """Singular values by kind, initial deviation and point of training."""
    rows = []
    for kind in KINDS:
        for std, point in found_at(summary, which, activation, kind):
            of = point["singular"]
            rows.append(
                (
                    NAMES[kind],
                    f"{std:g}",
                    f"{point['step']:,}",
                    f"{np.median(point['loss']):.4g}",
                    _percentiles(point),
                    f"{np.exp(np.mean(np.log(of['rms']))):.3f}",
                    f"{np.mean(of['share']):.0%}",
                    f"{np.mean(of['zero']):.0%}",
                    "∞" if of["condition"][0] is None else f"{np.median(of['condition']):.0f}",
                )
            )
    columns = (
        "network",
        "deviation",
        "step",
        "loss",
        "5th – 50th – 95th",
        "root mean square",
        "in [0.5, 2]",
        "zero",
        "condition",
    )
    caption = (
        "Over layers: medians of percentiles and condition; geometric means of the root; means of shares."
    )
    if activation == "relu":
        caption += " ReLU switches about half of the units off, so that the 50th percentile lies on an edge."
    title = {"paper": "The paper's network", "deep": "The deep network"}[which]
    return Table(f"{title}, {activation}: singular values", columns, rows, caption)


def whole_table(summary: Mapping[str, Any]) -> Table:
    """A whole batch's Jacobian beside its examples'."""
    rows = []
    for activation in summary["experiment"]["activations"]:
        for std, point in found_at(summary, "paper", activation, "bn"):
            if std != summary["experiment"]["headline_std"]:
                continue
            for layer, found in enumerate(point["whole"], start=2):
                for name, of in (("held fixed", found["fixed"]), ("part of the map", found["through"])):
                    p = of["percentiles"]
                    rows.append(
                        (activation, f"{point['step']:,}", layer, name, _levels(p),
                         f"{of['rms']:.3f}", f"{of['share']:.0%}", f"{of['zero']:.0%}")
                    )  # fmt: skip
    columns = (
        "",
        "step",
        "to layer",
        "statistics",
        "5th – 50th – 95th",
        "root mean square",
        "in [0.5, 2]",
        "zero",
    )
    return Table("Statistics held fixed, and as part of the map (the same batch)", columns, rows)


def conditions_table(summary: Mapping[str, Any]) -> Table:
    """What section 3.3 supposes, measured."""
    rows = []
    for activation in summary["experiment"]["activations"]:
        for kind in KINDS:
            for std, point in found_at(summary, "paper", activation, kind):
                if std == summary["experiment"]["headline_std"]:
                    for layer, of in enumerate(point["conditions"], start=2):
                        rows.append(
                            (activation, NAMES[kind], f"{point['step']:,}", layer, f"{of['correlation']:.3f}",
                             f"{of['directions']:.0f}", _signed(of["kurtosis"], ".2f"), f"{of['linear']:.1%}")
                        )  # fmt: skip
    columns = (
        "",
        "network",
        "step",
        "to layer",
        "mean |correlation|",
        "effective directions of 100",
        "excess kurtosis",
        "explained by a linear map",
    )
    return Table("The conditions of the conjecture", columns, rows)


def gradient_table(summary: Mapping[str, Any], activation: str) -> Table:
    """First layer's gradient over the last's, in the deep network."""
    rows = []
    for kind in KINDS:
        for std, point in found_at(summary, "deep", activation, kind):
            rows.append(
                (
                    NAMES[kind],
                    f"{std:g}",
                    f"{point['step']:,}",
                    f"{np.median(point['loss']):.4g}",
                    _span(point["ratio"], _ratio),
                    _span(point["factor"], "{:.3f}".format),
                    _span(point["weight_ratio"], _ratio),
                )
            )
    columns = (
        "network",
        "deviation",
        "step",
        "loss",
        "first / last, in x̂",
        "a layer",
        "first / last, in W",
    )
    caption = (
        "Norm of the gradient at the first hidden layer over that at the last; range of the seeds. A network "
        "that is no longer finite has no further rows."
    )
    return Table(f"Gradients through depth, {activation}", columns, rows, caption)


def _span(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "not finite"
    low, high = form(min(there)), form(max(there))
    return low if low == high else f"{low} – {high}"
