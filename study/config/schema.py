"""Every parameter of `params.yaml`: its type, its default, its unit and what it means.

A parameter is one line of a class below; a new parameter is a new line here. A line without a default must be given.
`messages` turns what pydantic finds wrong into one sentence, `params` reads the file.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, create_model


class Section(BaseModel):
    """Names with values. Unknown names are refused, and no text or flag passes for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Expected:
    """What a value must be, in the words that follow "expected" in a message."""

    words: str


def _plain_path(path: str) -> str:
    """Refuse what would be taken for the name of a folder: $HOME/scans, ~nobody/scans."""
    if re.search(r"\$\w|\$\{", path) or os.path.expanduser(path).startswith("~"):
        raise ValueError("neither an environment variable nor an unknown home is replaced")
    return path


def _rising(window: list[float]) -> list[float]:
    if not window[0] < window[1]:
        raise ValueError("the first is not below the second")
    return window


def _above_16(shape: list[int]) -> list[int]:
    if max(shape) <= 16:
        raise ValueError("too small for the networks")
    return shape


# ---- Types -----------------------------------------------------------------------------------------------------------
WholeNumber = Annotated[int, Field(ge=0), Expected("a whole number of at least 0")]
Count = Annotated[int, Field(ge=1), Expected("a whole number of at least 1")]
Two = Annotated[int, Field(ge=2), Expected("a whole number of at least 2")]
Layers = Annotated[int, Field(ge=4, le=9), Expected("a whole number from 4 to 9")]
Number = Annotated[float, Field(ge=0), Expected("a number of at least 0")]
Positive = Annotated[float, Field(gt=0), Expected("a number above 0")]
Fraction = Annotated[float, Field(ge=0, lt=1), Expected("a number from 0 to below 1")]
Text = Annotated[str, StringConstraints(pattern=r"\S"), Expected("a text")]
PathText = Annotated[Text, AfterValidator(_plain_path), Expected("a path without environment variables")]
# What DVC allows in the name of a stage
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$"), Expected("a name of letters, digits, - and _")]
Names = Annotated[list[Name], Expected("a list of names")]
Size = Annotated[list[Two], Field(min_length=3, max_length=3), Expected("three whole numbers of at least 2")]
Sizes = Annotated[list[Size], Field(min_length=1), Expected("a list of sizes, each three whole numbers of at least 2")]
Shape = Annotated[Size, AfterValidator(_above_16),
                  Expected("three whole numbers of at least 2, the largest above 16")]  # fmt: skip
Window = Annotated[
    list[float], Field(min_length=2, max_length=2), AfterValidator(_rising), Expected("two numbers, the lower first")
]
Labels = Annotated[list[Count], Field(min_length=1), Expected("a list of label numbers of at least 1")]
MultipleOf4 = Annotated[int, Field(ge=4, multiple_of=4), Expected("a multiple of 4")]
OneOrTwo = Annotated[int, Field(ge=1, le=2), Expected("a whole number from 1 to 2")]
Poolings = Annotated[int, Field(ge=0, le=4), Expected("a whole number from 0 to 4")]
Keypoints = Annotated[int, Field(ge=5), Expected("a whole number of at least 5")]
Iterations = Annotated[
    list[WholeNumber], Field(min_length=1), Expected("a list of whole numbers, coarsest level first")
]
Method = Literal["identity", "syn", "voxelmorph", "transmorph", "keymorph", "gridreg"]
Methods = Annotated[list[Method], Field(min_length=1), Expected("a list of methods")]


# ---- Your cohort -----------------------------------------------------------------------------------------------------
class Use(Section):
    """What is run, in this order."""

    datasets: Names  # under `datasets`; one whose folder is not found is skipped
    trained: Names  # under `runs`, of methods that are trained
    untrained: Names  # under `runs`, of methods that are not
    refined: Names = []  # of `trained`: evaluated a second time, every test pair refined


