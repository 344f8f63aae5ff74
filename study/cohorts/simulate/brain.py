"""The brain template of the simulated inter-patient cohort (Dataset 3), from the MNI152 maps inside nilearn.

Tissue fractions are the ICBM 2009a nonlinear symmetric grey- and white-matter maps, what is left of the brain mask
is cerebrospinal fluid, and the real T1 gives the detail that fractions cannot. Zones come from the same maps and from
MNI coordinates; landmarks are anatomical fiducials with their published positions. All coordinates are RAS mm.
"""

from __future__ import annotations

import numpy as np
from nilearn import datasets
from scipy.ndimage import binary_dilation, gaussian_filter, watershed_ift

from study.cohorts.simulate.deformation import Deformation, Lattice, deformation, limited_normal, rigid, smooth_noise
from study.cohorts.simulate.scanner import Appearance, Template

NAMES = {
    1: "left cerebral grey matter",
    2: "right cerebral grey matter",
    3: "left cerebral white matter",
    4: "right cerebral white matter",
    5: "left lateral ventricle",
    6: "right lateral ventricle",
    7: "left cerebellum",
    8: "right cerebellum",
    9: "left deep grey matter",
    10: "right deep grey matter",
    11: "brain stem",
}
# Lau et al., A framework for evaluating correspondence between brain images using anatomical fiducials, Human Brain
# Mapping 2019: positions in the symmetric 2009 template (MNI152NLin2009bSym), left and right made exact mirrors.
LANDMARKS = {
    "anterior commissure": (0.0, 2.6, -4.8),
    "posterior commissure": (0.0, -25.1, -2.1),
    "pontomesencephalic junction": (0.0, -23.4, -21.9),
    "genu of corpus callosum": (0.0, 33.4, 2.5),
    "splenium of corpus callosum": (0.0, -37.6, 6.4),
    "left temporal horn": (-34.4, -4.9, -26.9),
    "right temporal horn": (34.4, -4.9, -26.9),
}
CENTRE = np.array([0.0, -16.0, 5.0])  # middle of the template's brain
# centre and radii (mm) of ellipsoids around the nuclei of the right side
DEEP_GREY = (
    ((12, -19, 7), (11, 14, 10)),  # thalamus
    ((13, 13, 5), (7, 12, 12)),  # caudate head
    ((17, -2, 20), (6, 15, 6)),  # caudate body
    ((25, 3, 0), (10, 20, 12)),  # putamen and pallidum
)
SHARPEN = 2.0  # power on the fractions: the average of 152 brains is blurred, one brain is not


def brain_template(resolution_mm: int) -> Template:
    """The MNI152 brain at 1 or 2 mm as fractions of csf, grey and white matter, T1 detail, zones and landmarks."""
    load = {
        "t1": datasets.load_mni152_template,
        "grey": datasets.load_mni152_gm_template,
        "white": datasets.load_mni152_wm_template,
        "mask": datasets.load_mni152_brain_mask,
    }
    images = {k: f(resolution=resolution_mm) for k, f in load.items()}
    affine = images["t1"].affine
    t1, grey, white, mask = (np.clip(images[k].get_fdata(dtype=np.float32), 0, 1) for k in load)
    csf = np.clip(mask - grey - white, 0, 1)
    fractions = {"csf": csf, "grey": grey * (mask > 0), "white": white * (mask > 0)}
    total = sum(f**SHARPEN for f in fractions.values()) + 1e-6
    fractions = {k: (f**SHARPEN / total * mask).astype(np.float32) for k, f in fractions.items()}
    # what the mix of three tissues leaves unexplained of the real T1, least squares inside the brain
    inside = mask > 0.5
    mix = np.stack([f[inside] for f in fractions.values()], axis=1)
    levels = np.linalg.lstsq(mix, t1[inside], rcond=None)[0]
    detail = np.where(inside, t1 - sum(m * f for m, f in zip(levels, fractions.values())), 0).astype(np.float32)
    landmarks = {name: np.array(p) for name, p in LANDMARKS.items()}
    return Template(affine, fractions, detail, zones(fractions, affine), landmarks)


