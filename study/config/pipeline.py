"""What DVC reads of `params.yaml`: which cohorts and runs there are, and the complete settings of each.

DVC stops at a folder that is missing, cannot nest interpolation and knows neither defaults nor bases. So

    python -m study.config.pipeline               before DVC: check params.yaml, say what is left out, write in_use.yaml
    python -m study.config.pipeline --settings    the stage `settings`: write results/settings.json

in_use.yaml     the lists and folders that dvc.yaml interpolates; it comes with the clone, for the cohorts there
settings.json   all settings, so that a stage depends on those of its own dataset and run alone, base and defaults included
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
    """What dvc.yaml interpolates, of the values of ``params.load``."""
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
    """Check `path` and bring the in_use.yaml beside it up to date. Returns a line for all that is skipped or left out.

    Raises InputError where the file is wrong or no folder of a dataset is found.
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
    """Everything that a stage of DVC depends on, of the values of ``params.load``.

    preprocess.DATASET      of ``preprocess_dataset``
    train.DATASET.RUN       of ``train.train``; train.ablation.RUN has its dataset, too
    refine.DATASET.RUN      of refinement, for the runs of use.refined
    untrained.DATASET.RUN   of a method that is not trained
    and the sections of params.yaml by their names, for tables, figures and the report
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
    """Write results/settings.json beside `path`. Raises InputError where in_use.yaml is not what `path` asks for."""
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
    parser.add_argument("--settings", action="store_true", help=f"write {SETTINGS} instead: the stage of DVC")
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
