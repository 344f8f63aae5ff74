"""Gauss-Newton on control points: the matrix against a dense one, the slopes against autograd, and what it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import gridreg
from gridreg import losses
from gridreg.gauss_newton import FROM_IDENTITY, Level, Objective, _prolongation, conjugate_gradients, solve
from gridreg.network import Registration
from gridreg.refinement import refine, unsupervised_loss
from gridreg.spatial import control_point_coordinates, voxel_coordinates, warp
from gridreg.upsampling import apply_along_axes, basis, displacement_bound, upsample

SHAPE, GRID, WEIGHT = (16, 18, 14), (4, 5, 4), 20.0


def textured_pair(shape=SHAPE, share: float = 0.05, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fixed, moving and the displacement u with fixed(x) = moving(x + u(x)): sums of waves, in closed form."""
    generator = torch.Generator().manual_seed(seed)
    waves = [6 * math.pi * torch.randn(4, generator=generator) for _ in range(24)]
    width = torch.tensor(shape).view(3, 1, 1, 1) - 1

    def texture(x):
        value = sum(torch.sin((wave[:3].view(3, 1, 1, 1) * x / width).sum(0) + wave[3]) for wave in waves)
        return (0.5 + 0.04 * value).clamp(0, 1)[None, None]

    x = voxel_coordinates(shape)
    a, b, c = math.pi * x / width
    u = share * width * torch.stack([a.sin() * (2 * b).sin(), b.sin() * c.cos(), (2 * c).sin() * a.sin()])
    return texture(x + u), texture(x), u[None]


def somewhere(seed: int = 1, size: float = 0.5, grid=GRID) -> torch.Tensor:
    return size * torch.randn(1, 3, *grid, generator=torch.Generator().manual_seed(seed))


def zeros(grid=GRID) -> torch.Tensor:
    return torch.zeros(1, 3, *grid)


def dense_basis(upsampling: str, shape=SHAPE, grid=GRID) -> np.ndarray:
    """(N, G), what the solver never forms."""
    x, y, z = (basis(n, g, upsampling, dtype=torch.float64).numpy() for n, g in zip(shape, grid))
    return np.kron(np.kron(x, y), z)


@pytest.mark.parametrize("similarity", ["mse", "ncc"])
@pytest.mark.parametrize("upsampling", ["trilinear", "bspline", "deconv"])
def test_the_loss_and_its_gradient_are_those_of_training(similarity, upsampling):
    fixed, moving, _ = textured_pair()
    c = somewhere().requires_grad_()
    loss = unsupervised_loss(c, fixed, moving, similarity, WEIGHT, upsampling)
    (gradient,) = torch.autograd.grad(loss, c)
    objective = Objective(fixed, moving, GRID, similarity, WEIGHT, upsampling)
    point = objective.at(c.detach())
    assert point.loss == pytest.approx(loss.item() + (2 if similarity == "ncc" else 0), rel=1e-4)
    found = -objective.normal_equations(point).right
    assert float((found - gradient).norm()) < 0.01 * float(gradient.norm())


@pytest.mark.parametrize("similarity", ["mse", "ncc"])
def test_the_slopes_at_the_voxels_are_those_of_autograd(similarity):
    fixed, moving, _ = textured_pair()
    c = somewhere()
    warped = warp(moving, upsample(c, SHAPE)).requires_grad_()
    (expected,) = torch.autograd.grad(losses.similarity_loss(similarity, fixed, warped, GRID), warped)
    slope, curvature = Objective(fixed, moving, GRID, similarity, WEIGHT, "trilinear").at(c).slopes()
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert (curvature >= 0).all()


