"""The npm package: which version, whether a file is it, and what is in it, without unpacking it to the disk."""

import base64
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from building import BuildError

NAME = "@iconify/json"
VERSION = "2.2.535"
# As npm lists it for this version; algorithm and base64 digest of the tarball.
INTEGRITY = "sha512-nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw=="

PACK_COMMAND = f"npm pack {NAME}@{VERSION}"
_READ_BYTES = 1 << 20


def integrity(path: Path) -> str:
    """Hash a file as npm does: "sha512-" and the digest in base64."""
    digest = hashlib.sha512()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return "sha512-" + base64.b64encode(digest.digest()).decode()


class Package:
    """An npm tarball of icon sets, in memory one member at a time.

    Attributes:
        path: the tarball.
        version: its version.
        collections: collections.json: facts about each set by its prefix (name, author, license, category, palette …).

    Raises:
        BuildError: on construction, if the file is no such package or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        wanted: dict[str, dict] = {"package/package.json": {}, "package/collections.json": {}}
        for name, content in self._read(wanted):
            wanted[name] = content
        self.version = str(wanted["package/package.json"].get("version", "unknown"))
        self.collections: dict[str, dict] = wanted["package/collections.json"]
        if not self.collections:
            raise BuildError(f"{path} holds no package/collections.json; make the package with: {PACK_COMMAND}")

    def icon_sets(self, prefixes: set[str]) -> Iterator[tuple[str, dict]]:
        """Read icon sets one after the other, in the order of the tarball.

        Args:
            prefixes: the sets to read; those that the package lacks are passed over.
        Yields:
            Pairs of a prefix and the set's data (icons, aliases, suffixes, prefixes, categories, chars …).
        Raises:
            BuildError: the tarball is damaged.
        """
        for name, data in self._read({f"package/json/{prefix}.json" for prefix in prefixes}):
            yield Path(name).stem, data

    def _read(self, names: "set[str] | dict[str, dict]") -> Iterator[tuple[str, dict]]:
        try:
            with tarfile.open(self.path, "r:gz") as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.name in names else None
                    if file is not None:
                        yield member.name, json.loads(file.read())
        except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
            raise BuildError(
                f"{self.path} cannot be read as an npm package ({error}); make it anew with: {PACK_COMMAND}"
            ) from error
