"""Walking through a tar file from member to member: the one way in which samples are counted and read.

Positions of samples hang on it, so what it makes of a damaged file depends on the file alone, and not on which members
somebody wants to read. tarfile would take 60 µs a member and end at the first damaged header without a word; here the
walk goes on at the next sound header, wherever that lies. Members are never written anywhere, links are not followed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol

from webdataset.tariterators import base_plus_ext, meta_prefix, meta_suffix

from training.data.samples import Problem

BLOCK = 512
_ZEROS = bytes(BLOCK)
# What lies beyond this many bytes without a header between them is not looked for.
SEARCHED_BYTES = 512 * 2**20
# A longer name is no name.
_LONGEST_NAME = 2**20
_CHUNK = 2**18
_REGULAR = (b"0", b"\0", b"7")
# Links, devices, folders, pipes: no data follows even when their header gives a size.
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_LONG_NAME, _LONG_LINK = b"L", b"K"
_PAX = (b"x", b"X")
_PAX_GLOBAL = b"g"
# Its data are in pieces, with a list of them in blocks of their own.
_SPARSE = b"S"
_MAGIC, _MAGIC_AT = b"ustar", 257
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
LONGEST_MAGIC = max(map(len, _COMPRESSED))
# The same names that webdataset's tar iteration leaves out.
_SKIPPED = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """A regular file in a tar file.

    name: as it stands there; bytes that are not utf-8 are escaped as by os.fsdecode.
    size: of its content, in bytes.
    whole: False when the file is known to end before the content does.
    """

    name: str
    size: int
    whole: bool


class Damage(NamedTuple):
    """Something that is wrong with a shard as a whole: one of the kinds of Problem, and in words."""

    kind: str
    detail: str


class DamagedCompressionError(Exception):
    """A compressed tar file cannot be decompressed any further."""


class TarBytes(Protocol):
    """The bytes of a tar file, from the first on."""

    def read(self, size: int) -> bytes:
        """The next bytes, fewer only at the end."""
        ...

    def move_to(self, position: int) -> bool:
        """Goes on to a position; False if the file ends before it."""
        ...

    def holds(self, end: int) -> bool:
        """False if the file is known to end before this position."""
        ...

    def unread(self, content: bytes) -> None:
        """Goes back before what was read last."""
        ...

    def rewind(self, position: int) -> bool:
        """Goes back to any position; False where that cannot be done."""
        ...


class LocalBytes:
    """An uncompressed local file: what is not wanted is never read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._length = os.fstat(file.fileno()).st_size
        self.read = file.read

    def move_to(self, position: int) -> bool:
        """Moves only if the file is long enough."""
        if position > self._length:
            return False
        self._file.seek(position)
        return True

    def holds(self, end: int) -> bool:
        """By the length of the file."""
        return end <= self._length

    def unread(self, content: bytes) -> None:
        """Goes back by the length of the content."""
        self._file.seek(-len(content), os.SEEK_CUR)

    def rewind(self, position: int) -> bool:
        """Always possible."""
        self._file.seek(position)
        return True


class ForwardBytes:
    """A stream that only goes forward."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._ahead = b""
        self._position = 0

    def read(self, size: int) -> bytes:
        """From what was unread first."""
        content, self._ahead = self._ahead[:size], self._ahead[size:]
        if len(content) < size:
            try:
                content += self._stream.read(size - len(content))
            except DamagedCompressionError:
                # What was unread lies before the damage.
                if not content:
                    raise
        self._position += len(content)
        return content

    def move_to(self, position: int) -> bool:
        """Reads up to there."""
        while self._position < position:
            if not self.read(min(position - self._position, _CHUNK)):
                return False
        return True

    def holds(self, end: int) -> bool:
        """Not known before it is read."""
        return True

    def unread(self, content: bytes) -> None:
        """Keeps the content for the next reading."""
        self._ahead = content + self._ahead
        self._position -= len(content)

    def rewind(self, position: int) -> bool:
        """Never possible."""
        return False


class _Decompressed:
    """A stream whose damage is told apart from that of the stream below it, and told after all that comes before it."""

    def __init__(self, stream: io.BufferedReader) -> None:
        """stream: of gzip, bz2 or lzma, which have this method too."""
        self._read_some = stream.read1
        self._damage: DamagedCompressionError | None = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer at the end or at damage; raises DamagedCompressionError where that is met."""
        parts: list[bytes] = []
        while size > 0 and self._damage is None:
            try:
                part = self._read_some(size)
            except (zlib.error, lzma.LZMAError, EOFError) as error:
                self._damage = DamagedCompressionError(str(error))
            except OSError as error:
                # bz2 and gzip raise a bare OSError for damage; one of the system has a number, one of a stream a type.
                if error.errno is not None or type(error) not in (OSError, gzip.BadGzipFile):
                    raise
                self._damage = DamagedCompressionError(str(error))
            else:
                if not part:
                    break
                parts.append(part)
                size -= len(part)
        if self._damage is not None and not parts:
            raise self._damage
        return b"".join(parts)


