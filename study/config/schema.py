"""Every parameter of `params.yaml`: its type, default, unit and meaning.

A parameter is one line of a class below. A parameter without a default must be given in the file. `params` reads the
file, and `messages` turns pydantic's errors into one sentence.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, create_model


class Section(BaseModel):
    """Names with values. Unknown names are errors, and neither text nor true and false count as numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Expected:
    """The words after "expected" in a message about a wrong value."""

    words: str


def _plain_path(path: str) -> str:
    """Refuse paths that would be taken literally, such as $HOME/scans and ~nobody/scans."""
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
# Characters that DVC allows in the name of a stage
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
    """The datasets and runs that are computed, in this order."""

    datasets: Names  # under `datasets`; one whose folder is not found is skipped
    trained: Names  # under `runs`, with a method that is trained
    untrained: Names  # under `runs`, with a method that is not trained
    refined: Names = []  # among `trained`: evaluated a second time with refinement of every test pair


class Dataset(Section):
    """A cohort in Learn2Reg layout, and how networks are trained on it."""

    title: Text | None = None  # in figures; null: the name of the dataset
    path: PathText  # its folder: absolute, relative to the folder of params.yaml, or from your home (~/scans)
    shape: Shape  # voxels after preprocessing
    spacing_mm: Positive  # mm, isotropic, after preprocessing
    affine_reference: PathText | None = None  # mni152 or an image file to which every scan is aligned first; null: none
    # Position of the scans before registration: as their headers say, centre on centre, or aligned to affine_reference.
    # null: affine with a reference, else headers if all scans have an orientation and overlap, else centre
    start: Literal["headers", "centre", "affine"] | None = None
    window: Window | None = None  # stored intensities (HU for CT) that become 0 and 1; null: percentiles of the scan
    padding_value: float | None = None  # stored intensity of voxels outside the field of view; null: none
    nan: Literal["refuse", "background"] = "refuse"  # meaning of a NaN voxel: an error, or background
    labels: Labels | None = None  # numbers of the labels to use; null: every label of dataset.json
    max_subjects: Two | None = None  # at most so many of each split; null: all
    max_pairs: Count | None = None  # at most so many of each split; null: all
    similarity: Literal["mse", "ncc", "mi"] = "mse"  # similarity loss between the images; a Bayesian run needs mse
    dice_weight: Number = 0.0  # weight of the Dice loss; above 0, every training scan needs labels
    bending_weight: Number  # weight of the bending energy; for voxels s times as large divide by s^4
    budget: Positive = 1.0  # multiplies the steps or epochs of every run


# ---- For experts -----------------------------------------------------------------------------------------------------
class Train(Section):
    """Training of every run. A run may override each of these."""

    steps: Count | None = None  # exactly one of steps and epochs is a number
    epochs: Count | None = None  # an epoch has as many pairs as there are training scans
    batch: Count  # pairs per step and device
    learning_rate: Positive  # of Adam; the peak of its schedule
    beta2: Fraction = 0.999  # of Adam: decay of the mean of squared gradients
    bending: Number = 1.0  # multiplies the bending_weight of the dataset
    clip: Positive | None = None  # largest norm of the gradient of all weights; null: no limit
    identical: Fraction = 0.0  # probability that the fixed scan of a pair also replaces its moving scan
    validate_every: Count  # steps between two validations


class Evaluate(Section):
    """Instance refinement of the runs in use.refined."""

    refine_steps: Count = 40  # steps of optimisation per pair
    refine_bending: Number = 1.0  # multiplies the bending weight of training


class FalseCorrespondence(Section):
    """Figure 1."""

    pairs: Count = 5  # number of simulated pairs of slices


class Benchmark(Section):
    """Time and memory of every method in its published size."""

    methods: Methods = ["gridreg", "voxelmorph"]  # names in METHODS below
    grids: Sizes = [[10, 10, 10]]  # control points of GridReg
    shapes: Sizes = [[32, 32, 32]]  # voxels of the images
    batches: Annotated[list[Count], Expected("a list of whole numbers of at least 1")] = []  # pairs per step; []: none
    limit_seconds: Positive = 60.0  # seconds; a call that would take longer is left out


