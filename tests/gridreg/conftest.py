"""A pair of two files, and its registration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from small_scans import OBLIQUE

from gridreg.explorer.registered import Registered, register_pair
from gridreg.network import GridReg
from gridreg.scans.pair import Pair, read_pair
from gridreg.scans.volumes import write_volume


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    """Two oblique scans on a grid of 24×22×20 voxels of 2 mm; their headers lie 87 mm apart."""
    folder, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    for name, shift in (("fixed", 0), ("moving", 50)):
        affine = OBLIQUE.copy()
        affine[:3, 3] += shift
        write_volume(folder / f"{name}.nii.gz", gaussian_filter(rng.random((30, 28, 20)), 2).astype(np.float32), affine)
    return read_pair(folder / "fixed.nii.gz", folder / "moving.nii.gz", (24, 22, 20), 2.0, start="centre")


@pytest.fixture(scope="module")
def registered(pair) -> Registered:
    torch.manual_seed(0)
    network = GridReg(base_channels=4, num_layers=4, bayesian=True)
    torch.nn.init.normal_(network.mean.weight, std=0.05)
    return register_pair(network, pair, 5)
