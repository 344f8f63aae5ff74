"""Intensities of a scan as numbers from 0 to 1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gridreg.errors import refused
from gridreg.scans.volumes import Volume, read_image

BACKGROUND_SHARE = 0.1  # a volume with this share of voxels at its lowest value has a background, e.g. skull-stripped
PERCENTILES = (0.1, 99.9)
# Hounsfield units. A scan with this share of its voxels about -1000 holds air and is a CT. What is lower is padding of the
# scanner or of a resampling (-2000, -3024 …); a CT without air has it as one value, which this share of it takes. What is
# higher is metal: the densest bone and enamel end at about 2000.
AIR, AIR_SHARE = (-1100.0, -900.0), 0.01
PADDING_SHARE = 0.95
METAL = 2000.0

Loaded = tuple[Volume, np.ndarray]  # a scan, and its image in [0, 1]


@dataclass(frozen=True)
class Intensity:
    """How stored intensities become numbers from 0 to 1.

    window         (low, high): stored values that become 0 and 1; None: from percentiles
    padding_value  voxels of exactly this value lie outside the scan: background, and not counted
    nan            "refuse", or "background": NaN voxels lie outside the scan, too
    """

    window: tuple[float, float] | None = None
    padding_value: float | None = None
    nan: str = "refuse"

    def __post_init__(self) -> None:
        if self.window is not None and not (len(self.window) == 2 and self.window[0] < self.window[1]):
            raise refused("window", repr(self.window), "null or two numbers, the lower one first")
        if self.nan not in ("refuse", "background"):
            raise refused("nan", repr(self.nan), "refuse or background")


def read_normalised(path: Path | str, intensity: Intensity = Intensity()) -> Loaded:
    """A scan as ``read_image`` reads it, and its image in [0, 1]."""
    volume = read_image(path, intensity.nan)
    return volume, normalise(volume.data, intensity, str(path))


def normalise(data: np.ndarray, intensity: Intensity = Intensity(), name: str = "image") -> np.ndarray:
    """Intensities to [0, 1] as float32, per volume, robust to a few extreme voxels; what lies outside is clipped.

    With a window, its ends become 0 and 1. Else, with a background (skull-stripped, or air stored as one value) the
    background becomes 0 and the 99.9th percentile of the rest 1; without one, the 0.1st and 99.9th percentile become 0
    and 1. In a CT, padding and metal are not counted. InputError, naming ``name``, where nothing is left to count.
    """
    counted = np.isfinite(data)
    if intensity.padding_value is not None:
        counted &= data != np.float32(intensity.padding_value)
    low, high = intensity.window or _limits(data if counted.all() else data[counted])
    if not high > low:
        raise refused(name, "one value in all voxels that count", "an image with contrast")
    scaled = np.clip((data - low) / (high - low), 0, 1).astype(np.float32)
    scaled[~counted] = 0
    if scaled.min() == scaled.max():
        raise refused(name, f"no contrast within the window {low:g} to {high:g}", "an image with contrast")
    return scaled


def _limits(data: np.ndarray) -> tuple[float, float]:
    """The intensities that become 0 and 1."""
    if not data.size:
        return 0.0, 0.0
    if _is_ct(data):
        data = data[(data > AIR[0]) & (data < METAL)]
    low, high = data.min(), data.max()
    foreground = data[data > low]
    if foreground.size < (1 - BACKGROUND_SHARE) * data.size:
        return low, np.percentile(foreground, PERCENTILES[1]) if foreground.size else high
    inner = np.percentile(data, PERCENTILES)
    return tuple(inner) if inner[1] > inner[0] else (low, high)  # fewer than 0.2 % of the voxels differ from the rest


def _is_ct(data: np.ndarray) -> bool:
    """Whether intensities look like Hounsfield units, by their air or by their padding."""
    lowest = data.min()
    if lowest >= AIR[1]:
        return False
    if np.mean((data > AIR[0]) & (data < AIR[1])) > AIR_SHARE:
        return True
    return bool(lowest < AIR[0] and np.mean(data[data <= AIR[0]] == lowest) > PADDING_SHARE and data.max() > AIR[0])
