"""The experiment of Figure 1: the effect of a false correspondence on coarse grids, fine grids and a dense field.

Pairs of simulated slices have a known smooth deformation. They show a homogeneous disc (the organ) in textured
surroundings. Each condition adds one error to otherwise perfect pairs: image noise, a spot at different positions of the
disc in the two images (the orange stars of Figure 1), or a mask of the disc with a wrong contour. A condition with the
correct mask is there for comparison. In the last condition nothing is wrong, but the deformation has details that only a
fine grid can represent.

Every pair is registered with the losses of ``gridreg``. The control points themselves are optimised, without a network, at
several grid sizes and several weights of the bending energy, which also keeps a field smooth.

A slice is a volume (1, n, n) with one control point along its first axis and no displacement along this axis. So the
functions for volumes apply unchanged. Lengths are in voxels of the slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from gridreg import losses
from gridreg.refinement import LEARNING_RATE
from gridreg.spatial import warp
from gridreg.upsampling import upsample

SIZE = 48  # n
RADIUS = 12.0  # of the disc
DISC_INTENSITY = 0.65  # the texture around the disc has mean 0.45
EDGE_WIDTH = 0.7
DEFORMATION = 4.0  # longest true displacement
NOISE = 0.05  # standard deviation, intensities in [0, 1]
SPOT_DISTANCE = 5.0  # in the moving image, from the correct position of the spot to its actual one
CONTOUR_ERROR = 2.0  # standard deviation of the fixed mask's contour error
GRIDS = (3, 5, 8, 12, SIZE)  # control points per axis; the last grid has one at every voxel
PAPERS_WEIGHT = 2e5 * (SIZE / 128) ** 4  # the paper's weight of the bending energy, for voxels 128/48 times as large
BENDING_WEIGHTS = (PAPERS_WEIGHT, PAPERS_WEIGHT / 10, PAPERS_WEIGHT / 100)
DICE_WEIGHT = 0.3  # as in params.yaml
STEPS = 60  # of Adam on each grid
CONVERGENCE = (
    f"The optimisation has not converged: it runs {STEPS} steps at each grid, and each finer grid starts from the coarser one. With 600 "
    "steps, over five pairs, the means in the disc change by up to 0.35 voxels."
)
CONDITIONS = {  # name in figures → arguments of ``simulate``
    "nothing": {},
    "image noise": {"noise": NOISE},
    "false match": {"spot": True},
    "correct masks": {"masks": True},
    "wrong masks": {"masks": True, "rough": True},
    "fine deformation": {"details": True},
}


@dataclass(frozen=True)
class SlicePair:
    """One simulated pair of slices (n, n); ``displacement`` (2, n, n) is the true pull-back in voxels."""

    fixed: np.ndarray
    moving: np.ndarray
    fixed_mask: np.ndarray  # of the disc, bool, in one condition with a wrong contour; all False without masks
    moving_mask: np.ndarray
    displacement: np.ndarray
    disc: np.ndarray  # the true disc in the fixed image: 1 inside, 0 outside, with a soft edge
    spots: np.ndarray | None = None  # (2, 2): the false match, a point of the fixed image and one of the moving image


def simulate(seed: int, noise: float = 0.0, spot: bool = False, masks: bool = False, rough: bool = False,
             details: bool = False) -> SlicePair:  # fmt: skip
    """Simulate a pair. With the same seed, conditions differ only in what is added, as every condition makes all draws."""
    rng = np.random.default_rng(seed)
    waves = rng.uniform(8, 24, 40), rng.uniform(0, 2 * np.pi, 40), rng.uniform(0, 2 * np.pi, 40)
    x = np.indices((SIZE, SIZE), float)
    u = _smooth_field(rng, x)
    around, angles, noises = (
        rng.uniform(0, 2 * np.pi, 3),
        rng.uniform(0, 2 * np.pi, 5),
        rng.standard_normal((2, SIZE, SIZE)),
    )
    if details:
        for k in range(3):  # in the textured surroundings, a third of a turn apart
            at = _from_centre(around[0] + k * 2 * np.pi / 3, RADIUS + 6)
            u = u + 2 * _direction(around[1] + k)[:, None, None] * np.exp(-(_distance(x, at) ** 2) / (2 * 3**2))
    y = x + u
    fixed, moving = _image(y, waves), _image(x, waves)
    disc = _disc(y)
    fixed_mask, moving_mask = (disc > 0.5) & masks, (_disc(x) > 0.5) & masks
    spots = None
    if spot:
        here = _from_centre(angles[0], 4.0)  # inside the disc
        there = here - SPOT_DISTANCE * _direction(angles[0])  # beyond the centre, so also inside the disc
        spots = np.stack([_preimage(here, x, y), there])
        fixed, moving = fixed + _spot(y, here), moving + _spot(x, there)
    if rough:
        fixed_mask = _distance(y, _from_centre(0.0, 0.0)) < RADIUS + _contour_error(angles[1:], y)
    return SlicePair(fixed + noise * noises[0], moving + noise * noises[1], fixed_mask, moving_mask, u, disc, spots)


def _smooth_field(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """(2, n, n) sum of waves with a length of one to two image sides, scaled to a longest displacement of ``DEFORMATION``."""
    u = np.zeros_like(x)
    for _ in range(4):
        wave = 2 * np.pi / (SIZE * rng.uniform(1, 2)) * _direction(rng.uniform(0, 2 * np.pi))
        phase, heading = rng.uniform(0, 2 * np.pi, 2)
        u += _direction(heading)[:, None, None] * np.cos(np.tensordot(wave, x, 1) + phase)
    return u * DEFORMATION / np.linalg.norm(u, axis=0).max()


def _direction(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])


def _from_centre(angle: float, distance: float) -> np.ndarray:
    """The point at an angle and a distance from the centre of the disc."""
    return (SIZE - 1) / 2 + distance * _direction(angle)


def _distance(x: np.ndarray, point: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x - point[:, None, None], axis=0)


def _soft(inside: np.ndarray) -> np.ndarray:
    """1 where ``inside`` is positive, 0 where negative, with a soft edge."""
    return 1 / (1 + np.exp(-np.clip(inside / EDGE_WIDTH, -50, 50)))


def _disc(x: np.ndarray) -> np.ndarray:
    return _soft(RADIUS - _distance(x, _from_centre(0.0, 0.0)))


def _spot(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    return 0.3 * np.exp(-(_distance(x, at) ** 2) / (2 * 2**2))


def _contour_error(phases: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(n, n) voxels by which the contour lies too far outside, a sum of four to seven waves around the disc."""
    angle = np.arctan2(*(y - (SIZE - 1) / 2)[::-1])
    return CONTOUR_ERROR * sum(np.cos(k * angle + phase) for k, phase in zip((4, 5, 6, 7), phases)) / np.sqrt(2)