class Dataset(Section):
    """A cohort in Learn2Reg layout, and how networks are trained on it."""

    title: Text | None = None  # in figures; null: the name of the dataset
    path: PathText  # its folder, absolute, from the folder of params.yaml, or from your home: ~/scans
    shape: Shape  # voxels after preprocessing
    spacing_mm: Positive  # mm, isotropic, after preprocessing
    affine_reference: PathText | None = None  # mni152 or an image file to which every scan is aligned first; null: none
    # Where scans lie before registration: at their headers' places, centre on centre, or aligned to affine_reference.
    # null: affine with a reference, else headers where all scans state an orientation and overlap, else centre
    start: Literal["headers", "centre", "affine"] | None = None
    window: Window | None = None  # stored intensities (HU for CT) that become 0 and 1; null: percentiles of the scan
    padding_value: float | None = None  # stored intensity of voxels that were not measured; null: none
    nan: Literal["refuse", "background"] = "refuse"  # what a NaN voxel is
    labels: Labels | None = None  # numbers of the labels to use; null: every label of dataset.json
    max_subjects: Two | None = None  # at most so many of each split; null: all
    max_pairs: Count | None = None  # at most so many of each split; null: all
    similarity: Literal["mse", "ncc", "mi"] = "mse"  # loss between the images; a Bayesian run needs mse
    dice_weight: Number = 0.0  # of the Dice loss; above 0 it needs labels of every training scan
    bending_weight: Number  # of the bending energy, which is in voxels: same deformation, voxels s times as large, s^4
    budget: Positive = 1.0  # times the steps or epochs of every run


# ---- For experts -----------------------------------------------------------------------------------------------------
class Train(Section):
    """Of every trained run. A run may override each of these."""

    steps: Count | None = None  # either steps or epochs is a number
    epochs: Count | None = None  # each has as many pairs as there are training scans
    batch: Count  # pairs per step and device
    learning_rate: Positive  # highest of the schedule, of Adam
    beta2: Fraction = 0.999  # of Adam: how long it remembers squared gradients
    bending: Number = 1.0  # times the bending_weight of the dataset
    clip: Positive | None = None  # longest gradient, norm of all weights together; null: any
    identical: Fraction = 0.0  # chance that a pair is replaced by its fixed scan twice: nothing to register
    validate_every: Count  # steps


class Evaluate(Section):
    """Instance refinement of the runs in use.refined."""

    refine_steps: Count = 40  # steps of optimisation per pair
    refine_bending: Number = 1.0  # times the bending weight of training


class FalseCorrespondence(Section):
    """Figure 1."""

    pairs: Count = 5  # simulated slices


class Benchmark(Section):
    """Time and memory of every method in its published size."""

    methods: Methods = ["gridreg", "voxelmorph"]  # any of METHODS below
    grids: Sizes = [[10, 10, 10]]  # control points of GridReg
    shapes: Sizes = [[32, 32, 32]]  # voxels of the images
    batches: Annotated[list[Count], Expected("a list of whole numbers of at least 1")] = []  # pairs; []: no training
    limit_seconds: Positive = 60.0  # s; a call that would take longer is left out


class Ablation(Section):
    """Tables 2 and 3, Figure 8 (1): one thing varied at a time, all on one dataset with one budget."""

    dataset: Name | None = None  # one of use.datasets
    steps: Count | None = None  # of every run; null: those of train
    use: Names = []  # which of runs
    runs: dict[Name, Any] = {}  # AblationRun, and what differs from its base: anything that a run has


class AblationRun(Section):
    of: Name  # one of base
    seed: WholeNumber | None = None  # null: that of all


# ---- Methods: what a run may have -------------------------------------------------------------------------------------
# A value for every dataset, or a mapping from the names of datasets; a dataset that it lacks has the default.
class Identity(Section):
    """No registration."""


class Syn(Section):
    """ANTs SyN."""

    iterations: Iterations = [40, 20, 0]  # from the coarsest level to the full resolution
    metric: Literal["mattes", "CC", "meansquares"] = "mattes"
    gradient_step: Positive = 0.2
    flow_sigma: Number = 3.0  # voxels squared: smoothing of each update
    total_sigma: Number = 0.0  # voxels squared: smoothing of the whole field
    affine_stage: bool | dict[str, bool] = True  # an affine registration first
    mask_margin: WholeNumber | dict[str, WholeNumber] | None = None  # voxels around the labels where the metric is
    # evaluated; null: everywhere


