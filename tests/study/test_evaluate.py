"""Refinement in the evaluation has the losses of the training; identical images are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_params import edit, fresh

from gridreg.network import Registration
from gridreg.scans.pair import Pair
from study.config.params import load
from study.config.runs import refinement_arguments
from study.evaluation.evaluate import motion_of_identical_mm


def test_refinement_has_the_weights_of_the_training(tmp_path):
    path = fresh(tmp_path)
    edit(path, "    grids: [[8, 8, 8]]\n", "    grids: [[8, 8, 8]]\n    bending: {brain: 4, pelvis: 0.5}\n")
    edit(path, "\nruns:", "\nevaluate: {refine_steps: 7, refine_bending: 0.5}\nruns:")
    edit(path, "similarity: mse", "similarity: ncc")
    values = load(path)
    found = {name: refinement_arguments(values, name, "gridreg-8") for name in values["use"]["datasets"]}
    assert found["prostate"] == {"steps": 7, "similarity": "ncc", "bending_weight": 1e5}
    assert found["brain"] == {"steps": 7, "similarity": "mse", "bending_weight": pytest.approx(4e5)}
    assert found["pelvis"]["bending_weight"] == pytest.approx(5e4)


def test_motion_of_identical_images_is_that_of_the_method_within_the_mask():
    class Shift(torch.nn.Module):
        """Moves every voxel by (3, 0, 4) voxels; nothing where both images are the same one, if it knows."""

        def __init__(self, knows: bool):
            super().__init__()
            self.knows = knows

        def forward(self, fixed, moving, grid_size=None):
            still = self.knows and torch.equal(fixed, moving)
            shift = torch.tensor([0.0, 0.0, 0.0] if still else [3.0, 0.0, 4.0]).view(1, 3, 1, 1, 1)
            return Registration(shift.expand(1, 3, *fixed.shape[2:]).clone())

    rng = np.random.default_rng(0)
    pair = Pair("a ← b", *rng.random((2, 8, 7, 6), dtype=np.float32), np.diag([2.0, 2, 2, 1]), 2.0, (Path("a"), Path("b")),
                (np.eye(4), np.eye(4)))  # fmt: skip
    cpu = torch.device("cpu")
    assert motion_of_identical_mm(Shift(False), pair, None, cpu) == pytest.approx(10.0)
    assert motion_of_identical_mm(Shift(True), pair, None, cpu) == 0.0
