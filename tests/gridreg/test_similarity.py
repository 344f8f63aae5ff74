"""Similarities against SciPy and in closed form: local and global correlation, mutual information, both levels of one kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from gridreg.losses import (
    FLAT_VARIANCE,
    GRID_SIMILARITIES,
    SIMILARITIES,
    at_control_points,
    coarse_mi_loss,
    global_ncc_loss,
    mi_loss,
    ncc_loss,
    similarity_loss,
    squared_local_ncc,
)

SHAPE = (9, 12, 15)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def reference_ncc(fixed: np.ndarray, warped: np.ndarray, window: int = 5) -> float:
    """With SciPy's box filter; what lies inside the image is counted by filtering ones."""

    def mean(values):
        box = [ndimage.uniform_filter(v, window, mode="constant") for v in (values, np.ones_like(values))]
        return box[0] / box[1]

    f, w = ((image - image.mean()) / image.std() for image in (fixed, warped))
    covariance = mean(f * w) - mean(f) * mean(w)
    variances = [mean(v * v) - mean(v) ** 2 + FLAT_VARIANCE for v in (f, w)]
    return float(-(covariance**2 / (variances[0] * variances[1])).mean())


@pytest.mark.parametrize("window", [3, 5])
def test_local_ncc_is_that_of_scipy(window):
    fixed = torch.rand(2, 1, *SHAPE)
    warped = 0.5 * fixed + 0.4 * torch.rand(2, 1, *SHAPE)
    pairs = zip(fixed[:, 0].double().numpy(), warped[:, 0].double().numpy())
    expected = np.mean([reference_ncc(*pair, window) for pair in pairs])
    assert -0.9 < expected < -0.1
    assert ncc_loss(fixed, warped, window).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("window", [3, 5])
def test_local_ncc_is_monais_inside_the_image(window):
    """MONAI pads with zeros: at the border its value depends on the bias, and ours does not."""
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    fixed = torch.rand(2, 1, *SHAPE)
    warped = 0.5 * fixed + 0.4 * torch.rand(2, 1, *SHAPE)
    monai = LocalNormalizedCrossCorrelationLoss(kernel_size=window, smooth_nr=0, reduction="none")
    expected, found = -monai(warped, fixed)[:, 0], squared_local_ncc(fixed, warped, window)
    inside = (slice(None), *[slice(window // 2, -(window // 2))] * 3)
    torch.testing.assert_close(found[inside], expected[inside], rtol=5e-3, atol=1e-4)
    assert (found - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", [ncc_loss, global_ncc_loss])
def test_ncc_does_not_mind_gain_and_bias(kind):
    """Also at the border, where a window that counted zeros around the image would see the bias as an edge."""
    fixed, warped = torch.rand(2, 2, 1, *SHAPE)
    value = kind(fixed, warped).item()
    for gain, bias in ((0.3, 0.6), (-0.5, 0.5), (0.01, 0.9)):
        assert kind(fixed, gain * warped + bias).item() == pytest.approx(value, rel=1e-3)
        assert kind(fixed, gain * fixed + bias).item() == pytest.approx(-1, abs=2e-3)


def test_ncc_of_flat_images_is_nothing():
    """A constant image, and one whose only structure is far below that of the rest: no score and no wild gradient."""
    textured, flat = torch.rand(1, 1, *SHAPE), torch.full((1, 1, *SHAPE), 0.7, requires_grad=True)
    for kind in (ncc_loss, global_ncc_loss):
        score = kind(textured, flat)
        (gradient,) = torch.autograd.grad(score, flat)
        assert abs(score.item()) < 1e-3 and gradient.isfinite().all()
    half = torch.rand(2, 1, 1, *SHAPE)
    half[..., 5:] = 0.5 + 1e-5 * half[..., 5:]  # rounding of what was flat
    assert ncc_loss(*half).item() == pytest.approx(ncc_loss(*half[..., :5]).item() * 5 / 15, abs=0.05)


def test_global_ncc_is_the_squared_correlation():
    fixed, warped = torch.rand(2, 3, 1, 4, 5, 6)
    warped = warped + fixed
    expected = np.mean(
        [np.corrcoef(f.flatten(), w.flatten())[0, 1] ** 2 for f, w in zip(fixed.numpy(), warped.numpy())]
    )
    assert global_ncc_loss(fixed, warped).item() == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_both_levels_of_the_similarity_are_of_one_kind(name):
    fixed, warped = torch.rand(2, 1, 1, *SHAPE)
    grid, image = (4, 5, 6), SIMILARITIES[name](fixed, warped)
    at_grid = GRID_SIMILARITIES[name](*(at_control_points(volume, grid) for volume in (fixed, warped)))
    assert torch.equal(similarity_loss(name, fixed, warped), image)
    assert similarity_loss(name, fixed, warped, grid).item() == pytest.approx((image + at_grid).item())
    inverted = similarity_loss(name, fixed, 1 - fixed, grid) - similarity_loss(name, fixed, fixed, grid)
    assert inverted.item() > 0.1 if name == "mse" else abs(inverted.item()) < 0.02


def test_mutual_information_in_closed_form():
    """A binary image knows one bit of itself and of its negative, and nothing of another that is independent of it."""
    image, other = torch.zeros(2, 1, 1, 4, 6, 8)
    image[:, :, :2], other[..., :4] = 1, 1
    for seen, expected in ((image, math.log(2)), (1 - image, math.log(2)), (other, 0)):
        assert -mi_loss(image, seen).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("g", [5, 8, 10])
def test_few_control_points_do_not_seem_to_know_of_each_other(g):
    fixed, unrelated = torch.rand(2, 1, 1, g, g, g)
    assert 0 <= -coarse_mi_loss(fixed, unrelated).item() < 0.15
    assert -coarse_mi_loss(fixed, fixed).item() > 0.3


def test_mutual_information_does_not_mind_an_inverted_contrast():
    image = torch.rand(1, 1, 12, 12, 12)
    aligned, inverted, unrelated = (mi_loss(image, other) for other in (image, 1 - image, image.flip(2)))
    assert inverted == pytest.approx(aligned.item(), rel=0.02)
    assert aligned < unrelated - 0.3
