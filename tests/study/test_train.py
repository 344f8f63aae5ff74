"""Training: it learns, it resumes after a kill with the same weights, and only its own settings change the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from small_training import ROOT, RUN, SETTINGS, SHAPE, SPACING, run_training, same, weights_of
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gridreg import checkpoint
from gridreg.checkpoint import load_model
from gridreg.errors import InputError
from gridreg.network import Registration
from gridreg.scans.volumes import write_volume
from study.cohorts.dataset import Preprocessed
from study.evaluation.evaluate import evaluate, load_run, summary
from study.methods.table import build
from study.training import train as training
from study.training.devices import launch


def test_it_learns_and_every_method_is_evaluated_by_one_path(folder, tmp_path):
    settings = SETTINGS | {"steps": 120, "validate_every": 40, "learning_rate": 1e-2, "batch": 4}
    result = run_training(folder, tmp_path / "model", tmp_path / "scratch", settings=settings)
    data = Preprocessed(folder)
    network, grids, chosen, trained = load_run(RUN, tmp_path / "model")
    cases = evaluate(data, network, dataset="blobs", run="gridreg", method="gridreg", grids=grids, chosen=chosen)
    nothing, *_ = load_run({"method": "identity"}, tmp_path)
    before = evaluate(data, nothing, dataset="blobs", run="identity", method="identity", grids=[None], chosen=None)
    after = cases[cases["chosen"]]
    assert len(cases) == 2 * len(before) and before["chosen"].all()
    assert (after["tre_interior_mm"].notna() & after["tre_boundary_mm"].notna()).all()
    assert after["tre_mm"].mean() < 0.75 * before["tre_mm"].mean()
    assert after["dice"].mean() > before["dice"].mean()
    assert (after["folding_percent"] == 0).all()
    means = summary(cases, trained, result["parameters"])
    assert means["tre_mm"] == pytest.approx(after["tre_mm"].mean(), abs=1e-5)
    assert (before["tre_mm"] > 0).all() and result["grid"] in {"3x3x3", "4x5x3"}
    history = pd.read_csv(tmp_path / "model" / "history.csv")
    assert history["val_dice"].notna().sum() == 3 and history["step"].iloc[-1] == 120
    assert not any((tmp_path / "scratch").iterdir())


KILLED = """
import json, os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import small_training as t
from study.training import train as training
save = training.State.save
def save_then_hang(self):
    save(self)
    print("saved", self.step, flush=True)
    if self.step == 8:
        import time; time.sleep(60)
