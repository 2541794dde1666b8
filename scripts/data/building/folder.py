"""A built folder appears whole or not at all, and is left alone when it is complete."""

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import BuildError


def is_complete(out: Path, builder: str, version: int, options: dict) -> bool:
    """Say whether a folder holds a finished build of just this kind.

    Args:
        out: the folder, which need not exist.
        builder: name of the builder.
        version: its version.
        options: what decides the files' content, as it stands in the manifest.
    Raises:
        BuildError: `out` holds something that this builder did not make.
    """
    manifest = finished_manifest(out, builder)
    if manifest is None:
        return False
    if manifest["builder_version"] == version and manifest.get("options") == options:
        print(f"{out} is complete (builder version {version}); nothing to do")
        return True
    print(f"{out} was built with other options or by another version; building it anew")
    return False


def finished_manifest(out: Path, builder: str) -> dict | None:
    """Read the manifest of a finished build; None where there is nothing yet.

    Raises:
        BuildError: `out` holds something that this builder did not make.
    """
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        is_manifest = isinstance(manifest, dict) and "builder_version" in manifest
        # The quickstart's manifest is older than the second builder, and does not say whose it is.
        if is_manifest and manifest.get("builder", "quickstart") == builder:
            return manifest
    except (OSError, ValueError):
        pass
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise BuildError(f"--out {out} exists and is no {builder} data; name another folder or move it away")
    return None


def build_and_rename(out: Path, build: Callable[[Path], dict]) -> dict:
    """Build beside `out` and move the result there when it is complete: `out` is never half-built.

    Args:
        out: the folder to make or to replace.
        build: fills an existing empty folder and returns its manifest.
    Returns:
        The manifest.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        exit_when_told(),
        tempfile.TemporaryDirectory(prefix=f".{out.name}-unfinished-", dir=out.parent) as temporary,
    ):
        folder = Path(temporary, "new")
        folder.mkdir()
        manifest = build(folder)
        if out.exists():
            out.rename(Path(temporary, "old"))
        folder.rename(out)
    return manifest


@contextmanager
def exit_when_told() -> Iterator[None]:
    """Make an ordinary kill, or a connection that is lost, raise as Ctrl-C does, so that what is unfinished gets removed."""
    # Under nohup a lost connection is ignored, and stays so.
    told = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in told}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
