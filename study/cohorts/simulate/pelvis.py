"""How scans of the pelvis phantom differ: anatomy between visits or patients, and T2 contrast between scanners."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from study.cohorts.simulate.deformation import (
    Deformation,
    Lattice,
    bump,
    deformation,
    limited_normal,
    rigid,
    smooth_noise,
    swelling,
)
from study.cohorts.simulate.phantom import Anatomy
from study.cohorts.simulate.scanner import Appearance

# T2-weighted spin echo without fat suppression: fluid brightest, fat bright, muscle dark, cortical bone black
MEANS = {
    "fat": 0.60,
    "muscle": 0.17,
    "cortex": 0.04,
    "marrow": 0.43,
    "urine": 0.95,
    "wall": 0.22,
    "stool": 0.33,
    "peripheral": 0.76,
    "transition": 0.42,
    "fibrous": 0.15,
    "vessel": 0.66,
    "fluid": 0.93,
}
TEXTURE = {
    "fat": 0.045,
    "muscle": 0.022,
    "marrow": 0.03,
    "stool": 0.05,
    "vessel": 0.03,
    "peripheral": 0.012,
    "transition": 0.014,
}


@dataclass(frozen=True)
class Change:
    """Standard deviations of how one scan's anatomy differs from its template's."""

    position: float  # mm, repositioning of the patient, per axis
    rotation: float  # degrees, per axis
    size: float  # log of the whole pelvis's size, per axis
    gland: float  # log of the gland's size
    shift: float  # mm, the gland within the pelvis, per axis
    bladder: float  # log of the bladder's size
    rectum: float  # log of the rectum's width
    smooth: tuple[float, float]  # mm, random smooth velocity on nodes 45 and 24 mm apart


VISIT = Change(
    position=3.0, rotation=2.5, size=0.0, gland=0.05, shift=0.8, bladder=0.25, rectum=0.16, smooth=(0.8, 0.4)
)
PATIENT = Change(
    position=3.2, rotation=3.0, size=0.04, gland=0.14, shift=2.2, bladder=0.30, rectum=0.18, smooth=(2.2, 0.8)
)


def pelvis_deformation(rng: np.random.Generator, lattice: Lattice, anatomy: Anatomy, change: Change) -> Deformation:
    """One scan's deformation: the gland grows and moves, bladder and rectum fill, everything shifts a little."""
    middle = np.zeros(3)  # of the gland
    pose = rigid(
        limited_normal(rng, change.rotation, 3),
        limited_normal(rng, change.position, 3),
        middle,
        scale=np.exp(limited_normal(rng, change.size, 3)),
    )
    growth, filling, width = limited_normal(rng, np.array([change.gland, change.bladder, change.rectum]), 3)
    shift = limited_normal(rng, change.shift, 3).reshape(3, 1, 1, 1)
    keys = rng.integers(2**63, size=2)
    gland = np.array(anatomy.gland)
    bladder = np.array([0, 7, gland[2] - 4 + anatomy.bladder[2]])
    rectum = np.array([0, -gland[1] - anatomy.rectum, 0])

    def velocity(points: np.ndarray) -> np.ndarray:
        coarse, fine = (np.random.default_rng(k) for k in keys)
        v = change.smooth[0] * smooth_noise(coarse, points, 45.0) + change.smooth[1] * smooth_noise(fine, points, 24.0)
        v += growth * swelling(points, middle, 1.3 * gland) + shift * bump(points, middle, 2 * gland)
        v += filling * swelling(points, bladder, 1.1 * np.array(anatomy.bladder))
        return v + width * swelling(points, rectum, np.array([1.5, 1.5, 4.0]) * anatomy.rectum)

    return deformation(lattice, velocity, pose)


def pelvis_appearance(rng: np.random.Generator, spread: float) -> Appearance:
    """One scan's contrast, its tissue means ``spread`` (log) apart from the usual, and its gain, bias and noise."""
    means = {k: float(np.clip(m * np.exp(rng.normal(0, spread)), 0, 1)) for k, m in MEANS.items()}
    return Appearance(
        means, TEXTURE, gain=rng.uniform(0.88, 1.0), bias=rng.uniform(0.05, 0.12), noise=rng.uniform(0.012, 0.025)
    )
