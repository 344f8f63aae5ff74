"""Losses in closed form and against MONAI, and the Gram form of the bending energy against the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from gridreg import losses
from gridreg.losses import (
    LABELS_AT_ONCE,
    LAMBDA_0,
    RESIDUAL_NOISE,
    at_control_points,
    bending_energy,
    dice_loss,
    gradient_energy,
    grid_bending_energy,
    label_dice_loss,
    mse_loss,
    uncertainty_loss,
)
from gridreg.spatial import control_point_coordinates, voxel_coordinates, warp
from gridreg.upsampling import METHODS, upsample

SHAPE = (9, 12, 15)
GRIDS = [((5, 5, 5), (17, 17, 17)), ((4, 6, 7), (13, 26, 19)), ((2, 3, 9), (8, 11, 9))]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def in_component(component: int, values: torch.Tensor) -> torch.Tensor:
    """(1, 3, W, H, D) field in voxels whose only component is ``values`` (W, H, D)."""
    field = torch.zeros(1, 3, *values.shape, dtype=values.dtype)
    field[0, component] = values
    return field


def unit(component: int) -> float:
    """One voxel in normalised units: the image is 2 wide."""
    return 2 / (SHAPE[component] - 1)


def test_affine_fields_do_not_bend():
    x = voxel_coordinates(SHAPE, dtype=torch.float64)
    matrix = torch.randn(3, 3, dtype=torch.float64)
    field = torch.einsum("ab,b...->a...", matrix, x)[None] + 7
    assert bending_energy(field) < 1e-20
    assert bending_energy(torch.full((1, 3, *SHAPE), 4.0)) == 0


@pytest.mark.parametrize("component", [0, 1, 2])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_bending_of_a_square(component, axis):
    """t = x² has ∂²t/∂x² = 2, everywhere."""
    x = voxel_coordinates(SHAPE, dtype=torch.float64)
    expected = (2 * unit(component)) ** 2
    assert bending_energy(in_component(component, x[axis] ** 2)).item() == pytest.approx(expected)


@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (1, 2)])
def test_mixed_derivatives_count_twice(axes):
    """t = x y has ∂²t/∂x∂y = ∂²t/∂y∂x = 1."""
    x = voxel_coordinates(SHAPE, dtype=torch.float64)
    energy = bending_energy(in_component(2, x[axes[0]] * x[axes[1]]))
    assert energy.item() == pytest.approx(2 * unit(2) ** 2)


def test_a_checkerboard_bends():
    """±1 from voxel to voxel: pure derivatives are ±4, mixed ones too; a stencil two voxels wide sees nothing."""
    board = 1 - 2 * (voxel_coordinates(SHAPE, dtype=torch.float64).sum(0) % 2)
    energy = bending_energy(in_component(1, board)).item()
    assert energy == pytest.approx((3 * 16 + 2 * 3 * 16) * unit(1) ** 2)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # of MONAI's
def test_bending_is_monais_on_a_quadratic_field():
    """MONAI averages over components and knows no image size; on quadratics its stencils are exact, as ours are."""
    from monai.losses import BendingEnergyLoss

    x = voxel_coordinates(SHAPE, dtype=torch.float64)
    field = torch.einsum("cab,a...,b...->c...", torch.randn(3, 3, 3, dtype=torch.float64), x, x)[None]
    normalised = field * torch.tensor([unit(a) for a in range(3)]).view(3, 1, 1, 1)
    expected = 3 * BendingEnergyLoss()(normalised)
    assert bending_energy(field).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("grid", "shape"), GRIDS)
@pytest.mark.parametrize(
    "shift", [0, 20]
)  # voxels, of all control points: it does not bend, and must not blunt the rest
def test_gram_form_is_the_dense_energy_and_its_gradient(method, grid, shape, shift):
    control = (shift + torch.randn(2, 3, *grid)).requires_grad_()
    reference = control.detach().double().requires_grad_()
    energy = grid_bending_energy(control, shape, method)
    dense = bending_energy(upsample(reference, shape, method))
    assert energy.item() == pytest.approx(dense.item(), rel=1e-5)
    energy.backward()
    dense.backward()
    tolerance = 1e-5 * reference.grad.abs().max().item()
    torch.testing.assert_close(control.grad.double(), reference.grad, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("method", ["trilinear", "bspline"])
def test_gram_form_of_an_affine_field_is_zero(method):
    grid, shape = (4, 6, 7), (13, 26, 19)
    matrix = torch.randn(3, 3)
    control = torch.einsum("ab,b...->a...", matrix, control_point_coordinates(grid, shape))[None]
    assert abs(grid_bending_energy(control, shape, method).item()) < 1e-7  # times 2e5, the paper's weight: < 0.02


def test_gram_form_keeps_double_precision():
    control = torch.randn(1, 3, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: grid_bending_energy(c, (9, 10, 11)), (control,))


def test_mixed_precision_does_not_blunt_the_gram_form():
    control = 10 + torch.randn(1, 3, 5, 6, 7)
    reference = grid_bending_energy(control, (33, 40, 26))
    with torch.autocast("cpu", torch.bfloat16):
        energy = grid_bending_energy(control, (33, 40, 26))
    assert energy.item() == pytest.approx(reference.item(), rel=1e-3)


def test_bending_needs_three_voxels():
    with pytest.raises(ValueError, match=r"3 voxels on every axis, found \(2, 9, 9\)"):
        bending_energy(torch.zeros(1, 3, 2, 9, 9))
    with pytest.raises(ValueError, match="displacement must have shape"):
        bending_energy(torch.zeros(1, 2, *SHAPE))


def test_gram_form_needs_three_voxels():
    with pytest.raises(ValueError, match=r"3 voxels on every axis, found \(2, 9, 9\)"):
        grid_bending_energy(torch.zeros(1, 3, 2, 2, 2), (2, 9, 9))


def test_dice_is_monais():
    from monai.losses import DiceLoss

    fixed, warped = (torch.rand(2, 3, *SHAPE) > 0.6).float(), torch.rand(2, 3, *SHAPE)
    expected = DiceLoss(smooth_nr=0, smooth_dr=1e-12)(warped, fixed)
    assert dice_loss(fixed, warped).item() == pytest.approx(expected.item(), rel=1e-6)


def test_dice_by_hand():
    fixed, warped = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4)
    fixed[..., :2], warped[..., 1:] = 1, 1  # 32 and 48 voxels, 16 in common
    assert dice_loss(fixed, warped).item() == pytest.approx(1 - 2 * 16 / 80)
    assert dice_loss(fixed, fixed).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(fixed, 1 - fixed).item() == 1


def test_dice_leaves_out_a_structure_absent_from_both():
    fixed = (torch.rand(1, 3, *SHAPE) > 0.5).float()
    warped = torch.rand(1, 3, *SHAPE)
    fixed[:, 1] = warped[:, 1] = 0
    assert dice_loss(fixed, warped).item() == pytest.approx(dice_loss(fixed[:, [0, 2]], warped[:, [0, 2]]).item())
    warped[:, 1, 0, 0, 0] = 1  # in one of the two only: it counts, as a miss
    two = 1 - dice_loss(fixed[:, [0, 2]], warped[:, [0, 2]]).item()
    assert dice_loss(fixed, warped).item() == pytest.approx(1 - 2 * two / 3)


def test_dice_of_nothing_is_no_loss_and_can_be_differentiated():
    warped = torch.zeros(1, 2, *SHAPE, requires_grad=True)
    loss = dice_loss(torch.zeros(1, 2, *SHAPE), warped)
    loss.backward()
    assert loss == 0 and (warped.grad == 0).all()


def test_mse():
    assert mse_loss(torch.zeros(2, 1, 3, 3, 3), torch.full((2, 1, 3, 3, 3), 0.5)).item() == 0.25


def test_values_at_control_points():
    volume = torch.rand(2, 2, *SHAPE)
    grid = (5, 6, 4)
    found = at_control_points(volume, grid)
    corners = (slice(None), slice(None), slice(None, None, 4), slice(None, None, 5), slice(None, None, 3))
    ends = (slice(None), slice(None), slice(None, None, 8), slice(None, None, 11), slice(None, None, 14))
    assert torch.equal(found[corners], volume[ends])
    at = control_point_coordinates(grid, SHAPE, dtype=torch.float64).numpy()
    for b in range(2):
        for c in range(2):
            expected = ndimage.map_coordinates(volume[b, c].numpy(), at, order=1)
            np.testing.assert_allclose(found[b, c].numpy(), expected, atol=1e-6)
    assert torch.equal(at_control_points(volume, SHAPE), volume)  # a control point on every voxel


def test_values_at_control_points_keep_double_precision():
    volume = torch.rand(1, 1, *SHAPE, dtype=torch.float64)
    found = at_control_points(volume, (2, 2, 2))
    assert found.dtype == torch.float64 and torch.equal(found, volume[..., ::8, ::11, ::14])


def masks(labels: torch.Tensor, values: list[int]) -> torch.Tensor:
    return torch.cat([(labels == value).double() for value in values], dim=1)


@pytest.mark.parametrize("values", [[1, 3, 5], [2], [4, 9], list(range(1, 10))])
@pytest.mark.parametrize("few", [1, 2, LABELS_AT_ONCE])  # some masks after the other, and all at once
def test_dice_of_labels_is_the_dice_of_their_masks(few, values, monkeypatch):
    """Value and gradient, with labels that are absent, not asked for, moved out of the image, or of one case only."""
    monkeypatch.setattr(losses, "LABELS_AT_ONCE", few)
    fixed, moving = torch.randint(0, 6, (2, 2, 1, 7, 9, 8))
    moving[0][moving[0] == 3] = 0
    field = (3 * torch.randn(2, 3, 7, 9, 8, dtype=torch.float64)).requires_grad_()
    one = dice_loss(masks(fixed, values), warp(masks(moving, values), field))
    other = label_dice_loss(fixed.to(torch.int16), moving.to(torch.int16), field, values)
    torch.testing.assert_close(other, one)
    gradients = [torch.autograd.grad(loss, field)[0] for loss in (one, other)]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("absent", [0, LABELS_AT_ONCE])
def test_dice_of_a_large_label_in_single_precision(absent):
    """A slab of 108 planes, moved by a tenth of a voxel: 107.9 of them overlap. Half a million weights are summed."""
    labels = torch.zeros(1, 1, 128, 64, 64, dtype=torch.int16)
    labels[:, :, 10:118] = 1
    field = torch.zeros(1, 3, 128, 64, 64)
    field[:, 0] = 0.1
    field.requires_grad_()
    loss = label_dice_loss(labels, labels, field, list(range(1, 2 + absent)))
    loss.backward()
    assert loss.dtype == field.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(0.1 / 108, rel=2e-3)
    slope = torch.zeros(128, 64, 64)  # of the overlap, at the last plane; of the mask's sum, there and before the first
    slope[117], slope[9] = 1 / 108 - 107.9 / (2 * 108**2), 107.9 / (2 * 108**2)
    torch.testing.assert_close(field.grad[0, 0] * 64**2, slope, rtol=1e-3, atol=1e-6)


def test_dice_of_a_hundred_labels_takes_the_memory_of_ten():
    """What autograd keeps for the backward pass does not grow with the number of labels."""
    fixed, moving = torch.randint(0, 120, (2, 1, 1, 10, 12, 11))
    field = torch.randn(1, 3, 10, 12, 11, requires_grad=True)

    def kept(values: list[int]) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            label_dice_loss(fixed, moving, field, values)
        return sum(sizes)

    assert kept(list(range(1, 120))) < 1.05 * kept(list(range(1, LABELS_AT_ONCE + 1)))


def test_information_of_a_ramp_is_its_squared_slope():
    x = voxel_coordinates((8, 9, 10))
    energy = gradient_energy((0.03 * x[1] - 0.04 * x[2])[None, None])
    torch.testing.assert_close(energy, torch.full((1, 1, 8, 9, 10), 25e-4))


def test_uncertainty_by_hand():
    fixed, warped, energy = (np.random.default_rng(seed).random((2, 1, 2, 3, 2)) for seed in range(3))
    variance, widest = np.random.default_rng(3).uniform(0.5, 2, (2, 3, 2, 3, 2)), np.array([1.0, 2.0, 3.0])
    terms = []
    for b, a, *x in np.ndindex(variance.shape):
        at = (b, 0, *x)
        displaced = ((fixed[at] - warped[at]) ** 2 + RESIDUAL_NOISE**2) / (
            energy[at] + RESIDUAL_NOISE**2 / widest[a] ** 2
        )
        terms.append(displaced / variance[(b, a, *x)] + LAMBDA_0 * np.log(variance[(b, a, *x)]))
    found = uncertainty_loss(*map(torch.from_numpy, (fixed, warped, energy, variance, widest.reshape(3, 1, 1, 1))))
    assert found.item() == pytest.approx(np.mean(terms))


def test_uncertainty_is_least_at_the_displacement_that_the_residual_amounts_to():
    """A ramp of slope s, shifted by d: the best σ² is (s² d² + RESIDUAL_NOISE²) / (s² + RESIDUAL_NOISE² / widest²), about d²."""
    slope, shift, widest = 0.1, 0.8, torch.full((3, 1, 1, 1), 2.0)
    fixed = slope * voxel_coordinates((12, 12, 12))[0][None, None]
    best = (slope**2 * shift**2 + RESIDUAL_NOISE**2) / (slope**2 + RESIDUAL_NOISE**2 / 4)
    assert best == pytest.approx(shift**2, rel=0.1)

    def loss(variance: float) -> float:
        dense = torch.full((1, 3, 12, 12, 12), variance)
        return uncertainty_loss(fixed, fixed + slope * shift, gradient_energy(fixed), dense, widest).item()

    assert loss(best) < min(loss(0.8 * best), loss(1.25 * best))
    flat = torch.full_like(fixed, 0.5)
    at = [
        uncertainty_loss(flat, flat, gradient_energy(flat), torch.full((1, 3, 12, 12, 12), v), widest)
        for v in (3.5, 4, 4.5)
    ]
    assert at[1] < min(at[0], at[2])  # widest²
