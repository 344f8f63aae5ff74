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

from gridreg.claims import Claim, Finding
from gridreg.errors import InputError

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
PACKAGES = ("torch", "numpy", "scipy", "monai", "antspyx", "voxelmorph", "keymorph", "nibabel", "nilearn", "dvc", "papermill")
WIDEST = 1500  # pixels of a figure in the report
COLOURS = {"holds here": "#1b7837", "does not hold here": "#b2182b", "holds in part": "#b8860b"}
ANSWERS = {True: "yes", False: "no", None: "open"}

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2em auto;padding:0 1em}
h1{font-size:1.7em}h2{margin-top:2em;border-bottom:1px solid #ccc;padding-bottom:.2em}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}th,td{padding:.25em .6em;text-align:left;
border-bottom:1px solid #e5e5e5;vertical-align:top}.wide{overflow-x:auto}.data table{font-size:12px}figure{margin:1.5em 0}img{max-width:100%}
figcaption,.small{font-size:13px;color:#444}.below{padding-left:1.8em;color:#777}.counts,.data td,
.data th{white-space:nowrap}.verdict{font-weight:600;white-space:nowrap}details{margin:.4em 0 .4em 1em}
summary{cursor:pointer;color:#444}nav a{margin-right:1em}
"""


def report(
    folder: Path | str, claims: Sequence[Claim], indexes: Mapping[str, Mapping[str, Any]], skipped: Mapping[str, str],
    facts: Mapping[str, str],
) -> str:  # fmt: skip
    """The page as text. ``folder`` holds the tables (.md) and figures (.png); ``facts`` are what ``made_with`` says."""
    folder = Path(folder)
    simulated = [name for name, index in indexes.items() if index["simulated"]]
    parts = ["<h1>GridReg: what this reproduction finds</h1>", _opening(simulated, indexes, skipped)]
    parts += ['<nav><a href="#verdicts">Verdicts</a><a href="#tables">Tables</a><a href="#figures">Figures</a>'
              '<a href="#made">How it was made</a></nav>', '<h2 id="verdicts">Verdicts</h2>', _verdicts(claims)]  # fmt: skip
    parts += ['<h2 id="tables">Tables</h2>', *(_table(folder, name) for name in TABLES)]
    captions = captioned(indexes)
    parts += ['<h2 id="figures">Figures</h2>', *(_figure(folder, name, captions[name]) for name in FIGURES)]
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
    parts += ['<h2 id="made">How it was made</h2>', f"<table>{rows}</table>"]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>GridReg</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def captioned(indexes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Figure → its caption, which says what is simulated."""
    simulated = [name for name, index in indexes.items() if index["simulated"]]
    which = "Simulated cohorts, not patients." if len(simulated) == len(indexes) else f"Simulated: {', '.join(simulated)}."
    captions = {}
    for number, (name, text) in enumerate(FIGURES.items(), 1):
        own = "Simulated slices, not patients." if name == "figure1" else which if simulated else ""
        title = f"Figure {number}. " if name.startswith("figure") else ""
        captions[name] = f"{title}{text} {'' if name in (DRAWN, OF_MACHINES) else own}".strip()
    return captions


def _opening(simulated: list[str], indexes: Mapping[str, Any], skipped: Mapping[str, str]) -> str:
    text = "Every number below is computed from per-case results on held-out test pairs. "
    if simulated:
        text += f"<b>These cohorts are simulated, not patients: {', '.join(simulated)}.</b> A verdict on them says what holds "
        text += "here, not what would hold in patients. "
    real = [name for name in indexes if name not in simulated]
    text += f"Real scans: {', '.join(real)}. " if real else ""
    text += "".join(f"Skipped: {html.escape(name)} ({html.escape(why)}). " for name, why in skipped.items())
    return f"<p>{text}</p>"


def _verdicts(claims: Sequence[Claim]) -> str:
    rows = []
    for claim in claims:
        yes, no, unclear = claim.counts
        words = f"{yes} yes, {no} no, {unclear} open" if claim.findings else "–"
        colour = COLOURS.get(claim.verdict, "#555")
        rows.append(f"<tr><td><b>{html.escape(claim.title)}</b><br><span class=small>Paper: {html.escape(claim.paper)}</span></td>"
                    f'<td class=verdict style="color:{colour}">{claim.verdict}</td><td class=counts>{words}</td>'
                    f"<td>{_largest(claim)}</td></tr>")  # fmt: skip
    table = ("<table><tr><th>Claim</th><th>Here</th><th>Findings</th><th>Effect (95 % interval), range</th></tr>"
             + "".join(rows) + "</table>")  # fmt: skip
    details = []
    for claim in claims:
        lines = "".join(f"<tr><td>{html.escape(f.words)}</td><td>{effect(f)}</td><td>{ANSWERS[f.holds]}</td></tr>" for f in claim.findings)
        lines = lines or "<tr><td>nothing was run that could tell</td><td></td><td></td></tr>"
        details.append(f"<details><summary>{html.escape(claim.title)}: every finding</summary><p class=small>Counts as holding: "
                       f"{html.escape(claim.rule)}.</p><table>{lines}</table></details>")  # fmt: skip
    note = ("Intervals are over test pairs. Each run was trained once: how far trainings of one setting differ by their seed "
            "alone stands under Table 3.")  # fmt: skip
    return f"<div class=wide>{table}</div><p class=small>{note}</p>{''.join(details)}"


def _largest(claim: Claim) -> str:
    """The smallest and the largest effect of a claim, one of each unit."""
    lines = []
    for unit in dict.fromkeys(f.unit for f in claim.findings):
        own = sorted((f for f in claim.findings if f.unit == unit), key=lambda f: f.effect)
        lines.append(effect(own[0]) if len(own) == 1 else f"{effect(own[0])} to {effect(own[-1])}")
    return "<br>".join(lines) or "–"


def effect(finding: Finding) -> str:
    """``−2.90 (−3.60 to −2.21) mm``"""
    digits = {"": 3, "mm": 2}.get(finding.unit, 2)
    unit = f"{finding.unit}" if finding.unit in ("×", "") else f" {finding.unit}"
    signed = "" if finding.unit in ("×", "%") else "+"

    def number(value: float) -> str:
        return f"{value:{signed}.{digits}f}".replace("-", "−")

    inner = f" ({number(finding.low)} to {number(finding.high)})" if np.isfinite(finding.low) else ""
    return f"{number(finding.effect)}{inner}{unit}"


def _table(folder: Path, name: str) -> str:
    page = mistune.create_markdown(plugins=["table"])(_read(folder / f"{name}.md").replace("&emsp;", ""))
    page = re.sub(r"<td>(q|p|paper)</td>", r'<td class="below">\1</td>', page)  # lines that belong to the one above
    return f'<div class="wide data">{page}</div>'


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
        "Budgets": "; ".join(dict.fromkeys(f"{int(row.steps):,} steps × batch {int(row.batch)}" for row in trained.itertuples())),
        "Trained on": "; ".join(sorted(devices)) or "nothing was trained",
        "Evaluated on": "; ".join(sorted(set(budgets["device"]))),
        "Training time": f"{sum(seconds.values()) / 60:.0f} min in all, the longest "
        f"{max(seconds, key=seconds.get)}, {max(seconds.values()) / 60:.1f} min" if seconds else "–",
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "Packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }
    return facts | {f"Data, {name}": text for name, text in data_hashes(params).items()}


def data_hashes(params: Mapping[str, Any], results: Path | str = "results/preprocess", pointer: Path | str = "data.dvc") -> dict[str, str]:
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
