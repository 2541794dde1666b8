"""The one look of the project's figures: colours, lines, fonts, and how a figure becomes files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from evaluation.whole_files import replacing

# Okabe and Ito's colours, told apart with any colour vision, in an order that keeps neighbours far apart; without their
# yellow, which is too faint for a line on white. Lines differ in their strokes as well.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b6470")
LINE_STYLES = ("-", "--", ":", "-.")
MUTED = "#9aa1ac"

LAYOUT = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14, wspace=0.02, hspace=0.02)  # inches, and shares of a panel
DOTS_PER_INCH = 120

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b6bcc6",
    "axes.grid": True,
    "grid.color": "#e8eaee",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "xtick.color": "#5b6470",
    "ytick.color": "#5b6470",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,  # text stays text
}


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.pdf and NAME.png, each whole or not at all; the same figure gives the same bytes.

    Returns:
        The two paths.

    Raises:
        OSError: a file cannot be written.
    """
    written = []
    for kind, metadata in (("pdf", {"CreationDate": None, "Producer": None, "Creator": None}), ("png", {})):
        path = folder / f"{name}.{kind}"
        with replacing(path) as temporary, matplotlib.rc_context(STYLE):
            figure.savefig(temporary, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
        written.append(path)
    return written
