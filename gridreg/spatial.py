"""Conventions of GridReg, and the few functions that everything else stands on.

Arrays
    Volumes are canonical RAS, axes (i, j, k) = (x, y, z); tensors are (B, C, W, H, D).
Displacement field
    Shape (B, 3, W, H, D). Channel a is along array axis a, **in voxels of the fixed grid**. It is a
    pull-back: warped(x) = moving(x + u(x)) for x on the fixed grid (paper, section 3.1). Millimetres
    only where a name ends in ``_mm``.
Control points
    A grid of (gw, gh, gd) control points includes the corners of the image: linspace(0, n - 1, g)
    per axis. Control-point displacements have shape (B, 3, gw, gh, gd), in voxels of the fixed grid.
Images and points
    Images go from moving to fixed (``warp``); points go from fixed to moving (``transform_points``).
Sampling
    ``align_corners=True`` throughout: voxel 0 is -1 and voxel n - 1 is +1. ``_read`` is the only
    function that calls ``grid_sample``, so that a zero displacement is the identity everywhere.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, int, int]
SLAB = 2**17  # voxels that are warped at once: what is computed on the way stays in a cache
INSIDE = 1e-9  # voxels; a coordinate at the last plane is moved by so much, to lie between two planes


def as_shape(size: int | Shape, name: str = "size") -> Shape:
    """One integer or three as three integers. ValueError if that is not what ``size`` holds."""
    triple = (size,) * 3 if isinstance(size, int) else tuple(int(n) for n in size)
    if len(triple) != 3:
        raise ValueError(f"{name} must be one integer or three, found {size!r}")
    return triple


def check_volume(volume: Tensor, channels: int | None, name: str) -> None:
    """ValueError unless ``volume`` is (B, channels, W, H, D); ``channels=None`` admits any number."""
    wanted = f"(B, {'C' if channels is None else channels}, W, H, D)"
    if volume.dim() != 5 or (channels is not None and volume.shape[1] != channels):
        raise ValueError(f"{name} must have shape {wanted}, found {tuple(volume.shape)}")


def check_grid_size(grid_size: int | Shape, shape: Shape) -> Shape:
    """The grid size as a triple. ValueError below 2 control points, or more of them than voxels, on an axis."""
    grid_size = as_shape(grid_size, "grid_size")
    if any(g < 2 for g in grid_size) or any(g > n for g, n in zip(grid_size, shape)):
        raise ValueError(
            f"grid_size must lie between 2 and the image size {tuple(shape)} on every axis, found {grid_size}"
        )
    return grid_size


def voxel_coordinates(shape: Shape, device=None, dtype=torch.float32) -> Tensor:
    """(3, W, H, D) coordinates, in voxels, of every voxel of a grid of that shape."""
    axes = [torch.arange(n, device=device, dtype=dtype) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def control_point_coordinates(grid_size: Shape, shape: Shape, device=None, dtype=torch.float32) -> Tensor:
    """(3, gw, gh, gd) coordinates, in voxels of an image of ``shape``, of the control points."""
    axes = [torch.linspace(0, n - 1, g, device=device, dtype=dtype) for g, n in zip(grid_size, shape)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept must serve a training too
def _normalised_axes(shape: Shape, device: torch.device) -> list[Tensor]:
    """Per axis, coordinates in [-1, 1] shaped to broadcast over (W, H, D); they differ only by shape, so cached.

    On a CPU they are float64: in float32 the rounding of [-1, 1] moves voxel 127 by 1e-5 voxels.
    """
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    axes = [torch.linspace(-1, 1, n, device=device, dtype=dtype) for n in shape]
    return [axis.view([-1 if b == a else 1 for b in range(3)]) for a, axis in enumerate(axes)]


def _read(image: Tensor, coordinates: Tensor, mode: str = "bilinear") -> Tensor:
    return F.grid_sample(image, coordinates, mode, padding_mode="border", align_corners=True)


def sample(volume: Tensor, coordinates: Tensor, mode: str = "linear") -> Tensor:
    """Read ``volume`` (B, C, W, H, D) at normalised ``coordinates`` (B, w, h, d, 3), last axis first (z, y, x).

    Beyond the border the border's value is read. ``mode`` is "linear" or "nearest". Returns (B, C, w, h, d).
    """
    volume_type, volume = volume.dtype, volume.to(coordinates.dtype)
    # On a CPU, PyTorch shares out a batch among threads, but not one volume: then every slice is one of a batch.
    slices = volume.shape[0] == 1 and volume.device.type == "cpu" and not volume.requires_grad
    if slices:
        volume, coordinates = volume.expand(coordinates.shape[1], -1, -1, -1, -1), coordinates[0, :, None]
    values = _read(volume, coordinates, {"linear": "bilinear", "nearest": "nearest"}[mode])
    return (values.permute(2, 1, 0, 3, 4) if slices else values).to(volume_type)


def warp(moving: Tensor, displacement: Tensor, mode: str = "linear") -> Tensor:
    """warped(x) = moving(x + u(x)), x on the fixed grid (paper, section 3.1).

    moving        (B, C, W', H', D') image, or label map with ``mode="nearest"``
    displacement  (B, 3, W, H, D) in voxels; of the moving grid, should the two sizes differ
    returns       (B, C, W, H, D)

    ValueError on other shapes, batches that differ, or another mode.
    """
    check_volume(moving, None, "moving")
    check_volume(displacement, 3, "displacement")
    if moving.shape[0] != displacement.shape[0]:
        raise ValueError(f"moving holds {moving.shape[0]} volumes, displacement {displacement.shape[0]}")
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode is {mode!r}, expected linear or nearest")
    if mode == "linear" and not moving.is_floating_point():
        raise ValueError(f"moving holds {moving.dtype}, which linear interpolation would truncate; expected floats")
    shape, size = tuple(displacement.shape[2:]), moving.shape[2:]
    learns = torch.is_grad_enabled() and (moving.requires_grad or displacement.requires_grad)
    if mode == "linear" and moving.device.type == "cpu" and not learns and min(size[:2]) > 1:
        warped = moving.new_empty(*moving.shape[:2], *shape)
        for triple in zip(moving, displacement, warped):
            _warp_by_planes(*triple)
        return warped
    axes = _normalised_axes(shape, displacement.device)
    volume, warped, first = moving.to(axes[0].dtype), [], 0
    for slab in displacement.split(max(SLAB // (shape[1] * shape[2]), 1), dim=2):
        of_slab = [axes[0][first : first + slab.shape[2]], *axes[1:]]
        coordinates = [torch.add(of_slab[a], slab[:, a], alpha=2 / max(size[a] - 1, 1)) for a in (2, 1, 0)]
        warped.append(sample(volume, torch.stack(coordinates, dim=-1), mode).to(moving.dtype))
        first += slab.shape[2]
    return torch.cat(warped, dim=2)


def _warp_by_planes(moving: Tensor, displacement: Tensor, warped: Tensor) -> None:
    """``warp`` of one (C, W', H', D') volume by a (3, W, H, D) displacement into (C, W, H, D), on a CPU, without gradients.

    PyTorch reads images with vector instructions, volumes without. So the planes of the volume stand below each other as
    one tall image, which is read twice at once: in the plane below each point and in the one above it.
    """
    (width, height, depth), shape = moving.shape[1:], displacement.shape[1:]
    rows = (width - 1) * height  # of the tall image; the one that is read above starts ``height`` rows later
    row = 2 / (rows - 1)
    volume = moving.double().contiguous()
    x, y, z = (torch.linspace(0, n - 1, m, dtype=torch.float64) for n, m in zip(moving.shape[1:], shape))
    x, y, z = x.view(-1, 1, 1), y.view(1, -1, 1) * row - 1, z * 2 / max(depth - 1, 1) - 1
    first = 0
    for slab in displacement.split(max(SLAB // (shape[1] * shape[2]), 1), dim=1):
        u, planes = slab.double(), slice(first, first + slab.shape[1])
        place = (u[0] + x[planes]).clamp_(0, width - 1 - INSIDE)
        plane = place.floor()
        at = torch.empty(*u.shape[1:], 2, dtype=torch.float64)
        torch.add(z, u[2], alpha=2 / max(depth - 1, 1), out=at[..., 0])
        torch.add((y + u[1] * row).clamp_(-1, (height - 1) * row - 1), plane, alpha=height * row, out=at[..., 1])
        for channel, values in zip(volume, warped):
            tall = channel.as_strided((2, rows, depth), (height * depth, depth, 1))
            read = _read(tall.expand(len(at), -1, -1, -1), at)
            values[planes] = torch.lerp(read[:, 0], read[:, 1], place - plane)
        first += slab.shape[1]


def transform_points(points: Tensor, displacement: Tensor) -> Tensor:
    """Carry points of the fixed image to the moving image: y = x + u(x), u read linearly at x.

    points        (B, N, 3) in voxels of the fixed grid, in the order of the array axes
    displacement  (B, 3, W, H, D) in voxels
    returns       (B, N, 3) in voxels
    """
    check_volume(displacement, 3, "displacement")
    if points.dim() != 3 or points.shape[-1] != 3 or points.shape[0] != displacement.shape[0]:
        raise ValueError(f"points must have shape ({displacement.shape[0]}, N, 3), found {tuple(points.shape)}")
    last = torch.tensor([max(n - 1, 1) for n in displacement.shape[2:]], device=points.device, dtype=points.dtype)
    coordinates = (2 * points / last - 1).flip(-1)[:, :, None, None]
    moved = sample(displacement.to(points.dtype), coordinates)[..., 0, 0]
    return points + moved.transpose(1, 2)
