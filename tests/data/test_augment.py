import pytest
import torch

from batchnorm.data import distort, shift_and_mirror, standardize


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 8, 9), dtype=torch.uint8, generator=generator(5))


def test_shifts_and_mirrors_are_those_drawn(images):
    moved = shift_and_mirror(images, generator(3), reach=2)
    draws = generator(3)
    rows, columns = torch.randint(0, 5, (2, 6, 1), generator=draws)[:, :, 0] - 2
    mirrored = torch.rand(6, 1, generator=draws)[:, 0] < 0.5
    assert 0 < mirrored.sum() < 6
    for n, image in enumerate(images):
        for y in range(8):
            for x in range(9):
                # Mirrored within the frame of the crop, then moved.
                at_y, at_x = y + int(rows[n]), (8 - x if mirrored[n] else x) + int(columns[n])
                inside = 0 <= at_y < 8 and 0 <= at_x < 9
                expected = image[:, at_y, at_x].tolist() if inside else [128] * 3
                assert moved[n, :, y, x].tolist() == expected


def test_without_reach_and_mirror_nothing_moves(images):
    assert shift_and_mirror(images, generator(), reach=0, mirror=False).equal(images)
    again = shift_and_mirror(images, generator(), reach=0)
    assert all(a.equal(b) or a.equal(b.flip(-1)) for a, b in zip(again, images, strict=True))


def test_mirroring_does_not_change_what_else_is_drawn(images):
    assert shift_and_mirror(images, generator(), reach=3, mirror=False).shape == images.shape
    first, second = generator(), generator()
    shift_and_mirror(images, first, reach=3)
    shift_and_mirror(images, second, reach=3, mirror=False)
    assert first.get_state().equal(second.get_state())


def test_strength_zero_changes_nothing(images):
    levels = images / 255
    torch.testing.assert_close(distort(levels, generator(), strength=0.0), levels)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_distortion_is_brightness_contrast_and_colour_in_the_order_drawn(strength):
    # Levels in the middle, so that nothing is clamped and the arithmetic shows.
    levels = 0.4 + 0.02 * torch.rand(16, 3, 4, 4, generator=generator(1), dtype=torch.float64)
    got = distort(levels, generator(2), strength=strength)
    draws = generator(2)
    factors = 1 + strength * 0.5 * (2 * torch.rand(3, 16, generator=draws) - 1)
    orders = torch.rand(3, 16, generator=draws).argsort(0)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    for n, image in enumerate(levels):
        for which in orders[:, n].tolist():
            grey = torch.einsum("chw,c->hw", image, luma)
            flat = [torch.zeros_like(grey), grey.mean().expand_as(grey), grey][which]
            image = flat + factors[which, n] * (image - flat)
        torch.testing.assert_close(got[n], image, rtol=1e-6, atol=1e-7)
    assert factors.min() >= 1 - strength / 2
    assert factors.max() <= 1 + strength / 2
    assert len({tuple(order.tolist()) for order in orders.T}) > 3


def test_levels_stay_levels(images):
    distorted = distort(images / 255, generator())
    assert distorted.min() >= 0
    assert distorted.max() <= 1
    assert not torch.allclose(distorted, images / 255)


def test_standardized_levels_of_the_mean_are_zero():
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = torch.stack([mean, mean + deviation]).view(2, 3, 1, 1)
    expected = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    torch.testing.assert_close(standardize(image), expected, rtol=1e-6, atol=1e-6)
