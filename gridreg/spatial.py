"""Conventions of GridReg, and the functions that implement them: warp, transform_points, sample.

Arrays
    Volumes are canonical RAS, axes (i, j, k) = (x, y, z); tensors are (B, C, W, H, D).
Displacement field
    Shape (B, 3, W, H, D). Channel a is along array axis a, **in voxels of the fixed grid**. It is a
    pull-back: warped(x) = moving(x + u(x)) for x on the fixed grid (paper, section 3.1). A length is
    in mm only where its name ends in ``_mm``.
Control points
    A grid of (gw, gh, gd) control points includes the corners of the image: linspace(0, n - 1, g)
    per axis. Control-point displacements have shape (B, 3, gw, gh, gd), in voxels of the fixed grid.
Images and points
    Images go from moving to fixed (``warp``); points go from fixed to moving (``transform_points``).
Sampling
    ``align_corners=True`` throughout: voxel 0 is -1 and voxel n - 1 is +1. Only ``sample`` and its fast
    counterpart call ``grid_sample``, so that a zero displacement is the identity everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gridreg import fast

Shape = tuple[int, int, int]


def as_shape(size: int | Shape, name: str = "size") -> Shape:
    """A size as three integers, of one integer or three. ValueError on another number of them."""
    triple = (size,) * 3 if isinstance(size, int) else tuple(int(n) for n in size)
    if len(triple) != 3:
        raise ValueError(f"{name} must be one integer or three, found {size!r}")
    return triple


def check_volume(volume: Tensor, channels: int | None, name: str) -> None:
    """Raise ValueError unless ``volume`` is (B, channels, W, H, D); ``channels=None`` allows any number."""
    wanted = f"(B, {'C' if channels is None else channels}, W, H, D)"
    if volume.dim() != 5 or (channels is not None and volume.shape[1] != channels):
        raise ValueError(f"{name} must have shape {wanted}, found {tuple(volume.shape)}")


def check_grid_size(grid_size: int | Shape, shape: Shape) -> Shape:
    """The grid size as three integers. ValueError if an axis has fewer than 2 control points, or more than voxels."""
    grid_size = as_shape(grid_size, "grid_size")
    if any(g < 2 for g in grid_size) or any(g > n for g, n in zip(grid_size, shape)):
        raise ValueError(
            f"grid_size must lie between 2 and the image size {tuple(shape)} on every axis, found {grid_size}"
        )
    return grid_size


def voxel_coordinates(shape: Shape, device=None, dtype=torch.float32) -> Tensor:
    """(3, W, H, D) coordinates in voxels of every voxel of a grid of ``shape``."""
    axes = [torch.arange(n, device=device, dtype=dtype) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def control_point_coordinates(grid_size: Shape, shape: Shape, device=None, dtype=torch.float32) -> Tensor:
    """(3, gw, gh, gd) coordinates of the control points, in voxels of an image of ``shape``."""
    axes = [torch.linspace(0, n - 1, g, device=device, dtype=dtype) for g, n in zip(grid_size, shape)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _sampling_dtype(device: torch.device) -> torch.dtype:
    """float64 on a CPU, where rounding [-1, 1] in float32 would move voxel 127 by 1e-5 voxels; float32 on a GPU."""
    return torch.float64 if device.type == "cpu" else torch.float32


def sample(volume: Tensor, coordinates: Tensor, mode: str = "linear") -> Tensor:
    """Read ``volume`` (B, C, W, H, D) at normalised ``coordinates`` (B, w, h, d, 3), last axis first (z, y, x).

    Outside the image the value at the border is used. ``mode`` is "linear" or "nearest". Returns (B, C, w, h, d).
    """
    by_slice = fast.can_sample_by_slice(volume)
    read = volume.to(coordinates.dtype)
    if by_slice:
        read, coordinates = fast.as_slices(read, coordinates)
    values = F.grid_sample(
        read, coordinates, {"linear": "bilinear", "nearest": "nearest"}[mode], padding_mode="border", align_corners=True
    )
    return (fast.from_slices(values) if by_slice else values).to(volume.dtype)


def warp(moving: Tensor, displacement: Tensor, mode: str = "linear") -> Tensor:
    """warped(x) = moving(x + u(x)), x on the fixed grid (paper, section 3.1).

    moving        (B, C, W', H', D') image, or label map with ``mode="nearest"``
    displacement  (B, 3, W, H, D) in voxels; in voxels of the moving grid if the two sizes differ
    returns       (B, C, W, H, D)

    ValueError on other shapes, batches that differ, another mode, or integers with mode "linear".
    """
    check_volume(moving, None, "moving")
    check_volume(displacement, 3, "displacement")
    if moving.shape[0] != displacement.shape[0]:
        raise ValueError(f"moving holds {moving.shape[0]} volumes, displacement {displacement.shape[0]}")
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode is {mode!r}, expected linear or nearest")
    if mode == "linear" and not moving.is_floating_point():
        raise ValueError(f"moving holds {moving.dtype}, which linear interpolation would truncate; expected floats")
    if mode == "linear" and fast.can_warp(moving, displacement):
        return fast.warp(moving, displacement)
    sizes, shape, dtype = moving.shape[2:], displacement.shape[2:], _sampling_dtype(displacement.device)
    coordinates = []  # of x + u(x) in [-1, 1], last axis first
    for axis in (2, 1, 0):
        x = torch.linspace(-1, 1, shape[axis], device=displacement.device, dtype=dtype)
        x = x.view([-1 if other == axis else 1 for other in range(3)])
        coordinates.append(torch.add(x, displacement[:, axis], alpha=2 / max(sizes[axis] - 1, 1)))
    volume = moving.to(dtype)
    return sample(volume, torch.stack(coordinates, dim=-1), mode).to(moving.dtype)


def transform_points(points: Tensor, displacement: Tensor) -> Tensor:
    """Transform points of the fixed image to the moving image: y = x + u(x), with u interpolated linearly at x.

    points        (B, N, 3) in voxels of the fixed grid, in the order of the array axes
    displacement  (B, 3, W, H, D) in voxels
    returns       (B, N, 3) in voxels

    ValueError on other shapes.
    """
    check_volume(displacement, 3, "displacement")
    if points.dim() != 3 or points.shape[-1] != 3 or points.shape[0] != displacement.shape[0]:
        raise ValueError(f"points must have shape ({displacement.shape[0]}, N, 3), found {tuple(points.shape)}")
    last = torch.tensor([max(n - 1, 1) for n in displacement.shape[2:]], device=points.device, dtype=points.dtype)
    coordinates = (2 * points / last - 1).flip(-1)[:, :, None, None]
    moved = sample(displacement.to(points.dtype), coordinates)[..., 0, 0]
    return points + moved.transpose(1, 2)
