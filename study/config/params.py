"""Read and check `params.yaml`, the file with all values on which the results depend. This module never writes it.

`schema` defines every parameter. Devices, nodes and precision are not in the file, because a change of machine would then
repeat every computation. They are the environment variables GRIDREG_ACCELERATOR, GRIDREG_DEVICES, GRIDREG_NODES and
GRIDREG_PRECISION.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gridreg.errors import InputError
from study.config import ablation
from study.config.files import read
from study.config.messages import check, refuse_unknown
from study.config.runs import agree, check_base, complete, fit, settings_for, train_settings, training_arguments
from study.config.schema import BUNDLED, MAIN_RUN, UNTRAINED, Params

IN_USE = "in_use.yaml"  # beside params.yaml, written by `pipeline`

__all__ = ["load", "settings_for", "train_settings", "training_arguments"]


def profile_names(path: str | Path) -> list[str]:
    """The profiles beside a `params.yaml`."""
    return sorted(file.stem for file in (Path(path).parent / "profiles").glob("*.yaml"))


def load(path: str | Path = "params.yaml", recall: bool = True) -> dict[str, Any]:
    """The checked values of `params.yaml` as plain dicts and lists, with defaults and with every run complete.

    `use` then names only what can be run. A dataset whose folder is not found is moved to `use.skipped`. A run that cannot
    be trained on a dataset is moved to `use.left_out`, and so are ablations whose dataset is not in use. Both give the
    reason. With `recall`, a dataset also counts as found if in_use.yaml lists it, since a compute node may lack the raw
    scans. Raises InputError where a value is wrong.
    """
    return resolve(read(path), path, recall)


def resolve(values: dict[str, Any], path: str | Path = "params.yaml", recall: bool = True) -> dict[str, Any]:
    """``load`` for values that were already read from `path`; the values are not changed."""
    params = check(values, Params, path)
    refuse_unknown(params["profile"], profile_names(path) or [params["profile"]], "profile", str(path))
    if ablation.ABLATION_FOLDER in params["datasets"]:
        raise InputError(
            f"{path}: datasets: {ablation.ABLATION_FOLDER!r} is not a valid name; expected another, as folders of results use it"
        )
    for name, block in params["datasets"].items():
        block["title"] = block["title"] or name
        for key in ("path", "affine_reference"):
            block[key] = block[key] and os.path.expanduser(block[key])
    for name, base in params["base"].items():
        check_base(base, path, f"base.{name}")
    for name, run in params["runs"].items():
        params["runs"][name] = complete(run, params["base"], path, f"runs.{name}")
        agree(params, name, f"{path}: runs.{name}")
    params["use"] |= {"skipped": {}, "left_out": {}}
    _check_use(params, path)
    _skip_datasets(params, path, recorded(path) if recall else {})
    _leave_out_runs(params, path)
    ablation.resolve(params, path)
    return params


def _check_use(params: dict, path: str | Path) -> None:
    """Raise InputError unless every name under `use` exists, occurs once and is in the right list."""
    use = params["use"]
    for lists, section in ((("datasets",), "datasets"), (("trained", "untrained"), "runs")):
        seen: list[str] = []
        for name in (name for key in lists for name in use[key]):
            refuse_unknown(name, params[section], section[:-1], f"{path}: use")
            if name in seen:
                raise InputError(f"{path}: use names the {section[:-1]} {name!r} twice; expected it once")
            seen.append(name)
    if not use["datasets"]:
        raise InputError(f"{path}: use.datasets is empty; expected at least one dataset")
    if MAIN_RUN not in use["trained"]:
        raise InputError(f"{path}: use.trained lacks {MAIN_RUN}; expected it there: every table compares with it")
    for key in ("trained", "untrained"):
        for name in use[key]:
            method = params["runs"][name]["method"]
            if (method in UNTRAINED) != (key == "untrained"):
                other = "untrained" if key == "trained" else "trained"
                raise InputError(
                    f"{path}: use.{key} names the run {name!r} of method {method}; expected it in use.{other}"
                )
    for name in use["refined"]:
        if name not in use["trained"] or "grids" not in params["runs"][name]:
            raise InputError(
                f"{path}: use.refined names {name!r}; expected runs of use.trained that have control points"
            )


def _skip_datasets(params: dict, path: str | Path, known: dict[str, str]) -> None:
    """Move the datasets whose folder is not found from `use.datasets` to `use.skipped`."""
    use = params["use"]
    for name in list(use["datasets"]):
        folder = params["datasets"][name]["path"]
        if not folder_found(folder, path) and known.get(name) != folder:
            use["skipped"][name] = f"its folder {folder} was not found"
            use["datasets"].remove(name)


def _leave_out_runs(params: dict, path: str | Path) -> None:
    """Remove from `use` every run that does not fit one of its datasets. The main run must fit every dataset."""
    use = params["use"]
    for name in list(use["trained"]):
        where = f"{path}: runs.{name}"
        reasons = {
            d: fit(params["runs"][name], d, params["datasets"][d], where) for d in (*use["datasets"], *use["skipped"])
        }
        reason = next((reasons[d] for d in use["datasets"] if reasons[d]), "")
        if reason and name == MAIN_RUN:
            raise InputError(f"{where} does not fit: {reason}")
        if reason:
            use["left_out"][name] = reason
            use["trained"].remove(name)
            use["refined"] = [other for other in use["refined"] if other != name]


def folder_found(folder: str, path: str | Path) -> bool:
    """Whether a cohort exists or comes with the clone. `folder` is absolute or relative to the folder of `path`."""
    bundled = [os.path.join("data", name) for name in BUNDLED]
    return os.path.normpath(folder) in bundled or os.path.isdir(os.path.join(Path(path).parent, folder))


def recorded(path: str | Path) -> dict[str, str]:
    """The cohorts in the in_use.yaml beside `path`, name → folder; {} without such a file."""
    file = Path(path).with_name(IN_USE)
    if not file.is_file():
        return {}
    found = read(file).get("in_use")
    return dict(found.get("cohorts") or {}) if isinstance(found, dict) else {}
