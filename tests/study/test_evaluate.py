"""Refinement in the evaluation has the losses that the run was trained with."""

from __future__ import annotations

import pytest
from small_params import edit, fresh

from study.config.params import load
from study.config.runs import refinement_arguments


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
