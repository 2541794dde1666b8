#!/usr/bin/env python3
"""Figures and tables over several runs, from what their folders hold.

    python src/evaluation/figures.py curves 'logs/neuclip-s*' 'logs/openclip-s*' --out figures
    python src/evaluation/figures.py optimization 'logs/opt-*'
    python src/evaluation/figures.py npn-time 'logs/neuclip-*'
    python src/evaluation/figures.py ablation 'logs/ablation-*' --by npn_num_protos --by npn_repetition

Runs that differ in nothing but --seed are one curve, or one row. Figures are written as PDF and PNG, tables as Markdown, CSV
and LaTeX.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script, Python puts this folder first on the path; its modules would hide packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluation.comparison.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
