"""Fetching the npm package: over HTTP from the registry that the environment names, else with npm itself."""

import http.client
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from building import BuildError
from building.folder import exit_when_told

from .package import INTEGRITY, NAME, PACK_COMMAND, VERSION, integrity

REGISTRY_VARIABLE = "npm_config_registry"  # npm's own
_ATTEMPTS = 4
_TIMEOUT_SECONDS = 60
_READ_BYTES = 1 << 20
_FILE_NAME = f"{NAME.partition('/')[2]}-{VERSION}.tgz"


def fetch_package(target: Path) -> Path:
    """Get the package's tarball, unless it is there already.

    What an interrupted download left in TARGET.part is continued. The target appears whole and checked, or not at all.

    Args:
        target: where it goes.
    Returns:
        The target.
    Raises:
        BuildError: it cannot be had, or is not what npm published.
    """
    if target.exists():
        if integrity(target) == INTEGRITY:
            return target
        raise BuildError(f"{target} is not {NAME} {VERSION} (its checksum differs); remove it and run again")
    target.parent.mkdir(parents=True, exist_ok=True)
    registry = os.environ.get(REGISTRY_VARIABLE)
    if registry:
        url = f"{registry.rstrip('/')}/{NAME}/-/{_FILE_NAME}"
        print(f"fetching {url}", flush=True)
        download(url, target, INTEGRITY)
    elif shutil.which("npm"):
        print(f"fetching {NAME} {VERSION} with npm", flush=True)
        _pack(target)
    else:
        raise BuildError(
            f"there is no npm to fetch {NAME} {VERSION} with; install Node.js, or set {REGISTRY_VARIABLE} to the address of "
            f"an npm registry, or run {PACK_COMMAND} elsewhere and name its file with --package"
        )
    return target


def download(url: str, target: Path, expected: str) -> None:
    """Download a file, again from where it broke off, and put it in place when its checksum is right.

    Args:
        url: where it is.
        target: where it goes; until it is whole it is in TARGET.part.
        expected: its integrity string.
    Raises:
        BuildError: the server has no such file or cannot be reached, the transfer breaks off time after time, or the file
            is another one. In the last case nothing is kept.
    """
    part = target.with_name(f"{target.name}.part")
    failure = "nothing was sent"
    for _ in range(_ATTEMPTS):
        try:
            if _continue(url, part):
                break
            failure = "the transfer broke off"
        except urllib.error.HTTPError as error:
            raise BuildError(f"{url} cannot be fetched: HTTP {error.code} {error.reason}; {_remedy()}") from error
        except (OSError, http.client.HTTPException) as error:
            failure = str(getattr(error, "reason", error))
    else:
        done = part.stat().st_size if part.exists() else 0
        raise BuildError(
            f"{url} cannot be fetched: {failure} after {done:,} bytes; run again to go on from there, or {_remedy()}"
        )
    if integrity(part) != expected:
        part.unlink()
        raise BuildError(f"{url} sent another file than {NAME} {VERSION} (its checksum differs); {_remedy()}")
    os.replace(part, target)


def _remedy() -> str:
    return f"check {REGISTRY_VARIABLE}, or name a file made by {PACK_COMMAND} with --package"


def _continue(url: str, part: Path) -> bool:
    """Fetch what is missing of a file; says whether it is whole by the server's account."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return True  # nothing is missing, or what is there is of another file: the checksum tells
        raise
    with response:
        is_rest = response.status == http.HTTPStatus.PARTIAL_CONTENT
        length = response.headers.get("Content-Length")
        received = 0
        with open(part, "ab" if is_rest else "wb") as file:
            while block := response.read(_READ_BYTES):
                file.write(block)
                received += len(block)
    return length is None or received == int(length)


def _pack(target: Path) -> None:
    with exit_when_told(), tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        command = [*PACK_COMMAND.split(), "--silent", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        packed = sorted(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(packed) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise BuildError(
                f"{PACK_COMMAND} failed ({lines[0] if lines else f'status {done.returncode}'}); "
                "run it where it works and name its file with --package"
            )
        if integrity(packed[0]) != INTEGRITY:
            raise BuildError(
                f"{PACK_COMMAND} gave another file than {NAME} {VERSION} (its checksum differs); run again"
            )
        os.replace(packed[0], target)
