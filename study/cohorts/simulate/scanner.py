"""From a template and a deformation to a scan: what a simulated scanner sees of one subject.

The template holds tissue fractions on a fine grid. A scan mixes them with its own tissue means, averages the warped
template over each voxel (sub-voxel samples, so thin structures get partial volume), and adds a smooth bias field,
gain and Rician noise. Labels are the majority over the same samples: image and mask share one definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import map_coordinates

from study.cohorts.simulate.deformation import Deformation

WHITE = 255.0  # brightest stored value


@dataclass(frozen=True)
class Template:
    """An anatomy on a fine grid, shared by every subject that has to correspond."""

    affine: np.ndarray  # (4, 4) voxel → RAS mm, axis-aligned
    fractions: Mapping[str, np.ndarray]  # tissue → (W, H, D) float32 in [0, 1]; what is missing to 1 is dark
    texture: np.ndarray  # (W, H, D), zero mean; how strongly a tissue shows it is the scan's choice
    labels: np.ndarray  # (W, H, D) uint8
    landmarks: Mapping[str, np.ndarray] = field(default_factory=dict)  # name → RAS mm (3,)


@dataclass(frozen=True)
class Appearance:
    """How one scan shows the tissues. Means and noise in units of the full range, 1 = ``WHITE`` at gain 1."""

    means: Mapping[str, float]
    texture: Mapping[str, float] = field(default_factory=dict)  # amplitude per tissue, 0 where absent
    gain: float = 1.0
    bias: float = 0.1  # standard deviation of the log bias field
    noise: float = 0.02  # standard deviation of each Rician channel
    stripped: bool = False  # skull-stripped: exactly 0 outside the template's tissues


@dataclass(frozen=True)
class Grid:
    """The voxels of a scan as stored: shape and voxel → RAS mm affine (any of the 48 axis orders)."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm along each stored axis, (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def corners(self) -> np.ndarray:
        """The eight outer corners of the volume (voxel edges, not centres) in RAS mm, (3, 8)."""
        ends = np.meshgrid(*((-0.5, n - 0.5) for n in self.shape), indexing="ij")
        return self.affine[:3, :3] @ np.reshape(ends, (3, 8)) + self.affine[:3, 3:]


def grid(shape, spacing, centre_mm, orientation: str = "RAS") -> Grid:
    """A grid centred on ``centre_mm`` (RAS mm) whose stored axes point along ``orientation``, e.g. "LPS"."""
    affine = np.eye(4)
    for axis, letter in enumerate(orientation):
        world, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[letter]
        affine[:3, axis] = 0
        affine[world, axis] = sign * spacing[axis]
    affine[:3, 3] = np.asarray(centre_mm) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return Grid(tuple(int(n) for n in shape), affine)


def scan(
    template: Template, deformation: Deformation, target: Grid, look: Appearance, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One subject's image and labels, both uint8 of ``target.shape``."""
    contrast = sum(f * np.float32(look.means[name]) for name, f in template.fractions.items())
    for name, amplitude in look.texture.items():
        contrast += np.float32(amplitude) * template.fractions[name] * template.texture
    wanted = [(contrast, 1), (template.labels, 0)] + ([(sum(template.fractions.values()), 1)] if look.stripped else [])
    signal, labels, *tissue = sample(wanted, template.affine, deformation, target)
    signal = signal * look.gain * bias_field(rng, target.shape, look.bias)
    real, imaginary = look.noise * rng.standard_normal((2, *target.shape))
    image = np.hypot(signal + real, imaginary)
    if look.stripped:
        image = np.where(tissue[0] > 0.5, image, 0)
    return np.clip(np.rint(WHITE * image), 0, WHITE).astype(np.uint8), labels


def sample(
    volumes: list[tuple[np.ndarray, int]], affine: np.ndarray, deformation: Deformation, target: Grid
) -> list[np.ndarray]:
    """Average template volumes over each voxel of ``target``, pulled back through the deformation.

    volumes: (volume (W, H, D), order) on the grid of ``affine``, axes along RAS; order 1 gives the mean, float32,
    order 0 the majority label, uint8. Every voxel is sampled on a regular sub-grid no coarser than the template's own,
    one slab at a time to bound memory. Returns arrays of ``target.shape``.
    """
    fine = np.diag(affine)[:3]
    stored = [int(np.abs(target.affine[a, :3]).argmax()) for a in range(3)]  # the stored axis along each world axis
    shape = [target.shape[s] for s in stored]
    parts = [max(int(np.ceil(target.spacing[s] / f - 1e-6)), 1) for s, f in zip(stored, fine)]
    mm = [
        target.affine[a, 3] + target.affine[a, s] * ((np.arange(n * p) + 0.5) / p - 0.5)
        for a, (s, n, p) in enumerate(zip(stored, shape, parts))
    ]  # world coordinates of the sub-voxel samples
    out = [np.empty(shape, np.float32 if order else np.uint8) for _, order in volumes]
    values = [None if order else np.unique(volume) for volume, order in volumes]
    for k in range(shape[2]):
        points = deformation.on_grid(mm[0], mm[1], mm[2][k * parts[2] : (k + 1) * parts[2]])
        index = (points - affine[:3, 3].reshape(3, 1, 1, 1)) / fine.reshape(3, 1, 1, 1)
        for result, (volume, order), choices in zip(out, volumes, values):
            seen = map_coordinates(volume, index, order=order, mode="nearest")
            seen = seen.reshape(shape[0], parts[0], shape[1], parts[1], parts[2])
            if order:
                result[:, :, k] = seen.mean(axis=(1, 3, 4))
            else:
                votes = [(seen == v).sum(axis=(1, 3, 4)) for v in choices]
                result[:, :, k] = choices[np.argmax(votes, axis=0)]
    world_axis = np.argsort(stored)  # the world axis along each stored axis
    return [np.ascontiguousarray(np.transpose(o, world_axis)) for o in out]


def bias_field(rng: np.random.Generator, shape: tuple[int, ...], strength: float) -> np.ndarray:
    """exp of a random polynomial of degree 3 across the image, mean 1, standard deviation about ``strength``."""
    x, y, z = (np.linspace(-1, 1, n).reshape([-1 if a == b else 1 for b in range(3)]) for a, n in enumerate(shape))
    log = np.zeros(shape)
    for i, j, k in np.ndindex(4, 4, 4):
        if 0 < i + j + k <= 3:
            log += rng.standard_normal() * x**i * y**j * z**k
    log = strength * (log - log.mean()) / log.std()
    return np.exp(log) / np.exp(log).mean()
