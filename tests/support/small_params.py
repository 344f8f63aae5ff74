"""A small params.yaml with its own small profiles, so that tuning the real ones cannot break the tests of behaviour."""

from __future__ import annotations

from pathlib import Path

BLOCK = """\
    path: {path}
    shape: {shape}
    spacing_mm: {spacing}
    labels: null
    similarity: mse
    dice_weight: 1.0
    bending_weight: 200000.0
"""


def block(path: str | Path, shape: str = "[32, 38, 32]", spacing: float = 5) -> str:
    return BLOCK.format(path=path, shape=shape, spacing=spacing)


STOCK = f"""\
# A comment at the top.
profile: demo
seed: 2026

use:
  datasets: [prostate, pelvis, brain]
  trained: [voxelmorph, gridreg-adaptive, gridreg-5, gridreg-8]
  untrained: [identity]
  refined: []

datasets:
  # a comment in between
  prostate:
{block("data/prostate", "[32, 32, 26]", 2.8)}  pelvis:
{block("data/pelvis", "[32, 32, 26]", 4.0)}
  brain:  # after an empty line
{block("data/brain", "[40, 48, 40]", 4.0)}
# A comment above train.
train:
  steps: 600
  epochs: null
  batch: 4
  learning_rate: 0.002
  validate_every: 100

base:
  gridreg:
    method: gridreg
    grids: [[8, 8, 8]]

runs:
  identity:
    method: identity
  voxelmorph:
    method: voxelmorph
  gridreg-5:
    method: gridreg
    grids: [[5, 5, 5]]  # control points
    upsampling: trilinear
    bayesian: false
  gridreg-8: {{of: gridreg}}
  gridreg-adaptive: {{of: gridreg, grids: [[8, 8, 8], [10, 10, 10]]}}
"""
OVERLAY = """\
datasets:
  prostate: {{path: {where}/prostate, shape: {shape}, spacing_mm: {spacing}}}
  pelvis: {{path: {where}/pelvis, shape: {shape}}}
  brain: {{path: {where}/brain, labels: {labels}}}
train: {{steps: {steps}, epochs: {epochs}, batch: 4, learning_rate: {rate}}}
base:
  gridreg: {{grids: {grids}}}
"""


def fresh(folder: Path) -> Path:
    """A small params.yaml in profile demo, three profiles, and the folders of the profile paper. Returns the first."""
    (folder / "profiles").mkdir()
    for profile, values in {
        "demo": dict(
            where="data",
            shape=[32, 32, 26],
            spacing=2.8,
            labels="null",
            steps=600,
            epochs="null",
            rate=0.002,
            grids=[[8, 8, 8]],
        ),
        "smoke": dict(
            where="data",
            shape=[24, 24, 20],
            spacing=3.75,
            labels=[1],
            steps=4,
            epochs="null",
            rate=0.002,
            grids=[[8, 8, 8]],
        ),
        "paper": dict(
            where="cohorts/paper",
            shape=[128, 128, 102],
            spacing=0.7,
            labels=[1, 2],
            steps="null",
            epochs=300,
            rate=0.0001,
            grids=[[8, 8, 8], [15, 15, 15]],
        ),
    }.items():
        (folder / "profiles" / f"{profile}.yaml").write_text(OVERLAY.format(**values))
    for name in ("prostate", "pelvis", "brain"):
        (folder / "cohorts" / "paper" / name).mkdir(parents=True)
    path = folder / "params.yaml"
    path.write_text(STOCK)
    return path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
