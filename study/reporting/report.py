"""``figures/report.html``: verdicts on the paper's claims, then tables and figures, then how they were made.

One file without any other: figures are inside it, and nothing is fetched. It holds no date, so equal results are an equal
report.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.metadata
import io
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mistune
import numpy as np
import pandas as pd
from PIL import Image

from gridreg.errors import InputError
from study.reporting.claims import MARGIN, Claim, Finding
from study.reporting.results import METRICS, grid_label, run_label

TABLES = ("table1", "table2", "table3", "table4")
FIGURES = {
    "figure1": "False correspondences: noise, a false match and a wrong mask, coarse grids against fine ones.",
    "figure2": "The architecture, its sizes from a forward pass.",
    "figure3": "Landmarks of the prostate.",
    "figure4": "Landmarks of the brain.",
    "figure5": "Prostate registrations.",
    "figure6": "Brain registrations.",
    "figure7": "Uncertainty in millimetres, and the error that was made.",
    "figure8": "Bending weight (1); grid size, trained separately and in one adaptive model (2, 3).",
    "oracle": "Beyond the paper: what a grid can hold of the true deformation (oracle), beside what was reached.",
    "calibration": "Beyond the paper: calibration and sparsification of the Bayesian head.",
    "benchmark": "What a registration and a training step cost.",
}
DRAWN, OF_MACHINES = "figure2", "benchmark"  # these two show no cohort
PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "monai",
    "antspyx",
    "voxelmorph",
    "keymorph",
    "nibabel",
    "nilearn",
    "dvc",
    "papermill",
)
WIDEST = 1500  # pixels of a figure in the report
COLOURS = {"holds here": "#1b7837", "does not hold here": "#b2182b", "holds in part": "#b8860b"}
ANSWERS = {True: "yes", False: "no", None: "not shown"}
CALIBRATION = {  # column of calibration.csv → its head and format
    "dataset": ("Dataset", "{}"), "grid": ("Grid", "{}"), "propagation": ("Control points", "{}"), "scaling": ("σ", "{}"),
    "factor": ("Factor", "{:.2f}"),
    "coverage_50": ("Within 50 %", "{:.0%}"), "coverage_90": ("Within 90 %", "{:.0%}"), "coverage_95": ("Within 95 %", "{:.0%}"),
    "coverage_error": ("Calibration error", "{:.3f}"), "ause": ("AUSE", "{:.3f}"),
    "ause_uninformed": ("AUSE, uninformed", "{:.3f}"), "rms_error_mm": ("RMS error (mm)", "{:.2f}"),
    "rms_sigma_mm": ("RMS σ (mm)", "{:.2f}"),
}  # fmt: skip

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1240px;margin:2em auto;padding:0 1em}
h1{font-size:1.7em}h2{margin-top:2em;border-bottom:1px solid #ccc;padding-bottom:.2em}p,ul{max-width:68em}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}th,td{padding:.25em .6em;text-align:left;
border-bottom:1px solid #e5e5e5;vertical-align:top}figure{margin:1.5em 0}img{max-width:100%}
.data{overflow-x:auto}.data table{font-size:10.5px}.data td,.data th{padding:.2em .3em}.data td{white-space:nowrap}
.data th{vertical-align:bottom}.data td:first-child,.data th:first-child{position:sticky;left:0;background:#fff;padding-left:0;
white-space:normal;min-width:8em}.data .heading{padding-top:1em}.effects{width:42%}
figcaption,.small,.data ul,.common{font-size:13px;color:#444}.data td.below:first-child{padding-left:1.4em}.below,.below~td{color:#777}
.counts,.verdict{white-space:nowrap}.verdict{font-weight:600}details{margin:.2em 0}summary{cursor:pointer;color:#444}nav a{margin-right:1em}
"""


