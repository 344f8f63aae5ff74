"""What a result is: the runs, the metrics with their better direction, and the files that the evaluation writes.

Every table, test and figure is computed from ``cases.csv``, which has one row per test pair and grid size.
``metrics.json`` beside it adds what is not per case (parameters, device).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from gridreg.errors import InputError
from study.config.schema import MAIN_RUN
from study.reporting.paper_numbers import PAPER_DATASETS

REFERENCE = MAIN_RUN  # against which the others are compared
PAIR = ["fixed", "moving"]


class Metric(NamedTuple):
    """How one quantity is read: which direction is better, how it is printed and how it is tested."""

    label: str
    unit: str  # "" for pure numbers
    better: Literal["higher", "lower"]
    format: str
    tested: bool = True
    can_fail: bool = False  # an empty value is a failed case, not a missing measurement
    trivial_for_identity: bool = False  # describes the transform alone: moving nothing is perfect by definition

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


METRICS: dict[str, Metric] = {
    "dice": Metric("Dice", "", "higher", "{:.3f}"),
    "landmark_mm": Metric("Landmark distance", "mm", "lower", "{:.2f}", can_fail=True),
    "mask_mm": Metric("Mask centroid distance", "mm", "lower", "{:.2f}", can_fail=True),
    "tre_mm": Metric("True TRE", "mm", "lower", "{:.2f}"),
    "tre_interior_mm": Metric("True TRE, interior", "mm", "lower", "{:.2f}"),  # deeper than metrics.THICKNESS_MM
    "tre_boundary_mm": Metric("True TRE, boundary", "mm", "lower", "{:.2f}"),
    "ncc": Metric("Image correlation", "", "higher", "{:.3f}", tested=False),  # only where accuracy was not measured
    "mse": Metric("Mean squared difference", "", "lower", "{:.4f}", tested=False),
    "folding_percent": Metric("Folding", "%", "lower", "{:.2f}", trivial_for_identity=True),
    "nondiffeomorphic_percent": Metric("Non-diffeomorphic volume", "%", "lower", "{:.2f}", trivial_for_identity=True),
    "logdet_mean": Metric("Mean log det J", "", "lower", "{:.3f}", tested=False, trivial_for_identity=True),
    "logdet_std": Metric("SD of log det J", "", "lower", "{:.3f}", trivial_for_identity=True),
    "identical_mm": Metric(
        "Motion of identical images", "mm", "lower", "{:.2f}", tested=False, trivial_for_identity=True
    ),
    "memory_mb": Metric("Memory", "MB", "lower", "{:.0f}", tested=False),
    "parameters": Metric("Parameters", "", "lower", "{:,.0f}", tested=False),
    "seconds": Metric("Time per case", "s", "lower", "{:.3f}", tested=False),
}
CASE_METRICS = [name for name, metric in METRICS.items() if metric.tested]
ACCURACY = ["dice", "landmark_mm", "mask_mm", "tre_mm"]  # each needs labels, landmarks or a known deformation
SIMILARITY = ["ncc", "mse"]

# In the order of the paper's Table 1, our variants of GridReg after it; runs not listed follow, under their own name.
RUN_LABELS = {
    "identity": "Original",
    "ants-syn": "ANTs SyN",
    "voxelmorph": "VoxelMorph",
    "transmorph": "TransMorph",
    "keymorph": "KeyMorph",
    "gridreg-adaptive": "GridReg (adaptive)",
    "gridreg-adaptive-refined": "GridReg (refined)",
    "gridreg-bayesian": "GridReg (Bayesian)",
    "gridreg-5": "GridReg-5",
    "gridreg-8": "GridReg-8",
    "gridreg-10": "GridReg-10",
    "gridreg-15": "GridReg-15",
}

_TEXT = ["dataset", "run", "method", "grid", *PAIR]
_NUMBERS = ["dice", "landmark_mm", "mask_mm", "tre_mm", "tre_interior_mm", "tre_boundary_mm", "logdet_mean", "logdet_std",
            "folding_percent", "nondiffeomorphic_percent", "labels_lost", "landmarks_missing", "seconds", "peak_mb"]  # fmt: skip
_OPTIONAL = [*SIMILARITY, "identical_mm"]  # files of earlier versions do not have them


def run_label(run: str) -> str:
    return RUN_LABELS.get(run, run)


def in_order(names: Iterable[str], known: Iterable[str] = tuple(RUN_LABELS)) -> list[str]:
    """The distinct ``names``: those in ``known`` first, in that order, then the others alphabetically."""
    present, known = set(names), list(known)
    return [name for name in known if name in present] + sorted(present - set(known))


def refined_name(run: str) -> str:
    """What a run is called where its control points were refined on every pair."""
    return f"{run}-refined"


def evaluated_runs(use: Mapping[str, list[str]]) -> list[str]:
    """Every run that has per-case results, of the section ``use`` of ``params.yaml``."""
    return use["untrained"] + use["trained"] + [refined_name(run) for run in use["refined"]]


def dataset_label(dataset: str, simulated: bool) -> str:
    """``Prostate, Dataset 1 (simulated)``; a dataset that the paper does not have keeps its own name."""
    paper = PAPER_DATASETS.get(dataset)
    name = f"{dataset.capitalize()}, {paper}" if paper else dataset
    return f"{name} (simulated)" if simulated else name


def grid_label(grid: str) -> str:
    """``10x10x10`` → ``10×10×10``; "" (no grid) stays empty."""
    return grid.replace("x", "×")


def describe(row: pd.Series) -> str:
    """Name one row of results in an error message."""
    grid = f" at {grid_label(row['grid'])}" if row["grid"] else ""
    return f"{row['dataset']}, run {row['run']}{grid}, fixed {row['fixed']}, moving {row['moving']}"


def read_cases(paths: Iterable[Path | str]) -> pd.DataFrame:
    """All rows of several ``cases.csv``: text as str (no grid is ""), ``chosen`` as bool, numbers as float (empty is NaN).

    Image similarity is NaN where a file does not have it.
    Raises InputError for a missing or empty file, missing columns, text where a number belongs, or a case given twice.
    """
    frames = [_read_one(Path(path)) for path in paths]
    if not frames:
        raise InputError("no cases.csv was given, expected at least one file of per-case results")
    cases = pd.concat(frames, ignore_index=True)
    repeated = cases[cases.duplicated(["dataset", "run", "grid", *PAIR])]
    if len(repeated):
        raise InputError(f"cases.csv: {describe(repeated.iloc[0])} is there twice, expected one row per pair and grid")
    return cases


def _read_one(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"{path}: not found, expected the per-case results that the evaluation writes")
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: the file is empty, expected a header and one row per test pair") from None
    wanted = [*_TEXT, "chosen", *_NUMBERS]
    missing = [column for column in wanted if column not in frame.columns]
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}, expected {', '.join(wanted)}")
    if frame.empty:
        raise InputError(f"{path}: no case in it, expected one row per test pair")
    frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *_OPTIONAL])), fill_value="")
    for column in [*_NUMBERS, *_OPTIONAL]:
        values = frame[column].str.strip().replace({"": "nan"})
        numbers = pd.to_numeric(values, errors="coerce").astype(float)
        wrong = values[numbers.isna() & (values.str.lower() != "nan")]
        if len(wrong):
            raise InputError(f"{path}: column {column} holds {wrong.iloc[0]!r}, expected a number or nothing")
        frame[column] = numbers
    wrong = sorted(set(frame["chosen"].str.lower()) - {"true", "false"})
    if wrong:
        raise InputError(f"{path}: column chosen holds {wrong[0]!r}, expected True or False")
    frame["chosen"] = frame["chosen"].str.lower() == "true"
    return frame


def read_costs(paths: Iterable[Path | str]) -> pd.DataFrame:
    """Parameters and device of every run from ``.../<dataset>/<run>/metrics.json``.

    Returns columns dataset, run, parameters (NaN where the file has none), device (a torch device type with an
    optional description, e.g. ``cpu`` or ``cuda (NVIDIA H200)``), steps and batch (None for what is not trained).
    """
    rows = []
    for path in map(Path, paths):
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(f"{path}: not found, expected the summary that the evaluation writes") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON ({error}), expected a flat object of numbers and text") from None
        parameters = record.get("parameters")
        rows.append(
            {
                "dataset": path.parent.parent.name,
                "run": path.parent.name,
                "parameters": float("nan") if parameters in (None, "") else float(parameters),
                "device": str(record.get("device") or "cpu"),
                "steps": record.get("steps"),
                "batch": record.get("batch"),
            }
        )
    return pd.DataFrame(rows, columns=["dataset", "run", "parameters", "device", "steps", "batch"])


def read_results(folder: Path | str, datasets: Iterable[str], runs: Iterable[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(cases, costs) of ``<folder>/<dataset>/<run>/`` for every dataset and run that is in use."""
    runs = list(runs)
    files = [Path(folder) / dataset / run / "cases.csv" for dataset in datasets for run in runs]
    return read_cases(files), read_costs(file.with_name("metrics.json") for file in files)


