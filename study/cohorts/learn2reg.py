"""Read a cohort in Learn2Reg layout: which subjects there are, in which split, and which pairs to register.

A cohort is a folder with ``dataset.json`` (or one ``*_dataset.json``, such as LUMIR's ``LUMIR_dataset.json``) that
lists image files; nothing is opened here but that one file. What Learn2Reg releases do differently is evened out:

* entries under ``training``, ``test`` are dictionaries (``image``, ``label``, ``mask``, ``landmarks``, ``patient``) or paths;
  what an entry does not name is looked for in the neighbouring folder (``study.cohorts.files``), e.g.
  ``imagesTs/x.nii.gz`` has ``labelsTs/x.nii.gz``, ``masksTs/x.nii.gz``, ``landmarksTs/x.csv``, ``truthTs/x.nii.gz``;
* an entry without ``patient`` gets one from its name (``study.cohorts.patients``);
* pairs stand under ``registration_val`` or ``validation``, ``training_paired_images`` or ``registration_train``, ...;
  members are paths or subject names; a path that no list names (LUMIR's ``imagesVal``) is fine if the file exists;
* a subject of a validation or test pair never trains, nor does another visit of the same patient;
* a release without test pairs (LUMIR keeps its test set to itself) is tested on its validation pairs, and
  384 of every 3384 training patients, the last ones listed, become the validation set (Section 4 of the paper:
  3000 / 384 / 40).

``Cohort.found`` says what was found, ``Cohort.notes`` what differs from the release or from what it says of itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from gridreg.errors import InputError
from gridreg.scans.files import read_text
from study.cohorts.files import Neighbours, id_of
from study.cohorts.patients import patients_of
from study.cohorts.splits import (
    SPLITS,
    Subject,
    check_stated,
    hold_out,
    implied_pairs,
    neighbours,
    validate_on_training,
)

SUBJECT_KEYS = {"train": ("training",), "val": ("validation", "val"), "test": ("test", "testing")}
PAIR_KEYS = {
    "train": ("registration_train", "training_paired_images"),
    "val": ("registration_val", "validation", "val"),
    "test": ("registration_test", "test_paired_images", "test"),
}
MOST_IMPLIED_PAIRS = 30_000  # 3000 subjects have nine million ordered pairs: ten partners each are kept


@dataclass(frozen=True)
class Cohort:
    """A cohort as its ``dataset.json`` states it.

    subjects  {id: scan}
    pairs     {split: [(fixed id, moving id), …]}
    found     sentences: how many patients by which rule, how many images with what
    notes     sentences: what differs from the release, or from what it says of itself
    """

    name: str
    file: Path
    simulated: bool
    template_per_patient: bool  # else the true deformations of all subjects lead to one template
    label_names: dict[int, str]
    subjects: dict[str, Subject]
    pairs: dict[str, list[tuple[str, str]]]
    found: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())


def read_cohort(source: Path | str) -> Cohort:
    """Read the cohort in folder ``source`` (or the named JSON file itself).

    Raises InputError for a missing or malformed ``dataset.json``, one without training subjects or without anything
    to test on, a pair that lacks a member, one that names an unknown subject, or a stated patient both in the test set
    and elsewhere.
    """
    file = find_dataset_json(Path(source))
    try:
        info = json.loads(read_text(file))
    except ValueError as error:
        raise InputError(f"{file}: found text that is not JSON ({error}), expected Learn2Reg's keys.") from error
    except OSError as error:
        raise InputError(
            f"{file}: found a file that cannot be read ({error.strerror}), expected Learn2Reg's keys."
        ) from error
    if not isinstance(info, dict):
        raise InputError(f"{file}: found a JSON {type(info).__name__}, expected an object with 'training' and 'test'.")

    subjects: dict[str, Subject] = {}
    pairs: dict[str, list[tuple[str, str]]] = {}
    files = Neighbours()
    for split in SPLITS:
        for entry in _items(info, SUBJECT_KEYS[split]):
            if not _is_pair(entry):
                _add(subjects, _subject(entry, split, file, files.beside), file)
    if not any(s.split == "train" for s in subjects.values()):
        raise InputError(f"{file}: found no subject under 'training', expected a list of images.")
    for split in SPLITS:
        entries = [entry for entry in _items(info, PAIR_KEYS[split]) if _is_pair(entry)]
        pairs[split] = list(dict.fromkeys(_pair(entry, split, subjects, file, files.beside) for entry in entries))

    stated = {name: subject.patient for name, subject in subjects.items() if subject.patient}
    check_stated(subjects, pairs, stated, file)
    patients, found = patients_of(subjects, stated)
    subjects = {name: replace(subject, patient=patients[name]) for name, subject in subjects.items()}
    found.append(_counted(subjects))
    notes = _other_numbers(info) + files.notes(subjects.values())
    for split in ("val", "test"):
        listed = [s.id for s in subjects.values() if s.split == split]
        if listed and not pairs[split]:
            pairs[split] = neighbours(subjects, listed)
    if not pairs["test"]:
        if not pairs["val"]:
            raise InputError(
                f"{file}: found no subject or pair under 'test', 'registration_test', 'registration_val' "
                "or 'validation', expected at least one pair to test on."
            )
        pairs["test"], pairs["val"] = pairs["val"], []
        notes.append("no test pairs are listed: the validation pairs are the test set")
    listed = pairs["train"]
    hold_out(subjects, pairs, notes)
    if not pairs["val"]:
        validate_on_training(subjects, pairs, notes, file, listed)
    if not pairs["train"]:
        train = [s.id for s in subjects.values() if s.split == "train"]
        same_patient = info.get("pairings") == "paired"
        pairs["train"] = list(islice(implied_pairs(subjects, train, same_patient), MOST_IMPLIED_PAIRS))
        if not pairs["train"]:
            raise InputError(
                f"{file}: found {len(train)} training subject(s), which make no pair, expected two. "
                + " ".join(f"Note: {note}." for note in notes)
            )
    return Cohort(
        name=str(info.get("name", file.parent.name)),
        file=file,
        simulated=bool(info.get("simulated", False)),
        template_per_patient=info.get("template") == "one per patient",
        label_names=_label_names(info.get("labels")),
        subjects=subjects,
        pairs=pairs,
        found=tuple(found),
        notes=tuple(notes),
    )


def limit(
    cohort: Cohort, max_subjects: int | dict[str, int] | None = None, max_pairs: int | dict[str, int] | None = None
) -> Cohort:
    """Keep at most so many subjects and pairs (the first ones listed), and no subject without a pair.

    A number holds for each split, a dictionary for the splits it names ("train", "val", "test"); None: all.
    """
    max_subjects, max_pairs = (
        dict.fromkeys(SPLITS, most) if isinstance(most, int) else most or {} for most in (max_subjects, max_pairs)
    )
    pairs: dict[str, list[tuple[str, str]]] = {}
    subjects: dict[str, Subject] = {}
    for limits in (max_subjects, max_pairs):
        for split, number in limits.items():
            if split not in SPLITS or number is not None and number < 1:
                raise InputError(
                    f"found a limit of {number} for split '{split}', "
                    f"expected a positive number for one of {', '.join(SPLITS)}."
                )
    for split in SPLITS:
        most = max_subjects.get(split)
        chosen: dict[str, None] = {}
        for pair in cohort.pairs[split]:  # whole pairs, in order, so that a paired cohort keeps complete patients
            if most is None or len(chosen) + sum(member not in chosen for member in pair) <= most:
                chosen.update(dict.fromkeys(pair))
        kept = [pair for pair in cohort.pairs[split] if set(pair) <= chosen.keys()]
        pairs[split] = kept[: max_pairs.get(split)]
        if not pairs[split]:
            raise InputError(f"{cohort.file}: found no {split} pair within {most} subject(s), expected at least 2.")
        used = {member for pair in pairs[split] for member in pair}
        subjects.update({k: s for k, s in cohort.subjects.items() if k in used})
    return replace(cohort, subjects=subjects, pairs=pairs)


def find_dataset_json(source: Path) -> Path:
    """``source`` itself if it is a file, else its ``dataset.json`` or its only ``*_dataset.json``."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise InputError(f"{source}: found no such folder, expected a cohort in Learn2Reg layout.")
    usual = source / "dataset.json"
    candidates = [usual] if usual.is_file() else sorted(source.glob("*_dataset.json"))
    if len(candidates) != 1:
        found = ", ".join(c.name for c in candidates) or "none"
        raise InputError(f"{source}: found {found}, expected dataset.json or exactly one *_dataset.json.")
    return candidates[0]


