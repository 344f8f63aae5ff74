"""A preprocessed dataset of shifted blobs and a training on it that takes a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from gridreg.checkpoint import read_tensors
from gridreg.scans.volumes import write_field_mm, write_volume
from study.cohorts.dataset import Preprocessed
from study.training import train as training

ROOT = Path(__file__).parents[2]
SHAPE, SPACING = (20, 24, 18), 4.0
RUN = {"method": "gridreg", "grids": [[3, 3, 3], [4, 5, 3]], "base_channels": 8, "num_layers": 4, "bayesian": False,
       "upsampling": "trilinear", "projector": True}  # fmt: skip
SETTINGS = {"steps": 12, "epochs": None, "batch": 2, "learning_rate": 2e-3, "beta2": 0.98, "bending": 1.0,
            "validate_every": 4}  # fmt: skip


def write_blobs(folder: Path) -> Path:
    """A preprocessed dataset of shifted blobs, with true deformations: a shift of the template for each subject."""
    rng = np.random.default_rng(0)
    affine = np.diag([SPACING] * 3 + [1.0])
    texture = np.zeros((40, 40, 40))
    texture[14:25, 13:28, 13:22], texture[18:26, 16:22, 15:20] = 0.6, 1.0  # a box with a brighter one to one side
    texture = ndimage.gaussian_filter(texture, 2.0)
    coordinates = np.indices(SHAPE).astype(float)
    subjects, splits = {}, ["train"] * 16 + ["val"] * 2 + ["test"] * 6
    for number, split in enumerate(splits):
        name, shift = f"blob_{number:04d}_0000", rng.uniform(-1.5, 1.5, 3)
        where = coordinates + shift[:, None, None, None] + 9
        image = ndimage.map_coordinates(texture, where, order=1)
        labels = (ndimage.map_coordinates(texture, where, order=1) > 0.3).astype(np.int16)
        for kind in ("images", "labels", "truth"):
            (folder / kind).mkdir(exist_ok=True)
        write_volume(folder / "images" / f"{name}.nii.gz", image.astype(np.float32), affine)
        write_volume(folder / "labels" / f"{name}.nii.gz", labels, affine)
        field = np.broadcast_to(shift[:, None, None, None] * SPACING, (3, *SHAPE)).astype(np.float32)
        write_field_mm(folder / "truth" / f"{name}.nii.gz", field, affine)
        subjects[name] = {"split": split, "patient": name[:9], "label": True, "landmarks": False, "truth": True,
                          "template": "blob", "to_source": np.eye(4).tolist()}  # fmt: skip
    names = list(subjects)
    pairs = {"train": [[a, b] for a in names[:16] for b in names[:16] if a != b], "val": [[names[16], names[17]]],
             "test": [[a, b] for a, b in zip(names[18:], names[19:])]}  # fmt: skip
    index = {"name": "blobs", "simulated": True, "shape": SHAPE, "spacing_mm": SPACING, "labels": {"1": "blob"},
             "subjects": subjects, "pairs": pairs, "source": "a test"}  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def run_training(folder: Path, out: Path, scratch: Path, run=RUN, settings=SETTINGS, **weights):
    weights = {"seed": 3, "similarity": "mse", "bending_weight": 100.0, "dice_weight": 0.1} | weights
    return training.train(Preprocessed(folder), run, settings, out, scratch=scratch, **weights)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(out / "model.safetensors")[0]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
