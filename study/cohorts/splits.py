"""Who trains, who validates, who is tested, and which pairs follow where a release lists none.

A subject of a validation or test pair never trains, nor does another visit of the same patient. No other visit of a test
patient validates. These functions change the ``subjects`` and ``pairs`` they are given and add a line to ``notes`` for
whatever is not in the release itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gridreg.errors import InputError
from gridreg.scans.prepare import Scan

SPLITS = ("train", "val", "test")
HELD_OUT = 384 / 3384  # share of the training patients that validates where a release has no test set (LUMIR)


@dataclass(frozen=True)
class Subject(Scan):
    """One scan of a cohort, whose it is, and the split it belongs to.

    truth: a displacement field to the template that a simulated scan was made from, or None.
    """

    truth: Path | None = None
    id: str = ""
    patient: str = ""
    split: str = ""


def neighbours(subjects: dict[str, Subject], ids: list[str]) -> list[tuple[str, str]]:
    """Pairs for a split that lists none: successive visits of a patient if there are any, else successive subjects."""
    successive = list(zip(ids[1:], ids[:-1]))  # (fixed, moving), as LUMIR does
    visits = [p for p in successive if subjects[p[0]].patient == subjects[p[1]].patient]
    return visits or successive


def check_stated(subjects: dict[str, Subject], pairs: dict, stated: dict[str, str], file: Path) -> None:
    """InputError where the split puts scans with one stated patient ({id: patient}) into the test set and elsewhere."""
    tested = {m for pair in pairs["test"] for m in pair} | {s.id for s in subjects.values() if s.split == "test"}
    validated = {m for pair in pairs["val"] for m in pair} - tested
    for name, patient in stated.items():
        other = next((m for m in tested if stated.get(m) == patient), None)
        if name not in tested and other is not None:
            raise InputError(
                f"{file}: found patient '{patient}' in {'validation' if name in validated else 'training'} ({name}) "
                f"and in test ({other}), expected each patient in one of them."
            )


def hold_out(subjects: dict[str, Subject], pairs: dict, notes: list[str]) -> None:
    """Move members of validation and test pairs to their split; nobody who shares a patient with them trains."""
    for split in ("val", "test"):  # test last: a subject in both is never looked at before the end
        for member in {m for pair in pairs[split] for m in pair}:
            subjects[member] = replace(subjects[member], split=split)
    tested = {s.patient for s in subjects.values() if s.split == "test"}
    kept = [pair for pair in pairs["val"] if not {subjects[m].patient for m in pair} & tested]
    if len(kept) < len(pairs["val"]):
        notes.append(f"{len(pairs['val']) - len(kept)} validation pair(s) of test patients are left out")
    pairs["val"] = kept
    seen = {s.patient for s in subjects.values() if s.split != "train"}
    leaking = [s.id for s in subjects.values() if s.split == "train" and s.patient in seen]
    for name in leaking:
        del subjects[name]
    if leaking:
        notes.append(f"{len(leaking)} training scan(s) of validation or test patients are left out of training")
    pairs["train"] = [p for p in pairs["train"] if all(m in subjects and subjects[m].split == "train" for m in p)]


def validate_on_training(
    subjects: dict[str, Subject], pairs: dict, notes: list[str], file: Path, listed: list[tuple[str, str]]
) -> None:
    """Hold out the last training patients for validation, and pair them as the training set is paired (``listed``)."""
    patients = list(dict.fromkeys(s.patient for s in subjects.values() if s.split == "train"))
    number = max(2, round(HELD_OUT * len(patients)))
    if len(patients) - number < 2:
        raise InputError(
            f"{file}: found no validation pairs and {len(patients)} training patient(s), "
            "expected 'registration_val' or at least 4 patients to hold two out."
        )
    held = set(patients[-number:])
    for s in [s for s in subjects.values() if s.split == "train" and s.patient in held]:
        subjects[s.id] = replace(s, split="val")
    ids = [s.id for s in subjects.values() if s.split == "val"]
    pairs["val"] = [p for p in listed if p[0] in ids and p[1] in ids] or neighbours(subjects, ids)
    pairs["train"] = [p for p in pairs["train"] if p[0] not in ids and p[1] not in ids]
    notes.append(f"no validation pairs are left: the last {number} of {len(patients)} training patients validate")


def implied_pairs(subjects: dict[str, Subject], ids: list[str], same_patient: bool) -> Iterator[tuple[str, str]]:
    """Every ordered pair of two different subjects, partner by partner, so that any first part of them is balanced."""
    for shift in range(1, len(ids)):
        for i, fixed in enumerate(ids):
            moving = ids[(i + shift) % len(ids)]
            if not same_patient or subjects[fixed].patient == subjects[moving].patient:
                yield fixed, moving
