"""The report: section 3.3's equations beside what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.report import Claim, Curve, CurveChart, Page, Section, Table, draw, figure_of, write_page
from batchnorm.reproduce.invariance.experiment import DTYPES, EQUATIONS
from batchnorm.reproduce.invariance.summary import KINDS, spread_of_losses, spread_of_rates

INTRO = """\
Section 3.3 of Ioffe & Szegedy (2015): for a scalar a, BN(aWu) = BN(Wu); ∂BN(aWu)/∂u = ∂BN(Wu)/∂u;
∂BN(aWu)/∂(aW) = (1/a) ∂BN(Wu)/∂W. So the scale of the weights moves neither a layer's output nor what flows
back through it; and larger weights get smaller gradients, which steadies their growth.

Data: {data}. Layers: the second of three layers of 100 sigmoids (fc) and the second of two 3×3 convolutions
(conv), both with BN, as initialized and after {prior_steps} steps of training; {examples} images, {seeds}
seeds. Deviations are ‖at a − at 1‖ / ‖at 1‖, over all entries, for random cotangents, everything (u, aW and
the product) in the dtype that is named.
"""

EPS = """\
In a layer that divides by sqrt(σ² + eps) the equations are approximate. With s = (1 + eps/(a²σ²))^(−1/2)
for each channel, BN(aWu) is s x̂, and (s/σ)(dy − E[dy] − s² x̂ E[dy x̂]) flows back to Wu. The dashed curves
are this calculation, which knows nothing of any kernel; the solid ones are measured, and lie on them. At
a = 1, against which all is held, there is no deviation to draw. In float32 deviations differ from those in
float64 by at most {low:.1e}.
"""

TRAINING = """\
The paper's network (784-100-100-100-10 sigmoids) by plain SGD from Gaussian weights of three deviations. A
gradient at a right angle to W lengthens W at every step: ‖W‖² grows by rate² ‖gradient‖². As the gradient
is proportional to 1/‖W‖, small weights grow fast and large ones hardly: the effective rate, rate / ‖W‖²,
falls by itself where it is high, and nothing raises it where it is low. Shown for the second hidden layer;
bands are the range of the seeds.
"""

SHADES = {"float64": "#14579a", "float32": "#2b83d6", "bfloat16": "#e0701f"}
LAYERS = {
    "fc/initial": "#2b83d6",
    "fc/trained": "#2e9d68",
    "conv/initial": "#e0701f",
    "conv/trained": "#b65fc4",
}
WORDS = {"output": "output", "input": "gradient in u", "weight": "gradient in aW, times a"}
BN_SHADES = ("#9cc7ef", "#2b83d6", "#0b3257")
PLAIN_SHADES = ("#f3b98d", "#e0701f", "#6b3006")


def write_report(summary: Mapping[str, Any], out: Path, environment: Mapping[str, object]) -> Path:
    """Write the pictures and ``report.html`` into ``out``; returns the page's path.

    Raises:
        OSError: A file cannot be written.
    """
    settings = summary["experiment"]
    exact = exact_chart(summary)
    with_eps = {equation: eps_chart(summary, equation) for equation in EQUATIONS}
    effective, lengths = (training_chart(summary, what) for what in ("effective", "weight"))
    losses = training_chart(summary, "loss")
    draw(exact, out / "equations.png", size=(8, 4.2))
    draw(with_eps["output"], out / "eps.png", size=(9, 4.2))
    draw(effective, out / "effective-rate.png", size=(9, 4.2))
    draw(lengths, out / "weights.png", size=(9, 4.2))
    sections = [
        Section("The claims", claims=claims(summary)),
        Section(
            "Without eps: exact",
            "The largest deviation of both layers, both states, all kernels and seeds. The curves run on "
            "through a = 1, where there is none by definition.",
            figures=[figure_of("The three equations at eps = 0", exact)],
            tables=[exact_table(summary)],
        ),
        Section(
            f"With eps = {settings['eps']:g}: as far as eps lets them",
            EPS.format(low=float32_apart(summary)),
            figures=[figure_of(chart.title, chart) for chart in with_eps.values()],
            tables=[eps_table(summary)],
        ),
        Section(
            "What follows for training",
            TRAINING,
            figures=[figure_of(chart.title, chart) for chart in (effective, lengths, losses)],
            tables=[training_table(summary)],
        ),
    ]
    page = Page("The scale of the weights", INTRO.format(**settings), sections, environment)
    return write_page(page, out / "report.html")


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """Section 3.3's statements, with what was measured."""
    made = [_equation(summary, equation) for equation in EQUATIONS]
    return [*made, _with_eps(summary), _larger_weights(summary), _right_angle(summary), _steadies(summary)]