class VoxelMorph(Section):
    width: Count = 16  # features of every level
    levels: Two = 5
    integration_steps: WholeNumber = 5  # of a velocity field; 0: the output is the displacement


class TransMorph(Section):
    embed: MultipleOf4 = 96  # features of the first stage
    convolutions: OneOrTwo = 1  # 1: the paper's 41 476 659 parameters; 2: as published
    drop_path: Fraction = 0.3  # highest chance that training leaves out a transformer block


class KeyMorph(Section):
    keypoints: Keypoints = 80
    layers: Layers = 9
    width: Count = 12  # features of the first layer
    poolings: Poolings = 4  # at most; images need 2^(poolings + 1) voxels
    align: Literal["tps", "affine"] = "tps"
    tps_lambda: Number = 1.0  # smoothness of the thin-plate spline


class GridReg(Section):
    grids: Sizes  # control points per axis; of several, one is drawn at every step
    base_channels: Count = 16  # features of the first level
    num_layers: Layers = 5  # of the encoder
    upsampling: Literal["trilinear", "bspline", "deconv"] = "trilinear"  # control points to dense field
    projector: bool = True  # projections of the skip connections
    fold_free: bool = False  # bound the control points so that no fold is possible; needs bspline
    encoder: Literal["pair", "match"] = "pair"  # sees both images at once, as the paper's, or finds correspondences
    passes: Count = 1  # of warping the moving image by what was found and registering again; above 1 needs match
    bayesian: bool = False  # a standard deviation for every control point
    samples: Count = 1  # Monte-Carlo samples per step of a Bayesian run


METHODS: dict[Method, type[Section]] = {
    "identity": Identity,
    "syn": Syn,
    "voxelmorph": VoxelMorph,
    "transmorph": TransMorph,
    "keymorph": KeyMorph,
    "gridreg": GridReg,
}
UNTRAINED = ("identity", "syn")
BUNDLED = ("prostate", "pelvis", "brain")  # cohorts that DVC fetches to data/; they may be named without being there
MAIN_RUN = "gridreg-adaptive"  # every table compares with it, so it is always trained
TUNED = ("learning_rate", "bending")  # of Train: a run may give a value for each dataset


# ---- The file --------------------------------------------------------------------------------------------------------
class Params(Section):
    """`params.yaml`. A run is checked as `RUNS` of its method says, once it and its base are put together."""

    profile: Name  # smoke, demo or paper: whose values this file has
    use: Use
    datasets: dict[Name, Dataset]
    seed: WholeNumber
    train: Train
    evaluate: Evaluate = Evaluate()
    base: dict[Name, Any] = {}  # what runs and ablations may be made of
    runs: dict[Name, Any]  # method: and its settings, or of: a base, and what differs from it
    ablation: Ablation = Ablation()
    false_correspondence: FalseCorrespondence = FalseCorrespondence()
    benchmark: Benchmark = Benchmark()


def hints(model: type[Section]) -> dict[str, Any]:
    """The type of every parameter of a model, with its annotations."""
    every = get_type_hints(model, include_extras=True)
    return {name: every[name] for name in model.model_fields}


def _of_one_run(name: str, hint: Any) -> tuple[Any, None]:
    return (hint | dict[str, hint] | None if name in TUNED else hint | None), None


OVERRIDES = {name: _of_one_run(name, hint) for name, hint in hints(Train).items()}
RUNS: dict[str, type[Section]] = {
    name: model if name in UNTRAINED else create_model(model.__name__, __base__=model, __module__=__name__, **OVERRIDES)
    for name, model in METHODS.items()
}  # what one run of a method may have: its settings and, if it is trained, its overrides of Train


def defaults(method: str) -> dict[str, Any]:
    """The settings of a method that have a default, with it."""
    fields = METHODS[method].model_fields
    return {name: field.get_default() for name, field in fields.items() if not field.is_required()}
