"""Make the simulated cohorts: ``python -m study.cohorts.simulate.cohort --profile demo --out data``.

Each dataset becomes a folder in Learn2Reg layout (images, labels, landmarks, ``dataset.json``) with the true
deformation of every subject beside it in ``truthTr`` and ``truthTs``. Everything follows from one seed: the same seed
gives the same bytes. Nobody's data are in it, and every file says so.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import nibabel
import numpy as np
from tqdm import tqdm

from gridreg.errors import InputError, exit_status
from study.cohorts.simulate.deformation import STEP_MM, Deformation
from study.cohorts.simulate.plan import (
    PROFILES,
    Plan,
    PlannedScan,
    pairs,
    planned_scans,
    simulate_scan,
    with_few_patients,
)
from study.locks import whole_folder

GENERATOR = "gridreg.cohort"  # as the delivered cohorts say: another name would be other bytes
SIMULATED = f"SIMULATED, not a patient; made by {GENERATOR}"  # NIfTI descrip, at most 79 characters
DESCRIPTIONS = {
    "prostate": "SIMULATED. Longitudinal T2-weighted MR of the prostate, two to four visits of each patient; "
    "parametric phantom, every patient their own anatomy.",
    "pelvis": "SIMULATED. T2-weighted MR of the male pelvis from scanners of differing resolution; "
    "parametric phantom, one template warped into every patient.",
    "brain": "SIMULATED. T1-weighted, skull-stripped brain MR; the MNI152 template (ICBM 2009a, in nilearn) warped "
    "into every subject.",
}


def write_cohort(plan: Plan, out: Path | str, workers: int = 1, progress: bool = True) -> Path:
    """Write one dataset to ``out/<plan.dataset>``, which appears complete or not at all, and return that folder.

    An earlier simulated dataset there is replaced; InputError if the folder holds anything else.
    """
    folder = Path(out) / plan.dataset
    _check_ours(folder)
    todo = planned_scans(plan)
    patients = [list(scans) for _, scans in groupby(todo, key=lambda planned: planned.patient)]
    names: dict[int, str] = {}
    with whole_folder(folder) as temporary:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else nullcontext()
        with pool as executor:
            done = (executor.map if executor else map)(partial(write_patient, plan, temporary), patients)
            bar = tqdm(done, f"simulate {plan.dataset}", total=len(patients), unit="patient", disable=not progress)
            for names in bar:
                pass
        (temporary / "dataset.json").write_text(json.dumps(_dataset(plan, todo, names), indent=1) + "\n", "utf-8")
    return folder


def write_patient(plan: Plan, folder: Path, scans: list[PlannedScan]) -> dict[int, str]:
    """Simulate the scans of one patient, one after the other: they share a template, which is kept in memory."""
    return [write_scan(plan, folder, planned) for planned in scans][0]


def write_scan(plan: Plan, folder: Path, planned: PlannedScan) -> dict[int, str]:
    """Simulate one scan and write its image, labels, truth and, outside training, landmarks; returns label names."""
    subject = simulate_scan(plan, planned)
    kind = _kind(planned)
    write_nifti(folder / f"images{kind}" / f"{planned.id}.nii.gz", subject.image, subject.grid.affine)
    write_nifti(folder / f"labels{kind}" / f"{planned.id}.nii.gz", subject.labels, subject.grid.affine)
    write_truth(folder / f"truth{kind}" / f"{planned.id}.nii.gz", subject.deformation)
    if subject.landmarks and planned.split != "train":
        rows = ["name,x_mm,y_mm,z_mm"]
        rows += [",".join([name, *(f"{v:.3f}" for v in point)]) for name, point in subject.landmarks.items()]
        path = folder / f"landmarks{kind}" / f"{planned.id}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(rows) + "\n", "utf-8")
    return subject.label_names


def write_nifti(
    path: Path, data: np.ndarray, affine: np.ndarray, slope: float | None = None, intent: str = "none"
) -> None:
    """Write integers as .nii.gz with reproducible bytes: no time stamp, no file name, highest compression."""
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    image.header["descrip"] = SIMULATED.encode()
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    raw = bytearray(image.to_bytes())
    if slope is not None:  # nibabel resets the scaling of integer data on saving: put it into the header's bytes
        at = nibabel.Nifti1Header.template_dtype.fields["scl_slope"][1]
        raw[at : at + 8] = np.array([slope, 0], image.header.endianness + "f4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(bytes(raw), 9, mtime=0))


def write_truth(path: Path, deformation: Deformation) -> None:
    """The stored field as an ITK displacement field: 5-D, vector intent, LPS mm, int16 steps with scl_slope."""
    lps = deformation.steps * np.array([-1, -1, 1], np.int16).reshape(3, 1, 1, 1)
    data = np.ascontiguousarray(np.moveaxis(lps, 0, -1)[:, :, :, None, :])
    write_nifti(path, data, deformation.lattice.affine, slope=STEP_MM, intent="vector")


def _kind(planned: PlannedScan) -> str:
    return "Ts" if planned.split == "test" else "Tr"  # Learn2Reg lists validation subjects under training


def _entry(planned: PlannedScan) -> dict[str, str]:
    return {
        "image": f"./images{_kind(planned)}/{planned.id}.nii.gz",
        "label": f"./labels{_kind(planned)}/{planned.id}.nii.gz",
    }


def _dataset(plan: Plan, todo: list[PlannedScan], label_names: dict[int, str]) -> dict:
    """The content of dataset.json."""
    tr, ts = ([_entry(c) for c in todo if (c.split == "test") == last] for last in (False, True))
    described = {
        "name": plan.dataset,
        "description": DESCRIPTIONS[plan.dataset],
        "simulated": True,
        "generator": GENERATOR,
        "profile": plan.profile,
        "seed": plan.seed,
        "test_seed": plan.test_seed,
        "licence": "CC0-1.0"
        if plan.dataset != "brain"
        else "CC0-1.0 for the simulation; the MNI152 template is copyright McConnell Brain Imaging Centre, free to use",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "MR"},
        "labels": {"0": "background", **{str(k): v for k, v in label_names.items()}},
        "truth": "truthTr/<id>.nii.gz and truthTs/<id>.nii.gz: ITK displacement field (LPS, mm), linear between nodes; "
        "p + d(p) is the template's point for p in the subject's world. Points of two subjects of one "
        "template correspond where their template points agree.",
        "template": "one per patient" if plan.dataset == "prostate" else "one for the cohort",
        "numTraining": len(tr),
        "numTest": len(ts),
        "training": tr,
        "test": ts,
    }
    by_id = {c.id: _entry(c)["image"] for c in todo}
    for split in ("train", "val", "test"):
        listed = [{"fixed": by_id[f], "moving": by_id[m]} for f, m in pairs(plan, todo, split)]
        if listed:
            described[f"registration_{split}"] = listed
    return described


def _check_ours(folder: Path) -> None:
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    try:
        ours = json.loads((folder / "dataset.json").read_text("utf-8")).get("generator") == GENERATOR
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise InputError(
            f"{folder}: found files that the simulation did not write, expected an empty folder, none, or an "
            "earlier simulated cohort."
        )


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m study.cohorts.simulate.cohort", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--profile", choices=sorted(PROFILES), default="demo")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives prostate/, pelvis/ and brain/")
    parser.add_argument("--only", nargs="+", choices=list(DESCRIPTIONS), default=list(DESCRIPTIONS))
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--patients", type=int, help="at most so many in each split (default: all), to try a profile out"
    )
    chosen = parser.parse_args(arguments)

    def write() -> None:
        if chosen.patients is not None and chosen.patients < 2:
            raise InputError(f"--patients is {chosen.patients}, expected at least 2: one is no pair")
        for dataset in chosen.only:
            _check_ours(chosen.out / dataset)  # all of them first: nothing is made if one must be refused
        for dataset in chosen.only:
            plan = PROFILES[chosen.profile][dataset]
            plan = plan if chosen.patients is None else with_few_patients(plan, chosen.patients)
            write_cohort(plan, chosen.out, chosen.workers)

    return exit_status(write)


if __name__ == "__main__":
    sys.exit(main())