def worst(summary: Mapping[str, Any], dtype: str, equation: str) -> float:
    """The largest deviation of all kernels, at eps = 0."""
    return max(row[equation] for way, row in summary["exact"].items() if way.startswith(f"{dtype}/"))


def _equation(summary: Mapping[str, Any], equation: str) -> Claim:
    found = {dtype: worst(summary, dtype, equation) for dtype in DTYPES}
    same = sum(row["powers_of_two"] for row in summary["exact"].values())
    tried = sum(row["powers_tried"] for row in summary["exact"].values())
    held = found["float64"] < 1e-10 and found["float32"] < 1e-4
    note = (
        f"eps = 0; a from {summary['scales'][0]:g} to {summary['scales'][-1]:g}; kernels: {_kernels(summary)}"
    )
    if equation == "output":
        note += f". With a a power of two no bit of output and gradients differs in {same} of {tried} cases"
    ours = ", ".join(f"{value:.1e} in {dtype}" for dtype, value in found.items())
    return Claim(EQUATIONS[equation], "equal", f"equal but for {ours}", "holds" if held else "misses", note)


def _kernels(summary: Mapping[str, Any]) -> str:
    return ", ".join(dict.fromkeys(way.split("/")[1] for way in summary["exact"]))


def _with_eps(summary: Mapping[str, Any]) -> Claim:
    scales, eps = summary["scales"], summary["experiment"]["eps"]
    found = {
        a: max(
            layer["deviations"]["float64/reference/eps"][equation][scales.index(a)]
            for layer in summary["layers"].values()
            for equation in EQUATIONS
        )
        for a in (scales[0], scales[-1])
    }
    small, large = found.values()
    return Claim(
        f"The same with eps = {eps:g}.",
        "eps is not considered",
        f"off by up to {large:.1e} at a = {scales[-1]:g} and by {small:.0%} at a = {scales[0]:g}; as "
        f"calculated from eps/(a²σ²), to {summary['agreement']:.1e} of the deviation",
        "holds" if small < 0.01 else "partly" if summary["agreement"] < 0.01 else "misses",
        "float64; the worst of layers and equations. Where a²σ² comes near eps, the scale matters",
    )


def _larger_weights(summary: Mapping[str, Any]) -> Claim:
    rows = summary["training"]["bn"]
    firsts = sorted((row["init_std"], np.median([g[0] for g in row["gradient"]])) for row in rows)
    (low, high_gradient), (high, low_gradient) = firsts[0], firsts[-1]
    ratio, wanted = high_gradient / low_gradient, high / low
    return Claim(
        "Larger weights lead to smaller gradients.",
        "1/a",
        f"weights × {wanted:g}: gradient ÷ {ratio:.4g} (before training)",
        "holds" if abs(ratio / wanted - 1) < 0.1 else "partly" if ratio > 1 else "misses",
        "the paper's network, second hidden layer; eps takes its share where weights are small",
    )


def _right_angle(summary: Mapping[str, Any]) -> Claim:
    rows = summary["training"]["bn"]
    low, high = (f(row["growth_over_steps"][i] for row in rows) for i, f in ((0, min), (1, max)))
    plain = [row["cosine"] for row in summary["training"]["plain"]]
    return Claim(
        "The gradient stands at a right angle to W, so that ‖W‖² grows by rate² ‖gradient‖² a step.",
        "follows from BN(aWu) = BN(Wu)",
        f"growth of ‖W‖² is {low:.3f} to {high:.3f} of that sum; |cosine| at most "
        f"{max(row['cosine'] for row in rows):.1e} (without BN up to {max(plain):.2f})",
        "holds" if low > 0.9 and high < 1.1 else "partly" if low > 0 else "misses",
        "all hidden layers, rates, initial deviations and seeds; eps and float32 make the rest",
    )


