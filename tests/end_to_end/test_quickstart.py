"""The README's first command, on few drawings and for two steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from end_to_end.runs import ROOT, clean_environment


def test_from_data_to_gallery(tmp_path: Path) -> None:
    data, logs = tmp_path / "data" / "quickstart", tmp_path / "logs"
    subprocess.run(
        [sys.executable, "scripts/data/build_quickstart.py", "--out", str(data), "--limit", "600", "--workers", "1"],
        cwd=ROOT,
        check=True,
    )
    # As if all drawings had been asked for: the quickstart finds its data finished.
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    manifest["options"]["limit"] = None
    (data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    environment = {
        **clean_environment(),
        **{"VIRTUAL_ENV": sys.prefix, "NEUCLIP_DATA": str(tmp_path / "data"), "NEUCLIP_LOGS": str(logs)},
        "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    few = ["--epochs", "1", "--batch-size", "64", "--train-num-samples", "128", "--npn_num_protos", "64"]
    done = subprocess.run(
        ["./scripts/quickstart.sh", *few], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing to do" in done.stdout
    folder = logs / "quickstart-neuclip"
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["metrics"]["zeroshot/top1"] >= 0
    for name in ("gallery.html", "curves.png", "evaluation.md", "checkpoints/epoch_1.pt"):
        assert (folder / name).stat().st_size > 0, name
