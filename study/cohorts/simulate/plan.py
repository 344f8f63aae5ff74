"""Who is in a simulated cohort: the plans of the profiles, their scans and pairs, and the simulation of one scan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import permutations

import numpy as np

from study.cohorts.simulate import brain, pelvis, phantom
from study.cohorts.simulate.deformation import Deformation, covering
from study.cohorts.simulate.scanner import Grid, Template, grid, scan

SEED = 20240
TEST_SEED = 20261  # of the test subjects: drawn when the settings of the demo profile had been chosen
DATASET_KEY = {"prostate": 1, "pelvis": 2, "brain": 3}  # part of every random key
SPLITS = ("train", "val", "test")
ORIENTATIONS = ("LPS", "LPS", "RAS", "LAS")  # as scanners and converters leave them


@dataclass(frozen=True)
class Plan:
    """One dataset at one size. Lengths in mm."""

    dataset: str
    profile: str
    counts: tuple[int, int, int]  # subjects (prostate: patients) in training, validation, test
    in_plane: tuple[float, float]  # voxel size: range over the scanners
    slices: tuple[float, float]  # slice thickness: range over the scanners
    field_of_view: tuple[float, float, float]
    lattice: float  # node spacing of the stored deformation
    template: float  # voxel size of the template
    visits: Mapping[str, Mapping[int, int]] = field(default_factory=dict, hash=False)  # split → {visits: patients}
    both_ways: bool = False  # validation and test pairs in both directions
    rounds: int = 2  # pelvis: shufflings of the held-out subjects into pairs
    seed: int = SEED
    test_seed: int = TEST_SEED


@dataclass(frozen=True)
class PlannedScan:
    """One scan to be made; ``patient`` and ``visit`` count from 1 (visit 0: the only one)."""

    id: str
    split: str
    patient: int
    visit: int


@dataclass(frozen=True)
class SimulatedScan:
    """One simulated scan and everything that is known about it."""

    image: np.ndarray  # uint8
    labels: np.ndarray  # uint8
    grid: Grid
    deformation: Deformation
    landmarks: dict[str, np.ndarray]  # name → RAS mm (3,)
    label_names: dict[int, str]


def _same(voxel: float) -> dict:
    return {"in_plane": (voxel, voxel), "slices": (voxel, voxel)}


PROFILES: dict[str, dict[str, Plan]] = {
    "demo": {
        # half the paper's patients in the paper's mix of visits (60, 8 and 18 patients with 2, 3 and 4)
        "prostate": Plan(
            "prostate",
            "demo",
            (35, 3, 5),
            **_same(2.8),
            field_of_view=(112, 112, 84),
            lattice=7.0,
            template=1.4,
            visits={"train": {2: 25, 3: 3, 4: 7}, "val": {2: 2, 4: 1}, "test": {2: 3, 3: 1, 4: 1}},
        ),
        "pelvis": Plan(
            "pelvis", "demo", (94, 17, 18), (3.2, 4.2), (3.5, 5.0), (150, 150, 122), lattice=10.0, template=1.6
        ),
        # the paper's 3000 / 384 / 40 would leave a single test subject at this size
        "brain": Plan(
            "brain", "demo", (72, 8, 10), **_same(4.0), field_of_view=(176, 208, 184), lattice=10.0, template=2.0
        ),
    },
    "paper": {
        "prostate": Plan(
            "prostate",
            "paper",
            (70, 6, 10),
            **_same(0.7),
            field_of_view=(112, 112, 84),
            lattice=3.5,
            template=0.7,
            visits={"train": {2: 49, 3: 6, 4: 15}, "val": {2: 4, 4: 2}, "test": {2: 7, 3: 2, 4: 1}},
            both_ways=True,
        ),
        "pelvis": Plan(
            "pelvis",
            "paper",
            (626, 116, 118),
            (0.6, 1.3),
            (0.82, 1.0),
            (150, 150, 122),
            lattice=5.0,
            template=1.0,
            rounds=1,
        ),
        "brain": Plan(
            "brain", "paper", (3000, 384, 40), **_same(1.0), field_of_view=(176, 208, 184), lattice=5.0, template=1.0
        ),
    },
}


def with_few_patients(plan: Plan, patients: int) -> Plan:
    """The plan with at most so many patients in each split, to try out its size."""
    visits = {
        split: Counter([v for v, n in many.items() for _ in range(n)][:patients]) for split, many in plan.visits.items()
    }
    return replace(plan, counts=tuple(min(count, patients) for count in plan.counts), visits=visits)


def planned_scans(plan: Plan) -> list[PlannedScan]:
    """Every scan of the cohort; a patient is in one split only."""
    out, patient = [], 0
    for split, count in zip(SPLITS, plan.counts):
        many = [v for v, n in plan.visits[split].items() for _ in range(n)] if plan.visits else [1] * count
        for scans in many:
            patient += 1
            numbers = range(1, scans + 1) if plan.visits else [0]
            out += [PlannedScan(f"{plan.dataset}_{patient:04d}_{v:04d}", split, patient, v) for v in numbers]
    return out


def pairs(plan: Plan, todo: list[PlannedScan], split: str) -> list[tuple[str, str]]:
    """(fixed id, moving id) of a split.

    Prostate: visits of one patient, both ways in training. Pelvis: held-out subjects shuffled into pairs, each
    pair once. Brain: each with the next. No training pairs for pelvis and brain: any two subjects are one.
    """
    mine = [c for c in todo if c.split == split]
    if plan.dataset == "prostate":
        patients = [[c for c in mine if c.patient == p] for p in sorted({c.patient for c in mine})]
        both = plan.both_ways or split == "train"
        return [(a.id, b.id) for scans in patients for a, b in permutations(scans, 2) if both or a.visit < b.visit]
    if split == "train":
        return []
    if plan.dataset == "brain":
        return [(a.id, b.id) for a, b in zip(mine, mine[1:] + mine[:1])]
    rng = np.random.default_rng((plan.seed, DATASET_KEY[plan.dataset], SPLITS.index(split)))
    found: list[tuple[str, str]] = []
    for _ in range(100):  # a round with a pair of an earlier one is drawn again; very few subjects allow one round only
        if len(found) == plan.rounds * (len(mine) // 2):
            break
        order = [mine[i].id for i in rng.permutation(len(mine))]
        new = list(zip(order[::2], order[1::2]))
        if not {frozenset(p) for p in new} & {frozenset(p) for p in found}:
            found += new
    return found


def simulate_scan(plan: Plan, planned: PlannedScan) -> SimulatedScan:
    """Simulate one scan; it depends on the plan, the patient and the visit only, not on what was made before."""
    seed = plan.test_seed if planned.split == "test" else plan.seed
    rng = np.random.default_rng((seed, DATASET_KEY[plan.dataset], 10, planned.patient, planned.visit))
    centre = brain.CENTRE if plan.dataset == "brain" else np.zeros(3)
    in_plane, thickness = rng.uniform(*plan.in_plane), rng.uniform(*plan.slices)
    voxel = np.round([in_plane, in_plane, thickness], 2)
    orientation = ORIENTATIONS[rng.integers(len(ORIENTATIONS))] if plan.dataset == "pelvis" else "RAS"
    target = grid(np.rint(np.array(plan.field_of_view) / voxel).astype(int), voxel, centre, orientation)
    lattice = covering(target.corners(), plan.lattice, margin_mm=plan.lattice / 2)
    if plan.dataset == "brain":
        template, names = _brain(plan), brain.NAMES
        warp, look = brain.brain_deformation(rng, lattice), brain.brain_appearance(rng)
    else:
        own = (seed, planned.patient) if plan.dataset == "prostate" else (plan.seed, 0)
        anatomy, template = _pelvis(plan, *own)
        names = {1: "prostate"}
        change, spread = (pelvis.VISIT, 0.03) if plan.dataset == "prostate" else (pelvis.PATIENT, 0.08)
        warp = pelvis.pelvis_deformation(rng, lattice, anatomy, change)
        look = pelvis.pelvis_appearance(rng, spread)
    image, labels = scan(template, warp, target, look, rng)
    points = {}
    if template.landmarks:
        found = warp.inverse(np.stack(list(template.landmarks.values()), axis=1))
        points = dict(zip(template.landmarks, found.T))
    return SimulatedScan(image, labels, target, warp, points, names)


@lru_cache(maxsize=1)
def _brain(plan: Plan) -> Template:
    return brain.brain_template(int(plan.template))


@lru_cache(maxsize=1)
def _pelvis(plan: Plan, seed: int, patient: int) -> tuple[phantom.Anatomy, Template]:
    """The anatomy of one prostate patient, or (patient 0) the one that every pelvis is warped from."""
    rng = np.random.default_rng((seed, DATASET_KEY[plan.dataset], 20, patient))
    anatomy = phantom.draw_anatomy(rng) if patient else phantom.Anatomy()
    reach = np.array(plan.field_of_view) / 2 + 24  # what deformations may bring into view
    return anatomy, phantom.pelvis_template(anatomy, reach, plan.template, rng, landmarks=patient > 0)
