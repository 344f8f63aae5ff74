"""``figures/report.html``: what holds and what does not, then tables and figures, then how they were made.

``report.html.jinja`` is the page; this module fills it. The page is one file: figures are embedded, and nothing is fetched.
It holds no date, so equal results are an equal report.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import mistune
import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from gridreg.errors import InputError
from study.reporting.claims import MARGIN, Claim, Finding
from study.reporting.results import METRICS, grid_label, run_label

TABLES = ("table1", "table2", "table3", "table4")
FIGURES = (*(f"figure{number}" for number in range(1, 9)), "oracle", "calibration", "benchmark")
MAX_PIXELS = 1500  # pixels of a figure in the report
ANSWERS = {True: "yes", False: "no", None: "undecided"}
CALIBRATION = {  # column of calibration.csv → its head and format
    "dataset": ("Dataset", "{}"), "grid": ("Grid", "{}"), "propagation": ("Control points", "{}"), "scaling": ("σ", "{}"),
    "factor": ("Factor", "{:.2f}"),
    "coverage_50": ("Within 50 %", "{:.0%}"), "coverage_90": ("Within 90 %", "{:.0%}"), "coverage_95": ("Within 95 %", "{:.0%}"),
    "coverage_error": ("Calibration error", "{:.3f}"), "ause": ("AUSE", "{:.3f}"),
    "ause_uninformed": ("AUSE, uninformed", "{:.3f}"), "rms_error_mm": ("RMS error (mm)", "{:.2f}"),
    "rms_sigma_mm": ("RMS σ (mm)", "{:.2f}"),
}  # fmt: skip


def report(
    folder: Path | str, claims: Sequence[Claim], pairs: str, indexes: Mapping[str, Mapping[str, Any]],
    skipped: Mapping[str, str], facts: Mapping[str, str], unmeasured: Sequence[str] = (),
) -> str:  # fmt: skip
    """The page as text; InputError where a table, a figure or a caption is missing.

    folder   holds tables (.md), figures (.png), their captions (.txt) and calibration.csv
    pairs    ``provenance.test_pairs_in_words``
    indexes  dataset → its ``index.json``
    skipped  dataset without results → the reason
    facts    ``provenance.made_with``
    unmeasured    datasets of which accuracy was not measured (``results.without_accuracy``)
    """
    folder = Path(folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"sentence": sentence, "effect": effect, "extremes": extremes, "answer": lambda finding: ANSWERS[finding.holds],
                            "metric_label": lambda metric: METRICS[metric].label}  # fmt: skip
    tables, common = tables_as_html(folder)
    return environment.get_template("report.html.jinja").render(
        summary=summary(claims, indexes, skipped, unmeasured), claims=claims, margin=f"{MARGIN:g}", pairs=pairs, tables=tables,
        common=common, calibration=calibration(folder / "calibration.csv"), facts=facts,
        figures=[_figure(folder, name) for name in FIGURES],
    )  # fmt: skip


def summary(
    claims: Sequence[Claim],
    indexes: Mapping[str, Mapping[str, Any]],
    skipped: Mapping[str, str],
    unmeasured: Sequence[str] = (),
) -> dict[str, list[str]]:
    """The first screen: head → its items. What holds, what does not, what is undecided, and what was not tested."""
    heads = {"holds here": "Holds", "holds in part": "Holds in part", "does not hold here": "Does not hold",
             "undecided here": "Undecided"}  # fmt: skip
    found: dict[str, list[str]] = {head: [] for head in heads.values()}
    for claim in claims:
        if claim.findings:
            words = claim.title
            if claim.verdict == "holds in part":
                words += f" ({claim.counts[0]} of {len(claim.findings)} findings)"
            found[heads[claim.verdict]].append(words)
    simulated = [name for name, index in indexes.items() if index["simulated"]]
    real = [name for name in indexes if name not in simulated]
    untested = [claim.title for claim in claims if not claim.findings]
    untested += [f"the accuracy on {name}, which has no labels, landmarks or known deformation" for name in unmeasured]
    if simulated and not real:
        untested.append("patients, because all cohorts are simulated")
    untested.append(f"equivalence, other than in Dice within ±{MARGIN:g}")
    cohorts = [f"simulated, not patients: {', '.join(simulated)}"] * bool(simulated) + [
        f"real scans: {', '.join(real)}"
    ] * bool(real)
    cohorts += [f"skipped: {name} ({why.rstrip('.')})" for name, why in skipped.items()]
    return found | {"Not tested": untested, "Cohorts": cohorts}


def sentence(items: Sequence[str]) -> str:
    """``a``, ``b`` → ``A; b.``"""
    text = "; ".join(items) or "none"
    return f"{text[:1].upper()}{text[1:]}."


def extremes(claim: Claim) -> list[tuple[str, list[tuple[Finding, str]]]]:
    """The smallest and the largest finding of a claim and their words, for each of its metrics."""
    parts = []
    for metric in dict.fromkeys(f.metric for f in claim.findings):
        own = sorted((f for f in claim.findings if f.metric == metric), key=lambda f: f.effect)
        named = [(own[0], own[0].words)]
        if own[0].effect < own[-1].effect:
            named.append((own[-1], own[-1].words))
        elif len(own) > 1:
            named = [(own[0], f"in all {len(own)}")]
        parts.append((METRICS[metric].label, named))
    return parts


def effect(finding: Finding) -> str:
    """``−2.90 (−3.60 to −2.21) mm``"""
    pattern = {"": "+.3f", "×": ".2g", "%": ".2f"}.get(finding.unit, "+.2f")  # ratios span decades
    unit = f"{finding.unit}" if finding.unit in ("×", "") else f" {finding.unit}"

    def number(value: float) -> str:
        return f"{value:{pattern}}".replace("-", "−")

    inner = f" ({number(finding.low)} to {number(finding.high)})" if np.isfinite(finding.low) else ""
    return f"{number(finding.effect)}{inner}{unit}"


# --- tables ------------------------------------------------------------------------------------------------------


def tables_as_html(folder: Path) -> tuple[list[Markup], Markup]:
    """Every table with its notes; notes that several tables share appear once."""
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
        pages.append(Markup(page))
    common = "\n".join(f"- Tables {', '.join(numbers)}: {note}" for note, numbers in shared.items())
    return pages, Markup(markdown(common))


def _across(row: re.Match) -> str:
    """A heading, all whose other cells are empty, as one cell."""
    return f'<td class="heading" colspan="{1 + row[2].count("<td>")}">{row[1]}</td>'


def calibration(path: Path) -> Markup:
    """``calibration.csv`` as a table; empty where no dataset has a Bayesian run and a known truth."""
    frame = pd.read_csv(io.StringIO(_read(path)))
    if frame.empty:
        return Markup("")
    runs = ", ".join(run_label(run) for run in frame["run"].unique())
    shown = frame.assign(grid=frame["grid"].map(grid_label), dataset=frame["dataset"].str.capitalize())
    if "simulated" in frame:
        shown["dataset"] += frame["simulated"].map({True: " (simulated)", False: ""})
    words = [name for name in shown.select_dtypes(exclude=["number", "bool"]) if name not in ("run", "fitted_on")]
    columns = {}
    for name in (*words, *(name for name in CALIBRATION if name in shown)):
        head, pattern = CALIBRATION.get(name, (name.replace("_", " ").capitalize(), "{}"))
        columns[head] = shown[name].map(pattern.format)
    table = Markup(pd.DataFrame(columns).to_html(index=False, border=0))  # escapes what it is given
    note = (
        "Within 50, 90, 95 %: the share of errors inside the predicted interval of that level; it should equal the level. "
        "Calibration error: the mean difference between the two over all levels; 0 is best. AUSE: how far the ranking of voxels "
        "by σ is from their ranking by error; 0 is best. Where AUSE is as high as uninformed, σ does not say where the errors "
        "are. Rescaled: σ times one factor, fitted on the validation pairs. The factor changes no ranking."
    )
    if "propagation" in frame:
        note += " Control points: whether their errors are taken as independent when σ is carried to the voxels between them."
    title = Markup("<p><b>Calibration</b> of {} on the test pairs, beyond the paper.</p>").format(runs)
    return title + table + Markup("<ul><li>{}</li></ul>").format(note)


# --- figures -----------------------------------------------------------------------------------------------------


def _figure(folder: Path, name: str) -> dict[str, str]:
    path = folder / f"{name}.png"
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a figure of the pipeline")
    caption = _read(folder / f"{name}.txt").strip()
    picture = Image.open(path).convert("RGB")
    picture.thumbnail((MAX_PIXELS, 10 * MAX_PIXELS), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=85)
    number = f"Figure {name.removeprefix('figure')}." if name.startswith("figure") else ""
    code = base64.b64encode(stream.getvalue()).decode()
    return {"name": name, "number": number, "title": caption.split(". ")[0], "caption": caption, "code": code}


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a file that the pipeline writes")
    return path.read_text(encoding="utf-8")
