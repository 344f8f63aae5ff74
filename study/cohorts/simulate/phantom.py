"""A parametric male pelvis as T2-weighted MR shows it, for the simulated prostate and pelvis cohorts (Datasets 1, 2).

Coordinates are RAS mm with the origin in the middle of the gland: x to the patient's right, y forwards, z upwards.
Sizes are those of an adult; every patient draws their own. The gland's two zones are nearly homogeneous, as in the
paper's motivation: there is little inside it that a fine, dense field could hold on to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from study.cohorts.simulate.deformation import Lattice, covering, smooth_noise
from study.cohorts.simulate.scanner import Template
from study.cohorts.simulate.shapes import Canvas, Shape, both, capsule, ellipsoid, inset, mirrored, union

TISSUES = (
    "fat",
    "muscle",
    "cortex",
    "marrow",
    "urine",
    "wall",
    "stool",
    "peripheral",
    "transition",
    "fibrous",
    "vessel",
    "fluid",
)
FAR = 1e4  # mm, in place of an infinite radius
WOBBLE = ((1.4, 26.0), (0.5, 11.0))  # standard deviation and node spacing (mm) of what makes surfaces irregular
GRAIN = ((0.8, 1.0), (2.2, 1.0))  # width (mm) and weight of the texture's two scales


@dataclass(frozen=True)
class Anatomy:
    """One patient's measures in mm."""

    gland: tuple[float, float, float] = (24.0, 17.0, 20.0)  # half-axes
    transition: float = 1.0  # size of the transition zone, 1 = usual
    bladder: tuple[float, float, float] = (34.0, 27.0, 24.0)  # half-axes
    rectum: float = 13.5  # outer radius
    gas: float = 2.0  # height of the stool over the rectum's axis; gas lies above it
    width: float = 1.0  # of the bony pelvis


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """A patient: gland of about 25 to 55 ml, the larger the more of it transition zone."""
    size = rng.uniform(0.92, 1.12)
    gland = np.array(Anatomy.gland) * size * np.exp(rng.normal(0, 0.05, 3))
    return Anatomy(
        tuple(gland.tolist()),
        transition=rng.uniform(0.9, 1.0) * size**0.5,
        rectum=rng.uniform(11.5, 15.5),
        bladder=tuple((np.array(Anatomy.bladder) * np.exp(rng.normal(0, 0.10, 3))).tolist()),
        gas=rng.uniform(-10, 12),
        width=rng.uniform(0.96, 1.05),
    )


def pelvis_template(
    anatomy: Anatomy, half_extent_mm: np.ndarray, spacing_mm: float, rng: np.random.Generator, landmarks: bool = False
) -> Template:
    """The anatomy as tissue fractions, gland mask (label 1) and, if asked for, five landmarks inside the gland."""
    corners = np.array([[-1, 1]]) * np.asarray(half_extent_mm)[:, None]
    lattice = covering(corners, spacing_mm)
    canvas = Canvas(lattice.affine, lattice.shape, TISSUES, _wobble(rng, corners, lattice))
    canvas.fractions["fat"][:] = 1
    _muscles(canvas, anatomy.width)
    _bones(canvas, anatomy.width)
    _pelvic_floor(canvas)
    _rectum(canvas, anatomy, phase=rng.uniform(0, 2 * np.pi))
    _bladder(canvas, anatomy)
    _gland(canvas, anatomy)
    points = _landmarks(canvas, anatomy, rng) if landmarks else {}
    white = rng.standard_normal(lattice.shape).astype(np.float32)
    grain = [gaussian_filter(white, width / spacing_mm) for width, _ in GRAIN]
    grain = sum(weight * g / g.std() for (_, weight), g in zip(GRAIN, grain))
    return Template(lattice.affine, canvas.fractions, grain / grain.std(), canvas.mask(gland_shape(anatomy)), points)


def gland_shape(anatomy: Anatomy) -> Shape:
    """A chestnut: narrower towards the apex below, with a shallow groove behind along the midline."""
    rx, ry, rz = anatomy.gland

    def distance(x, y, z):
        narrow = 1 - 0.22 * np.clip(-z / rz, 0, 1) ** 1.5
        body = ellipsoid((0, 0, 0), (rx, ry, rz), exponent=2.3)(x / narrow, y / narrow, z)
        groove = 2.5 * np.exp(-((x / 7) ** 2)) * np.clip(-y / ry, 0, 1)
        return body * narrow + groove

    return distance


def _wobble(rng: np.random.Generator, corners: np.ndarray, lattice: Lattice) -> np.ndarray:
    """(3, W, H, D) mm, drawn on a coarse lattice and interpolated: it need not be finer than it varies."""
    coarse = covering(corners, 5.0)
    wobble = sum(size * smooth_noise(rng, coarse.points(), nodes) for size, nodes in WOBBLE)
    return np.stack([zoom(w, np.divide(lattice.shape, coarse.shape), order=1) for w in wobble])


