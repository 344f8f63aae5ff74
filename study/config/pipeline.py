"""Write the two files that DVC reads instead of `params.yaml`: the cohorts and runs in use, and their complete settings.

DVC stops at a missing folder, cannot nest interpolation, and does not know our defaults and bases. Therefore

    python -m study.config.pipeline               runs before DVC: checks params.yaml, lists what is left out, and writes
                                                  in_use.yaml
    python -m study.config.pipeline --settings    is the stage `settings`: it writes results/settings.json

in_use.yaml     the lists and folders that dvc.yaml interpolates; the clone contains it for the bundled cohorts
settings.json   all settings, with bases and defaults, so that a stage depends only on those of its dataset and run
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from gridreg.errors import InputError, exit_status
from study.config import ablation
from study.config.files import read, write
from study.config.params import IN_USE, load
from study.config.runs import refinement_arguments, settings_for

SETTINGS = "results/settings.json"
HEADER = """\
# Written by `make repro` from params.yaml, for dvc.yaml: the cohorts whose folder was found, and what is run on them.
# Do not edit. Without make: python -m study.config.pipeline
"""
PREPROCESS = (
    "path", "shape", "spacing_mm", "affine_reference", "start", "window", "padding_value", "nan", "labels", "max_subjects",
    "max_pairs",
)  # fmt: skip
SECTIONS = ("profile", "seed", "use", "datasets", "runs", "evaluate", "ablation", "false_correspondence", "benchmark")


def in_use(params: dict[str, Any]) -> dict[str, Any]:
    """The values that dvc.yaml interpolates, from those of ``params.load``."""
    use, own = params["use"], params["ablation"]
    return {
        "cohorts": {name: params["datasets"][name]["path"] for name in use["datasets"]},
        "datasets": use["datasets"],
        "trained": use["trained"],
        "untrained": use["untrained"],
        "refined": use["refined"],
        "ablations": own["use"],
        "ablation_dataset": own["dataset"] if own["use"] else use["datasets"][0],
    }


def write_in_use(path: str | Path = "params.yaml") -> list[str]:
    """Check `path` and update the in_use.yaml beside it. Returns one line for each dataset or run that is left out.

    Raises InputError where the file is wrong, or where the folder of no dataset is found.
    """
    params, file = load(path, recall=False), Path(path).with_name(IN_USE)
    use = params["use"]
    if not use["datasets"]:
        folders = ", ".join(params["datasets"][name]["path"] for name in use["skipped"])
        raise InputError(
            f"{path}: no folder of any dataset in use was found ({folders}); expected at least one "
            "(`make cohort PROFILE=paper` makes the simulated ones under cohorts/paper)"
        )
    lines = [f"  {name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in in_use(params).items()]
    text = HEADER + "in_use:\n" + "".join(lines)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write(file, text)
    return [
        *(f"dataset {name}: skipped, {why} (named in {path})" for name, why in use["skipped"].items()),
        *(f"{name}: left out, {why}" for name, why in use["left_out"].items()),
    ]


def settings(params: dict[str, Any]) -> dict[str, Any]:
    """All settings on which stages of DVC depend, from the values of ``params.load``.

    preprocess.DATASET      arguments of ``preprocess_dataset``
    train.DATASET.RUN       arguments of ``train.train``; train.ablation.RUN also names its dataset
    refine.DATASET.RUN      arguments of the refinement, for the runs of use.refined
    untrained.DATASET.RUN   settings of a method that is not trained
    SECTION                 sections of params.yaml, for tables, figures and the report
    """
    use, datasets = params["use"], params["use"]["datasets"]
    trained: dict[str, dict] = {place: {} for place in (*datasets, ablation.ABLATION_FOLDER)}
    for place, run in ablation.trainings(params):
        dataset, arguments = ablation.named_arguments(params, place, run)
        trained[place][run] = arguments if place == dataset else arguments | {"dataset": dataset}
    return {
        "preprocess": {d: {name: params["datasets"][d][name] for name in PREPROCESS} for d in datasets},
        "train": trained,
        "refine": {d: {run: refinement_arguments(params, d, run) for run in use["refined"]} for d in datasets},
        "untrained": {d: {run: settings_for(params["runs"][run], d) for run in use["untrained"]} for d in datasets},
    } | {name: params[name] for name in SECTIONS}


def write_settings(path: str | Path = "params.yaml") -> None:
    """Write results/settings.json beside `path`. Raises InputError where in_use.yaml does not belong to `path`."""
    params, folder = load(path, recall=False), Path(path).parent
    if read(folder / IN_USE).get("in_use") != in_use(params):
        raise InputError(
            f"{folder / IN_USE}: does not have the datasets and runs of {path}; expected "
            "`python -m study.config.pipeline` to be run first, then dvc again (make repro does both)"
        )
    os.makedirs(folder / "results", exist_ok=True)
    write(folder / SETTINGS, json.dumps(settings(params), indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study.config.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--settings", action="store_true", help=f"write {SETTINGS} instead (DVC's stage `settings`)")
    parser.add_argument("--file", default=Path("params.yaml"), type=Path, help="another file than params.yaml")
    options = parser.parse_args()

    def start() -> None:
        if options.settings:
            write_settings(options.file)
            return
        for line in write_in_use(options.file):
            print(line, file=sys.stderr)

    return exit_status(start)


if __name__ == "__main__":
    sys.exit(main())
