"""What this paper's notebooks call: cohorts, the other methods, training, evaluation, tables and figures, lessons."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
