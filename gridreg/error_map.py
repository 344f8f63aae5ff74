"""How far may each voxel of a registration be off? A small network that learns it, for any registration method.

It sees the fixed image, the warped image and the displacement, and predicts a standard deviation per voxel and axis in mm.
It learns from pairs whose true displacement is known, because the training makes them (``make_pairs``):

    moving   a training scan
    fixed    the same scan under a random displacement T, with another contrast, resolution, bias field and noise
    label    e = u - T, where u is what the method in question answers for this pair

    loss     mean over voxels and axes of e² / (2 σ²) + log σ       (Gaussian negative log likelihood)

So it needs scans and no truth. T is half of the time what Gauss-Newton finds between two of the scans, scaled at random,
plus a random smooth field; else a random smooth field alone. Both have the size of what was found between the scans,
down to a tenth of it. Half of the time u is replaced by T + α (u - T) with a random α: a method leaves errors of one
size, and without this the network would learn that size in place of what a misaligned image looks like.

What it knows: where the images disagree, and where they hold no structure that could show it. What it does not know:
errors that leave no trace in the images, and a scan unlike all that it was trained on. The scale of σ is that of the
pairs made here; ``coverage_factor`` fits one factor on validation patients.

The network works at half the resolution of the images; σ is interpolated linearly, and no control point enters, so there is
no lattice in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridreg import calibration, gauss_newton
from gridreg.checkpoint import read_tensors, write_tensors
from gridreg.errors import InputError
from gridreg.refinement import default_bending_weight
from gridreg.spatial import Shape, check_volume, warp
from gridreg.upsampling import upsample

WIDTHS = (8, 16, 32)  # features at half, quarter and eighth of the resolution
LOG_SIGMA_RANGE = (-6.0, 4.0)  # σ lies between 0.002 and 55 voxels
IMAGE_SCALE, GRADIENT_SCALE, DISPLACEMENT_SCALE, FLOW_SCALE = 4.0, 8.0, 0.25, 60.0  # bring each input near 1

FOUND_BETWEEN = 40  # pairs of scans that Gauss-Newton registers for T
FOUND_GRID = (8, 8, 8)
FOUND_BENDING = 1 / 16  # of ``default_bending_weight``
SMALLEST_SIZE, LARGEST_SIZE = 0.1, 1.2  # of the random smooth field, relative to what was found
KEPT_MB = 1000  # of pairs that are kept for further steps

# fixed, moving (B, 1, W, H, D), grid → displacement (B, 3, W, H, D) in voxels, or (displacement, spread)
Register = Callable[..., "Tensor | tuple[Tensor, Tensor]"]


# ---- the network ----


def _even(volume: Tensor) -> Tensor:
    """The volume with its last slice repeated along every axis that has an odd number of them."""
    padding = [side for n in reversed(volume.shape[2:]) for side in (0, n % 2)]
    return F.pad(volume, padding, mode="replicate") if any(padding) else volume


def _halved(volume: Tensor) -> Tensor:
    """Means of 2×2×2 voxels."""
    return F.avg_pool3d(_even(volume), 2)


def _doubled(volume: Tensor, shape: Sequence[int]) -> Tensor:
    """Linear between the centres of those 2×2×2 voxels, cropped to ``shape``."""
    volume = F.interpolate(volume, scale_factor=2, mode="trilinear", align_corners=False)
    return volume[:, :, : shape[0], : shape[1], : shape[2]]


def _gradient(image: Tensor) -> Tensor:
    """(B, 3, W, H, D) central differences of (B, 1, W, H, D); 0 at the border."""
    found = image.new_zeros(image.shape[0], 3, *image.shape[2:])
    for axis, n in enumerate(image.shape[2:]):
        if n > 2:
            after, before = (image[:, 0].narrow(axis + 1, start, n - 2) for start in (2, 0))
            found[:, axis].narrow(axis + 1, 1, n - 2).copy_((after - before) / 2)
    return found


def features(fixed: Tensor, warped: Tensor, displacement: Tensor, spread: Tensor | None = None) -> Tensor:
    """What the network sees, (B, 13 or 16, w, h, d) at half resolution (rounded up).

    Means of 2×2×2 voxels: fixed, warped, fixed - warped, its root mean square; the root mean square of the gradient
    along each axis; gradient times difference (the right-hand side of the normal equations of ``gauss_newton``: it points
    along the displacement that is still missing); the displacement; log of the spread.
    """
    difference = fixed - warped
    gradient = _gradient((fixed + warped) / 2)
    seen = [
        _halved(fixed),
        _halved(warped),
        IMAGE_SCALE * _halved(difference),
        IMAGE_SCALE * (_halved(difference.square()) + 1e-6).sqrt(),
        GRADIENT_SCALE * (_halved(gradient.square()) + 1e-6).sqrt(),
        FLOW_SCALE * _halved(gradient * difference),
        DISPLACEMENT_SCALE * _halved(displacement),
    ]
    if spread is not None:
        seen.append((F.interpolate(spread, seen[0].shape[2:], mode="trilinear") + 1e-3).log())
    return torch.cat(seen, dim=1)


def _flipped(seen: Tensor, axis: int) -> Tensor:
    """``features`` of the mirrored pair: along the axis displacement and flow change their sign."""
    seen = seen.flip(2 + axis)
    sign = torch.ones(seen.shape[1], device=seen.device)
    sign[[7 + axis, 10 + axis]] = -1
    return seen * sign.view(1, -1, 1, 1, 1)


def _block(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(channels, width, 3, padding=1), nn.LeakyReLU(0.1))


class ErrorMap(nn.Module):
    """σ of a registration's error, per voxel and axis. No layer normalises: the size of a difference must get through.

    spacing_mm  of the images, one number or three
    spread      whether the method gives a spread (of its attention) besides its displacement
    """

    def __init__(self, spacing_mm: float | Sequence[float], spread: bool = False):
        super().__init__()
        half, quarter, eighth = WIDTHS
        self.spread = spread
        self.first = _block(16 if spread else 13, half)
        self.second = nn.Sequential(_block(half, quarter), _block(quarter, quarter))
        self.third = nn.Sequential(_block(quarter, eighth), _block(eighth, eighth))
        self.whole = nn.Linear(eighth, eighth)  # of the mean over the image: one pair is worse than another
        self.joined = _block(eighth + quarter, quarter)
        self.head = nn.Sequential(nn.Conv3d(half + quarter, 16, 1), nn.LeakyReLU(0.1), nn.Conv3d(16, 3, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=0.1)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head[-1].weight)  # starts at σ of one voxel everywhere
        spacing = torch.as_tensor(spacing_mm, dtype=torch.float32).expand(3).clone()
        self.register_buffer("spacing_mm", spacing.view(1, 3, 1, 1, 1))
        self.register_buffer("factor", torch.ones(()))  # see ``coverage_factor``

    def log_sigma(self, seen: Tensor) -> Tensor:
        """(B, 3, w, h, d) log σ in voxels, at the half resolution of ``features``."""
        at_half = self.first(seen)
        at_quarter = self.second(_halved(at_half))
        at_eighth = self.third(_halved(at_quarter))
        at_eighth = at_eighth + self.whole(at_eighth.mean((2, 3, 4)))[..., None, None, None]
        y = self.joined(torch.cat([_doubled(at_eighth, at_quarter.shape[2:]), at_quarter], dim=1))
        y = self.head(torch.cat([_doubled(y, at_half.shape[2:]), at_half], dim=1))
        return y.clamp(*LOG_SIGMA_RANGE)

    def forward(self, fixed: Tensor, warped: Tensor, displacement: Tensor, spread: Tensor | None = None) -> Tensor:
        """Predicted standard deviation of the error along each axis, (B, 3, W, H, D) in mm, times ``factor``.

        fixed, warped  (B, 1, W, H, D) in [0, 1]; ``warped`` is the moving image warped by the displacement
        displacement   (B, 3, W, H, D) in voxels
        spread         (B, 3, w, h, d) in voxels, of any size: for a map that was trained with it

        ValueError on shapes that do not agree, a spread that is missing or not expected.
        """
        _check(fixed, warped, displacement)
        if (spread is not None) != self.spread:
            raise ValueError(f"spread is {'missing' if self.spread else 'given'}, but the map was trained otherwise")
        sigma = self.log_sigma(features(fixed, warped, displacement, spread)).exp() * self.spacing_mm * self.factor
        return _doubled(sigma, fixed.shape[2:])

    def save(self, file: Path | str) -> None:
        """Write one safetensors file, whole or not at all. InputError where it cannot be written."""
        write_tensors(file, self.state_dict(), {"error_map": {"spread": self.spread}})

    @classmethod
    def load(cls, file: Path | str) -> ErrorMap:
        """The map of a file of ``save``, in evaluation mode. InputError where it is not one."""
        weights, note = read_tensors(file)
        if "error_map" not in note:
            raise InputError(f"{file}: found other weights, expected those of an error map")
        found = cls(1.0, **note["error_map"])
        try:
            found.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(f"{file}: cannot be used ({error}); expected the weights of an error map") from error
        return found.eval()


def _check(fixed: Tensor, other: Tensor, displacement: Tensor) -> None:
    check_volume(fixed, 1, "fixed")
    check_volume(displacement, 3, "displacement")
    if other.shape != fixed.shape or displacement.shape != (fixed.shape[0], 3, *fixed.shape[2:]):
        raise ValueError(
            f"the images are {tuple(fixed.shape)} and {tuple(other.shape)}, the displacement "
            f"{tuple(displacement.shape)}; they must agree"
        )


# ---- pairs whose true displacement is known ----


class Known(NamedTuple):
    """Pairs made by ``make_pairs``: images (B, 1, W, H, D), the true and the found displacement (B, 3, W, H, D) in voxels."""

    fixed: Tensor
    moving: Tensor
    true: Tensor
    found: Tensor
    spread: Tensor | None

    def one(self, index: int) -> Known:
        return Known(*(None if each is None else each[index : index + 1] for each in self))


def _normal(rng: np.random.Generator, *size: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=size).astype(np.float32))


def _uniform(rng: np.random.Generator, low: float, high: float, batch: int) -> Tensor:
    """(B, 1, 1, 1, 1)."""
    return torch.from_numpy(rng.uniform(low, high, (batch, 1, 1, 1, 1)).astype(np.float32))


def found_between(
    images: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]], bending_weight: float | None = None
) -> Tensor:
    """Control points (N, 3, 8, 8, 8) in voxels that Gauss-Newton finds from zero between scans, by B-splines.

    They give the random displacements the size and the shape of the motion between these scans; that they are no exact
    registration does not matter. bending_weight: None is 1/16 of ``default_bending_weight``.
    """
    shape: Shape = tuple(images[0].shape)
    weight = FOUND_BENDING * default_bending_weight(shape) if bending_weight is None else bending_weight
    grid = tuple(min(g, n) for g, n in zip(FOUND_GRID, shape))
    found = []
    for pair in pairs:
        fixed, moving = (torch.from_numpy(np.ascontiguousarray(images[i], np.float32))[None, None] for i in pair)
        found.append(
            gauss_newton.solve(
                torch.zeros(1, 3, *grid), fixed, moving,
                bound=None, steps=6, similarity="mse", bending_weight=weight, upsampling="bspline",
            )
        )  # fmt: skip
    return torch.cat(found)


def random_displacement(found: Tensor, shape: Shape, batch: int, rng: np.random.Generator) -> Tensor:
    """(B, 3, W, H, D) in voxels: what was found between scans, scaled, or a random smooth field, or both."""
    size = found.square().mean().sqrt().clamp(min=0.05)
    grid = rng.integers(3, 9, 3)
    relative = torch.exp(_uniform(rng, math.log(SMALLEST_SIZE), math.log(LARGEST_SIZE), batch))
    smooth = _normal(rng, batch, 3, *grid) + _normal(rng, batch, 3, 1, 1, 1) * _uniform(rng, 0, 1, batch)
    smooth = upsample(size * relative * smooth, shape, "bspline")
    chosen = upsample(found[rng.integers(len(found), size=batch)], shape, "bspline")
    both = 0.3 * smooth + _uniform(rng, 0, 1.3, batch) * chosen
    return torch.where(_uniform(rng, 0, 1, batch) < 0.5, both, smooth)


def _blurred(image: Tensor, sigma: np.ndarray) -> Tensor:
    """Gaussian blur, ``sigma`` voxels along each axis."""
    x = torch.arange(-2.0, 3.0)
    for axis, s in enumerate(sigma):
        kernel = torch.exp(-(x**2) / (2 * max(float(s), 0.05) ** 2))
        size = [1, 1, 1, 1, 1]
        size[2 + axis] = 5
        padding = [2 if a == axis else 0 for a in (2, 1, 0) for _ in range(2)]
        image = F.conv3d(F.pad(image, padding, mode="replicate"), (kernel / kernel.sum()).view(size))
    return image


def other_appearance(images: Tensor, rng: np.random.Generator) -> Tensor:
    """The same anatomy from another scanner: resolution, a random increasing curve of intensities, bias field, noise."""
    batch, shape = images.shape[0], tuple(images.shape[2:])
    if rng.random() < 0.5:
        images = _blurred(images, rng.uniform(0, 0.9, 3))
    knots, values = np.linspace(0, 1, 7), []
    for image in images.numpy():
        curve = np.concatenate([[0], np.cumsum(np.exp(rng.normal(0, 0.4, 6)))])
        values.append(np.interp(image, knots, curve / curve[-1] * np.exp(rng.normal(0, 0.1))))
    bias = torch.exp(0.1 * upsample(_normal(rng, batch, 1, 4, 4, 4), shape, "bspline"))
    noise = _uniform(rng, 0, 0.04, batch) * _normal(rng, *images.shape)
    return (torch.from_numpy(np.stack(values).astype(np.float32)) * bias + noise).clamp(0, 1)


def make_pairs(
    register: Register,
    images: Sequence[np.ndarray],
    found: Tensor,
    rng: np.random.Generator,
    grids: Sequence[Shape | None] = (None,),
    batch: int = 2,
) -> Known:
    """A scan, the same scan displaced and of another appearance, registered by the method at one of ``grids``."""
    chosen = rng.integers(len(images), size=batch)
    moving = torch.from_numpy(np.stack([np.asarray(images[i], np.float32) for i in chosen]))[:, None]
    true = random_displacement(found, tuple(moving.shape[2:]), batch, rng)
    fixed = other_appearance(warp(moving, true), rng)
    if rng.random() < 0.5:
        moving = other_appearance(moving, rng)
    with torch.no_grad():
        answer = register(fixed, moving, grids[rng.integers(len(grids))])
    displacement, spread = answer if isinstance(answer, tuple) else (answer, None)
    _check(fixed, moving, displacement)
    # clones: what a method made in inference mode cannot take part in a gradient
    displacement, spread = (None if t is None else t.detach().cpu().float().clone() for t in (displacement, spread))
    return Known(fixed, moving, true, displacement, spread)


def _example(pair: Known, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Features and mean squared error (1, 3, w, h, d) in voxels², mirrored at random."""
    found = pair.found
    if rng.random() < 0.5:
        found = pair.true + float(rng.uniform(0.1, 1.5)) * (found - pair.true)
    seen = features(pair.fixed, warp(pair.moving, found), found, pair.spread)
    squared = _halved((found - pair.true).square())
    for axis in range(3):
        if rng.random() < 0.5:
            seen, squared = _flipped(seen, axis), squared.flip(2 + axis)
    return seen, squared