def zones(fractions: dict[str, np.ndarray], affine: np.ndarray) -> np.ndarray:
    """The label map of ``NAMES`` (W, H, D) uint8."""
    shape = fractions["grey"].shape
    i = [affine[a, a] * np.arange(n) + affine[a, 3] for a, n in enumerate(shape)]
    x, y, z = np.meshgrid(*i, indexing="ij", sparse=True)
    side = np.abs(x)
    tissue = fractions["grey"] + fractions["white"]
    solid = tissue > 0.5

    mm = abs(affine[0, 0])
    stem = _brain_stem(side, y, z) & solid
    cerebellum = _hindbrain(tissue, x, y, z) & solid & ~stem
    deep = sum(_ellipsoid(side, y, z, c, r) for c, r in DEEP_GREY) > 0
    deep &= (gaussian_filter(fractions["grey"], 1.0 / mm) > 0.25) & ~stem & solid
    ventricle = (fractions["csf"] > 0.5) & _ventricle_region(side, y, z)
    # next to fluid, white matter averages to the look of grey matter: no cortex lines a ventricle
    lining = binary_dilation(ventricle, iterations=int(np.ceil(3 / mm))) & ~deep

    right = (x > 0) & np.ones(shape, bool)
    out = np.zeros(shape, np.uint8)
    grey = (fractions["grey"] >= fractions["white"]) & ~lining
    out[solid & grey], out[solid & ~grey] = 1, 3
    out[ventricle], out[deep], out[cerebellum] = 5, 9, 7
    out[(out > 0) & right] += 1
    out[stem] = 11
    return out


def _ellipsoid(x, y, z, centre, radii) -> np.ndarray:
    return sum(((v - c) / r) ** 2 for v, c, r in zip((x, y, z), centre, radii)) < 1


def _hindbrain(tissue: np.ndarray, x, y, z) -> np.ndarray:
    """Below the tentorium: a watershed on missing tissue, from seeds deep inside cerebellum and cerebrum."""
    side = np.abs(x)
    tent = 0.0 - 0.55 * side + 0.45 * np.minimum(y + 55, 0)  # height of the tentorium: a ridge, falling to the back
    cost = np.rint(255 * (1 - np.clip(gaussian_filter(tissue, 0.5), 0, 1))).astype(np.uint8)
    seeds = np.zeros(tissue.shape, np.int16)
    seeds[(z < tent - 8) & (y < -36) & (z < -14)] = 1
    seeds[(z < -28) & (y < -30) & (side < 24)] = 1
    seeds[(z > tent + 8) | (y > -12)] = 2
    return watershed_ift(cost, seeds) == 1


def _brain_stem(side, y, z) -> np.ndarray:
    """Midbrain, pons and medulla: ellipses across an axis that leans backwards on its way down from z = -8."""
    levels = [-70, -50, -44, -22, -16, -8]
    lateral = np.interp(z, levels, [10.5, 13, 20.5, 21.5, 17.5, 17.5])
    depth = np.interp(z, levels, [10, 11, 16, 17.5, 16, 16])
    axis = -22.0 + 0.36 * (z + 8.0)
    return (z < -8) & ((side / lateral) ** 2 + ((y - axis) / depth) ** 2 < 1)


def _ventricle_region(side, y, z) -> np.ndarray:
    """Where fluid belongs to a lateral ventricle: frontal horn and body, trigone, occipital and temporal horn."""
    body = _ellipsoid(side, y, z, (11, -2, 16), (14, 40, 17)) & (side > 1) & (z > 3)
    trigone = _ellipsoid(side, y, z, (26, -42, 8), (11, 16, 14))
    occipital = _ellipsoid(side, y, z, (26, -62, 6), (8, 22, 8))
    return body | trigone | occipital


def brain_deformation(rng: np.random.Generator, lattice: Lattice) -> Deformation:
    """A subject's anatomy: a few degrees, per cent and mm of affine, and a smooth velocity at two scales."""
    pose = rigid(
        limited_normal(rng, 2.0, 3), limited_normal(rng, 1.4, 3), CENTRE, scale=np.exp(limited_normal(rng, 0.03, 3))
    )
    keys = rng.integers(2**63, size=2)

    def velocity(points: np.ndarray) -> np.ndarray:
        coarse, fine = (np.random.default_rng(k) for k in keys)
        return 1.6 * smooth_noise(coarse, points, 45.0) + 0.8 * smooth_noise(fine, points, 22.0)

    return deformation(lattice, velocity, pose)


def brain_appearance(rng: np.random.Generator) -> Appearance:
    """T1 contrast: white matter brightest, then grey matter, fluid dark; every subject differs."""
    white = rng.uniform(0.68, 0.80)
    grey = white * rng.uniform(0.60, 0.72)
    csf = white * rng.uniform(0.16, 0.30)
    share = rng.uniform(0.5, 1.0)
    return Appearance(
        {"csf": csf, "grey": grey, "white": white},
        {k: share for k in ("csf", "grey", "white")},
        gain=rng.uniform(0.9, 1.1),
        bias=rng.uniform(0.03, 0.10),
        noise=rng.uniform(0.010, 0.022),
        stripped=True,
    )
