"""The conventions: identity, whole-voxel shifts, images moving → fixed, points fixed → moving."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

import gridreg
from gridreg import fast
from gridreg.spatial import (
    as_shape,
    check_grid_size,
    control_point_coordinates,
    transform_points,
    voxel_coordinates,
    warp,
)

SHAPE = (7, 10, 13)  # non-cubic, so that swapped axes show


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def constant_field(*vector: float, shape=SHAPE) -> torch.Tensor:
    return torch.tensor(vector, dtype=torch.float32).view(1, 3, 1, 1, 1).expand(1, 3, *shape)


@pytest.mark.parametrize("shape", [SHAPE, (128, 5, 102), (2, 3, 4)])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_zero_field_is_the_identity(shape, mode):
    moving = torch.rand(2, 2, *shape)
    torch.testing.assert_close(warp(moving, torch.zeros(2, 3, *shape), mode), moving, rtol=0, atol=1e-6)


def test_one_volume_is_warped_as_one_of_a_batch(monkeypatch):
    """A single volume goes to the threads slice by slice; slabs of two slices here."""
    monkeypatch.setattr(fast, "SLAB_VOXELS", 2 * SHAPE[1] * SHAPE[2])
    moving, displacement = torch.rand(2, 3, *SHAPE), torch.randn(2, 3, *SHAPE)
    for moves in (moving, moving.clone().requires_grad_()):
        together = warp(moves, displacement)
        for i in range(2):
            torch.testing.assert_close(
                warp(moves[i : i + 1], displacement[i : i + 1]), together[i : i + 1], rtol=0, atol=0
            )


@pytest.mark.parametrize("shape", [SHAPE, (2, 2, 1), (9, 3, 1), (40, 6, 5)])
def test_the_fast_warp_is_the_plain_one(shape):
    """Far beyond the border too, and for images of another size; with gradients the plain one runs anyhow."""
    moving, displacement = torch.rand(2, 3, *shape), 4 * torch.randn(2, 3, *SHAPE)
    with fast.without("warp"):
        plain = warp(moving, displacement)
    torch.testing.assert_close(warp(moving, displacement), plain, rtol=0, atol=2e-7)
    assert torch.equal(warp(moving.clone().requires_grad_(), displacement).detach(), plain)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_slices_are_sampled_as_the_volume(mode):
    moving, displacement = torch.rand(1, 2, *SHAPE), 4 * torch.randn(1, 3, *SHAPE).requires_grad_()
    found = []
    for plain in ((), ("slices",)):
        with fast.without(*plain):
            warped = warp(moving, displacement, mode)
        found.append(
            [warped, *torch.autograd.grad(warped.square().sum(), displacement)] if mode == "linear" else [warped]
        )
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_zero_field_is_not_the_identity_in_the_released_code():
    """Its grid runs linspace(-1, 1) but is sampled with align_corners=False: the fault is a visible one."""
    moving = torch.rand(1, 1, *SHAPE)
    axes = [torch.linspace(-1, 1, n) for n in SHAPE]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None]
    released = F.grid_sample(moving, grid, padding_mode="border", align_corners=False)
    assert (released - moving).abs().mean() > 0.05
    assert (warp(moving, torch.zeros(1, 3, *SHAPE)) - moving).abs().max() < 1e-6


def test_one_function_samples_and_its_fast_counterpart():
    calls = []
    for path in Path(gridreg.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                called = [ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)]
                calls += [(path.name, function.name) for name in called if name.split(".")[-1] == "grid_sample"]
    assert sorted(calls) == [("fast.py", "_warp_by_planes"), ("spatial.py", "sample")]


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_whole_voxel_moves_exactly_one_voxel(axis, step, mode):
    moving = torch.rand(1, 1, *SHAPE)
    warped = warp(moving, constant_field(*(step * (a == axis) for a in range(3))), mode)
    read = (torch.arange(SHAPE[axis]) + step).clamp(0, SHAPE[axis] - 1)  # beyond the border, the border's value
    torch.testing.assert_close(warped, moving.index_select(2 + axis, read), rtol=0, atol=1e-6)


def test_bright_voxel_and_its_point():
    """warped(x) = moving(x + u): a voxel at m shows at m - u, and the point m - u is carried to m."""
    u, there, here = (1, -2, 3), (4, 3, 8), (3, 5, 5)
    moving = torch.zeros(1, 1, *SHAPE)
    moving[0, 0][there] = 1
    warped = warp(moving, constant_field(*u))
    assert [tuple(v.tolist()) for v in (warped[0, 0] > 0.5).nonzero()] == [here]
    points = transform_points(torch.tensor([[here]], dtype=torch.float32), constant_field(*u))
    torch.testing.assert_close(points, torch.tensor([[there]], dtype=torch.float32), rtol=0, atol=1e-5)


def test_points_follow_an_affine_field_between_voxels():
    matrix = torch.tensor([[0.1, -0.2, 0.05], [0.0, 0.15, 0.1], [-0.1, 0.02, -0.2]], dtype=torch.float64)
    offset = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    x = voxel_coordinates(SHAPE, dtype=torch.float64)
    field = (torch.einsum("ab,bxyz->axyz", matrix, x) + offset.view(3, 1, 1, 1))[None]
    points = torch.rand(1, 20, 3, dtype=torch.float64) * (torch.tensor(SHAPE) - 1)
    torch.testing.assert_close(transform_points(points, field), points + points @ matrix.T + offset)


def test_points_read_the_field_as_images_are_read():
    field = torch.randn(2, 3, *SHAPE)
    inside = torch.rand(2, 15, 3) * (torch.tensor(SHAPE) - 1)
    moved = transform_points(inside, field)
    for b in range(2):
        u = [ndimage.map_coordinates(c.numpy(), inside[b].T.numpy(), order=1, mode="nearest") for c in field[b]]
        np.testing.assert_allclose(moved[b].numpy(), inside[b].numpy() + np.stack(u, 1), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_random_warps_agree_with_scipy(seed):
    """SciPy's mode="nearest" repeats the border. Displacements reach beyond it."""
    rng = np.random.default_rng(seed)
    moving, field = rng.random((2, 2, *SHAPE), np.float32), 4 * rng.standard_normal((2, 3, *SHAPE), np.float32)
    warped = warp(torch.from_numpy(moving), torch.from_numpy(field)).numpy()
    for b in range(2):
        at = np.indices(SHAPE) + field[b]
        for c in range(2):
            expected = ndimage.map_coordinates(moving[b, c], at, order=1, mode="nearest")
            np.testing.assert_allclose(warped[b, c], expected, atol=1e-5)


