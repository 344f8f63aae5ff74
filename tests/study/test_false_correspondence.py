"""The experiment of Figure 1: what is injected is there, nothing else changes, and registration gets nearer the truth."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import map_coordinates

from gridreg.errors import InputError
from study import style
from study.evaluation import false_correspondence as experiment
from study.reporting.figures.false_correspondence import figure1, finding


def test_the_clean_pair_matches_under_its_true_displacement():
    pair = experiment.simulate(3)
    warped = map_coordinates(pair.moving, np.indices(pair.moving.shape) + pair.displacement, order=3, mode="nearest")
    inside = (slice(6, -6),) * 2  # within the image after the deformation
    assert np.abs(warped - pair.fixed)[inside].mean() < 0.003 < np.abs(pair.moving - pair.fixed)[inside].mean() / 10
    assert np.linalg.norm(pair.displacement, axis=0).max() == pytest.approx(experiment.DEFORMATION)


@pytest.mark.parametrize("condition", experiment.CONDITIONS)
def test_only_what_is_named_is_injected(condition):
    clean, pair = experiment.simulate(1), experiment.simulate(1, **experiment.CONDITIONS[condition])
    same = np.array_equal(pair.displacement, clean.displacement)
    assert same == (condition != "fine deformation")
    assert np.array_equal(pair.moving, clean.moving) == (condition not in ("image noise", "false match"))
    assert pair.fixed_mask.any() == ("masks" in condition)
    if condition == "image noise":
        assert (pair.fixed - clean.fixed).std() == pytest.approx(experiment.NOISE, rel=0.1)
    if condition == "false match":  # both within the disc, and apart from where the truth would put them
        fixed, moving = pair.spots
        matched = fixed + pair.displacement[:, int(fixed[0]), int(fixed[1])]
        assert np.linalg.norm(matched - moving) == pytest.approx(experiment.SPOT_DISTANCE, abs=1)
        assert pair.disc[tuple(fixed.astype(int))] > 0.5
    if condition == "wrong masks":
        assert 0.02 < (pair.fixed_mask != (clean.disc > 0.5)).sum() / (clean.disc > 0.5).sum() < 0.6


@pytest.fixture(scope="module")
def small():
    return experiment.run(range(2), (3, 5), ("nothing", "false match"), (400.0,), steps=25)


def test_the_frame_and_the_pictures(small):
    frame, pictures = small
    assert len(frame) == 2 * 2 * 2 and set(pictures) == {
        (c, 400.0, g) for c in ("nothing", "false match") for g in (3, 5)
    }
    assert frame[["error_disc", "error_around", "error", "difference"]].gt(0).all(axis=None)
    pair = pictures["nothing", 400.0, 5][0]
    found = frame.query("condition == 'nothing' and grid == 5 and seed == 0")
    assert found["error"].item() < np.linalg.norm(pair.displacement, axis=0).mean() / 2  # of doing nothing


def test_a_pair_does_not_know_of_the_others():
    pairs = [experiment.simulate(seed, **experiment.CONDITIONS[c]) for seed, c in enumerate(("nothing", "wrong masks"))]
    together = experiment.register(pairs, (3,), steps=5)[3][0]
    for pair, displacement in zip(pairs, together):
        alone = experiment.register([pair], (3,), steps=5)[3][0][0]
        np.testing.assert_allclose(alone, displacement, atol=1e-3)


def test_figure1(small, tmp_path):
    figure1(tmp_path / "figure1", *small, note=experiment.CONVERGENCE)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["figure1.pdf", "figure1.png", "figure1.txt"]
    caption = (tmp_path / "figure1.txt").read_text()
    assert "Simulated slices, not patients." in caption and "2 pairs" in caption and experiment.CONVERGENCE in caption
    with pytest.raises(InputError, match="no picture"):
        figure1(tmp_path / "figure1", *small, condition="rain")


def errors(change: dict[tuple[float, str], float]) -> pd.DataFrame:
    """Errors in the disc of 1 at grid 3 and, at grid 48, of 1 more by ``change``: (bending weight, condition) → voxels."""
    rows = [(*key, grid, 1 + by * (grid == 48)) for key, by in change.items() for grid in (48, 3)]
    return pd.DataFrame(rows, columns=["bending_weight", "condition", "grid", "error_disc"])


def test_the_finding_is_what_the_numbers_say():
    weak, strong = (
        ((1.0, "nothing"), (1.0, "false match"), (1.0, "wrong masks")),
        ((9.0, "nothing"), (9.0, "false match"), (9.0, "wrong masks")),
    )
    as_expected = dict(zip(weak, (-0.5, 0.5, 0.25))) | dict.fromkeys(strong, -0.25)
    said = finding(errors(as_expected))
    assert said.startswith("A fine grid follows a false correspondence where the bending energy is weak")
    assert (
        "Smallest bending weight: 1.00 → 0.50 (nothing), 1.00 → 1.50 (false match), 1.00 → 1.25 (wrong masks)." in said
    )
    assert "Largest bending weight: 1.00 → 0.75 (nothing), " in said
    for key in as_expected:  # one that goes the other way, and there is no such finding
        said = finding(errors(as_expected | {key: -as_expected[key]}))
        assert said.startswith("Mean error in the disc") and said != finding(errors(as_expected))


def test_bars_of_one_grid_stand_side_by_side(tmp_path):
    frame, pictures = experiment.run(range(2), (3, 5), ("false match",), (400.0, 40.0), steps=2)
    axes = figure1(tmp_path / "figure1", frame, pictures).findobj(matplotlib.axes.Axes)
    (panel,) = [ax for ax in axes if ax.get_title() == "(b) false match"]
    first, second = (container.lines[0] for container in panel.containers)
    assert (np.diff([first.get_xdata(), second.get_xdata()], axis=0) > 0.1).all()
    assert not {first.get_color(), second.get_color()} & set(style.COLOURS.values())