def tar_bytes(file: io.BufferedReader, local: bool) -> TarBytes:
    """A file opened at its beginning as the walk wants it: decompressed if it is gzip, bzip2 or xz.

    Args:
        file: the local file, or a stream.
        local: whether the file may be moved about in.
    """
    begin = file.peek(LONGEST_MAGIC)
    for magic, decompress in _COMPRESSED.items():
        if begin.startswith(magic):
            return ForwardBytes(_Decompressed(decompress(file)))  # type: ignore[arg-type]
    return LocalBytes(file) if local else ForwardBytes(file)


def split_name(member: str) -> tuple[str | None, str | None]:
    """The sample that a member belongs to and its suffix, which are up to and after the first dot of the last part.

    (None, None) for a member that belongs to no sample.
    """
    if member.startswith(meta_prefix):
        is_meta = "/" not in member and member.endswith(meta_suffix)
        if is_meta or _SKIPPED.match(member):
            return None, None
    return base_plus_ext(member)


def walk(source: TarBytes) -> Iterator[Member | Damage]:
    """The regular files of a tar file, in order, and what is wrong with it, where it is met.

    After a member its content may be read from the source, or left. After damage the walk goes on at the next sound header.

    Raises:
        OSError: of reading.
    """
    try:
        yield from _walk(source)
    except DamagedCompressionError as error:
        yield Damage(Problem.BAD_COMPRESSION, f"cannot be decompressed ({error})")


def _walk(source: TarBytes) -> Iterator[Member | Damage]:
    begin = 0
    announced: dict[str, str | int] = {}
    while begin >= 0:
        block = source.read(BLOCK)
        header = parse_header(block)
        if header is None or header.kind == _SPARSE:
            damage, begin = _after_damage(source, begin, block)
            announced = {}
            if damage is not None:
                yield damage
            continue
        data, size = begin + BLOCK, header.size
        if header.kind in _REGULAR:
            name = header.name
            if announced:
                size, name = int(announced.get("size", size)), str(announced.get("path", name))
                announced = {}
            # Of old, a file with such a name was a folder.
            if not name.endswith("/"):
                yield Member(name, size, source.holds(data + size))
        elif header.kind in _WITHOUT_DATA:
            size, announced = 0, {}
        elif header.kind in (_LONG_NAME, *_PAX) and size <= _LONGEST_NAME:
            # A name of one kind of header does not undo a size of the other.
            announced |= _announced(header.kind, source.read(size))
        elif header.kind not in (_LONG_LINK, _PAX_GLOBAL):
            announced = {}
        begin = data + size + -size % BLOCK
        if not source.move_to(begin):
            damage, begin = _after_cut(source, data)
            announced = {}
            yield damage


def _after_cut(source: TarBytes, data: int) -> tuple[Damage, int]:
    """What a member that is longer than the file means, and where the next header is; a negative number for nowhere."""
    header = data - BLOCK
    following = _find_header(source, b"", data) if source.rewind(data) else -1
    if following < 0:
        return Damage(Problem.TRUNCATED, f"cut short, inside the member whose header is at byte {header}"), -1
    return Damage(Problem.BAD_HEADER, f"the header at byte {header} gives a size that is too large"), following