def _items(info: dict, keys: tuple[str, ...]) -> list:
    """The lists under ``keys``, joined (some releases write 0 or {} for an empty list)."""
    return [entry for key in keys if isinstance(info.get(key), list) for entry in info[key]]


def _is_pair(entry: object) -> bool:
    return isinstance(entry, dict) and ("fixed" in entry or "moving" in entry)


def _subject(entry: object, split: str, file: Path, beside: Callable[[Path, str], Path | None]) -> Subject:
    """A subject from a dictionary with 'image' or a mere path; its other files by name or ``beside`` the image."""
    named = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(named, dict) or not isinstance(named.get("image"), str):
        raise InputError(f"{file}: found the {split} entry {entry!r}, expected a path or an object with 'image'.")
    image = file.parent / named["image"]
    patient = named.get("patient")
    if isinstance(patient, (bool, float, list, dict)):
        raise InputError(f"{file}: found the patient {patient!r} of {image.name}, expected a name or a whole number.")

    def stated(key: str) -> Path | None:  # named in the file: it must exist, which is checked when it is read
        return file.parent / named[key] if isinstance(named.get(key), str) else None

    return Subject(
        id=id_of(image),
        patient="" if patient is None else str(patient).strip(),  # "": not stated
        split=split,
        image=image,
        label=stated("label") or stated("mask") or beside(image, "label"),
        # Learn2Reg's keypoints are automatic, belong to one pair each and state no unit: they are no landmarks
        landmarks=stated("landmarks") or beside(image, "landmarks"),
        truth=stated("truth") or beside(image, "truth"),
    )


