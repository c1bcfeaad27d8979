import pytest
import torch

from batchnorm.models import mlp


def test_is_the_network_of_section_4_1():
    model = mlp(seed=0)
    names = ["flatten", "linear1", "sigmoid1", "linear2", "sigmoid2", "linear3", "sigmoid3", "output"]
    assert [name for name, _ in model.named_children()] == names
    assert (
        sum(p.numel() for p in model.parameters()) == 784 * 100 + 100 + 2 * (100 * 100 + 100) + 100 * 10 + 10
    )
    assert model.training


def test_forward_is_the_formula_in_float64():
    model = mlp(6, (5, 4), 3, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():  # Biases too, which start at zero.
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    x = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(1))
    w = {name: parameter.double() for name, parameter in model.named_parameters()}
    z = x.double().reshape(7, 6)
    for layer in ("linear1", "linear2"):
        z = 1 / (1 + torch.exp(-(z @ w[f"{layer}.weight"].T + w[f"{layer}.bias"])))
    expected = z @ w["output.weight"].T + w["output.bias"]
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_weights_are_gaussian_with_the_deviation_asked_for_and_biases_zero():
    model = mlp(init_std=0.3, seed=4)
    weight = model.linear1.weight.double()
    # 78,400 draws: the standard errors are 0.3/280 of the mean, 0.3/396 of the deviation.
    assert abs(weight.mean().item()) < 5 * 0.3 / 280
    assert weight.std().item() == pytest.approx(0.3, abs=5 * 0.3 / 396)
    assert (weight / 0.3).pow(4).mean().item() == pytest.approx(3, abs=0.2)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_seed_decides_everything_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, same, other = mlp(seed=5), mlp(seed=5), mlp(seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.linear3.weight, same.linear3.weight)
    assert not torch.equal(first.linear3.weight, other.linear3.weight)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param({"hidden": ()}, "at least one", id="no hidden layer"),
        pytest.param({"hidden": (100, 0)}, "1 or more", id="empty layer"),
        pytest.param({"classes": 0}, "1 or more", id="no classes"),
        pytest.param({"activation": "softmax"}, "softmax.*known are sigmoid", id="unknown activation"),
        pytest.param({"init_std": -0.1}, "standard deviation", id="negative deviation"),
        pytest.param({"init_std": float("nan")}, "standard deviation", id="nan deviation"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        mlp(**arguments)
