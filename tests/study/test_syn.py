"""ANTs SyN: its field in our convention, held against ANTs' own warped image; the same field every time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import ants
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from gridreg.errors import InputError
from gridreg.spatial import warp
from study.methods.pairwise import SyN
from study.methods.syn import METRICS, syn

ROOT = Path(__file__).parents[2]
SHAPE = (33, 30, 27)
OBLIQUE = np.eye(4)  # anisotropic, off-centre and left-handed, too
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (12, -20, 9), degrees=True).as_matrix() @ np.diag((-1.0, 1.5, 2.2))
OBLIQUE[:3, 3] = (30, -12, 5)


def smooth_noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    noise = gaussian_filter(rng.standard_normal(SHAPE), sigma)
    return (noise / np.abs(noise).max()).astype(np.float32)


@pytest.fixture(scope="module")
def deformed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """fixed, moving (W, H, D) and the displacement (3, W, H, D) between them, 2 voxels at most."""
    rng = np.random.default_rng(0)
    moving = 0.5 + 0.5 * smooth_noise(rng, 1.5)
    truth = 2 * np.stack([smooth_noise(rng, 5) for _ in range(3)])
    return warped(moving, truth), moving, truth


def warped(moving: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    return warp(torch.from_numpy(moving)[None, None], torch.from_numpy(displacement)[None])[0, 0].numpy()


def middle(array: np.ndarray) -> np.ndarray:
    return array[..., 4:-4, 4:-4, 4:-4]


@pytest.mark.parametrize("affine_stage", [True, False])
def test_our_warp_by_its_field_is_ants_warped_image(deformed, monkeypatch, affine_stage):
    fixed, moving, _ = deformed
    results, register = [], ants.registration

    def watched(*arguments, **settings):
        results.append(register(*arguments, **settings))
        return results[-1]

    monkeypatch.setattr(ants, "registration", watched)
    displacement = syn(fixed, moving, OBLIQUE, affine_stage=affine_stage)
    theirs = results[0]["warpedmovout"].numpy()
    at = np.stack(np.indices(SHAPE)) + displacement
    inside = np.all([(at[a] >= 0) & (at[a] <= SHAPE[a] - 1) for a in range(3)], axis=0)  # beyond, ANTs reads zero
    assert displacement.dtype == np.float32 and displacement.shape == (3, *SHAPE)
    assert np.abs(displacement).mean() > 0.2 and inside.mean() > 0.8
    np.testing.assert_allclose(warped(moving, displacement)[inside], theirs[inside], atol=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_a_known_deformation_is_recovered(deformed, metric):
    fixed, moving, truth = deformed
    found = syn(fixed, moving, metric=metric, affine_stage=False)
    before, after = (np.linalg.norm(middle(u), axis=0).mean() for u in (truth, found - truth))
    assert after < 0.6 * before
    assert np.abs(middle(warped(moving, found) - fixed)).mean() < 0.7 * np.abs(middle(moving - fixed)).mean()


def test_masks_leave_out_what_misleads(deformed):
    """A part of the fixed image that fits another place would pull along what is beside it."""
    fixed, moving, truth = deformed
    spoiled, mask = fixed.copy(), np.ones(SHAPE, np.float32)
    spoiled[:12], mask[:12] = np.roll(fixed[:12], 5, axis=1), 0
    errors = []
    for masks in ({}, {"fixed_mask": mask}, {"fixed_mask": mask, "moving_mask": np.ones_like(mask)}):
        found = syn(spoiled, moving, affine_stage=False, **masks)
        errors.append(np.linalg.norm(found - truth, axis=0)[12:20, 4:-4, 4:-4].mean())
    assert max(errors[1:]) < 0.7 * errors[0]


@pytest.mark.parametrize("collapsed", [np.diag((0.1, 1, 1)), np.diag((-1, 1, 1)), np.diag((2, 1.5, 1))])
def test_an_affine_stage_that_collapsed_is_left_out(deformed, monkeypatch, collapsed):
    """ANTs' affine registration may end in a plane or a mirror image; the pair is then registered without it."""
    fixed, moving, _ = deformed
    expected, kinds, register = syn(fixed, moving, affine_stage=False, iterations=(5, 0, 0)), [], ants.registration

    def watched(*arguments, **settings):
        kinds.append(arguments[2])
        return register(*arguments, **settings)

    monkeypatch.setattr(ants, "registration", watched)
    assert not np.array_equal(syn(fixed, moving, iterations=(5, 0, 0)), expected) and kinds == ["SyN"]
    transform = ants.create_ants_transform(matrix=collapsed)
    monkeypatch.setattr(ants, "read_transform", lambda path: transform)
    np.testing.assert_array_equal(syn(fixed, moving, iterations=(5, 0, 0)), expected)
    assert kinds == ["SyN", "SyN", "SyNOnly"]


