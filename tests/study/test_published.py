"""Costs in the published size: what is measured, once for each network, and that every run finds its own."""

from __future__ import annotations

import numpy as np
import pandas as pd

from study.benchmark.published import costs, is_default, published, reductions, variants

RUNS = {
    "identity": {"method": "identity"},
    "voxelmorph": {"method": "voxelmorph", "width": 8, "levels": 4, "learning_rate": 0.003},
    "keymorph": {"method": "keymorph", "keypoints": 32, "width": 4, "poolings": 2, "layers": 9},
    "shallow": {"method": "keymorph", "keypoints": 32, "width": 4, "poolings": 2, "layers": 4},
    "gridreg-adaptive": {"method": "gridreg", "grids": [[5, 5, 5], [8, 8, 8], [10, 10, 10], [15, 15, 15]]},
    "bayesian": {"method": "gridreg", "grids": [[10, 10, 10]], "bayesian": True, "samples": 4},
    "again": {"method": "gridreg", "grids": [[10, 10, 10]], "bayesian": True, "bending": 10.0, "steps": 3},
}


def rows(*names: tuple) -> pd.DataFrame:
    columns = ["run", "method", "grid", "shape", "task", "seconds", "memory_mb", "peak_mb", "parameters"]
    frame = pd.DataFrame(names, columns=columns)
    return frame.assign(device="cpu", threads=2, note="")


FRAME = rows(
    ("voxelmorph", "voxelmorph", "", "64x64x51", "register", 0.1, 100, np.nan, 105),
    ("voxelmorph", "voxelmorph", "", "128x128x102", "register", 0.9, 1000, np.nan, 105),
    ("voxelmorph", "voxelmorph", "", "160x192x224", "register", 4.0, 4000, np.nan, 105),
    ("voxelmorph", "voxelmorph", "", "128x128x102", "train", 3.0, 9000, np.nan, 105),
    ("gridreg-10", "gridreg", "10x10x10", "128x128x102", "register", 0.05, 100, np.nan, 250),
    ("gridreg-5", "gridreg", "5x5x5", "128x128x102", "register", 0.04, 90, np.nan, 250),
    ("shallow", "keymorph", "", "128x128x102", "variant", 2.0, 500, np.nan, 60),
    ("bayesian", "gridreg", "10x10x10", "128x128x102", "variant", 0.06, 110, np.nan, 251),
)  # fmt: skip


def test_a_smaller_peer_is_its_published_self_and_keeps_what_is_varied():
    assert published(RUNS["voxelmorph"]) == {"method": "voxelmorph", "width": 16, "levels": 5, "integration_steps": 5}
    assert is_default(RUNS["voxelmorph"]) and is_default(RUNS["keymorph"]) and is_default(RUNS["gridreg-adaptive"])
    assert published(RUNS["shallow"])["layers"] == 4 and published(RUNS["shallow"])["keypoints"] == 80
    assert not is_default(RUNS["shallow"]) and not is_default(RUNS["bayesian"])


def test_each_network_is_measured_once():
    assert list(variants(RUNS)) == ["shallow", "bayesian"]


def test_every_run_finds_its_row_at_the_middle_size():
    found = costs(FRAME, RUNS)
    assert found.shape == "128x128x102" and found.in_words() == "128×128×102 voxels, cpu, 2 threads"
    assert found.of("voxelmorph", "memory_mb") == 1000 and found.of("voxelmorph", "seconds") == 0.9
    assert found.of("gridreg-adaptive", "seconds") == 0.05  # at 10×10×10
    assert found.of("again", "parameters") == found.of("bayesian", "parameters") == 251
    assert found.of("shallow", "seconds") == 2.0
    syn = rows(("ants-syn", "syn", "", "128x128x102", "register", 23.0, np.nan, np.nan, 0)).assign(note="on one thread")
    tuned = {"ants-syn": {"method": "syn", "iterations": [9, 9, 9], "mask_margin": {"prostate": 6}}}
    beside = costs(pd.concat([FRAME, syn]), tuned)
    assert (
        beside.of("ants-syn", "seconds") == 23 and beside.notes == {"ants-syn": "on one thread"} and found.notes == {}
    )
    assert np.isnan(found.of("keymorph", "seconds")) and np.isnan(found.of("nobody", "seconds"))


def test_on_a_gpu_memory_is_all_that_was_allocated():
    found = costs(FRAME.assign(device="cuda (NVIDIA)", peak_mb=146.0), RUNS)
    assert found.of("voxelmorph", "memory_mb") == 146


def test_what_is_smaller_than_published_is_said():
    assert reductions(RUNS) == ["VoxelMorph: width 8, levels 4 (published 16, 5)",
                                "KeyMorph: keypoints 32, width 4, poolings 2 (published 80, 12, 4)"]  # fmt: skip
    assert reductions({"narrow": {"method": "transmorph", "embed": 12}}) == ["TransMorph: embedding 12 (published 96)"]
    assert reductions({"full": {"method": "transmorph"}, "gridreg": {"method": "gridreg"}}) == []