def _gland(canvas: Canvas, anatomy: Anatomy) -> None:
    rx, ry, rz = anatomy.gland
    t = anatomy.transition
    outline = gland_shape(anatomy)
    # vessels: the venous plexus in front, the neurovascular bundles behind at both sides
    canvas.paint("vessel", ellipsoid((0, ry + 3, -2), (0.75 * rx, 5, 0.7 * rz)), 0.8)
    canvas.paint("vessel", mirrored(capsule((0.76 * rx, -0.84 * ry, -12), (0.82 * rx, -0.88 * ry, 14), 2.4)), 0.6)
    canvas.paint("fibrous", inset(outline, -0.4))
    canvas.paint("peripheral", inset(outline, 1.0))
    lobe = mirrored(ellipsoid((0.34 * rx, 0.20 * ry, 0.12 * rz), (0.46 * rx * t, 0.62 * ry * t, 0.72 * rz * t)))
    middle = ellipsoid((0, 0.2 * ry, 0.1 * rz), (0.4 * rx, 0.5 * ry, 0.7 * rz))
    zone = both(union(lobe, middle, blend=4), inset(outline, 2.0))
    canvas.paint("fibrous", zone)
    canvas.paint("transition", inset(zone, 0.9))
    # anterior fibromuscular stroma
    canvas.paint("fibrous", both(ellipsoid((0, ry, 0), (0.5 * rx, 0.30 * ry, 0.8 * rz)), inset(outline, 0.3)))
    # urethra: through the gland, then the sphincter under the apex
    canvas.paint("muscle", capsule((0, 0, -rz - 14), (0, 0, -rz + 2), 7.5))
    canvas.paint("fibrous", capsule((0, 0, -rz - 14), (0, 0.15 * ry, rz - 5), 2.8), 0.7)
    canvas.paint("fluid", capsule((0, 0, -rz - 14), (0, 0.15 * ry, rz - 4), 1.3), 0.7)
    canvas.paint("vessel", ellipsoid((0, 8, -rz - 26), (11, 13, 9)))  # bulb of the penis
    canvas.paint("vessel", mirrored(capsule((9, 30, -30), (36, 2, -54), 5.5)))  # crura along the pubic rami


def _rectum(canvas: Canvas, anatomy: Anatomy, phase: float) -> None:
    r, ry = anatomy.rectum, anatomy.gland[1]

    def axis(z):  # y of the middle: against the gland, following the sacrum backwards above and the anus below
        return -(ry + r + 2.0) - 0.006 * np.clip(z, 0, None) ** 2 - 0.004 * np.clip(-z - 20, 0, None) ** 2

    def tube(x, y, z):
        radius = r * (1 - 0.25 * np.clip((-z - 15) / 20, 0, 1) + 0.06 * np.sin(z / 7 + phase))
        return np.hypot(x / 1.12, y - axis(z)) - radius

    def lumen(x, y, z):
        return tube(x, y, z) + 3.0 + 5.0 * np.clip((-z - 18) / 12, 0, 1)  # the anal canal closes

    def above(x, y, z):  # gas rises to the front of a patient on their back
        return axis(z) + anatomy.gas + 6 * np.sin(z / 13 + phase) - y + 0 * x

    canvas.paint("wall", tube)
    canvas.paint("stool", lumen)
    canvas.paint(None, both(lumen, above))


def _bladder(canvas: Canvas, anatomy: Anatomy) -> None:
    _, ry, rz = anatomy.gland
    bladder = ellipsoid((0, 7, rz - 4 + anatomy.bladder[2]), anatomy.bladder, exponent=2.3)
    for depth, tissue in ((0, "fibrous"), (1.1, "fluid")):  # seminal vesicles: bright, thin-walled tubes behind it
        tubes = union(
            capsule((3, -ry + 2, rz - 3), (18, -ry - 1, rz + 5), 4.2),
            capsule((16, -ry - 2, rz + 4), (31, -ry + 1, rz + 10), 4.6),
        )
        canvas.paint(tissue, mirrored(inset(tubes, depth)))
    canvas.paint("wall", bladder)
    canvas.paint("urine", inset(bladder, 3.2))


def _wide(shape: Shape, width: float) -> Shape:
    """A shape of the right side on both sides, x measured in units of the pelvis's width."""
    return mirrored(lambda x, y, z: shape(x / width, y, z))


def _side_wall(x, y, z):
    """Distance (mm) to the side wall of the pelvis, negative inside; it leans outwards on its way up."""
    return ellipsoid((0, -2, 0), (50, 56, FAR), 2.4)(x / (1 + 0.0022 * z), y, 0 * z)