def test_the_method_looks_only_around_the_labels_it_is_given(deformed, monkeypatch):
    """The mask is every voxel at most so far from a label; without labels, or without a margin, there is none."""
    seen = []

    class Process:
        def submit(self, function, *pair, **settings):
            seen.append(
                {name: settings.get(name) for name in ("fixed_mask", "moving_mask", "iterations", "mask_margin")}
            )
            return self

        def result(self):
            return np.zeros((3, *SHAPE), np.float32)

    monkeypatch.setattr("study.methods.pairwise.fresh_processes", lambda number: Process())
    labels = [np.zeros(SHAPE, np.int16) for _ in range(2)]
    labels[0][10, 12, 8], labels[1][20, 12, 8] = 3, 1
    images = [torch.from_numpy(side)[None, None] for side in deformed[:2]]
    masked = SyN(mask_margin=4, iterations=(5, 0))
    masked(*images, labels=labels)
    masked(*images)
    SyN(iterations=(5, 0))(*images, labels=labels)
    apart = np.linalg.norm(np.stack(np.indices(SHAPE)) - np.array([10, 12, 8])[:, None, None, None], axis=0)
    np.testing.assert_array_equal(seen[0]["fixed_mask"], apart <= 4)
    assert seen[0]["moving_mask"][20, 12, 8] == 1 and not seen[0]["moving_mask"][10].any()
    assert seen[0]["iterations"] == (5, 0) and all(entry["mask_margin"] is None for entry in seen)
    assert all(entry["fixed_mask"] is None for entry in seen[1:])


def test_the_method_registers_each_pair_of_a_batch_and_always_alike(deformed):
    """In two new processes, and in this one, where other tests have run ITK."""
    fixed, moving, _ = deformed
    images = [torch.from_numpy(np.stack(side))[:, None] for side in ((fixed, moving), (moving, fixed))]
    first, again = SyN(iterations=(20, 10, 0)), SyN(iterations=(20, 10, 0))
    registration = first(*images, (5, 5, 5))
    assert registration.displacement.shape == (2, 3, *SHAPE) and registration.control_points is None
    assert torch.equal(registration.displacement, first(*images).displacement)
    assert torch.equal(registration.displacement[:1], again(images[0][:1], images[1][:1]).displacement)


def test_a_failure_is_one_sentence(deformed, monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError("Registration failed with error code 1")

    monkeypatch.setattr(ants, "registration", fail)
    with pytest.raises(InputError, match="found no registration .*error code 1.*, expected images of the same"):
        syn(*deformed[:2])


LIKE_A_KERNEL = """
import math, os, signal, time
from gridreg.scans.prepare import fresh_processes
if __name__ == "__main__":
    process = fresh_processes(1)
    assert process.submit(math.sqrt, 4.0).result() == 2.0
    signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
    os.killpg(0, signal.SIGINT)  # as Jupyter does before it ends a kernel
    time.sleep(0.5)
"""


def test_the_end_of_a_notebook_leaves_no_traceback_of_the_other_process(tmp_path):
    script = tmp_path / "kernel.py"
    script.write_text(LIKE_A_KERNEL)
    done = subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_a_process_that_was_ended_is_replaced(deformed):
    fixed, moving = (torch.from_numpy(side)[None, None] for side in deformed[:2])
    network = SyN(iterations=(2, 0, 0), affine_stage=False)
    expected = network(fixed, moving).displacement
    (pid,) = network.process._processes
    os.kill(pid, signal.SIGINT)
    with pytest.raises(BrokenProcessPool):
        network(fixed, moving)
    assert torch.equal(network(fixed, moving).displacement, expected)


def test_the_other_process_needs_no_pytorch():
    code = "import sys, study.methods.syn; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.stdout == "False\n", done.stderr