def _counted(subjects: dict[str, Subject]) -> str:
    labels, points, truth = (
        sum(getattr(s, kind) is not None for s in subjects.values()) for kind in ("label", "landmarks", "truth")
    )
    return f"{len(subjects)} images: {labels} with labels, {points} with landmarks, {truth} with a true deformation"


def _other_numbers(info: dict) -> list[str]:
    """Where ``numTraining`` and its like say another number than that of the entries listed."""
    notes = []
    for key, number in info.items():
        name = key.removeprefix("num")
        lists = [
            info[k]
            for k in (name, name[:1].lower() + name[1:])
            if key.startswith("num") and isinstance(info.get(k), list)
        ]
        if lists and str(number).isdecimal() and int(number) != len(lists[0]):
            notes.append(f"{key} says {number}, {len(lists[0])} are listed")
    return notes


def _add(subjects: dict[str, Subject], subject: Subject, file: Path) -> None:
    """Add a subject; one that is listed twice belongs to the later split, so that nobody tested trains."""
    known = subjects.setdefault(subject.id, subject)
    if known.image != subject.image:
        raise InputError(
            f"{file}: found '{subject.id}' both as {known.image} and {subject.image}, expected unique file names."
        )
    subjects[subject.id] = replace(known, split=subject.split)


def _pair(
    entry: dict, split: str, subjects: dict[str, Subject], file: Path, beside: Callable[[Path, str], Path | None]
) -> tuple[str, str]:
    """(fixed id, moving id); a member that no list names is added if its path leads to a file."""
    members = []
    for role in ("fixed", "moving"):
        name = entry.get(role)
        if not isinstance(name, str) or not name:
            raise InputError(
                f"{file}: found the {split} pair {entry!r} without '{role}', expected both 'fixed' and 'moving'."
            )
        if id_of(name) not in subjects:
            if not (file.parent / name).is_file():
                raise InputError(
                    f"{file}: found '{name}' as {role} image of a {split} pair, "
                    "expected a subject listed under 'training' or 'test', or an existing file."
                )
            _add(subjects, _subject(name, split, file, beside), file)
        members.append(id_of(name))
    if members[0] == members[1]:
        raise InputError(
            f"{file}: found '{members[0]}' as fixed and moving image of one {split} pair, expected two volumes."
        )
    return members[0], members[1]


def _label_names(labels: object) -> dict[int, str]:
    """{value: name} from Learn2Reg's ``labels``, which some releases nest once more, by modality."""
    names: dict[int, str] = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if isinstance(value, dict):
            names.update(_label_names(value))
        elif str(key).isdigit() and int(key) > 0:
            names[int(key)] = str(value)
    return names