def _after_damage(source: TarBytes, begin: int, block: bytes) -> tuple[Damage | None, int]:
    """What a block that is no header means, and where the next header is; a negative number for nowhere."""
    if block == _ZEROS:
        # The end-of-archive mark, unless something wrote zeros over headers or tar files were joined end to end.
        try:
            following = _find_header(source, b"", begin + BLOCK)
        except (OSError, DamagedCompressionError):
            # How a stream ends is of no concern once the archive has.
            return None, -1
        if following < 0:
            return None, -1
        return Damage(
            Problem.BAD_HEADER, f"after an end-of-archive mark at byte {begin} the archive goes on"
        ), following
    following = _find_header(source, block[1:], begin + 1)
    if following >= 0:
        return Damage(Problem.BAD_HEADER, f"damaged header at byte {begin}"), following
    if begin == 0:
        return Damage(Problem.NOT_TAR, "empty file" if not block else "no tar header at its beginning"), -1
    if len(block) < BLOCK:
        return Damage(Problem.TRUNCATED, f"cut short at byte {begin + len(block)}, no end-of-archive mark"), -1
    return Damage(Problem.BAD_HEADER, f"damaged header at byte {begin}, and no other after it"), -1


def _find_header(source: TarBytes, window: bytes, begin: int) -> int:
    """Moves the source to the next sound header, at any byte; returns its position, or −1 if there is none.

    Args:
        source: stands after the window.
        window: bytes read already.
        begin: their position.
    """
    searched = 0
    while searched <= SEARCHED_BYTES:
        found = window.find(_MAGIC, _MAGIC_AT)
        while found >= 0 and found - _MAGIC_AT + BLOCK <= len(window):
            start = found - _MAGIC_AT
            if parse_header(window[start : start + BLOCK]) is not None:
                source.unread(window[start:])
                return begin + start
            found = window.find(_MAGIC, found + 1)
        more = source.read(_CHUNK)
        if not more:
            return -1
        searched += len(more)
        # A header may begin in what is kept and end in what comes.
        kept = window[max(len(window) - BLOCK + 1, 0) :]
        begin += len(window) - len(kept)
        window = kept + more
    return -1


class Header(NamedTuple):
    """A block with a sound checksum; size is in bytes."""

    name: str
    size: int
    kind: bytes


def parse_header(block: bytes) -> Header | None:
    """What a header says; None for anything that is no sound header.

    Args:
        block: 512 bytes, or fewer at the end of a file.
    """
    if len(block) < BLOCK:
        return None
    try:
        field = block[148:156]
        checksum = int(field.strip(b" \0"), 8)
        size = _size(block[124:136])
    except ValueError:
        return None
    # The sum is taken with eight blanks in place of the checksum itself; old programs took bytes for signed.
    total = sum(block) - sum(field) + 8 * 32
    if (total != checksum and total - 256 * _negative_bytes(block) != checksum) or size < 0:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return Header(name.decode("utf-8", "surrogateescape"), size, block[156:157])


def _size(field: bytes) -> int:
    """Octal digits; or, from 8 GiB on, a binary number with the first bit set. Raises ValueError for anything else."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    return int(field.strip(b" \0") or b"0", 8)


def _negative_bytes(block: bytes) -> int:
    return sum(byte > 127 for byte in block[:148] + block[156:])


def _announced(kind: bytes, content: bytes) -> dict[str, str | int]:
    """Path and size that the content of a special header gives to the next member; what makes no sense is left out."""
    if kind == _LONG_NAME:
        return {"path": content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str | int] = {}
    at = 0
    while at < len(content):
        # Each record is "LENGTH key=value\n", and the length counts all of it.
        digits, blank, _ = content[at : at + 20].partition(b" ")
        if not blank or not digits.isdigit() or not int(digits):
            break
        key, _, value = content[at + len(digits) + 1 : at + int(digits)].removesuffix(b"\n").partition(b"=")
        if key == b"path":
            found["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) < 20:
            found["size"] = int(value)
        at += int(digits)
    return found
