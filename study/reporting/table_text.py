"""A table as text: the same lines as Markdown and as LaTeX, and the tidy numbers as CSV.

Every metric (in a listing, every configuration) takes up to three lines: our values, their q or p, and the paper's values.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from study.reporting.results import METRICS, grid_label, in_order, run_label
from study.reporting.tables import ALL, SKIPPED, Table


class Line(NamedTuple):
    """One printed row; ``cells`` of (text, bold), one per method, or empty for a heading across the table."""

    kind: Literal["heading", "grid", "value", "q", "p", "paper", "skipped"]
    label: str
    cells: list[tuple[str, bool]]


def lines(rows: pd.DataFrame) -> tuple[list[str], list[Line]]:
    """The column heads (one per method) and the printed lines of a tidy table."""
    measured = rows[rows["metric"] != SKIPPED]
    methods = in_order(measured["method"])
    out: list[Line] = []
    for dataset, group in measured.groupby("dataset", sort=False):
        remark = group["note"].dropna()
        out.append(Line("heading", group["dataset_label"].iloc[0] + (f": {remark.iloc[0]}" if len(remark) else ""), []))
        if dataset != ALL:
            grids = group.dropna(subset="grid").groupby("method")["grid"].first()
            out.append(Line("grid", "Control grid", [(grid_label(grids.get(m, "")) or "–", False) for m in methods]))
        for metric, part in group.groupby("metric", sort=False):
            by_method = {row.method: row for row in part.itertuples()}
            cells = [by_method.get(method) for method in methods]
            out.append(Line("value", METRICS[metric].title, [_value(cell, metric) for cell in cells]))
            if any(map(_q, cells)):
                out.append(Line("q", "q", [(_q(cell), False) for cell in cells]))
            if (part["paper"] != "").any():
                out.append(Line("paper", "paper", [(cell.paper if cell else "", False) for cell in cells]))
    for row in rows[rows["metric"] == SKIPPED].itertuples():
        out.append(Line("skipped", f"{row.dataset_label}: skipped. {row.note}", []))
    return [run_label(method) for method in methods], out


def listing_lines(rows: pd.DataFrame) -> tuple[list[str], list[Line]]:
    """The column heads (one per metric) and the printed lines of a listing."""
    metrics = [name for name in METRICS if name in set(rows["metric"])]
    out: list[Line] = []
    for group, part in rows.groupby("group", sort=False):
        if group:
            out.append(Line("heading", group, []))
        for label, own in part.groupby("label", sort=False):
            by_metric = {row.metric: row for row in own.itertuples()}
            cells = [by_metric.get(metric) for metric in metrics]
            out.append(Line("value", label, [_value(cell, metric) for cell, metric in zip(cells, metrics)]))
            if own["p"].notna().any():
                out.append(Line("p", "p", [(_small(cell.p) if cell else "", False) for cell in cells]))
            if (own["paper"] != "").any():
                out.append(Line("paper", "paper", [(cell.paper if cell else "", False) for cell in cells]))
    return [METRICS[metric].title for metric in metrics], out


def _printed(table: Table) -> tuple[list[str], list[Line]]:
    return listing_lines(table.rows) if table.listing else lines(table.rows)


def _value(cell, metric: str) -> tuple[str, bool]:
    if cell is None:
        return "–", False
    number = METRICS[metric].format
    text = "–" if not np.isfinite(cell.mean) else number.format(cell.mean)
    if set(text) <= set("-0."):
        text = text.removeprefix("-")  # no negative zero
    text = text.replace("-", "−")
    if np.isfinite(cell.mean) and np.isfinite(cell.sd):
        text += f" ± {number.format(cell.sd)}"
    if cell.failures:
        text += f" ({cell.failures} failed)"
    return text, bool(cell.best)


def _q(cell) -> str:
    """q of a baseline, or ``p …`` of a variant of GridReg. Only the CSV has the p of the unregistered images."""
    if cell is None:
        return ""
    return f"p {_small(cell.p)}" if cell.sides == "two-sided" and np.isfinite(cell.p) else _small(cell.q)


def _small(p: float) -> str:
    return "" if not np.isfinite(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def to_markdown(table: Table) -> str:
    """GitHub-flavoured Markdown: a pipe table and the notes as a list."""
    heads, body = _printed(table)
    number = table.name.removeprefix("table")
    text = [f"**Table {number}.** {_md(table.title)}", ""]
    text += ["| | " + " | ".join(map(_md, heads)) + " |", "|---" * (len(heads) + 1) + "|"]
    for line in body:
        cells = [f"**{_md(value)}**" if bold else _md(value) for value, bold in line.cells]
        label = f"&emsp;{line.label}" if line.kind in ("q", "p", "paper") else _md(line.label)
        if line.kind in ("heading", "skipped"):
            label, cells = f"**{label}**", [""] * len(heads)
        text.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*text, "", *(f"- {_md(note)}" for note in table.notes), ""])


def _md(text: str) -> str:
    return re.sub(r"([\\|*_`<])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": r"\textbar{}", "±": r"$\pm$",
    "×": r"$\times$", "≤": r"$\leq$", "≥": r"$\geq$", "–": "--", "—": "---", "→": r"$\to$", "°": r"$^\circ$",
    "−": "$-$", "²": "$^2$", "³": "$^3$", "µ": r"$\mu$", "μ": r"$\mu$", "\u00a0": "~",
}  # fmt: skip


def latex_escape(text: str) -> str:
    """Plain text → LaTeX, one character at a time so that nothing is escaped twice."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def to_latex(table: Table) -> str:
    """A ``table*`` with booktabs rules, no wider than the text, at the top of whose file its packages are named."""
    heads, body = _printed(table)
    width = len(heads) + 1
    text = [
        r"% needs \usepackage{booktabs,graphicx,xcolor} and UTF-8 input",
        r"\begin{table*}[p]",
        r"\centering",
        rf"\caption{{{latex_escape(table.title)}}}\label{{tab:{table.name}}}",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{@{{}}l*{{{len(heads)}}}{{c}}@{{}}}}",
        r"\toprule",
        " & ".join(["", *map(latex_escape, heads)]) + r" \\",
    ]
    for line in body:
        cells = [latex_escape(value) for value, _ in line.cells]
        if line.kind in ("heading", "skipped"):
            text += [r"\midrule", rf"\multicolumn{{{width}}}{{@{{}}l}}{{\textbf{{{latex_escape(line.label)}}}}} \\"]
        elif line.kind in ("q", "p", "paper"):
            small = [rf"{{\small\color{{black!65}}{cell}}}" if cell else "" for cell in cells]
            text.append(" & ".join([rf"\quad{{\small\color{{black!65}}{line.label}}}", *small]) + r" \\")
        else:
            bold = [rf"\textbf{{{cell}}}" if strong else cell for cell, (_, strong) in zip(cells, line.cells)]
            text.append(" & ".join([latex_escape(line.label), *bold]) + r" \\")
    text += [r"\bottomrule", r"\end{tabular}}", r"\par\medskip\scriptsize\raggedright"]
    text += [rf"{latex_escape(note)}\par" for note in table.notes]
    return "\n".join([*text, r"\end{table*}", ""])


def write_table(table: Table, folder: Path | str) -> list[Path]:
    """Write ``<folder>/<name>.csv`` (tidy, full precision), ``.md`` and ``.tex``, each in one move; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"csv": table.rows.to_csv(index=False), "md": to_markdown(table), "tex": to_latex(table)}
    paths = []
    for suffix, text in texts.items():
        path = folder / f"{table.name}.{suffix}"
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        paths.append(path)
    return paths
