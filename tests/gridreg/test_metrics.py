"""Metrics with known answers: overlaps, millimetres, determinants and folds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from gridreg import metrics

SHAPE = (8, 10, 12)
EVERYWHERE = np.ones(SHAPE, bool)
INTERIOR = np.zeros(SHAPE, bool)
INTERIOR[1:-1, 1:-1, 1:-1] = True


def along(axis: int, values) -> np.ndarray:
    """Displacement whose component ``axis`` depends on that axis alone."""
    field = np.zeros((3, *SHAPE))
    field[axis] = np.asarray(values).reshape([-1 if a == axis else 1 for a in range(3)])
    return field


def affine(matrix, offset=(0, 0, 0)) -> np.ndarray:
    """u(x) = (A - I) x + b, so that φ(x) = A x + b."""
    field = np.einsum("ab,b...->a...", np.asarray(matrix) - np.eye(3), np.indices(SHAPE))
    return field + np.reshape(offset, (3, 1, 1, 1))


def test_dice_is_monais():
    import torch
    from monai.metrics import DiceMetric
    from monai.networks.utils import one_hot

    rng = np.random.default_rng(0)
    fixed, warped = rng.integers(0, 5, (2, *SHAPE)).astype(np.int16)
    channels = [one_hot(torch.from_numpy(m.astype(np.int64))[None, None], 5) for m in (warped, fixed)]
    expected = DiceMetric(include_background=False)(*channels).mean().item()
    assert metrics.dice(fixed, warped) == pytest.approx(expected, rel=1e-6)


def test_dice_counts_a_lost_label():
    fixed, warped = np.zeros(SHAPE, np.int16), np.zeros(SHAPE, np.int16)
    fixed[:4], warped[:4] = 1, 1
    assert metrics.dice(fixed, warped) == 1
    fixed[6:] = 2035  # FreeSurfer's numbers
    assert metrics.dice(fixed, warped) == 0.5
    warped[5] = 3  # and one that should not be there
    assert metrics.dice(fixed, warped) == pytest.approx(1 / 3)


def test_label_values():
    assert metrics.label_values(np.array([0, 5, 2]), np.array([0, 9, 5])) == [2, 5, 9]


def test_centroid_distance():
    fixed, warped = np.zeros(SHAPE, np.int16), np.zeros(SHAPE, np.int16)
    fixed[1:3, 1:3, 1:3], warped[4:6, 5:7, 1:3] = 1, 1  # (3, 4, 0) voxels apart: 5
    fixed[6, 8, 9:12], warped[6, 8, 9] = 4, 4  # (0, 0, 1) voxels apart, of another size
    assert metrics.centroid_distance_mm(fixed, warped, 0.7) == pytest.approx(0.7 * (5 + 1) / 2)
    assert metrics.centroid_distance_mm(fixed, fixed, 0.7) == 0


def test_landmark_distance():
    fixed = np.array([[2.0, 3.0, 4.0], [1.5, 6.25, 7.0]])
    constant = np.broadcast_to(np.array([1.0, -2.0, 2.0]).reshape(3, 1, 1, 1), (3, *SHAPE))
    partners = fixed + [1, -2, 2]
    assert metrics.landmark_distance_mm(fixed, partners, constant, 0.8) == pytest.approx(0)
    assert metrics.landmark_distance_mm(fixed, fixed, constant, 0.8) == pytest.approx(0.8 * 3)
    assert metrics.landmark_distance_mm(fixed, partners + [[0, 0, 0], [0, 3, 4]], constant, 2.0) == pytest.approx(5)
    stretch = affine(np.diag([1.5, 1, 1]))  # read between voxels
    assert metrics.landmark_distance_mm(fixed, fixed * [1.5, 1, 1], stretch, 1.0) == pytest.approx(0)


def test_tre():
    truth = np.random.default_rng(0).normal(size=(3, *SHAPE))
    error = np.zeros((3, *SHAPE))
    error[:, :4] = np.reshape([3.0, 4.0, 0.0], (3, 1, 1, 1))
    where = EVERYWHERE.copy()
    assert metrics.tre_mm(truth + error, truth, where, 0.7) == pytest.approx(0.7 * 2.5)
    where[4:] = False
    assert metrics.tre_mm(truth + error, truth, where, 0.7) == pytest.approx(0.7 * 5)


def test_nothing_to_measure_is_nan():
    empty, nowhere, field = np.zeros(SHAPE, np.int16), np.zeros(SHAPE, bool), np.zeros((3, *SHAPE))
    determinant = metrics.jacobian_determinant(field)
    assert math.isnan(metrics.dice(empty, empty))
    assert math.isnan(metrics.centroid_distance_mm(empty, empty, 1.0))
    assert math.isnan(metrics.landmark_distance_mm(np.empty((0, 3)), np.empty((0, 3)), field, 1.0))
    assert math.isnan(metrics.tre_mm(field, field, nowhere, 1.0))
    assert all(math.isnan(value) for value in metrics.log_jacobian(determinant, nowhere))
    assert math.isnan(metrics.folding_percent(determinant, nowhere))
    assert math.isnan(metrics.nondiffeomorphic_percent(field, nowhere))


AFFINE = {
    "identity": np.eye(3),
    "scaling": np.diag([2, 0.5, 1.5]),
    "quarter turn": [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
    "shear": [[1.2, 0.3, -0.1], [0.2, 0.7, 0], [0, 0.4, 1]],
}


@pytest.mark.parametrize("matrix", AFFINE.values(), ids=AFFINE)
def test_affine_maps_have_their_determinant_and_do_not_fold(matrix):
    field = affine(matrix, offset=(3, -2, 1)).astype(np.float32)
    determinant = metrics.jacobian_determinant(field)
    np.testing.assert_allclose(determinant, np.linalg.det(matrix), rtol=1e-5)
    assert metrics.log_jacobian(determinant, EVERYWHERE) == pytest.approx((np.log(np.linalg.det(matrix)), 0), abs=1e-5)
    assert metrics.folding_percent(determinant, EVERYWHERE) == 0
    assert metrics.nondiffeomorphic_percent(field, EVERYWHERE) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("matrix", [np.diag([-1, 1, 1]), -np.eye(3), [[0, 1, 0], [1, 0, 0], [0, 0, 1]]])
def test_reflections_fold_everywhere(matrix):
    field = affine(matrix)
    assert metrics.folding_percent(metrics.jacobian_determinant(field), EVERYWHERE) == 100
    assert metrics.nondiffeomorphic_percent(field, EVERYWHERE) == pytest.approx(100)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_known_fold(axis):
    """φ = 0 1 2 3 1 2 3 …: central differences are negative at 2 of n voxels; 1 of n - 1 cells is turned, of length 2."""
    n = SHAPE[axis]
    field = along(axis, np.where(np.arange(n) < 4, 0.0, -3.0))
    determinant = metrics.jacobian_determinant(field)
    assert metrics.folding_percent(determinant, EVERYWHERE) == pytest.approx(100 * 2 / n)
    assert metrics.nondiffeomorphic_percent(field, EVERYWHERE) == pytest.approx(100 * 2 / (n - 1))
    half = EVERYWHERE.copy()
    half[(slice(None),) * axis + (slice(2, 6),)] = False  # the fold is outside
    assert metrics.folding_percent(determinant, half) == metrics.nondiffeomorphic_percent(field, half) == 0


def test_a_collapse_counts_as_a_fold():
    determinant = metrics.jacobian_determinant(affine(np.diag([0, 1, 1])))
    assert metrics.folding_percent(determinant, EVERYWHERE) == 100  # det = 0; the paper writes < 0
    assert metrics.log_jacobian(determinant, EVERYWHERE)[0] == pytest.approx(np.log(1e-6))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_checkerboard_fold_that_central_differences_miss(axis):
    """±0.75 from voxel to voxel: every other cell has length -0.5, yet u(x + 1) - u(x - 1) = 0."""
    field = along(axis, 0.75 * (-1.0) ** np.arange(SHAPE[axis]))
    assert metrics.folding_percent(metrics.jacobian_determinant(field), INTERIOR) == 0
    turned = 0.5 * np.mean(np.arange(1, SHAPE[axis] - 1) % 2 == 0)
    assert metrics.nondiffeomorphic_percent(field, INTERIOR) == pytest.approx(100 * turned)


def test_a_fold_at_one_corner_is_seen_whichever_corner():
    """One corner voxel pushed through the opposite face folds the cell at it, on any of the eight corners."""
    for corner in itertools.product((0, -1), repeat=3):
        field = np.zeros((3, *SHAPE))
        field[(slice(None), *corner)] = [-2 if end else 2 for end in corner]
        assert metrics.nondiffeomorphic_percent(field, EVERYWHERE) > 0


def test_a_mirrored_field_folds_as_much():
    """Cells are cut in two mirror-image ways, so that left and right count alike."""
    field = np.random.default_rng(0).normal(0, 0.5, (3, *SHAPE))
    mirrored = field[:, ::-1] * np.reshape([-1, 1, 1], (3, 1, 1, 1))
    found = metrics.nondiffeomorphic_percent(field, EVERYWHERE)
    assert found > 1
    assert metrics.nondiffeomorphic_percent(mirrored, EVERYWHERE) == pytest.approx(found)


def test_smooth_small_displacements_are_diffeomorphic():
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(0).normal(size=(3, *SHAPE))
    field = np.stack([gaussian_filter(u, 2) for u in noise])
    field *= 0.3 / max(np.abs(np.diff(field, axis=a)).max() for a in (1, 2, 3))  # every derivative below 0.3
    determinant = metrics.jacobian_determinant(field)
    mean, deviation = metrics.log_jacobian(determinant, INTERIOR)
    assert deviation == pytest.approx(np.log(determinant[INTERIOR]).std()) and mean < deviation
    assert metrics.folding_percent(determinant, EVERYWHERE) == metrics.nondiffeomorphic_percent(field, EVERYWHERE) == 0


def test_image_similarity_is_numpys_correlation_and_mean_square():
    rng = np.random.default_rng(0)
    fixed, other = rng.random((2, *SHAPE))
    found = metrics.image_similarity(fixed, other, INTERIOR)
    assert found["ncc"] == pytest.approx(np.corrcoef(fixed[INTERIOR], other[INTERIOR])[0, 1])
    assert found["mse"] == pytest.approx(np.mean((fixed[INTERIOR] - other[INTERIOR]) ** 2))
    same = metrics.image_similarity(fixed, 2 * fixed + 1, EVERYWHERE)
    assert same["ncc"] == pytest.approx(1) and same["mse"] > 0
    assert math.isnan(metrics.image_similarity(fixed, np.ones(SHAPE), EVERYWHERE)["ncc"])
    assert all(math.isnan(value) for value in metrics.image_similarity(fixed, other, ~EVERYWHERE).values())


def test_a_pair_without_labels_is_measured_by_its_images_before_and_after():
    from pathlib import Path

    from gridreg.scans.pair import Pair

    fixed = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    moving = np.roll(fixed, 1, axis=0)
    pair = Pair("p", fixed, moving, np.eye(4), 1.0, (Path("f"), Path("m")), (np.eye(4), np.eye(4)))
    before, after = (metrics.measure_pair(pair, field) for field in (along(0, np.zeros(8)), along(0, np.ones(8))))
    assert math.isnan(before["dice"]) and math.isnan(before["tre_mm"])
    assert before["ncc"] < 0.3 < 0.8 < after["ncc"] and after["mse"] < before["mse"]
