"""On a GPU nothing but the device is different: every method trains, resumes and is evaluated on one that pretends."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from pretend_gpu import GPU, Memory, Pretend
from small_training import RUN, SETTINGS, run_training

from gridreg.explorer import registered as explorer
from gridreg.network import GridReg
from gridreg.spatial import warp
from study.benchmark.memory import MB
from study.cohorts.dataset import Preprocessed
from study.evaluation import evaluate, uncertainty
from study.evaluation.evaluate import load_run
from study.training import fingerprint, train

GRIDREG = RUN | {"grids": [[3, 3, 3], [4, 5, 3]]}
RUNS = {
    "gridreg": GRIDREG,
    "gridreg-bayesian": GRIDREG | {"bayesian": True, "samples": 2},
    "gridreg-fold-free": GRIDREG | {"upsampling": "bspline", "fold_free": True, "projector": False},
    "gridreg-deconv": GRIDREG | {"upsampling": "deconv"},
    "voxelmorph": {"method": "voxelmorph", "width": 4, "levels": 2, "integration_steps": 0},
    "voxelmorph-integrated": {"method": "voxelmorph", "width": 4, "levels": 2, "integration_steps": 3},
    "transmorph": {"method": "transmorph", "embed": 12, "drop_path": 0.1},
    "keymorph": {"method": "keymorph", "keypoints": 8, "width": 4, "layers": 4, "poolings": 1},
    "keymorph-affine": {
        "method": "keymorph",
        "keypoints": 8,
        "width": 4,
        "layers": 4,
        "poolings": 1,
        "align": "affine",
    },
}


SAVE = train.State.save


def interrupted_at(step: int):
    """``State.save``, with an interruption behind the one of this step."""

    def save(self):
        SAVE(self)
        if self.step == step:
            raise KeyboardInterrupt

    return save


class Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(train, "launch", lambda: Fabric(strategy=SingleDeviceStrategy(GPU, Accelerator())))
    monkeypatch.setattr(fingerprint, "check", lambda names: {})  # of the code on the CPU, whatever the device
    # in inference mode tensors of Python's making cannot be views
    for module, name in ((evaluate, "register"), (uncertainty, "register"), (explorer, "register_pair")):
        monkeypatch.setattr(module, name, torch.no_grad()(getattr(module, name).__wrapped__))
        monkeypatch.setattr(module, "device", lambda: GPU)
    torch.__future__.set_swap_module_params_on_conversion(
        True
    )  # as on a GPU, where a moved parameter is the same object
    with Pretend():
        yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def evaluated(folder: Path, run: dict, model: Path) -> pd.DataFrame:
    """Every test pair at every grid, the control points of the chosen one refined."""
    network, grids, chosen, _ = load_run(run, model)
    return evaluate.evaluate(
        Preprocessed(folder), network, dataset="blobs", run="a run", method=run["method"], grids=grids, chosen=chosen,
        refinement={"steps": 3, "bending_weight": 1.0},
    )  # fmt: skip


def test_tensors_of_both_devices_do_not_mix(gpu):
    there = torch.ones(3, device=GPU)
    assert there.device == GPU and torch.equal((there + 1).cpu(), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="one device"):
        there + torch.ones(3)


@pytest.mark.parametrize("name", RUNS)
def test_a_training_on_a_gpu_resumes_and_is_that_on_the_cpu(folder, tmp_path, gpu, monkeypatch, name):
    settings = SETTINGS | {"steps": 4, "validate_every": 2}
    train_there = partial(
        run_training, folder, tmp_path / "gpu", tmp_path / "scratch", run=RUNS[name], settings=settings
    )
    monkeypatch.setattr(train.State, "save", interrupted_at(2))
    with pytest.raises(KeyboardInterrupt):
        train_there()
    monkeypatch.setattr(train.State, "save", SAVE)
    assert train_there()["device"] == "pretend"
    there = evaluated(folder, RUNS[name], tmp_path / "gpu")
    monkeypatch.undo()
    run_training(folder, tmp_path / "cpu", tmp_path / "scratch", run=RUNS[name], settings=settings)
    found, expected = (pd.read_csv(tmp_path / where / "history.csv") for where in ("gpu", "cpu"))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-2)
    here = evaluated(folder, RUNS[name], tmp_path / "gpu")
    pd.testing.assert_frame_equal(here.drop(columns="seconds"), there.drop(columns="seconds"), rtol=1e-3)


def test_what_is_made_of_sigma_comes_back_from_a_gpu(folder, gpu):
    data, network = Preprocessed(folder), GridReg(base_channels=8, num_layers=4, bayesian=True)
    pair = next(uncertainty.uncertain_pairs(data, network, (4, 5, 3), "test"))
    assert all(np.isfinite(sigma).all() for sigma in pair.sigma_mm.values())
    registered = explorer.register_pair(network, data.pair(pair.fixed, pair.moving), 4)
    draw_sample = torch.no_grad()(explorer.draw_sample.__wrapped__)
    assert registered.control_points.device == GPU and np.isfinite(draw_sample(registered, 1)[1]).all()


@pytest.mark.parametrize("grid", [(5, 5, 5), (10, 10, 10), (15, 15, 15)])
def test_a_registration_holds_less_than_the_paper_measured(gpu, grid):
    """Weights, images and all that lives beside them, in the paper's size; what kernels need for themselves is not in it."""
    with torch.no_grad():
        network, images = GridReg().to(GPU), [torch.rand(1, 1, 128, 128, 102).to(GPU) for _ in range(2)]
        Memory.peak = Memory.now
        warp(images[1], network(*images, grid).displacement)
    assert 30 * MB < Memory.peak < 146 * MB