def _muscles(canvas: Canvas, width: float) -> None:
    def obturator_internus(x, y, z):  # a lens lining the side wall
        bulge = np.sqrt(np.clip(1 - ((y + 2) / 37) ** 2 - ((z - 2) / 52) ** 2, 0, 1))
        return np.abs(_side_wall(x, y, z) - 1) - 8.5 * bulge + 2.5 * (bulge == 0)

    for shape in (
        ellipsoid((56, -76, -5), (50, 25, FAR), 2.3),  # gluteus maximus
        ellipsoid((98, -42, 20), (22, 26, FAR)),  # gluteus medius and the small rotators
        ellipsoid((46, 41, -36), (25, 21, 24)),  # obturator externus
        ellipsoid((52, 57, -14), (26, 16, 34)),  # pectineus and adductors
        ellipsoid((76, 50, 30), (21, 17, FAR)),  # iliopsoas
        ellipsoid((17, 63, 36), (17, 7, 36)),  # rectus abdominis
        obturator_internus,
    ):
        canvas.paint("muscle", _wide(shape, width))
    canvas.paint("vessel", _wide(capsule((52, 66, -20), (50, 50, 60), 4.5), width), 0.55)  # femoral vein
    canvas.paint(None, _wide(capsule((61, 68, -20), (58, 54, 60), 3.6), width), 0.7)  # artery: fast flow is dark


def _bones(canvas: Canvas, width: float) -> None:
    def bone(shape: Shape, cortex: float = 2.0) -> None:
        canvas.paint("cortex", _wide(shape, width))
        canvas.paint("marrow", _wide(inset(shape, cortex), width))

    # hip bone: the plate behind the obturator internus, both columns, ischium; then the femoral head in its socket
    def plate(x, y, z):
        within = ellipsoid((0, 0, 8), (FAR, 30, 46), 4)(0 * x, y, z)
        return np.maximum(np.abs(_side_wall(x, y, z) - 12.5) - 4.5, within)

    bone(
        union(
            plate,
            ellipsoid((69, 27, 14), (15, 14, 26)),
            ellipsoid((70, -27, 10), (15, 15, 34)),
            ellipsoid((64, -18, -32), (13, 17, 24)),
            blend=6,
        )
    )
    canvas.paint("wall", _wide(ellipsoid((92, 2, 16), (26, 26, 26)), width), 0.8)  # cartilage and joint fluid
    bone(ellipsoid((92, 2, 16), (24, 24, 24)), 1.5)
    # pubis: body, rami, symphysis; sacrum and coccyx
    pubis = union(
        ellipsoid((15, 44, -6), (13, 9, 17)),
        capsule((17, 46, 2), (66, 27, 16), 8),
        capsule((13, 42, -16), (46, 4, -50), 7),
        blend=6,
    )
    bone(both(pubis, lambda x, y, z: 2.4 - x + 0 * y + 0 * z))
    canvas.paint("wall", ellipsoid((0, 44, -6), (3.4, 8.5, 16)))
    bone(union(ellipsoid((0, -84, 44), (30, 13, 26)), capsule((0, -76, 24), (0, -64, 2), 5.5), blend=6))


def _pelvic_floor(canvas: Canvas) -> None:
    """Levator ani: a funnel that hangs from the side wall around gland and rectum."""

    def funnel(x, y, z):
        half = np.interp(z, [-46, -20, 4, 14, 20], [13, 25, 32, 39, 46]).astype(np.float32)
        ring = np.sqrt((x / half) ** 2 + ((y + 14) / 34) ** 2) - 1
        ends = np.maximum(np.maximum(y - 10, z - 19), -46 - z)
        return np.maximum(np.abs(ring) * np.minimum(half, 34) - 1.9, ends)

    canvas.paint("muscle", mirrored(funnel))


def _landmarks(canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Paint cysts (bright) and calcifications (dark) and return five landmarks, zonal centroids among them (RAS mm)."""
    zones = {"transition zone": canvas.centroid(canvas.fractions["transition"])}
    half = canvas.xyz[0].size // 2
    for name, side in (("right peripheral zone", slice(half, None)), ("left peripheral zone", slice(0, half + 1))):
        box = (side, slice(None), slice(None))
        zones[name] = canvas.centroid(canvas.fractions["peripheral"][box], box)
    cysts, stones = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    placed: list[np.ndarray] = []
    while len(placed) < cysts + stones:
        unit = rng.uniform(-1, 1, 3)
        point = 0.68 * unit * np.array(anatomy.gland)
        if np.linalg.norm(unit) < 1 and abs(point[0]) > 5 and all(np.linalg.norm(point - p) > 11 for p in placed):
            placed.append(point)
    points = {}
    for i, point in enumerate(placed):
        shape = ellipsoid(point, rng.uniform(2.4, 3.6, 3))
        canvas.paint("fluid" if i < cysts else None, shape)
        box, cover = canvas.coverage(shape)
        name = f"cyst {i + 1}" if i < cysts else f"calcification {i + 1 - cysts}"
        points[name] = canvas.centroid(cover, box)  # where the irregular surface put it
    return points | dict(list(zones.items())[: 5 - len(points)])