def report(
    folder: Path | str, claims: Sequence[Claim], pairs: str, indexes: Mapping[str, Mapping[str, Any]],
    skipped: Mapping[str, str], facts: Mapping[str, str],
) -> str:  # fmt: skip
    """The page as text.

    folder  holds tables (.md), figures (.png) and calibration.csv
    pairs   ``tables.test_pairs_in_words``
    facts   what ``made_with`` says
    """
    folder = Path(folder)
    simulated = [name for name, index in indexes.items() if index["simulated"]]
    parts = ["<h1>GridReg: what this reproduction finds</h1>", _opening(simulated, indexes, skipped)]
    parts += ['<nav><a href="#verdicts">Verdicts</a><a href="#tables">Tables</a><a href="#figures">Figures</a>'
              '<a href="#made">How it was made</a></nav>', '<h2 id="verdicts">Verdicts</h2>', _verdicts(claims, pairs)]  # fmt: skip
    parts += ['<h2 id="tables">Tables</h2>', _tables(folder), calibration(folder / "calibration.csv")]
    captions = captioned(indexes)
    parts += ['<h2 id="figures">Figures</h2>', *(_figure(folder, name, captions[name]) for name in FIGURES)]
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
    parts += ['<h2 id="made">How it was made</h2>', f"<table>{rows}</table>"]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>GridReg</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def captioned(indexes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Figure → its caption, which says what is simulated."""
    simulated = [name for name, index in indexes.items() if index["simulated"]]
    which = "Simulated." if len(simulated) == len(indexes) else f"Simulated: {', '.join(simulated)}."
    captions = {}
    for number, (name, text) in enumerate(FIGURES.items(), 1):
        own = "Simulated slices." if name == "figure1" else which if simulated else ""
        title = f"Figure {number}. " if name.startswith("figure") else ""
        captions[name] = f"{title}{text} {'' if name in (DRAWN, OF_MACHINES) else own}".strip()
    return captions


def _opening(simulated: list[str], indexes: Mapping[str, Any], skipped: Mapping[str, str]) -> str:
    text = "Accuracy and its tests are computed from per-case results on held-out test pairs. Costs are measured by the benchmark, "
    text += "Figure 1 has simulated slices of its own, and the paper's numbers are copied from it. "
    if simulated:
        text += f"<b>These cohorts are simulated, not patients: {', '.join(simulated)}.</b> A verdict on them says what holds "
        text += "here, not what would hold in patients. "
    real = [name for name in indexes if name not in simulated]
    text += f"Real scans: {', '.join(real)}. " if real else ""
    text += "".join(f"Skipped: {html.escape(name)} ({html.escape(why)}). " for name, why in skipped.items())
    return f"<p>{text}</p>"


def _verdicts(claims: Sequence[Claim], pairs: str) -> str:
    rule = (  # that of claims.judged
        "A finding is a difference with its 95 % interval, or a cost or a share of folded voxels, which have none. <b>Yes</b>: the "
        "whole interval lies where the claim wants it, below 0 or above it, or within the margin of "
        f"±{MARGIN:g} of Dice where the claim is that two are equal. <b>No</b>: the whole interval lies elsewhere. "
        "<b>Not shown</b>: all else."
    )
    note = (
        f"Test pairs: {html.escape(pairs)}. Intervals are Student's, over patients: where both images of a pair are of one "
        "patient, the mean over that patient's pairs is one value. Pairs of two patients count as independent, as in the paper, "
        "although a patient may be in several, which makes their intervals too narrow. Every run was trained once: how far "
        "trainings of one setting differ by their seed alone stands under Table 3."
    )
    rows = []
    for claim in claims:
        yes, no, unclear = claim.counts
        words = f"{yes} yes<br>{no} no<br>{unclear} not shown" if claim.findings else "–"
        colour = COLOURS.get(claim.verdict, "#555")
        lines = "".join(f"<tr><td>{html.escape(f.words)}, {METRICS[f.metric].label}</td><td>{effect(f)}</td>"
                        f"<td>{ANSWERS[f.holds]}</td></tr>" for f in claim.findings)  # fmt: skip
        every = (
            f"<details class=small><summary>every finding</summary><table>{lines}</table></details>" if lines else ""
        )
        more = "".join(f"<br>{html.escape(text)}" for text in claim.notes if claim.findings)
        rows.append(f"<tr><td><b>{html.escape(claim.title)}</b><br><span class=small>Paper: {html.escape(claim.paper)}<br>"
                    f"Counts as holding: {html.escape(claim.rule)}.{more}</span></td>"
                    f'<td class=verdict style="color:{colour}">{claim.verdict}</td><td class=counts>{words}</td>'
                    f"<td>{_extremes(claim)}{every}</td></tr>")  # fmt: skip
    heads = "<th>Claim</th><th>Here</th><th>Findings</th><th class=effects>Effect (95 % interval), smallest and largest</th>"
    return f"<p>{rule}</p><table><tr>{heads}</tr>{''.join(rows)}</table><p class=small>{note}</p>"


def _extremes(claim: Claim) -> str:
    """The smallest and the largest effect of a claim, by name, for each of its metrics."""
    parts = []
    for metric in dict.fromkeys(f.metric for f in claim.findings):
        own = sorted((f for f in claim.findings if f.metric == metric), key=lambda f: f.effect)
        named = (
            [(f, f.words) for f in (own[0], own[-1])]
            if own[0].effect < own[-1].effect
            else [(own[0], f"in all {len(own)}")]
        )
        if len(own) == 1:
            named = [(own[0], own[0].words)]
        lines = "".join(f"<br>{effect(f)} <span class=small>{html.escape(words)}</span>" for f, words in named)
        parts.append(f"<b>{METRICS[metric].label}</b>{lines}")
    return "<br>".join(parts) or "–"


def effect(finding: Finding) -> str:
    """``−2.90 (−3.60 to −2.21) mm``"""
    pattern = {"": "+.3f", "×": ".2g", "%": ".2f"}.get(finding.unit, "+.2f")  # ratios span decades
    unit = f"{finding.unit}" if finding.unit in ("×", "") else f" {finding.unit}"

    def number(value: float) -> str:
        return f"{value:{pattern}}".replace("-", "−")

    inner = f" ({number(finding.low)} to {number(finding.high)})" if np.isfinite(finding.low) else ""
    return f"{number(finding.effect)}{inner}{unit}"


def _tables(folder: Path) -> str:
    """The tables, each with the notes that are its own; what stands under several is said once, below them all."""
    texts = {name.removeprefix("table"): _read(folder / f"{name}.md").replace("&emsp;", "") for name in TABLES}
    under: dict[str, list[str]] = {}  # note → numbers of the tables that have it
    for number, text in texts.items():
        for line in text.splitlines():
            if line.startswith("- "):
                under.setdefault(line.removeprefix("- "), []).append(number)
    shared = {note: numbers for note, numbers in under.items() if len(numbers) > 1}
    markdown = mistune.create_markdown(plugins=["table"])
    pages = []
    for text in texts.values():
        page = markdown("\n".join(line for line in text.splitlines() if line.removeprefix("- ") not in shared))
        page = re.sub(r"<td>(q|p|paper)</td>", r'<td class="below">\1</td>', page)  # lines that belong to the one above
        page = re.sub(r"<td>(<strong>[^<]*</strong>)</td>((?:\s*<td></td>)+)", _across, page)
        pages.append(f'<div class="data">{page}</div>')
    common = "\n".join(f"- Tables {', '.join(numbers)}: {note}" for note, numbers in shared.items())
    return "\n".join(pages) + f'<div class="common">{markdown(common)}</div>'


def _across(row: re.Match) -> str:
    """A heading, all whose other cells are empty, as one cell."""
    return f'<td class="heading" colspan="{1 + row[2].count("<td>")}">{row[1]}</td>'


def calibration(path: Path) -> str:
    """``calibration.csv`` as a table, every row of it; "" where nothing has a Bayesian head and a known truth."""
    frame = pd.read_csv(io.StringIO(_read(path)))
    if frame.empty:
        return ""
    runs = ", ".join(run_label(run) for run in frame["run"].unique())
    shown = frame.assign(grid=frame["grid"].map(grid_label), dataset=frame["dataset"].str.capitalize())
    words = [name for name in shown.select_dtypes(exclude=["number", "bool"]) if name not in ("run", "fitted_on")]
    columns = {}
    for name in (*words, *(name for name in CALIBRATION if name in shown)):
        head, pattern = CALIBRATION.get(name, (name.replace("_", " ").capitalize(), "{}"))
        columns[head] = shown[name].map(pattern.format)
    table = pd.DataFrame(columns).to_html(index=False, border=0)
    note = (
        "Within 50, 90, 95 %: the share of errors inside the predicted interval of that level, which should be that level; "
        "calibration error: the mean distance of the two over all levels (best 0). AUSE: how far the ranking of voxels by σ is from "
        "their ranking by error (best 0); where it is as high as uninformed, σ does not say where the errors are. Rescaled: σ "
        "times one factor, fitted on the validation pairs, which changes no ranking."
    )
    if "propagation" in frame:
        note += " Control points: what their errors are taken for, when σ is carried to the voxels between them."
    return (f'<div class="data"><p><b>Calibration</b> of {html.escape(runs)} on the test pairs, beyond the paper.</p>'
            f"{table}<ul><li>{html.escape(note)}</li></ul></div>")  # fmt: skip


def _figure(folder: Path, name: str, caption: str) -> str:
    path = folder / f"{name}.png"
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a figure of the pipeline")
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((WIDEST, 10 * WIDEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=85)
    code = base64.b64encode(stream.getvalue()).decode()
    return (f'<figure id="{name}"><img alt="{html.escape(caption)}" src="data:image/webp;base64,{code}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")  # fmt: skip


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a table of the pipeline")
    return path.read_text(encoding="utf-8")


# --- how it was made ---------------------------------------------------------------------------------------------


def made_with(params: Mapping[str, Any], budgets: pd.DataFrame, folders: Iterable[Path | str]) -> dict[str, str]:
    """Environment, seeds, budget, training times and data hashes, for the end of the report.

    budgets  ``results.read_costs`` of every run
    folders  training results, each with a metrics.json
    """
    seconds, devices = {}, set()
    for folder in map(Path, folders):
        record = json.loads(_read(folder / "metrics.json"))
        devices.add(f"{record['device']}, precision {record['precision']}")
        if record["step_seconds"]:
            seconds[f"{folder.parent.name} {folder.name}"] = record["step_seconds"] * record["steps"]
    trained = budgets.dropna(subset="steps")
    facts = {
        "Profile": params["profile"],
        "Seed": f"{params['seed']}; the default of the ablations also with others (Table 3)",
        "Budgets": "; ".join(
            dict.fromkeys(f"{int(row.steps):,} steps × batch {int(row.batch)}" for row in trained.itertuples())
        ),
        "Trained on": "; ".join(sorted(devices)) or "nothing was trained",
        "Evaluated on": "; ".join(sorted(set(budgets["device"]))),
        "Training time": f"{sum(seconds.values()) / 60:.0f} min in all, the longest "
        f"{max(seconds, key=seconds.get)}, {max(seconds.values()) / 60:.1f} min"
        if seconds
        else "–",
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "Packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }
    return facts | {f"Data, {name}": text for name, text in data_hashes(params).items()}


def data_hashes(
    params: Mapping[str, Any], results: Path | str = "results/preprocess", pointer: Path | str = "data.dvc"
) -> dict[str, str]:
    """Dataset → where it comes from, and the SHA-256 of its preprocessed images and labels."""
    known = re.search(r"md5: (\S+)", Path(pointer).read_text()) if Path(pointer).is_file() else None
    found = {}
    for name in params["use"]["datasets"]:
        digest = hashlib.sha256()
        for path in sorted(p for kind in ("images", "labels") for p in (Path(results) / name / kind).glob("*.nii.gz")):
            digest.update(path.name.encode() + path.read_bytes())
        origin = params["datasets"][name]["path"]
        comes = f"data.dvc {known.group(1)}, " if known and origin.split("/")[0] == "data" else ""
        found[name] = f"{origin}: {comes}preprocessed sha256 {digest.hexdigest()[:16]}"
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
