"""A fingerprint of what the code computes: a few numbers for each kind of run, in ``fingerprints.yaml``.

The numbers come from training steps of a small network on three synthetic subjects, from the evaluation of one pair, and
from the preprocessing of six small scans. A comment or a refactoring does not change these numbers; another
initialisation, loss weight or norm does. A test computes them again. If they differ from the file, the runs of that kind
must be trained and evaluated again. DVC does so once the file is written:

    python -m study.training.fingerprint           writes the file and lists the kinds that have changed
    python -m study.training.fingerprint --check   only compares

The file has six digits. ``TOLERANCE`` allows for processors that round differently. Adam's first steps follow the sign of
each gradient, so rounding errors grow there. They stay small for GridReg's networks, which take three steps and so test
the training loop for all methods. The other networks take one step, whose loss terms and gradients precede any update.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import SingleDeviceStrategy
from ruamel.yaml import YAML
from scipy import ndimage
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gridreg.checkpoint import write_text
from gridreg.errors import InputError, exit_status
from gridreg.network import Registration
from gridreg.scans.prepare import fresh_processes
from gridreg.scans.volumes import write_field_mm, write_volume
from gridreg.spatial import Shape
from study.cohorts.dataset import Preprocessed
from study.cohorts.preprocess import preprocess_dataset
from study.evaluation.evaluate import evaluate, register
from study.methods.table import build, grid_sizes
from study.training import kinds
from study.training.train import optimise

TOLERANCE = 1e-3  # relative; processors with AVX2 and with AVX-512 differed by up to 1.3e-4
ZERO = 1e-12  # absolute tolerance: smaller numbers are rounding errors
SHAPE, SPACING = (20, 24, 18), 2.0  # voxels, mm
SETTINGS = {"batch": 2, "learning_rate": 1e-3, "beta2": 0.98, "bending": 0.5, "epochs": None, "validate_every": 1}
STEPS = {"gridreg": 3}  # of training; other methods take 1

GRIDREG = {"method": "gridreg", "grids": [[3, 3, 3], [4, 5, 3]], "base_channels": 4, "num_layers": 5, "samples": 2}
KEYMORPH = {"method": "keymorph", "keypoints": 8, "width": 4, "layers": 9, "poolings": 2}
NETWORKS = [
    *(
        GRIDREG | {"upsampling": upsampling, "fold_free": fold_free, "bayesian": bayesian, "projector": projector}
        for upsampling, fold_free in (("trilinear", False), ("bspline", False), ("bspline", True), ("deconv", False))
        for bayesian in (False, True)
        for projector in (True, False)
    ),
    *(GRIDREG | {"num_layers": layers} for layers in (4, 6, 7, 8, 9)),
    GRIDREG | {"encoder": "match", "passes": 2},
    {"method": "voxelmorph", "width": 4, "levels": 2, "integration_steps": 0},
    {"method": "voxelmorph", "width": 4, "levels": 2, "integration_steps": 3},
    {"method": "transmorph", "embed": 12, "convolutions": 1, "drop_path": 0.1},
    {"method": "transmorph", "embed": 12, "convolutions": 2, "drop_path": 0.1},
    *(KEYMORPH | {"align": align} for align in ("tps", "affine")),
    *(KEYMORPH | {"layers": layers} for layers in range(4, 9)),
]
LOSSES = {  # kinds of training other than networks: similarity, weight of the Dice loss, numbers of labels
    "similarity-ncc": ("ncc", 0.0, [1]),
    "similarity-mi": ("mi", 0.0, [1]),
    "labels": ("mse", 0.3, [1, 10]),  # with many labels the Dice loss is computed in groups
    "no-labels": ("mse", 0.0, [0]),  # validation then uses the similarity
}
BASE = "gridreg-trilinear"  # the network that is trained with each of LOSSES
SYN = [
    {"method": "syn", "iterations": [5, 3, 0], "metric": "mattes", "mask_margin": 3},
    {"method": "syn", "iterations": [5, 3, 0], "metric": "CC", "affine_stage": False},
    {"method": "syn", "iterations": [5, 3, 0], "metric": "meansquares"},
]


def network_runs() -> dict[str, dict[str, Any]]:
    """A small run for each kind of network, by kind."""
    runs: dict[str, dict[str, Any]] = {}
    for run in NETWORKS:
        for kind in kinds.network_kinds(run):
            runs.setdefault(kind, run)
    return runs


def _small_run(kind: str) -> dict[str, Any]:
    runs = network_runs()
    if kind not in runs:
        raise InputError(f"{__file__}: found no run of the kind {kind}; expected one under NETWORKS")
    return runs[kind]


# ---- Three small subjects ------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def small_data(labels: int) -> Preprocessed:
    """A preprocessed dataset of three subjects with this number of labels: shifted textures with known deformations."""
    rng = np.random.default_rng(0)
    folder = Path(_scratch().name) / f"{labels}-labels"
    affine = np.diag([SPACING] * 3 + [1.0])
    texture = ndimage.gaussian_filter(rng.standard_normal([n + 8 for n in SHAPE]), 2.0)
    texture = (texture - texture.min()) / np.ptp(texture)
    subjects = {}
    for name in ("a", "b", "c"):
        shift = rng.uniform(-2, 2, 3)  # voxels
        at = np.indices(SHAPE) + 4 + shift[:, None, None, None]
        image = ndimage.map_coordinates(texture, at, order=1)
        write_volume(folder / f"images/{name}.nii.gz", image.astype(np.float32), affine)
        if labels:
            parts = np.clip((image - 0.4) / 0.4 * labels + 1, 0, labels).astype(np.int16)
            write_volume(folder / f"labels/{name}.nii.gz", parts, affine)
        field_mm = np.broadcast_to(SPACING * shift[:, None, None, None], (3, *SHAPE))
        write_field_mm(folder / f"truth/{name}.nii.gz", field_mm, affine)
        _write_points(folder / f"landmarks/{name}.csv", np.array([[8, 9, 10], [12, 14, 7]]) - shift)
        subjects[name] = {"split": "train", "patient": name, "label": bool(labels), "landmarks": True, "truth": True,
                          "template": "texture", "to_source": np.eye(4).tolist()}  # fmt: skip
    pairs = {"train": [["a", "b"], ["b", "c"], ["c", "a"]], "val": [["a", "b"]], "test": [["b", "c"]]}
    index = {"name": "small", "simulated": True, "shape": SHAPE, "spacing_mm": SPACING, "pairs": pairs,
             "subjects": subjects, "labels": {str(value): str(value) for value in range(1, labels + 1)}}  # fmt: skip
    write_text(folder / "index.json", json.dumps(index))
    return Preprocessed(folder)


def _write_points(file: Path, points: Sequence[np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [",".join([f"point {number}", *map(str, point)]) for number, point in enumerate(points)]
    file.write_text("\n".join(["name,x_voxel,y_voxel,z_voxel", *rows]) + "\n")


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fingerprint-")  # removed when the process ends


# ---- The numbers ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Run the block on one CPU thread, without progress bars and without effect on PyTorch's random numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.dict(os.environ, GRIDREG_ACCELERATOR="cpu"),
            contextlib.redirect_stderr(io.StringIO()),
            torch.random.fork_rng(devices=[]),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=None)
def _trained(kind: str, similarity: str = "mse", dice_weight: float = 0.0, labels: int = 1) -> dict[str, list]:
    """Train the small run of a kind of network: {name: one value per step}."""
    run = _small_run(kind)
    names = [name.split(".")[0] for name, _ in build(run).named_parameters()]
    norms: dict[str, list[float]] = {f"gradient of {name}": [] for name in names}

    def record(optimiser: torch.optim.Optimizer, *_) -> None:
        squares = dict.fromkeys(names, 0.0)
        for name, parameter in zip(names, optimiser.param_groups[0]["params"], strict=True):
            squares[name] += 0.0 if parameter.grad is None else float(parameter.grad.double().square().sum())
        for name, square in squares.items():
            norms[f"gradient of {name}"].append(math.sqrt(square))

    out = Path(tempfile.mkdtemp(dir=_scratch().name)) / "finished"
    weights = {"similarity": similarity, "dice_weight": dice_weight, "bending_weight": 1e6, "seed": 1}
    settings = SETTINGS | {"steps": STEPS.get(run["method"], 1)}
    handle = register_optimizer_step_pre_hook(record)
    try:
        optimise(
            Fabric(strategy=SingleDeviceStrategy(torch.device("cpu"))),
            small_data(labels),
            run,
            settings,
            out,
            **weights,
        )
    finally:
        handle.remove()
    # the loss and the learning rate affect the other numbers, so they need no numbers here
    history = pd.read_csv(out / "history.csv").drop(columns=["step", "loss", "learning_rate"])
    return {name: list(history[name]) for name in history} | norms


def training_numbers(kind: str) -> dict[str, list[float]]:
    """The numbers of one kind of training, one value per step. InputError for an unknown kind."""
    with _quietly():
        if kind not in LOSSES:
            return _trained(kind)
        similarity, dice_weight, numbers_of_labels = LOSSES[kind]
        return _joined({f"{n} labels": _trained(BASE, similarity, dice_weight, n) for n in numbers_of_labels})


class ConstantDisplacement(nn.Module):
    """A method with one random field for every pair. It folds and points outside the image, so it affects every metric."""

    def forward(self, fixed: Tensor, moving: Tensor, grid_size: Shape | None = None) -> Registration:
        field = ndimage.gaussian_filter(np.random.default_rng(1).standard_normal((3, *SHAPE)), (0, 2, 2, 2))
        return Registration(torch.from_numpy(1.5 * field / field.std()).float()[None])


def _registered(
    network: nn.Module, grids: list[Shape | None], refinement: dict | None = None
) -> dict[str, list[float]]:
    """Register the test pair: root mean square of u along each axis in voxels, and mean of the warped image, per grid."""
    data = small_data(1)
    pair, numbers = data.pair(*data.pairs("test")[0]), {"displacement": [], "warped": []}
    for grid in grids:
        registration, warped, *_ = register(network.eval(), pair, grid, torch.device("cpu"), refinement)
        numbers["displacement"] += registration.displacement[0].double().square().mean((1, 2, 3)).sqrt().tolist()
        numbers["warped"].append(float(warped.mean(dtype=float)))
    return numbers


def _fresh(kind: str, **refinement) -> dict[str, list[float]]:
    """The numbers of a registration by the small network before training."""
    torch.manual_seed(1)
    run = _small_run(kind)
    return _registered(build(run), grid_sizes(run), refinement)


def _metrics(labels: int) -> dict[str, list[float]]:
    """Every metric of the test pair under ``ConstantDisplacement``."""
    how = {"dataset": "small", "run": "known", "method": "known", "grids": [None], "chosen": None}
    cases = evaluate(small_data(labels), ConstantDisplacement(), **how).select_dtypes("number")
    cases = cases.drop(columns=["seconds", "peak_mb"]).dropna(axis=1)
    return {name: list(cases[name].astype(float)) for name in cases}


def evaluation_numbers(kind: str) -> dict[str, list[float]]:
    """The numbers of one kind of evaluation. InputError for an unknown kind."""
    with _quietly():
        if kind == "metrics":
            return _joined({f"{labels} labels": _metrics(labels) for labels in (0, 1, 10)})
        if kind == "identity":
            return _registered(build({"method": "identity"}), [None])
        if kind == "syn":
            networks = {run["metric"]: build(run) for run in SYN}
            with fresh_processes(1) as process:  # one for all networks, as it takes seconds to start
                for network in networks.values():
                    network.process = process
                return _joined({metric: _registered(network, [None]) for metric, network in networks.items()})
        if kind.startswith("refinement-"):
            how = {"steps": 3, "similarity": kind.removeprefix("refinement-"), "bending_weight": 100.0}
            return _joined({each: _fresh(each, **how) for each in (BASE, "gridreg-bspline-fold-free")})
        return _fresh(kind)


def _joined(parts: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    return {f"{name}, {part}": values for part, numbers in parts.items() for name, values in numbers.items()}


def preprocessing_numbers() -> dict[str, list[float]]:
    """The numbers of six small preprocessed scans, both without alignment and aligned to the first scan."""
    rng, folder = np.random.default_rng(0), Path(_scratch().name) / "cohort"
    affine = np.diag((-2.0, 2.5, 3.0, 1.0))  # LAS, anisotropic
    affine[:3, 3] = (30, -20, 10)
    names = [f"scan_{number:04d}_0000" for number in range(6)]
    at = np.indices((26, 22, 20))
    for name in names:
        centre = np.array([13, 11, 10])[:, None, None, None] + rng.uniform(-1, 1, (3, 1, 1, 1))
        distance = np.sqrt((((at - centre) / np.array([10, 8, 7])[:, None, None, None]) ** 2).sum(0))
        image = np.where(distance < 1, 300 + 400 * ndimage.gaussian_filter(rng.standard_normal(at.shape[1:]), 1.5), 0)
        write_volume(folder / f"imagesTr/{name}.nii.gz", image.astype(np.float32), affine)
        write_volume(folder / f"labelsTr/{name}.nii.gz", (distance < 0.6).astype(np.int16), affine)
        write_field_mm(
            folder / f"truthTr/{name}.nii.gz", 3 * rng.standard_normal((3, 4, 4, 4)), affine @ np.diag((8, 8, 8, 1))
        )
        _write_points(folder / f"landmarksTr/{name}.csv", [centre.ravel(), centre.ravel() + 3])
    files = [f"imagesTr/{name}.nii.gz" for name in names]
    pairs = [{"fixed": fixed, "moving": moving} for fixed, moving in zip(files[::2], files[1::2])]
    info = {
        "name": "small", "simulated": True, "labels": {"1": "core"}, "training": files[:4], "test": files[4:],
        "registration_train": pairs[:1], "registration_val": pairs[1:2], "registration_test": pairs[2:],
    }  # fmt: skip
    write_text(folder / "dataset.json", json.dumps(info))
    numbers = {}
    with _quietly():
        for kind, reference in (("as they are", None), ("aligned", folder / files[0])):
            out = Path(_scratch().name) / f"preprocessed {kind}"
            index = preprocess_dataset(folder, out, name="small", shape=(24, 20, 18), spacing_mm=2.4,
                                       affine_reference=reference, progress=False)  # fmt: skip
            data = Preprocessed(out)
            parts = [_scan_numbers(data, name, index["subjects"][name]["kept"]) for name in index["subjects"]]
            numbers |= {f"{name}, {kind}": [part[name] for part in parts] for name in parts[0]}
    return numbers


def _scan_numbers(data: Preprocessed, name: str, kept: float) -> dict[str, float]:
    image, labels, points = data.image(name).astype(float), data.labels(name), data.landmarks(name)
    places = dict(zip("xyz", ndimage.center_of_mass(image)))
    return (
        {"kept": kept, "mean": image.mean(), "deviation": image.std(), "labelled": float((labels > 0).sum())}
        | {f"centre {axis}": place for axis, place in places.items()}
        | {f"landmark {axis}": sum(point[i] for point in points.values()) for i, axis in enumerate("xyz")}
    )


# ---- The file ------------------------------------------------------------------------------------------------------


def compute() -> dict[str, Any]:
    """Compute all numbers of the file. This takes some 20 seconds."""
    networks = list(network_runs())
    evaluations = ["metrics", "identity", "syn", *networks, *(f"refinement-{name}" for name in ("mse", "ncc", "mi"))]
    return {
        "preprocess": preprocessing_numbers(),
        "train": {kind: training_numbers(kind) for kind in [*networks, *LOSSES]},
        "evaluate": {kind: evaluation_numbers(kind) for kind in evaluations},
    }


def differences(found: Any, stored: Any, name: str = "") -> Iterator[str]:
    """One line for each number that differs between both by more than rounding."""
    if isinstance(found, dict) or isinstance(stored, dict):
        found, stored = found or {}, stored or {}
        for key in {**stored, **found}:
            yield from differences(found.get(key), stored.get(key), f"{name}.{key}".lstrip("."))
    elif not _alike(found, stored):
        yield f"{name} is {_rounded(found)}, in {kinds.FILE.name} {_rounded(stored)}"


def _alike(found: list[float] | None, stored: list[float] | None) -> bool:
    if found is None or stored is None or len(found) != len(stored):
        return False
    return bool(np.allclose(found, stored, rtol=TOLERANCE, atol=ZERO, equal_nan=True))


def _rounded(numbers: Any) -> Any:
    if isinstance(numbers, dict):
        return {name: _rounded(value) for name, value in numbers.items()}
    return None if numbers is None else [float(f"{number:.6g}") for number in numbers]


def check(names: Sequence[str]) -> dict[str, Any]:
    """The numbers of these kinds of training in the file. InputError if the code computes other numbers."""
    stored = kinds.numbers_of("train", names)
    changed = list(differences({name: training_numbers(name) for name in names}, stored, "train"))
    if changed:
        raise InputError(
            f"{changed[0]}; expected the same, else DVC does not know that the code has changed. Run `{kinds.COMMAND}`"
        )
    return stored


HEADER = f"""\
# What the code computes, in a few numbers for each kind of run: loss terms and gradient norms of three training steps on
# synthetic subjects, metrics of one pair. DVC trains and evaluates the runs of a kind again when its numbers change.
# Written by `{kinds.COMMAND}`, compared by a test; never by hand.
"""


def write(numbers: dict[str, Any]) -> None:
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.width, yaml.sort_base_mapping_type_on_output = 120, False
    yaml.dump(_rounded(numbers), text)
    write_text(kinds.FILE, HEADER + text.getvalue())


def main() -> int:
    parser = argparse.ArgumentParser(prog=kinds.COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare with the file")
    options = parser.parse_args()

    def start() -> None:
        numbers = compute()
        changed = list(differences(numbers, kinds.read() if kinds.FILE.is_file() else {}))
        print(*changed, sep="\n", end="\n" * bool(changed))
        if options.check and changed:
            raise InputError(
                f"{kinds.FILE}: found {len(changed)} other numbers; expected those of the code. Run `{kinds.COMMAND}`"
            )
        if changed:
            write(numbers)
        print(
            f"{kinds.FILE.name}: {f'written, {len(changed)} numbers have changed' if changed else 'nothing has changed'}"
        )

    return exit_status(start)


if __name__ == "__main__":
    sys.exit(main())