def _steadies(summary: Mapping[str, Any]) -> Claim:
    settings, rows = summary["experiment"], summary["training"]
    told, near, better = [], [], []
    for rate in settings["rates"]:
        (first, last), (_, without) = (spread_of_rates(rows[kind], rate) for kind in KINDS)
        losses, losses_without = (spread_of_losses(rows[kind], rate) for kind in KINDS)
        told.append(
            f"rate {rate:g}: {first:,.0f} → {last:,.0f} (without BN {without:,.0f}), losses {losses:.1f} "
            f"({losses_without:.1f})"
        )
        near.append(last < 10 and last <= without)
        better.append(losses < losses_without)
    return Claim(
        "Batch Normalization stabilizes the growth of the parameters.",
        "stated without a figure",
        "largest over smallest of the initial deviations, effective rate at first → last step, and losses at "
        "the end: " + "; ".join(told),
        "holds" if all(near) else "partly" if all(better) else "misses",
        f"{settings['steps']:,} steps; holds: effective rates within a factor of 10, no wider than without; "
        "partly: losses depend less on the initial scale than without",
    )


def exact_chart(summary: Mapping[str, Any]) -> CurveChart:
    """Deviations at eps = 0 against a."""
    scales = np.array(summary["scales"])
    curves = []
    for dtype in DTYPES:
        for equation, dashed in (("output", False), ("weight", True)):
            found = np.max(
                [
                    columns[equation]
                    for layer in summary["layers"].values()
                    for way, columns in layer["deviations"].items()
                    if way.startswith(f"{dtype}/") and way.endswith("/0")
                ],
                axis=0,
            )
            found = np.where(found > 0, found, np.nan)
            name = f"{dtype}, {WORDS[equation]}"
            curves.append(Curve(name, scales, _bridged(found), SHADES[dtype], dashed))
    title = "BN(aWu) against BN(Wu), eps = 0: rounding, whatever a is"
    return CurveChart(title, "a", "relative deviation", curves, log_x=True, log_y=True, y_range=(1e-17, 1))


def _bridged(values: np.ndarray) -> np.ndarray:
    """Without the gap at a = 1, where the deviation is zero and has no logarithm."""
    there = np.isfinite(values)
    at = np.arange(len(values))
    return (
        np.exp(np.interp(at, at[there], np.log(values[there])))
        if there.any()
        else np.full(len(values), 1e-17)
    )


def eps_chart(summary: Mapping[str, Any], equation: str) -> CurveChart:
    """Measured deviations with eps of each layer, and the predicted ones on them."""
    scales = np.array(summary["scales"])
    curves, predicted = [], []
    for name, layer in summary["layers"].items():
        measured, expected = (
            # None at a = 1, so that no line is drawn through it.
            np.where(scales == 1, np.nan, np.array(columns[equation]))
            for columns in (layer["deviations"]["float64/reference/eps"], layer["predicted"])
        )
        sigma = f"median σ {layer['deviation'][1]:.2f}"
        curves.append(Curve(f"{name.replace('/', ', ')}: {sigma}", scales, measured, LAYERS[name]))
        predicted.append(np.append(expected, np.nan))
    # One curve with gaps, so that the legend says it once.
    everywhere = np.tile(np.append(scales, scales[-1]), len(predicted))
    curves.append(Curve("calculated", everywhere, np.concatenate(predicted), "#1d2126", True))
    title = f"{WORDS[equation]}, eps = {summary['experiment']['eps']:g}, float64"
    return CurveChart(title, "a", "relative deviation", curves, log_x=True, log_y=True)


