"""Counting the samples of a tar file by its headers alone: seeks from header to header and reads no member.

A sample is what webdataset's grouping makes one: a run of files that share the name up to the first dot of its last
part. Counts agree with what reading the shard yields, position by position.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext, meta_prefix, meta_suffix

BLOCK = 512
# The same names that webdataset's tar iteration leaves out.
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)
# What comes between a long name and the file it names.
_HEADERS_OF_OTHERS = (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
_PAX_TIMES = re.compile(rb"(?:\d+ [amc]time=[0-9.]+\n)+")
_PAX_PATH = re.compile(rb"\d+ path=([^\n]*)\n")


@dataclass(frozen=True)
class TarCount:
    """samples: whole samples found; damage: what is wrong with the file, or None."""

    samples: int
    damage: str | None = None


def sample_name(member: str) -> str | None:
    """The name of the sample that a member belongs to, None when it belongs to none."""
    is_meta = "/" not in member and member.startswith(meta_prefix) and member.endswith(meta_suffix)
    return None if is_meta or _SKIPPED.match(member) else base_plus_ext(member)[0]


def count_samples(path: str) -> TarCount:
    """Counts the samples of a local tar file (a compressed one is read through).

    A damaged file counts the samples that lie whole before the damage. Nothing is raised for damage.
    """
    samples, current = 0, None
    try:
        for member in _members(path):
            name = sample_name(member)
            if name is not None and name != current:
                samples, current = samples + 1, name
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        # The last sample may lack the files that the damage took.
        return TarCount(max(samples - 1, 0), _in_one_line(error))
    return TarCount(samples)


def check_first_header(path: str) -> str | None:
    """What keeps `path` from being read as a tar file, None if its first header is sound."""
    try:
        with tarfile.open(path, "r:*") as tar:
            tar.next()
    except (tarfile.TarError, EOFError, OSError) as error:
        return _in_one_line(error)
    return None


def _in_one_line(error: Exception) -> str:
    # tarfile lists what it tried, a line for each kind of compression; the first line says that all failed.
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(":")


def _members(path: str) -> Iterator[str]:
    """Names of the regular files of a tar file, in order. Raises tarfile.TarError or OSError at the first damage."""
    with open(path, "rb") as stream:
        length = os.fstat(stream.fileno()).st_size
        try:
            tarfile.TarInfo.frombuf(stream.read(BLOCK), "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            return
        except tarfile.HeaderError:
            plain = False
        else:
            plain = True
        if plain:
            stream.seek(0)
            yield from _plain_members(stream, length)
            return
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            if member.isreg():
                yield member.name


def _plain_members(stream: BinaryIO, length: int) -> Iterator[str]:
    long_name: str | None = None
    while True:
        header = stream.read(BLOCK)
        plain = None if long_name else plain_file(header)
        if plain is not None and stream.tell() + plain[1] <= length:
            stream.seek(-(-plain[1] // BLOCK) * BLOCK, os.SEEK_CUR)
            yield plain[0]
            continue
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            return
        except tarfile.HeaderError as error:
            where = stream.tell() - len(header)
            what = "cut short, no end-of-archive mark" if not header else str(error)
            raise tarfile.ReadError(f"{what} at byte {where} of {length}") from None
        padded = -(-member.size // BLOCK) * BLOCK
        if stream.tell() + member.size > length:
            raise tarfile.ReadError(f"cut short at byte {length}, inside {long_name or member.name}")
        if member.type == tarfile.GNUTYPE_LONGNAME:
            long_name = stream.read(padded)[: member.size].rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif member.type == tarfile.XHDTYPE:
            found = _PAX_PATH.search(stream.read(padded)[: member.size])
            long_name = found.group(1).decode("utf-8", "surrogateescape") if found else long_name
        else:
            # Links and folders carry no data even when their header gives a size.
            stream.seek(0 if member.type in _WITHOUT_DATA else padded, os.SEEK_CUR)
            if member.isreg():
                yield long_name or member.name
            if member.type not in _HEADERS_OF_OTHERS:
                long_name = None


def plain_file(header: bytes) -> tuple[str, int] | None:
    """What the header of a regular file with nothing special says; None leaves it to tarfile, 8 times slower.

    Args:
        header: 512 bytes, or fewer at the end of a file.

    Returns:
        name and size in bytes.
    """
    if len(header) < BLOCK or header[156:157] not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header[345]:
        return None
    name = header[:100].split(b"\0", 1)[0]
    try:
        size = int(header[124:136].strip(b" \0"), 8)
        checksum = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    # The sum is taken with eight blanks in place of the checksum itself.
    if sum(header) - sum(header[148:156]) + 8 * 32 != checksum or name.endswith(b"/"):
        return None
    return name.decode("utf-8", "surrogateescape"), size


def only_times(header: bytes, content: bytes) -> bool:
    """Whether a pax header gives the next member nothing but times, as Python writes it for times with a fraction."""
    return header[156:157] == tarfile.XHDTYPE and _PAX_TIMES.fullmatch(content.rstrip(b"\0")) is not None


def ends_archive(header: bytes) -> bool:
    """Whether tarfile takes a header between two members for the end of an archive: the mark, nothing, or a damaged one."""
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return True
    return False
