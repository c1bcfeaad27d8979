"""Section 3.3's conjecture: Jacobians are those of autograd, and verdicts follow the numbers."""

import json
import math

import pytest
import torch
from browsing import requests_of
from torch import nn

from batchnorm.layers import BatchNorm1d
from batchnorm.reproduce.jacobian import Jacobian
from batchnorm.reproduce.jacobian.job import conditions, names, num_steps, run_part, spectrum
from batchnorm.reproduce.jacobian.layers import (
    Hidden,
    gradients,
    growth_at_start,
    network,
    of_batch,
    of_examples,
    trace,
)
from batchnorm.reproduce.jacobian.page import claims, write_report
from batchnorm.reproduce.jacobian.summary import (
    factor,
    first_over_last,
    gaussian_matrix,
    summarize,
)
from batchnorm.reproduce.training import path_of


def small(out, **changes) -> Jacobian:
    settings = {"seeds": 1, "init_stds": (0.1, 0.3), "depth": 4, "steps": 3, "deep_steps": 3, "batch_size": 8}
    sizes = {"examples": 2, "whole_batch": 4, "condition_examples": 120}
    return Jacobian(**{**settings, **sizes, "out": out, **changes})


def made(activation: str, normalize: bool) -> nn.Module:
    net = network(
        in_features=9, depth=3, classes=4, activation=activation, normalize=normalize, init_std=0.3, seed=0
    )
    for module in net.modules():
        if isinstance(module, BatchNorm1d):
            # Not ones and zeros, so that their part in the Jacobian shows.
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return net


@pytest.mark.parametrize("normalize", [True, False], ids=["bn", "plain"])
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_jacobians_are_those_of_autograd(activation, normalize):
    net = made(activation, normalize)
    images = torch.rand(5, 9)
    layers = trace(net, images)
    before, after = layers[1:]
    norms = [m.double() for m in net.modules() if isinstance(m, BatchNorm1d)]
    weight = after.weight
    bias = torch.zeros(100, dtype=torch.float64)

    def onward(x_hat, mean=None, inverse=None):
        """From x̂ of the second layer to x̂ of the third, by the definition, statistics given or taken."""
        y = x_hat * norms[1].weight + norms[1].bias if normalize else x_hat
        z = nn.functional.linear(torch.sigmoid(y) if activation == "sigmoid" else y.relu(), weight, bias)
        if not normalize:
            return z
        if mean is None:
            mean, inverse = z.mean(0), (z.var(0, unbiased=False) + norms[2].eps).rsqrt()
        return (z - mean) * inverse

    torch.testing.assert_close(onward(before.x_hat), after.x_hat)
    whole = torch.autograd.functional.jacobian(onward, before.x_hat).reshape(500, 500)
    torch.testing.assert_close(of_batch(before, after), whole)
    z_mean = 0.0
    for index, found in enumerate(of_examples(before, after, 2)):
        alone = torch.autograd.functional.jacobian(
            lambda x: onward(x[None], z_mean, after.inverse)[0] if normalize else onward(x[None])[0],
            before.x_hat[index],
        )
        torch.testing.assert_close(found, alone)


def test_statistics_as_part_of_the_map_take_two_directions_of_each_unit_and_enlarge_none():
    before, after = trace(made("sigmoid", True), torch.rand(6, 9))[1:]
    through = torch.linalg.svdvals(of_batch(before, after))
    fixed = torch.linalg.svdvals(of_examples(before, after, 6)).flatten().sort(descending=True).values
    assert ((through / through[0]) < 1e-3).sum() >= 2 * 100  # eps leaves the stretch a little
    assert (through <= fixed + 1e-12).all()


def test_gradients_in_x_hat_and_weights_are_autograds():
    net = made("relu", True)
    images, labels = torch.rand(6, 9), torch.tensor([0, 1, 2, 3, 0, 1])
    loss, inside, weights = gradients(net, images, labels)
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    norms = [m for m in net.modules() if isinstance(m, BatchNorm1d)]
    h, x_hats = images, []
    for linear, norm in zip(linears, norms, strict=False):
        z = linear(h)
        x_hats.append((z - z.mean(0)) * (z.var(0, unbiased=False) + norm.eps).rsqrt())
        h = (norm.weight * x_hats[-1] + norm.bias).relu()
    expected = nn.functional.cross_entropy(linears[-1](h), labels)
    given = torch.autograd.grad(expected, [*x_hats, *(linear.weight for linear in linears[:-1])])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert inside == pytest.approx([g.norm().item() for g in given[:3]], rel=1e-4)
    assert weights == pytest.approx([g.norm().item() for g in given[3:]], rel=1e-4)


def test_growth_at_the_start_is_what_is_known_of_relu_and_seen_in_a_wide_network():
    assert growth_at_start("relu") == pytest.approx(math.sqrt(math.pi / (math.pi - 1)), rel=1e-4)
    assert 1.01 < growth_at_start("sigmoid") < 1.02
    net = network(
        in_features=50, depth=12, classes=10, activation="relu", normalize=True, init_std=0.1, seed=1
    )
    images, labels = torch.randn(200, 50), torch.arange(200) % 10
    _, inside, _ = gradients(net, images, labels)
    assert factor(inside) == pytest.approx(growth_at_start("relu"), rel=0.05)