class Ablation(Section):
    """Tables 2 and 3, Figure 8 (1): one setting varied at a time, on one dataset with one budget."""

    dataset: Name | None = None  # one of use.datasets
    steps: Count | None = None  # of every run; null: those of train
    use: Names = []  # the names of `runs` that are computed
    runs: dict[Name, Any] = {}  # AblationRun, and any settings of a run that differ from its base


class AblationRun(Section):
    of: Name  # a name in `base`
    seed: WholeNumber | None = None  # null: the seed of params.yaml


# ---- Settings of the methods ------------------------------------------------------------------------------------------
# Where a mapping is allowed, it gives a value per dataset; datasets that it lacks have the default.
class Identity(Section):
    """No registration."""


class Syn(Section):
    """ANTs SyN."""

    iterations: Iterations = [40, 20, 0]  # from the coarsest level to the full resolution
    metric: Literal["mattes", "CC", "meansquares"] = "mattes"
    gradient_step: Positive = 0.2
    flow_sigma: Number = 3.0  # voxels squared: smoothing of each update
    total_sigma: Number = 0.0  # voxels squared: smoothing of the whole field
    affine_stage: bool | dict[str, bool] = True  # whether an affine registration comes first
    mask_margin: WholeNumber | dict[str, WholeNumber] | None = None  # voxels around the labels in which the metric is
    # evaluated; null: everywhere


class VoxelMorph(Section):
    width: Count = 16  # features of every level
    levels: Two = 5
    integration_steps: WholeNumber = 5  # for a velocity field; 0: the output is the displacement


class TransMorph(Section):
    embed: MultipleOf4 = 96  # features of the first stage
    convolutions: OneOrTwo = 1  # 1: the paper's 41 476 659 parameters; 2: as published
    drop_path: Fraction = 0.3  # highest probability that training skips a transformer block


class KeyMorph(Section):
    keypoints: Keypoints = 80
    layers: Layers = 9
    width: Count = 12  # features of the first layer
    poolings: Poolings = 4  # at most; images need 2^(poolings + 1) voxels
    align: Literal["tps", "affine"] = "tps"
    tps_lambda: Number = 1.0  # smoothness of the thin-plate spline


class GridReg(Section):
    grids: Sizes  # control points per axis; of several grids, one is drawn at every step
    base_channels: Count = 16  # features of the first level
    num_layers: Layers = 5  # of the encoder
    upsampling: Literal["trilinear", "bspline", "deconv"] = "trilinear"  # control points to dense field
    projector: bool = True  # skip-projections; false: the coarsest level alone is decoded
    fold_free: bool = False  # bound the control points so that the field cannot fold; needs bspline
    encoder: Literal["pair", "match"] = "pair"  # the paper's, of both images together; match finds correspondences
    passes: Count = 1  # each later pass warps the moving image by the displacement so far; above 1 needs match
    bayesian: bool = False  # also predict a standard deviation for every control point
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
BUNDLED = ("prostate", "pelvis", "brain")  # cohorts that DVC fetches to data/; their folders may still be missing
MAIN_RUN = "gridreg-adaptive"  # every table compares with it, so it is always trained
TUNED = ("learning_rate", "bending")  # settings of Train that a run may give per dataset


# ---- The file --------------------------------------------------------------------------------------------------------
class Params(Section):
    """The whole of `params.yaml`. A run is joined with its base first and then checked by `RUNS` of its method."""

    profile: Name  # smoke, demo or paper: the profile that last wrote values into this file
    use: Use
    datasets: dict[Name, Dataset]
    seed: WholeNumber
    train: Train
    evaluate: Evaluate = Evaluate()
    base: dict[Name, Any] = {}  # settings from which runs and ablations are made
    runs: dict[Name, Any]  # method: and its settings, or of: a base and the settings that differ
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
}  # settings of one run of a method and, if it is trained, its overrides of Train


def defaults(method: str) -> dict[str, Any]:
    """The default values of a method's settings, without those that have none."""
    fields = METHODS[method].model_fields
    return {name: field.get_default() for name, field in fields.items() if not field.is_required()}