def read_ablations(folder: Path | str, names: Iterable[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same of the ablations, in ``<folder>/ablation/<name>/``; two frames without rows where there are none."""
    names = list(names)
    if names:
        return read_results(folder, ["ablation"], names)
    return pd.DataFrame(columns=[*_TEXT, "chosen", *_NUMBERS, *_OPTIONAL]), read_costs([])


def without_accuracy(cases: pd.DataFrame) -> list[str]:
    """The datasets of ``cases`` of which no pair has labels, landmarks or a known deformation."""
    known = cases[ACCURACY].notna().any(axis=1).groupby(cases["dataset"], sort=False).any()
    return list(known.index[~known])


def chosen_rows(cases: pd.DataFrame) -> pd.DataFrame:
    """The rows at each run's reported grid: one row per dataset, run and pair. Raises InputError unless that is one grid."""
    for (dataset, run), group in cases.groupby(["dataset", "run"]):
        grids = sorted(group.loc[group["chosen"], "grid"].unique())
        if len(grids) != 1:
            found = " and ".join(grid or "no grid" for grid in grids) or "none"
            raise InputError(f"cases of {dataset}, run {run}: {found} marked as chosen, expected exactly one grid")
    return cases[cases["chosen"]]


# --- who is in the pairs -----------------------------------------------------------------------------------------


def with_patients(cases: pd.DataFrame, indexes: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """``cases`` with a column ``patient``: whose pair it is; where the two images are of two patients, both.

    indexes  ``index.json`` of every dataset; a subject that it does not name counts as one patient
    """
    patients = [_patients_of(row.fixed, row.moving, indexes.get(row.dataset, {})) for row in cases.itertuples()]
    return cases.assign(patient=[" ".join(sorted(set(pair))) for pair in patients])


def pairs_in_words(cases: pd.DataFrame, index: Mapping[str, Any]) -> str:
    """Of one dataset: ``12 pairs of 5 patients, up to 6 pairs each``."""
    pairs = cases[PAIR].drop_duplicates()
    count = Counter(
        one for fixed, moving in pairs.itertuples(index=False) for one in set(_patients_of(fixed, moving, index))
    )
    most = max(count.values(), default=0)
    often = f", up to {most} pairs each" if most > 1 else ""
    return f"{len(pairs)} pair{'s' if len(pairs) != 1 else ''} of {len(count)} patient{'s' if len(count) != 1 else ''}{often}"


def _patients_of(fixed: str, moving: str, index: Mapping[str, Any]) -> tuple[str, str]:
    subjects = index.get("subjects", {})
    return tuple(subjects.get(name, {}).get("patient", name) for name in (fixed, moving))