def test_spectrum_counts_by_hand():
    found = spectrum(torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.4, 0.0])).double()[None])
    assert found["rms"] == pytest.approx(math.sqrt((16 + 4 + 1 + 0.16) / 5))
    assert found["share"] == pytest.approx(0.4)
    assert found["zero"] == pytest.approx(0.2)
    assert found["condition"] == math.inf
    assert found["percentiles"][4] == 1.0  # the median
    assert spectrum(torch.diag(torch.tensor([4.0, 2.0])).double()[None])["condition"] == 2.0


def test_conditions_are_met_by_white_gaussians_and_a_straight_map():
    x = torch.randn(4000, 20, dtype=torch.float64)
    matrix = torch.randn(20, 20, dtype=torch.float64)

    def hidden(values):
        return Hidden(values, values, values, matrix, torch.ones(20), True)

    straight = conditions(hidden(x), hidden(x @ matrix))
    assert straight["linear"] == pytest.approx(1.0)
    assert abs(straight["kurtosis"]) < 0.1
    assert straight["directions"] > 19.5
    assert straight["correlation"] < 0.02
    one = torch.randn(4000, 1, dtype=torch.float64).expand(-1, 20) + 1e-6 * x
    assert conditions(hidden(one), hidden(one))["directions"] == pytest.approx(1.0, rel=1e-3)
    bent = conditions(hidden(x), hidden(x.abs()))
    assert bent["linear"] < 0.05


def test_a_gaussian_matrix_has_the_quarter_circles_singular_values():
    values = torch.linalg.svdvals(torch.randn(600, 600, dtype=torch.float64) / math.sqrt(600))
    known = gaussian_matrix()
    assert ((values >= 0.5) & (values <= 2)).double().mean().item() == pytest.approx(known["share"], abs=0.01)
    assert values.median().item() == pytest.approx(known["median"], abs=0.01)


def test_ratios_of_gradients():
    assert first_over_last([8.0, 4.0, 2.0]) == 4.0
    assert factor([8.0, 4.0, 2.0]) == 2.0
    assert factor([1.0, 0.0]) is None
    assert factor([None, 1.0]) is None


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    experiment = small(tmp_path_factory.mktemp("jacobian"))
    (experiment.out / "jobs").mkdir()
    parts = {}
    for name, arguments in names(experiment).items():
        run_part(*arguments)
        parts[name] = json.loads(path_of(experiment.out, name).read_text())
    return summarize(experiment, parts)


def test_the_whole_says_what_was_measured(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    found = {claim.text: claim for claim in claims(summary)}
    assert len(found) == 7
    assert found["The scale of the weights does not affect the layer Jacobian."].verdict == "holds"
    deep = summary["networks"]["deep/relu/bn"][0]["points"]
    assert [point["step"] for point in deep] == [0, 1, 3]
    assert len(deep[0]["gradient"]) == 4
    assert len(deep[0]["singular"]["rms"]) == 3
    assert len(summary["networks"]["paper/relu/bn"][0]["points"][0]["whole"]) == 2


def test_verdicts_follow_the_numbers(summary):
    def changed(share=None, rms=None, factors=None):
        other = json.loads(json.dumps(summary))
        for name, networks in other["networks"].items():
            for point in (point for one in networks for point in one["points"]):
                if name.startswith("paper/sigmoid/bn") and share is not None:
                    point["singular"]["share"] = [share] * 2
                    point["singular"]["rms"] = [rms] * 2
                if name == "deep/sigmoid/bn" and factors is not None:
                    point["factor"] = factors
        made = claims(other)
        return made[0].verdict, made[-2].verdict

    assert changed(share=0.95, rms=1.0, factors=[1.0])[0] == "holds"
    assert changed(share=0.6, rms=1.0)[0] == "partly"
    assert changed(share=0.6, rms=0.2)[0] == "misses"
    assert [changed(factors=[f])[1] for f in (1.0, 1.03, 1.2)] == ["holds", "partly", "misses"]


def test_steps_add_up_and_points_are_three(tmp_path):
    experiment = Jacobian(out=tmp_path)
    assert experiment.points("paper") == [0, 100, 1000]
    assert experiment.points("deep") == [0, 30, 300]
    total = sum(num_steps(experiment, name) for name in names(experiment))
    assert total == 2 * 2 * 3 * 3 * (1000 + 300)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depth": 1}, "depth must be at least 2"),
        ({"whole_batch": 2}, "whole_batch must be at least 3, got 2: mean and deviation take two"),
        ({"examples": 9}, "examples must be at most batch_size 8, got 9"),
        ({"headline_std": 0.5}, r"headline_std 0.5 is not one of init_stds \(0.1, 0.3\)"),
        ({"deep_rate": 0.0}, "deep_rate must be positive"),
        ({"activations": ("gelu",)}, "activations must be of sigmoid, relu"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_settings_are_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        small(tmp_path, **change)


def test_chromium_shows_the_page_without_error_or_request(browser, summary, tmp_path):
    page = write_report(summary, tmp_path, {"torch": "2"})
    assert len(list(tmp_path.glob("*.png"))) == 6
    browser.get(page.as_uri())
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map("
        "  p => p.querySelectorAll('.scatterlayer .trace').length)"
    )
    # Before and after of both kinds; three points, a calculated line, two deviations; three points of both.
    assert shown == [4, 4, 6, 6, 6, 6]
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [page.as_uri()]