def test_nearest_keeps_labels():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 3, 17, 2035], SHAPE)
    field = rng.normal(0, 2, (3, *SHAPE)).astype(np.float32)
    warped = warp(torch.from_numpy(labels)[None, None], torch.from_numpy(field)[None], "nearest")
    assert warped.dtype == torch.int64
    expected = ndimage.map_coordinates(labels, np.indices(SHAPE) + field, order=0, mode="nearest")
    np.testing.assert_array_equal(warped[0, 0], expected)


def test_moving_image_of_another_size_is_read_corner_to_corner():
    moving = torch.rand(1, 1, 12, 9, 20)
    expected = F.interpolate(moving, SHAPE, mode="trilinear", align_corners=True)
    torch.testing.assert_close(warp(moving, torch.zeros(1, 3, *SHAPE)), expected, rtol=0, atol=1e-5)
    one_voxel = warp(moving, constant_field(0, 0, 1))[0, 0, 0, 0, 0]  # in voxels of the moving grid
    torch.testing.assert_close(one_voxel, moving[0, 0, 0, 0, 1], rtol=0, atol=1e-5)


def test_warp_is_differentiable_in_both_arguments():
    moving = torch.rand(1, 1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    field = (0.2 + 0.1 * torch.rand(1, 3, 4, 3, 5, dtype=torch.float64)).requires_grad_()  # away from the hat's kinks
    assert torch.autograd.gradcheck(warp, (moving, field))


@pytest.mark.parametrize(
    ("moving", "field", "found"),
    [
        ((1, 5, 6, 7), (1, 3, 5, 6, 7), r"moving must have shape \(B, C, W, H, D\), found \(1, 5, 6, 7\)"),
        ((1, 1, 5, 6, 7), (1, 2, 5, 6, 7), r"displacement must have shape \(B, 3, W, H, D\), found \(1, 2, 5, 6, 7\)"),
        ((1, 1, 5, 6, 7), (1, 5, 6, 7, 3), "displacement must have shape"),  # channels last, the usual mistake
        ((2, 1, 5, 6, 7), (1, 3, 5, 6, 7), "moving holds 2 volumes, displacement 1"),
    ],
)
def test_wrong_shapes_are_refused(moving, field, found):
    with pytest.raises(ValueError, match=found):
        warp(torch.zeros(moving), torch.zeros(field))


@pytest.mark.parametrize("shape", [(4, 3), (1, 4, 2), (2, 4, 3)])
def test_wrong_points_are_refused(shape):
    with pytest.raises(ValueError, match=r"points must have shape \(1, N, 3\)"):
        transform_points(torch.zeros(shape), torch.zeros(1, 3, *SHAPE))


def test_control_points_include_the_corners():
    points = control_point_coordinates((2, 3, 4), SHAPE)
    assert points.shape == (3, 2, 3, 4)
    assert points[:, 0, 0, 0].tolist() == [0, 0, 0]
    assert points[:, -1, -1, -1].tolist() == [n - 1 for n in SHAPE]
    assert points[1, 0, :, 0].tolist() == [0, 4.5, 9]


def test_grid_sizes_are_checked():
    assert check_grid_size(5, SHAPE) == (5, 5, 5)
    assert check_grid_size((2, 10, 13), SHAPE) == (2, 10, 13)
    for impossible in (1, (5, 5, 1), 8, (7, 11, 13)):
        with pytest.raises(ValueError, match=r"between 2 and the image size \(7, 10, 13\)"):
            check_grid_size(impossible, SHAPE)
    with pytest.raises(ValueError, match="one integer or three"):
        as_shape((5, 5))