# ---- training ----


@torch.inference_mode(False)
@torch.enable_grad()
def train_error_map(
    register: Register,
    images: Sequence[np.ndarray],
    spacing_mm: float | Sequence[float],
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    grids: Sequence[Shape | None] = (None,),
    steps: int = 400,
    batch: int = 4,
    made: int = 800,
    bending_weight: float | None = None,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> ErrorMap:
    """An error map for one registration method, in evaluation mode; the same numbers for the same seed.

    register        (fixed, moving, grid) → displacement (B, 3, W, H, D) in voxels, or (displacement, spread); the images
                    are (B, 1, W, H, D) in [0, 1], on the CPU
    images          training scans (W, H, D) in [0, 1], one shape and spacing
    spacing_mm      of the scans, one number or three
    pairs           (i, j), scans that are registered with each other in earnest, such as visits of one patient; None: any two
    grids           sizes of the control-point grid, one at random for each pair; (None,) for a method without one
    steps, batch    of Adam, and examples in each
    made            pairs that are registered, in the course of the training: fewer for a slow method
    bending_weight  see ``found_between``

    ValueError with fewer than two scans, or scans of different shapes.
    """
    if len(images) < 2 or any(image.shape != images[0].shape for image in images):
        raise ValueError(
            f"found {len(images)} scans of shapes {sorted({i.shape for i in images})}, expected two or more of one"
        )
    rng = np.random.default_rng(seed)
    if pairs is None:
        pairs = [tuple(rng.choice(len(images), 2, replace=False)) for _ in range(FOUND_BETWEEN)]
    elif len(pairs) > FOUND_BETWEEN:
        pairs = [pairs[i] for i in rng.choice(len(pairs), FOUND_BETWEEN, replace=False)]
    found = found_between(images, pairs, bending_weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = make_pairs(register, images, found, rng, grids, batch)
        error_map = ErrorMap(spacing_mm, spread=first.spread is not None)
    optimiser = torch.optim.AdamW(error_map.parameters(), lr=learning_rate, weight_decay=1e-3)
    kept, count = [first.one(i) for i in range(batch)], batch
    room = max(batch, int(KEPT_MB * 2**20 / (32 * images[0].size)))  # eight volumes a pair
    for step in range(steps):
        wanted = batch + (made - batch) * (step + 1) / steps
        while count + 2 <= wanted:
            fresh = make_pairs(register, images, found, rng, grids, 2)
            kept, count = [fresh.one(0), fresh.one(1), *kept][:room], count + 2
        examples = [_example(kept[rng.integers(len(kept))], rng) for _ in range(batch)]
        seen, squared = (torch.cat(each) for each in zip(*examples))
        log_sigma = error_map.log_sigma(seen)
        loss = (squared * torch.exp(-2 * log_sigma) / 2 + log_sigma).mean()
        warm, fall = min(1, 20 * (step + 1) / steps), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = learning_rate * warm * fall
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(error_map.parameters(), 1.0)
        optimiser.step()
    return error_map.eval()


def coverage_factor(error: np.ndarray, sigma: np.ndarray, level: float = 0.9) -> float:
    """The factor on σ with which the central Gaussian interval of ``level`` holds that fraction of the errors.

    error, sigma  (3, ...) in mm, of validation patients; as in ``gridreg.calibration``

    A conformal quantile of |error| / σ: coverage at one level is right even where errors are not Gaussian, which
    ``calibration.scale`` supposes. ValueError as ``calibration.coverage``.
    """
    calibration.coverage(error, sigma, (level,))  # for its checks
    ratio = np.abs(np.asarray(error, float) / np.asarray(sigma, float))
    return float(np.quantile(ratio, level) / scipy.stats.norm.ppf(0.5 + level / 2))