def _image(x: np.ndarray, waves) -> np.ndarray:
    """The noiseless anatomy at points x (2, n, n) of the moving image, in closed form, without interpolation."""
    lengths, angles, phases = waves
    vectors = 2 * np.pi / lengths * np.stack([np.cos(angles), np.sin(angles)])  # (2, waves)
    texture = np.cos(np.tensordot(vectors.T, x, 1) + phases[:, None, None]).sum(0) / np.sqrt(len(lengths) / 2)
    return DISC_INTENSITY * _disc(x) + (0.45 + 0.12 * texture) * (1 - _disc(x))


def _preimage(point: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The voxel x whose y = x + u(x) is nearest to a point of the moving image."""
    return x.reshape(2, -1)[:, np.argmin(_distance(y, point))]


def register(
    pairs: Sequence[SlicePair], grids: Sequence[int] = GRIDS, bending_weight: float = PAPERS_WEIGHT, steps: int = STEPS
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Register pairs by optimising their control points with Adam, on one grid size after the other.

    Each grid takes ``steps`` and starts from the result of the one before, so that a fine grid or a dense field does not
    fail because of a bad start. The loss is that of training: similarity at image level and at the control points, Dice
    of the masks, and bending energy. Returns grid → (displacements (B, 2, n, n) in voxels, final mean squared intensity
    differences (B,)).
    """
    fixed, moving = (_as_volumes(pairs, *names) for names in (("fixed", "fixed_mask"), ("moving", "moving_mask")))
    found, start = {}, torch.zeros(len(pairs), 3, 1, 2, 2)
    for grid in grids:
        start = _optimise(upsample(start, (1, grid, grid)), fixed, moving, bending_weight, steps)
        displacement = upsample(start, (1, SIZE, SIZE))
        difference = (warp(moving[:, :1], displacement) - fixed[:, :1]).square().mean((1, 2, 3, 4))
        found[grid] = displacement[:, 1:, 0].numpy(), difference.numpy()
    return found


def _optimise(start: Tensor, fixed: Tensor, moving: Tensor, bending_weight: float, steps: int) -> Tensor:
    """Control points (B, 3, 1, g, g) in voxels, ``steps`` after ``start``; image and mask are two channels."""
    moved = torch.zeros_like(start[:, 1:], requires_grad=True)  # in image widths, as in ``refine``
    optimiser = torch.optim.Adam([moved], lr=LEARNING_RATE)
    masked = fixed[:, 1].flatten(1).any(1).sum()
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1 / steps, total_iters=steps)
    for _ in range(steps):
        control_points = start + F.pad(moved * SIZE, (0, 0, 0, 0, 0, 0, 1, 0))  # no displacement along the first axis
        warped = warp(moving, upsample(control_points, (1, SIZE, SIZE)))
        loss = losses.similarity_loss("mse", fixed[:, :1], warped[:, :1], tuple(control_points.shape[2:]))
        loss = loss + bending_weight * losses.grid_bending_energy(control_points, (3, SIZE, SIZE))
        # means over pairs become sums, so that pairs are independent; those without masks add nothing to the Dice loss
        loss = loss * len(fixed) + DICE_WEIGHT * masked * losses.dice_loss(fixed[:, 1:], warped[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return control_points.detach()


def _as_volumes(pairs: Sequence[SlicePair], *names: str) -> Tensor:
    """(B, channels, 1, n, n) float32 of the named fields of each pair."""
    slices = [[getattr(pair, name) for name in names] for pair in pairs]
    return torch.from_numpy(np.array(slices)).float()[:, :, None]


def run(
    seeds: Iterable[int] = range(5),
    grids: Sequence[int] = GRIDS,
    conditions: Iterable[str] = tuple(CONDITIONS),
    bending_weights: Sequence[float] = BENDING_WEIGHTS,
    steps: int = STEPS,
) -> tuple[pd.DataFrame, dict[tuple[str, float, int], tuple[SlicePair, np.ndarray]]]:
    """Register a pair of every seed under every condition, at every grid size and weight of the bending energy.

    Returns a frame and a dict. The frame has one row per registration, with columns condition, bending_weight, grid,
    seed, error_disc, error_around, error (mean distance to the truth in voxels: inside the disc, outside it, everywhere)
    and difference (final mean squared intensity difference). The dict is for pictures: {(condition, bending_weight,
    grid): (pair of the first seed, estimated displacement (2, n, n))}.
    """
    cases = [(condition, seed) for condition in conditions for seed in seeds]
    pairs = [simulate(seed, **CONDITIONS[condition]) for condition, seed in cases]
    rows, pictures = [], {}
    for weight in bending_weights:
        for grid, found in register(pairs, grids, weight, steps).items():
            for (condition, seed), pair, displacement, difference in zip(cases, pairs, *found):
                pictures.setdefault((condition, weight, grid), (pair, displacement))
                error = np.linalg.norm(displacement - pair.displacement, axis=0)
                inside = pair.disc > 0.5
                parts = (error[inside].mean(), error[~inside].mean(), error.mean())
                rows.append((condition, weight, grid, seed, *parts, difference))
    columns = ["condition", "bending_weight", "grid", "seed", "error_disc", "error_around", "error", "difference"]
    return pd.DataFrame(rows, columns=columns), pictures