def float32_apart(summary: Mapping[str, Any]) -> float:
    """The largest difference between deviations with eps in float32 and in float64, all else the same."""
    return max(
        abs(low - high)
        for layer in summary["layers"].values()
        for way, columns in layer["deviations"].items()
        if way.startswith("float32/") and way.endswith("/eps")
        for equation in EQUATIONS
        for low, high in zip(
            columns[equation], layer["deviations"]["float64" + way[7:]][equation], strict=True
        )
    )


def training_chart(summary: Mapping[str, Any], quantity: str) -> CurveChart:
    """Effective rates, lengths or losses over steps, from each initial deviation at the headline rate."""
    rate = summary["experiment"]["headline_rate"]
    label = {
        "effective": "effective rate, rate / ‖W‖²",
        "weight": "‖W‖, second hidden layer",
        "loss": "training loss, nats",
    }[quantity]
    curves = []
    for kind, shades in zip(KINDS, (BN_SHADES, PLAIN_SHADES), strict=True):
        rows = [row for row in summary["training"][kind] if row["rate"] == rate]
        for index, row in enumerate(rows):
            after = np.array(row["step"]) > 0
            name = f"{'with' if kind == 'bn' else 'without'} BN, from {row['init_std']:g}"
            runs = np.array(row[quantity], dtype=float)[:, after]
            colour = shades[min(index, len(shades) - 1)]
            curves.append(Curve(name, np.array(row["step"])[after], runs, colour, kind == "plain"))
    title = f"Learning rate {rate:g}: {label}"
    return CurveChart(title, "steps", label, curves, log_x=True, log_y=True)


def exact_table(summary: Mapping[str, Any]) -> Table:
    """The largest deviations at eps = 0, by dtype and kernel."""
    rows = [
        (*way.split("/"), *(f"{row[equation]:.1e}" for equation in EQUATIONS),
         f"{row['powers_of_two']} of {row['powers_tried']}")
        for way, row in summary["exact"].items()
    ]  # fmt: skip
    columns = ("dtype", "kernel", *WORDS.values(), "powers of two that change no bit")
    return Table("Largest relative deviation, eps = 0", columns, rows)


def eps_table(summary: Mapping[str, Any]) -> Table:
    """Deviations of the output with eps, by layer and scale."""
    scales = summary["scales"]
    chosen = [i for i, a in enumerate(scales) if i % 2 == 0 and a != 1]
    rows = []
    for name, layer in summary["layers"].items():
        sigma = layer["deviation"][1]
        measured = layer["deviations"]["float64/reference/eps"]["output"]
        cells = (f"{measured[i]:.2e} ({layer['predicted']['output'][i]:.2e})" for i in chosen)
        rows.append((name.replace("/", ", "), f"{sigma:.3f}", *cells))
    columns = ("layer", "median σ", *(f"a = {scales[i]:g}" for i in chosen))
    caption = "In brackets as calculated. The largest of the seeds; float64, reference kernel."
    return Table(f"Deviation of the output, eps = {summary['experiment']['eps']:g}", columns, rows, caption)


def training_table(summary: Mapping[str, Any]) -> Table:
    """Where training goes, from each initial deviation at each rate."""
    rows = []
    for with_bn, plain in zip(*(summary["training"][kind] for kind in KINDS), strict=True):
        weight, effective = (np.median(with_bn[name], axis=0) for name in ("weight", "effective"))
        product = with_bn["product"]
        rows.append(
            (
                f"{with_bn['rate']:g}",
                f"{with_bn['init_std']:g}",
                f"{weight[0]:.3g} → {weight[-1]:.3g}",
                f"{product[0]:.3g} → {product[1]:.3g}",
                f"{effective[0]:.1e} → {effective[-1]:.1e}",
                f"{np.median(with_bn['final_loss']):.3f}",
                f"{np.median(plain['final_loss']):.3f}",
            )
        )
    columns = (
        "rate",
        "initial deviation",
        "‖W‖",
        "‖W‖ · ‖gradient‖",
        "effective rate",
        "loss with BN",
        "loss without BN",
    )
    caption = "First step → last; second hidden layer, with BN. Medians of seeds; losses over the last tenth."
    return Table("Training from small and large weights", columns, rows, caption)