@pytest.mark.parametrize("upsampling", ["trilinear", "bspline"])
def test_the_step_is_that_of_a_dense_solve(upsampling):
    fixed, moving, _ = textured_pair()
    objective = Objective(fixed, moving, GRID, "mse", WEIGHT, upsampling, at_grid=False)
    point = objective.at(somewhere())
    normal = objective.normal_equations(point, damping=0.1)
    b, j = dense_basis(upsampling), normal.j[0].flatten(1).double().numpy()
    jacobian = np.concatenate([row[:, None] * b for row in j], axis=1)  # of the warped image: (N, 3 G)
    data = 2 / len(b) * jacobian.T @ jacobian
    stiff = sum(k * np.kron(np.kron(x, y), z) for k, (x, y, z) in objective.grams)
    weights = [2 * WEIGHT * (2 / (n - 1)) ** 2 for n in SHAPE]
    bending = np.kron(np.diag(weights), stiff)
    residual = (fixed - point.warped).flatten().double().numpy()
    right = 2 / len(b) * jacobian.T @ residual - bending @ point.control_points.flatten().double().numpy()
    matrix = data + bending + 0.1 * np.diag(np.diag(data))
    np.testing.assert_allclose(normal.right.flatten(), right, rtol=0, atol=1e-4 * np.abs(right).max())
    np.testing.assert_allclose(normal.diagonal.flatten(), np.diag(matrix), rtol=1e-3)
    found = conjugate_gradients(normal.apply, normal.right, normal.diagonal, steps=500, tolerance=1e-6)
    expected = np.linalg.solve(matrix, right)
    np.testing.assert_allclose(found.flatten(), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_conjugate_gradients_solve_each_case_of_a_batch():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    matrix, right = root @ root.T + torch.eye(24), torch.randn(3, 3, 2, 2, 2, generator=generator, dtype=torch.float64)
    right[1] = 0

    def apply(x):
        return (x.flatten(1) @ matrix).view_as(x)

    diagonal = matrix.diagonal().view(3, 2, 2, 2)
    found = conjugate_gradients(apply, right, diagonal, steps=200, tolerance=1e-9)
    torch.testing.assert_close(found.flatten(1).T, torch.linalg.solve(matrix, right.flatten(1).T))
    free = torch.ones(1, 3, 2, 2, 2, dtype=torch.float64)
    free[:, 0] = 0
    held = conjugate_gradients(apply, right, diagonal, steps=200, tolerance=1e-9, free=free).flatten(1)
    assert (held[:, :8] == 0).all()
    torch.testing.assert_close(held[:, 8:].T, torch.linalg.solve(matrix[8:, 8:], right.flatten(1)[:, 8:].T))


@pytest.mark.parametrize("grid", [(4, 5, 4), (8, 7, 6)])
@pytest.mark.parametrize("upsampling", ["trilinear", "bspline", "deconv"])
def test_a_coarser_grid_is_carried_to_the_finer_one(upsampling, grid):
    """A linear displacement is in every trilinear and B-spline grid, so a level that moves a coarser one keeps it."""
    prolongation = [_prolongation(n, g, 4, upsampling, torch.device("cpu")) for n, g in zip(SHAPE, grid)]
    coarse = torch.einsum("ab,bxyz->axyz", torch.tensor([[0.1, 0, 0.2], [0, -0.1, 0], [0.1, 0.1, 0]]),
                          control_point_coordinates((4, 4, 4), SHAPE))[None]  # fmt: skip
    fine = upsample(apply_along_axes(coarse, prolongation), SHAPE, upsampling)
    wanted = upsample(coarse, SHAPE, upsampling)
    tolerance = 1e-4 if upsampling != "deconv" else 0.25
    assert float((fine - wanted).abs().max()) < tolerance


@pytest.mark.parametrize("similarity", ["mse", "ncc"])
@pytest.mark.parametrize("levels", [(Level(4),), (Level(3, 1.0, 1, 2), Level(3)), FROM_IDENTITY])
def test_the_loss_falls_at_every_iteration(similarity, levels):
    fixed, moving, _ = textured_pair()
    seen = [unsupervised_loss(zeros(), fixed, moving, similarity, WEIGHT, "trilinear")]
    for steps in range(1, 5):
        c = solve(zeros(), fixed, moving, similarity=similarity, bending_weight=WEIGHT, levels=(Level(steps),))
        seen.append(unsupervised_loss(c, fixed, moving, similarity, WEIGHT, "trilinear"))
    assert all(b <= a + 1e-6 for a, b in zip(seen, seen[1:])) and seen[1] < seen[0]
    start = zeros()
    c = solve(start, fixed, moving, similarity=similarity, bending_weight=WEIGHT, levels=levels)
    assert unsupervised_loss(c, fixed, moving, similarity, WEIGHT, "trilinear") < seen[0]
    assert (start == 0).all()


@pytest.mark.parametrize("upsampling", ["trilinear", "bspline"])
@pytest.mark.parametrize("seed", range(2))
def test_noise_without_correspondence_is_never_worse(seed, upsampling):
    fixed, moving = torch.rand(2, 1, 1, *SHAPE, generator=torch.Generator().manual_seed(seed))
    start = somewhere(seed, 3.0)
    c = solve(start, fixed, moving, bending_weight=WEIGHT, upsampling=upsampling)
    before, after = (float(unsupervised_loss(x, fixed, moving, "mse", WEIGHT, upsampling)) for x in (start, c))
    assert after <= before * (1 + 1e-5) and c.isfinite().all()


@pytest.mark.parametrize("similarity", ["mse", "ncc"])
def test_constant_images_and_identical_images_stay(similarity):
    flat = torch.full((1, 1, *SHAPE), 0.5)
    assert torch.equal(solve(zeros(), flat, flat, similarity=similarity, bending_weight=0.0), zeros())
    fixed, _, _ = textured_pair()
    assert float(solve(zeros(), fixed, fixed, similarity=similarity, bending_weight=WEIGHT).abs().max()) < 1e-2


@pytest.mark.parametrize("similarity, upsampling", [("mse", "trilinear"), ("mse", "bspline"), ("ncc", "bspline")])
def test_no_worse_than_eighty_steps_of_adam(similarity, upsampling):
    fixed, moving, truth = textured_pair((24, 26, 20))
    start = Registration(torch.zeros_like(truth), zeros((6, 6, 5)))
    settings = {"similarity": similarity, "bending_weight": WEIGHT, "upsampling": upsampling}
    found = {
        "adam": refine(start, fixed, moving, steps=80, **settings),
        "gauss-newton": refine(start, fixed, moving, solver="gauss-newton", **settings),
    }
    loss = {k: float(unsupervised_loss(r.control_points, fixed, moving, *settings.values())) for k, r in found.items()}
    assert loss["gauss-newton"] < loss["adam"] + 0.01 * abs(loss["adam"])
    off = {name: float((r.displacement - truth).norm(dim=1).mean()) for name, r in found.items()}
    assert off["gauss-newton"] < 1.05 * off["adam"]
    assert torch.equal(
        found["gauss-newton"].displacement, upsample(found["gauss-newton"].control_points, (24, 26, 20), upsampling)
    )


def test_local_correlation_sees_through_gain_and_bias():
    """A contrast that changes from place to place: the MSE is misled, local NCC is not."""
    fixed, moving, truth = textured_pair((24, 26, 20))
    gain = torch.linspace(0.4, 1.0, 24).view(1, 1, -1, 1, 1)
    grid, off = (6, 6, 5), {"nothing": float(truth.norm(dim=1).mean())}
    for similarity in ("mse", "ncc"):
        c = solve(zeros(grid), fixed, 1 - gain * moving, similarity=similarity, bending_weight=WEIGHT)
        off[similarity] = float((upsample(c, (24, 26, 20)) - truth).norm(dim=1).mean())
    assert off["ncc"] < 0.5 * off["nothing"] < 0.5 * off["mse"]


def test_a_large_motion_is_found_from_coarse_to_fine():
    shape, grid = (40, 36, 32), (10, 9, 8)
    x = voxel_coordinates(shape)

    def blob(centre):
        return torch.exp(-(x - torch.tensor(centre).view(3, 1, 1, 1)).square().sum(0) / (2 * 3.0**2))[None, None]

    fixed, moving = blob((16.0, 18.0, 16.0)), blob((24.0, 18.0, 16.0))  # eight voxels: the blobs hardly overlap
    settings = {"bending_weight": 0.5, "upsampling": "bspline"}
    found = {name: solve(zeros(grid), fixed, moving, levels=levels, **settings)
             for name, levels in (("coarse to fine", FROM_IDENTITY), ("fine", (Level(20),)))}  # fmt: skip
    moved = {name: float(upsample(c, shape, "bspline")[0, 0, 16, 18, 16]) for name, c in found.items()}
    assert moved["coarse to fine"] == pytest.approx(8, abs=0.5)


def test_the_bound_of_fold_free_is_kept():
    fixed, moving, _ = textured_pair((24, 26, 20), share=0.15)
    shape, grid = (24, 26, 20), (7, 7, 6)
    bound = displacement_bound(grid, shape)
    settings = {"bending_weight": 0.1, "upsampling": "bspline"}
    free = solve(zeros(grid), fixed, moving, **settings)
    kept = solve(zeros(grid), fixed, moving, bound=bound, **settings)
    assert (free.abs() > bound).any() and (kept.abs() <= bound).all()
    assert (kept.abs() > 0.999 * bound).any()  # it makes use of what it may
    start = Registration(torch.zeros(1, 3, *shape), zeros(grid))
    found = refine(start, fixed, moving, fold_free=True, solver="gauss-newton", **settings)
    assert (found.control_points.abs() <= bound).all()
    before, after = (
        float(unsupervised_loss(c, fixed, moving, "mse", 0.1, "bspline")) for c in (zeros(grid), kept)
    )  # fmt: skip
    assert after < 0.7 * before


def test_cases_of_a_batch_are_solved_alone_and_alike_twice():
    pairs = [textured_pair(seed=seed) for seed in (0, 1)]
    fixed, moving = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    start = Registration(torch.zeros(2, 3, *SHAPE), torch.zeros(2, 3, *GRID))
    with torch.inference_mode():
        found = [refine(start, fixed, moving, solver="gauss-newton", bending_weight=WEIGHT) for _ in range(2)]
    assert torch.equal(found[0].control_points, found[1].control_points)
    for number, (f, m, _) in enumerate(pairs):
        alone = solve(zeros(), f, m, bending_weight=WEIGHT)
        torch.testing.assert_close(found[0].control_points[number], alone[0])
    assert gridreg.refine(start, fixed, moving, solver="gauss-newton", steps=0) is start


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"solver": "newton"}, "solver must be adam or gauss-newton, found 'newton'"),
        ({"solver": "gauss-newton", "similarity": "mi"}, "needs similarity mse or ncc, found 'mi'"),
    ],
)
def test_a_solver_that_is_not_there(settings, message):
    fixed, moving, _ = textured_pair()
    with pytest.raises(ValueError, match=message):
        refine(Registration(torch.zeros(1, 3, *SHAPE), zeros()), fixed, moving, **settings)


def test_levels_end_with_the_loss():
    fixed, moving, _ = textured_pair()
    for levels in ((), (Level(3, smoothing=1.0),)):
        with pytest.raises(ValueError, match="last level"):
            solve(zeros(), fixed, moving, bending_weight=WEIGHT, levels=levels)
    with pytest.raises(ValueError, match="mse or ncc, found 'mi'"):
        solve(zeros(), fixed, moving, bending_weight=WEIGHT, similarity="mi")
