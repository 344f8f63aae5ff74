"""Whose a scan is: stated in ``dataset.json``, or inferred from the names of all scans of a cohort.

Two visits of one patient in training and test make results look better than they are; thirty people taken for one leave
nothing to train on. A name alone does not tell (``p12_01`` is a visit, ``site1_0007`` is a person), all names together
mostly do. The rules are tried in this order:

1. ``sub-012`` of BIDS, whatever follows it.
2. A word for a patient with a number: ``pat003``, ``case_0012``, ``p12``, whatever follows it.
3. Whatever stands before a word for a visit or a date (``_visit2``, ``_ses-01``, ``_t0``, ``_baseline``, ``_20190301``), or
   behind one at the beginning.
4. Whatever stands before the last part, where that part tells scans apart: see ``_tells_scans_apart``.
5. Otherwise every scan is a patient. So it is where the rules above make the whole cohort one patient.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

BIDS = re.compile(r"(?:.*[_-])?sub-[a-z0-9]+(?=_|$)", re.I)
PATIENT = re.compile(
    r"(?:.*?[^a-z0-9])?(?:patient|pat|pt|p|participant|subject|subj|sub|case|person|volunteer|mouse|rat|animal|id)"
    r"[_-]?\d+(?!\d)",
    re.I,
)
VISIT = re.compile(
    r"(?<![a-z])(?:"
    r"(?:visit|session|ses|time|timepoint|tp|scan|exam|followup|follow-up|fu|day|week|wk|month|year|fraction|fx)[_-]?\d+"
    r"|(?!t[12][a-z*]*$)[vtdwmy]\d+"  # T1 at the end is a contrast
    r"|(?:baseline|bl|followup|follow-up|fu|pre|post|before|after)(?![a-z])"
    r"|(?<!\d)(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:[0-2]\d|3[01])(?!\d)"
    r")",
    re.I,
)
LAST = re.compile(r"[-_. ]*(?P<number>\d+)$|[-_. ]+(?:[a-z]+|t[12][a-z*]*)$", re.I)
GROUP = re.compile(
    r"(?:.*[^a-z])?(?:site|center|centre|hospital|clinic|institution|scanner|vendor|batch|cohort|dataset|group|fold|study|set|part|oas)"
    r"[_-]?\d+$",
    re.I,
)
SEPARATORS = "-_. "
TOO_MANY = 4  # times as many scans of one "patient" as there are "patients": then those are groups of patients

RULES = {
    "stated": "stated in dataset.json for {scans}",
    "bids": "inferred from the names of {scans} by the label after sub-",
    "patient": "inferred from the names of {scans} by the number after a word for a patient",
    "visit": "inferred from the names of {scans} by all but the visit or date",
    "last": "inferred from the names of {scans} by all but the last part, which tells scans apart",
    "each": "inferred from the names of {scans}, one scan each",
}


def patients_of(ids: Iterable[str], stated: Mapping[str, str] | None = None) -> tuple[dict[str, str], list[str]]:
    """({id: patient} for the scans of a whole cohort, sentences that say how many were found by which rule).

    stated: {id: patient} of the scans whose entry names its patient. A scan without, whose inferred patient is that of
    scans that all state one and the same, is that patient's, too.
    """
    ids, stated = list(ids), dict(stated or {})
    found = infer_patients(ids)
    claims: dict[str, set[str]] = {}
    for name, patient in stated.items():
        claims.setdefault(found[name][0], set()).add(patient)
    for name, (patient, _) in found.items():
        if name in stated or len(claims.get(patient, ())) == 1:
            found[name] = (stated.get(name) or next(iter(claims[patient])), "stated")
    return {name: patient for name, (patient, _) in found.items()}, _sentences(found)


def infer_patients(ids: list[str]) -> dict[str, tuple[str, str]]:
    """{id: (patient, key of ``RULES``)} from the names alone."""
    found: dict[str, tuple[str, str]] = {}
    for rule, stem_of in (("bids", _bids), ("patient", _patient), ("visit", _before_visit)):
        stems = {name: stem for name in ids if name not in found and (stem := stem_of(name))}
        if rule == "bids" or len(set(stems.values())) > 1:  # case_1_0001, case_1_0002, …: 1 is no patient's number
            found |= {name: (stem, rule) for name, stem in stems.items()}
    rest = [name for name in ids if name not in found]
    found |= {name: (stem, "last") for name, stem in _without_last_parts(rest).items()}
    sizes = Counter(patient for patient, _ in found.values())
    if len(sizes) == 1:
        return {name: (name, "each") for name in ids}
    if len(sizes) == len(ids):
        return {name: (found[name][0], "each") for name in ids}
    return {name: found[name] for name in ids}


def _bids(name: str) -> str:
    match = BIDS.match(name)
    return _without_visits(match.group()) if match else ""


def _patient(name: str) -> str:
    match = PATIENT.match(name)
    return _without_visits(match.group()) if match else ""


def _without_visits(stem: str) -> str:
    return VISIT.sub("", stem).strip(SEPARATORS)


def _before_visit(name: str) -> str:
    """What stands before the first word for a visit; "" where that is nobody, as in brain_scan_0007 and site1_day3."""
    match = VISIT.search(name)
    if match is None:
        return ""
    before, behind = name[: match.start()].rstrip(SEPARATORS), name[match.end() :].lstrip(SEPARATORS)
    if not before:
        return behind if re.search(r"\d", behind) and not re.match("[dwmy]", match.group(), re.I) else ""
    someone = re.search(r"\d", before) or re.match("visit|ses", match.group(), re.I)
    return before if someone and not GROUP.fullmatch(before) else ""


def _without_last_parts(names: list[str]) -> dict[str, str]:
    """{name: what is left of it without the parts at its end that tell scans of a patient apart}."""
    stems = dict(zip(names, _without_common_end(names)))
    for _ in range(3):  # visit, run and contrast, say
        known = set(stems.values())
        cut = {stem: match for stem in known if (match := LAST.search(stem)) and match.start()}
        kinds: dict[tuple[bool, bool], dict[str, re.Match]] = {}
        for stem, match in cut.items():
            numbered, number = bool(re.search(r"\d", stem[: match.start()])), bool(match["number"])
            kinds.setdefault((numbered, number), {})[stem] = match
        counted = {stem for kind, parts in kinds.items() if _tells_scans_apart(parts, known, *kind) for stem in parts}
        stems = {name: stem[: cut[stem].start()] if stem in counted else stem for name, stem in stems.items()}
    return stems


def _tells_scans_apart(parts: dict[str, re.Match], known: set[str], numbered: bool, number: bool) -> bool:
    """Whether the last parts of names ({name: match of ``LAST``}) tell the scans of a patient apart.

    known: all names; numbered: a number is left without the part; number: the part is a number, not a word. They do not where

    * what is left has no number and is not many names (brain_0007),
    * what is left numbers groups of patients (site1_0007), or has far more scans than there are others like it,
    * numbers run on from one group to the next (1_0001, 1_0002, 2_0003, 2_0004),
    * numbers are written wider than what would be the patient's, and there are more of them than of patients.
    """
    scans = Counter(name[: match.start()] for name, match in parts.items())
    most = max(count + (patient in known) for patient, count in scans.items())  # p7, p7_2: the first has no number
    if not numbered:
        return number and 1 < most <= len(scans) / 2
    if most > TOO_MANY * len(scans) or sum(bool(GROUP.fullmatch(stem)) for stem in scans) > len(scans) / 2:
        return False
    if not number:
        return True  # a word after a number describes the scan
    if most == 1:
        return False
    last = [match["number"] for match in parts.values()]
    wide, usual = max(map(len, last)), max(len(re.findall(r"\d+", stem)[-1]) for stem in scans)
    if wide < usual:
        return True
    values = {int(text) for text in last}
    runs_on = len(values) == len(last) and max(values) - min(values) < 2 * len(last)
    return not runs_on and (wide == usual or most <= len(scans))


def _without_common_end(names: list[str]) -> list[str]:
    """The names without the parts that all of them end with, such as Learn2Reg's modality _0000."""
    parts = [re.split(r"(?=[-_.])", name) for name in names]
    while len(parts) > 1 and len({p[-1] for p in parts}) == 1 and all(re.search(r"\d", "".join(p[:-1])) for p in parts):
        parts = [p[:-1] for p in parts]
    return ["".join(p) for p in parts]


def _sentences(found: Mapping[str, tuple[str, str]]) -> list[str]:
    """For each rule: how many patients from how many scans, with an example of two scans of one patient if any."""
    sentences = []
    for rule, words in RULES.items():
        members: dict[str, list[str]] = {}
        for name, (patient, by) in found.items():
            if by == rule:
                members.setdefault(patient, []).append(name)
        if members:
            patient, scans = max(members.items(), key=lambda item: min(len(item[1]), 2))
            example = f"{' and '.join(scans[:2])} {'are' if len(scans) > 1 else 'is'} patient {patient}"
            how = words.format(scans=_many(sum(map(len, members.values())), "scan"))
            sentences.append(f"{_many(len(members), 'patient')} {how} ({example})")
    return sentences


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