training.State.save = save_then_hang
t.run_training(Path({folder!r}), Path({out!r}), Path({scratch!r}))
"""


def test_killed_in_the_middle_it_ends_with_the_same_weights(folder, tmp_path):
    run_training(folder, tmp_path / "whole", tmp_path / "scratch")
    script = KILLED.format(tests=str(ROOT / "tests" / "support"), folder=str(folder), out=str(tmp_path / "killed"),
                           scratch=str(tmp_path / "scratch"))  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.split() == ["saved", "8"]:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    began = time.perf_counter()
    run_training(folder, tmp_path / "killed", tmp_path / "scratch")
    assert time.perf_counter() - began < 60
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed"))
    histories = [pd.read_csv(tmp_path / name / "history.csv") for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*histories)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(folder, tmp_path):
    settings = SETTINGS | {"steps": 4}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run_training(folder, tmp_path / name, tmp_path / "scratch", settings=settings, seed=seed)
    assert same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert not same(weights_of(tmp_path / "a"), weights_of(tmp_path / "c"))


def test_a_changed_setting_does_not_resume_an_unfinished_training(folder, tmp_path, monkeypatch):
    def stop(self):
        save(self)
        raise KeyboardInterrupt

    save = training.State.save
    monkeypatch.setattr(training.State, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run_training(folder, tmp_path / "out", tmp_path / "scratch")
    monkeypatch.setattr(training.State, "save", save)
    run_training(folder, tmp_path / "fresh", tmp_path / "elsewhere", bending_weight=7.0)
    run_training(folder, tmp_path / "out", tmp_path / "scratch", bending_weight=7.0)
    assert same(weights_of(tmp_path / "fresh"), weights_of(tmp_path / "out"))


def test_labels_that_the_dice_loss_needs_and_are_not_there(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    index = json.loads((bare / "index.json").read_text())
    index["subjects"]["blob_0003_0000"]["label"] = False
    (bare / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"found no labels of blob_0003_0000 \(1 such .*; 0 trains without"):
        run_training(bare, tmp_path / "out", tmp_path / "scratch", dice_weight=0.5)
    assert not (tmp_path / "out").exists() and not (tmp_path / "scratch").exists()
    run_training(bare, tmp_path / "out", tmp_path / "scratch", dice_weight=0.0, settings=SETTINGS | {"steps": 1})


def test_a_loss_that_is_lost_ends_the_training_with_a_sentence(folder, tmp_path):
    settings = SETTINGS | {"learning_rate": 1e30}
    with pytest.raises(InputError, match="the loss is nan, expected a finite number; a lower learning_rate may help"):
        run_training(folder, tmp_path / "out", tmp_path / "scratch", settings=settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("variable", "value", "expected"), [
    ("GRIDREG_ACCELERATOR", "gpu", "expected cpu or cuda"), ("GRIDREG_DEVICES", "two", "expected a whole number"),
    ("GRIDREG_NODES", "0", "expected a whole number of at least 1")])  # fmt: skip
def test_an_environment_variable_that_makes_no_sense(monkeypatch, variable, value, expected):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"{variable} is '{value}', {expected}"):
        launch()


def test_voxelmorph_takes_the_same_path(folder, tmp_path):
    run = {"method": "voxelmorph", "width": 4, "levels": 3}
    result = run_training(folder, tmp_path / "vxm", tmp_path / "scratch", run=run, settings=SETTINGS | {"steps": 2})
    network, config = load_model(tmp_path / "vxm", build)
    assert config["grid"] is None and result["grid"] == ""


def test_the_matching_encoder_takes_the_same_path(folder, tmp_path):
    """And learns, with clipped gradients and identical pairs among the others."""
    run = RUN | {"encoder": "match", "passes": 2}
    settings = SETTINGS | {"steps": 12, "validate_every": 12, "clip": 0.1, "identical": 0.1}
    result = run_training(folder, tmp_path / "model", tmp_path / "scratch", run=run, settings=settings)
    network, grids, chosen, _ = load_run(run, tmp_path / "model")
    assert network.passes == 2 and result["parameters"] == training.parameter_count(build(run))
    how = {"dataset": "blobs", "run": "gridreg", "method": "gridreg"}
    after = evaluate(Preprocessed(folder), network, **how, grids=grids, chosen=chosen)
    nothing, *_ = load_run({"method": "identity"}, tmp_path)
    before = evaluate(Preprocessed(folder), nothing, **how, grids=[None], chosen=None)
    assert after["tre_mm"].mean() < 0.4 * before["tre_mm"].mean()


def test_gradients_are_clipped_where_a_run_asks_for_it(folder, tmp_path):
    norms, trained = [], []

    def record(optimiser, *_):
        gradients = [p.grad for p in optimiser.param_groups[0]["params"]]
        norms.append(float(torch.stack([g.norm() for g in gradients if g is not None]).norm()))

    handle = register_optimizer_step_pre_hook(record)
    try:
        for number, clip in enumerate((None, 1e-3)):
            settings = SETTINGS | {"steps": 2, "clip": clip}
            run_training(folder, tmp_path / f"{number}", tmp_path / "scratch", settings=settings)
            trained += norms[-2:]  # before them come those of the fingerprint
    finally:
        handle.remove()
    assert min(trained[:2]) > 1e-3 and trained[2:] == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_identical_pairs_are_drawn_and_leave_the_other_draws_alone():
    pairs, grids = [(f"a{i}", f"b{i}") for i in range(9)], [None]
    plain, mixed = ([training.draw(pairs, grids, 4, 1, step, 0, p)[0] for step in range(200)] for p in (0.0, 0.25))
    drawn = [(a, b) for left, right in zip(plain, mixed) for a, b in zip(left, right)]
    same = [b for a, b in drawn if a != b]
    assert all(b[0] == b[1] == a[0] for a, b in drawn if a != b)
    assert 0.18 < len(same) / len(drawn) < 0.32


def test_epochs_count_passes_over_the_pairs_or_over_the_subjects():
    settings = SETTINGS | {"steps": None, "epochs": 300, "batch": 4}
    assert training.total_steps(settings, pairs=156, subjects=162) == 300 * 39
    assert training.total_steps(settings, pairs=3000 * 2999, subjects=3000) == 300 * 750
    assert training.total_steps(settings, pairs=3000 * 2999, subjects=3000, devices=4) == 300 * 188
    assert training.total_steps(SETTINGS, pairs=3, subjects=2, devices=4) == SETTINGS["steps"]


def test_a_notebook_cannot_train_on_several_devices(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRIDREG_DEVICES", "2")
    monkeypatch.setattr(sys, "ps1", "In", raising=False)
    with pytest.raises(InputError, match="GRIDREG_DEVICES is 2 in a notebook, expected 1 there; train with torchrun"):
        run_training(folder, tmp_path / "out", tmp_path / "scratch")
    assert not any(tmp_path.iterdir())


def test_the_learning_rate_rises_and_falls():
    rates = [training.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] < rates[9] and max(rates) <= 1.0 and np.argmax(rates) in range(8, 12) and rates[-1] < 0.01


def test_a_bayesian_run_takes_the_same_path_and_resumes_to_the_same_weights(folder, tmp_path, monkeypatch):
    """Its Monte-Carlo samples too are drawn from (seed, step) alone."""
    run = RUN | {"bayesian": True, "samples": 2}
    run_training(folder, tmp_path / "whole", tmp_path / "scratch", run=run)
    steps = iter(range(8))
    real = training.loss_terms

    def killed(*arguments, **settings):
        next(steps)  # the ninth step ends in StopIteration
        return real(*arguments, **settings)

    monkeypatch.setattr(training, "loss_terms", killed)
    with pytest.raises(StopIteration):
        run_training(folder, tmp_path / "resumed", tmp_path / "scratch", run=run)
    monkeypatch.setattr(training, "loss_terms", real)
    run_training(folder, tmp_path / "resumed", tmp_path / "scratch", run=run)
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "resumed"))
    network, config = load_model(tmp_path / "resumed")
    data, grid = Preprocessed(folder), tuple(config["grid"])
    names = {"dataset": "blobs", "run": "bayesian", "method": "gridreg"}
    evaluate(data, network, **names, grids=[grid], chosen=grid, pictures=tmp_path / "pictures", pictured_cases=1)
    fixed, moving = data.pairs("test")[0]
    images = [torch.from_numpy(data.image(subject))[None, None] for subject in (fixed, moving)]
    with torch.no_grad():
        sigma = network(*images, grid).sigma
    assert (sigma > 0).all() and torch.isfinite(sigma).all()
    written = nibabel.load(tmp_path / "pictures" / f"{fixed}__{moving}_sigma.nii.gz").get_fdata()  # one map, in mm
    corner = SPACING * sigma[0, :, 0, 0, 0].norm()  # corners of the grid and of the image coincide
    assert written.shape == SHAPE and written[0, 0, 0] == pytest.approx(float(corner), rel=1e-4)


def test_the_grid_is_chosen_on_validation_from_any_sizes(folder):
    """Of control points that read a known field, the grid that can hold it scores best; of equals the first is taken."""
    data = Preprocessed(folder)
    fixed, moving = data.pairs("val")[0]
    field = torch.from_numpy(data.truth(fixed, moving)[0])[None]

    class Known(torch.nn.Module):
        def forward(self, fixed, moving, grid):
            return Registration(field * (grid == (6, 2, 5)))

    grids = [(3, 3, 3), (6, 2, 5), (4, 5, 3)]
    chosen, scores = training.choose_grid(Known(), data, grids, torch.device("cpu"))
    assert chosen == (6, 2, 5) and set(scores) == {"3x3x3", "6x2x5", "4x5x3"} and scores["6x2x5"] > scores["3x3x3"]
    assert training.choose_grid(Known(), data, grids[::2], torch.device("cpu"))[0] == (3, 3, 3)


def test_a_training_without_an_out_waits_and_is_adopted_without_training(folder, tmp_path, monkeypatch):
    run_training(folder, tmp_path / "direct", tmp_path / "elsewhere")
    run_training(folder, None, tmp_path / "scratch")
    (kept,) = (tmp_path / "scratch").iterdir()
    assert [path.name for path in kept.iterdir()] == ["finished"]
    monkeypatch.setattr(training, "optimise", None)
    result = run_training(folder, tmp_path / "adopted", tmp_path / "scratch")
    assert result["steps"] == SETTINGS["steps"] and not any((tmp_path / "scratch").iterdir())
    assert same(weights_of(tmp_path / "direct"), weights_of(tmp_path / "adopted"))


def test_changed_images_are_another_training(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "preprocessed")
    run_training(copy, None, tmp_path / "scratch", settings=SETTINGS | {"steps": 1})
    file = next((copy / "images").glob("*.nii.gz"))
    image = nibabel.load(file)
    write_volume(file, 0.5 * image.get_fdata(dtype=np.float32), image.affine)
    run_training(copy, None, tmp_path / "scratch", settings=SETTINGS | {"steps": 1})
    assert len(list((tmp_path / "scratch").iterdir())) == 2


HOLDS = """
import sys, time
from pathlib import Path
from study.locks import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_training_of_a_run_stops_with_a_sentence_until_the_first_has_ended(folder, tmp_path, monkeypatch):
    names = []

    def stop(*arguments, **weights):
        names.append(arguments[4].parent)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "optimise", stop)
        with pytest.raises(KeyboardInterrupt):
            run_training(folder, tmp_path / "out", tmp_path / "scratch", settings=SETTINGS | {"steps": 1})
    arguments = [sys.executable, "-c", HOLDS, str(names[0])]
    first = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"process {first.pid} on {socket.gethostname()}.*expected no other"):
            run_training(folder, tmp_path / "out", tmp_path / "scratch", settings=SETTINGS | {"steps": 1})
        assert not (tmp_path / "out").exists()
    finally:
        first.kill()  # its lock file stays, and says nothing any more
        first.wait()
    assert run_training(folder, tmp_path / "out", tmp_path / "scratch", settings=SETTINGS | {"steps": 1})["steps"] == 1
    assert not any((tmp_path / "scratch").iterdir())


def test_a_full_disk_ends_the_training_with_a_sentence_and_it_goes_on_afterwards(folder, tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(InputError, match=r"state.safetensors: cannot be written .*No space left on device"):
            run_training(folder, tmp_path / "out", tmp_path / "scratch", settings=SETTINGS | {"steps": 2})
    assert not (tmp_path / "out").exists()
    run_training(folder, tmp_path / "out", tmp_path / "scratch", settings=SETTINGS | {"steps": 2})
    assert (tmp_path / "out" / "model.safetensors").is_file()
