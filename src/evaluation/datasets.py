"""Readers of evaluation data: image–text pairs in shards, and classification sets in shards or in folders. All local.

A tar file is indexed once by its headers and then read by offset, so a sample has a fixed global index, every process
reads only its own samples, and nothing is unpickled. Rank r of K takes the samples i with i % K == r; a DataLoader shares
those among its workers.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from evaluation.errors import NoPairsError, UserError
from evaluation.sample_json import json_object
from evaluation.zero_shot import Template

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
# Pillow knows many more formats, and runs programs for some (Ghostscript for EPS), whatever the name of the file.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
MOST_SHARDS = 100_000
DEFAULT_TEMPLATES = ("a photo of a {c}.",)

Transform = Callable[[Image.Image], Any]
Tokenizer = Callable[[list[str]], Tensor]


class Member(NamedTuple):
    """Where one file of a shard lies: shard number, offset and size in bytes."""

    shard: int
    offset: int
    size: int


class ShardIndex:
    """The samples of a list of tar shards, found by reading the headers only.

    Consecutive members that share a key (the name up to the first dot of its last part) are one sample, as in webdataset.

    Args:
        shards: paths of uncompressed tar files.

    Attributes:
        keys: the key of every sample.
        members: for every sample, lower-case extension → Member.

    Raises:
        UserError: for a shard that is missing, compressed or not a tar file, and for one name twice in a sample.
    """

    def __init__(self, shards: Sequence[str | Path]) -> None:
        self.shards = [str(shard) for shard in shards]
        self.keys: list[str] = []
        self.members: list[dict[str, Member]] = []
        self._open_file: tuple[int, int, BinaryIO] | None = None
        for number, shard in enumerate(self.shards):
            for key, members in _scan_shard(shard, number):
                self.keys.append(key)
                self.members.append(members)

    def __len__(self) -> int:
        return len(self.members)

    def keep(self, wanted: Callable[[dict[str, Member]], bool]) -> int:
        """Drop the samples whose members are not `wanted`; returns how many were dropped."""
        kept = [i for i, members in enumerate(self.members) if wanted(members)]
        dropped = len(self) - len(kept)
        self.keys = [self.keys[i] for i in kept]
        self.members = [self.members[i] for i in kept]
        return dropped

    def read(self, member: Member) -> bytes:
        """The content of a member."""
        # A file handle must not be shared with a forked worker: they would move each other's position.
        if self._open_file is None or self._open_file[:2] != (os.getpid(), member.shard):
            if self._open_file is not None:
                self._open_file[2].close()
            self._open_file = (os.getpid(), member.shard, open(self.shards[member.shard], "rb"))  # noqa: SIM115
        file = self._open_file[2]
        file.seek(member.offset)
        content = file.read(member.size)
        if len(content) < member.size:
            raise UserError(f"shard {self.shards[member.shard]} ends inside a member; copy or rebuild it.")
        return content

    def name(self, i: int) -> str:
        """Sample i in words, for messages."""
        return f"sample {self.keys[i]} of {self.shards[next(iter(self.members[i].values())).shard]}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_file": None}


def _scan_shard(shard: str, number: int) -> Iterator[tuple[str, dict[str, Member]]]:
    if not Path(shard).is_file():
        raise UserError(f"shard {shard} does not exist; check the path and the brace range of the pattern.")
    key = ""
    members: dict[str, Member] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.size < 0:
                    raise tarfile.ReadError(f"the size of {info.name} is negative")
                prefix, extension = base_plus_ext(info.name) if info.isreg() else (None, None)
                if prefix is None or extension is None or prefix.startswith("__"):
                    continue
                if prefix != key:
                    if members:
                        yield key, members
                    key, members = prefix, {}
                extension = extension.lower()
                if extension in members:
                    raise UserError(f"shard {shard} holds {info.name} twice; rebuild it with one key per sample.")
                members[extension] = Member(number, info.offset_data, info.size)
            # tarfile takes a damaged header for the end, and a file that is cut off between two members for whole.
            _check_end(shard, tar.offset)
    except UserError:
        raise
    except Exception as error:
        # What tarfile raises at damage depends on the field: tarfile.TarError, ValueError, OverflowError, MemoryError.
        raise UserError(f"shard {shard} is not an uncompressed tar file ({error}); rebuild or gunzip it.") from None
    if members:
        yield key, members


def _check_end(shard: str, offset: int) -> None:
    """Checks that an archive has its end mark where its members end."""
    with open(shard, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header and no end-of-archive mark at byte {offset}")


def _has(members: dict[str, Member], extension: str) -> bool:
    """Whether a sample has an image and a member of an extension."""
    return extension in members and any(image in members for image in IMAGE_EXTENSIONS)


def _image_member(members: dict[str, Member]) -> Member:
    return next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members)


def expand_shards(pattern: str) -> list[str]:
    """Paths of the shards that a pattern names: braces {000..012}, *, folders (their *.tar), several joined by `::`.

    Raises:
        UserError: for a folder or a pattern without shards.
    """
    shards: list[str] = []
    for part in pattern.split("::"):
        if Path(part).is_dir():
            found = sorted(map(str, Path(part).glob("*.tar")))
            if not found:
                raise UserError(f"{part} holds no *.tar; give the folder or the pattern of the shards.")
            shards.extend(found)
        else:
            for path in expand_urls(part):
                shards.extend(sorted(glob.glob(path)) if glob.has_magic(path) and not Path(path).exists() else [path])
    if not shards:
        raise UserError(f"{pattern} matches no shard; correct the path.")
    return shards


def decode_image(data: bytes, name: str, mode: str | None = "RGB") -> Image.Image:
    """Decode one image.

    Args:
        data: the file's content.
        name: what messages call it.
        mode: the mode of the result; None for that of the file, which a transform that converts after resizing expects.

    Raises:
        UserError: if the bytes are no image, with `name` in the message.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if mode is not None:
            return image.convert(mode)
        image.load()
        return image
    except Exception as error:
        # Decoders raise whatever their format suggests (SyntaxError, struct.error, …), for damage alone.
        raise UserError(f"{name}: the image cannot be decoded ({error}); remove or rebuild the sample.") from None


class Share(Dataset[dict[str, Any]]):
    """The samples of one rank: local position p stands for global index rank + p * world_size.

    Args:
        total: number of samples of all ranks.
        rank, world_size: whose share this is.

    Raises:
        ValueError: if rank is not in 0 … world_size−1.
    """

    def __init__(self, total: int, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} ranks: rank must be in 0 … world_size-1.")
        self.total, self.rank, self.world_size = total, rank, world_size

    def __len__(self) -> int:
        return len(range(self.rank, self.total, self.world_size))

    def global_index(self, position: int) -> int:
        """The global index of local sample `position`.

        Raises:
            IndexError: past the end of the share, which is how a for loop over a Dataset ends.
        """
        return range(self.rank, self.total, self.world_size)[position]


class PairDataset(Share):
    """Image–text pairs in webdataset shards: png|jpg|jpeg|webp + txt, and optionally json with a "concept".

    As in training, a "caption" in the json stands in for a txt that is not there.

    Samples without an image or a caption are left out (`skipped` counts them). Gaps in the keys do not matter.

    Args:
        pattern: shard paths; braces {000..012} expand, a folder stands for its *.tar, `::` joins several patterns.
        transform: PIL image (RGB) → anything a DataLoader can collate; None leaves images out of the samples.
        tokenizer: list of strings → tokens [B, context_length]; None leaves tokens out of the samples.
        rank, world_size: the share of the samples that `len` and indexing see.
        limit: only the first that many pairs; None for all.

    A sample is a dict of `image`, `text` (tokens [context_length]) and `index` (global index, int).

    Raises:
        UserError: for a missing or broken shard, or shards without a single pair.
    """

    def __init__(
        self,
        pattern: str,
        transform: Transform | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
    ) -> None:
        self.index = ShardIndex(expand_shards(pattern))
        self.skipped = self.index.keep(self._is_pair)
        if not len(self.index):
            raise NoPairsError(f"{pattern}: no sample has both an image and a txt; check the shards.")
        total = len(self.index) if limit is None else min(limit, len(self.index))
        super().__init__(total, rank, world_size)
        self.transform, self.tokenizer = transform, tokenizer

    def __getitem__(self, position: int) -> dict[str, Any]:
        i = self.global_index(position)
        sample: dict[str, Any] = {"index": i}
        if self.transform is not None:
            sample["image"] = self.transform(self.image(i))
        if self.tokenizer is not None:
            sample["text"] = self.tokenizer([self.caption(i)])[0]
        return sample

    def image(self, i: int) -> Image.Image:
        """The RGB image with global index i, of any rank's share."""
        return decode_image(self.index.read(_image_member(self.index.members[i])), self.index.name(i))

    def caption(self, i: int) -> str:
        """The caption with global index i."""
        if "txt" in self.index.members[i]:
            return self._text(i, "txt").strip()
        return str(json_object(self.index.read(self.index.members[i]["json"])).get("caption", "")).strip()

    def _is_pair(self, members: dict[str, Member]) -> bool:
        if _has(members, "txt"):
            return True
        return _has(members, "json") and isinstance(json_object(self.index.read(members["json"])).get("caption"), str)

    def concept(self, i: int) -> str:
        """The "concept" in the json of the sample with global index i; empty if there is none."""
        if "json" not in self.index.members[i]:
            return ""
        try:
            facts = json.loads(self._text(i, "json"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.index.name(i)}: its json cannot be read ({error}); rebuild the sample.") from None
        return str(facts.get("concept", "")) if isinstance(facts, dict) else ""

    def captions(self) -> list[str]:
        """The captions of all samples of all ranks, in global order."""
        return [self.caption(i) for i in range(self.total)]

    def caption_ids(self) -> Tensor:
        """[total] int64: equal for samples whose captions are equal, in global order and over all ranks."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(text, len(numbers)) for text in self.captions()], dtype=torch.int64)

    def _text(self, i: int, extension: str) -> str:
        try:
            return self.index.read(self.index.members[i][extension]).decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.index.name(i)}: its {extension} is not UTF-8; rebuild the sample.") from None


class ShardClassification(Share):
    """Images and labels in shards: an image and `cls` (the class number as decimal text) per sample.

    Args:
        shards: paths of the tar files.
        number_of_classes: labels must be below it.
        transform: PIL image (RGB) → anything a DataLoader can collate.
        rank, world_size: the share of the samples that `len` and indexing see.

    A sample is a dict of `image`, `label` (int) and `index` (global index, int).

    Raises:
        UserError: for a missing or broken shard, and shards without a labelled image; on reading, for a bad label.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        number_of_classes: int,
        transform: Transform | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.index = ShardIndex(shards)
        self.skipped = self.index.keep(lambda members: _has(members, "cls"))
        if not len(self.index):
            raise UserError(f"{shards[0]} and its sisters: no sample has both an image and a cls; check the shards.")
        super().__init__(len(self.index), rank, world_size)
        self.number_of_classes, self.transform = number_of_classes, transform

    def __getitem__(self, position: int) -> dict[str, Any]:
        i = self.global_index(position)
        members = self.index.members[i]
        image = decode_image(self.index.read(_image_member(members)), self.index.name(i))
        image = image if self.transform is None else self.transform(image)
        return {"image": image, "label": self._label(i), "index": i}

    def _label(self, i: int) -> int:
        return class_number(self.index.read(self.index.members[i]["cls"]), self.number_of_classes, self.index.name(i))


def class_number(content: bytes, number_of_classes: int, name: str) -> int:
    """The class in a `cls` member, which is decimal text.

    Raises:
        UserError: if it is no number in 0 … number_of_classes−1, with `name` in the message.
    """
    text = content.decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) >= number_of_classes:
        raise UserError(f"{name}: cls is {text[:40]!r}; it must be a number in 0 … {number_of_classes - 1}.")
    return int(text)


class FolderClassification(Share):
    """Images in one folder per class; the label is the folder's place in the sorted list of folders.

    Args:
        folders: the class folders, sorted.
        transform: PIL image (RGB) → anything a DataLoader can collate.
        rank, world_size: the share of the samples that `len` and indexing see.

    A sample is a dict of `image`, `label` (int) and `index` (global index, int).

    Raises:
        UserError: if no folder holds an image.
    """

    def __init__(
        self, folders: Sequence[Path], transform: Transform | None = None, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.files = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
        ]
        if not self.files:
            raise UserError(f"{folders[0].parent}: no class folder holds a {', '.join(IMAGE_EXTENSIONS)} image.")
        super().__init__(len(self.files), rank, world_size)
        self.transform = transform

    def __getitem__(self, position: int) -> dict[str, Any]:
        i = self.global_index(position)
        path, label = self.files[i]
        image = decode_image(path.read_bytes(), str(path))
        return {"image": image if self.transform is None else self.transform(image), "label": label, "index": i}


class ClassificationSource(NamedTuple):
    """A classification set: C class names, the prompt templates, and the labelled images."""

    class_names: list[str]
    templates: list[Template]
    dataset: ShardClassification | FolderClassification


def open_classification(
    path: str | Path, transform: Transform | None = None, *, rank: int = 0, world_size: int = 1
) -> ClassificationSource:
    """Open a classification set, in shards or in folders.

    Shards, as clip_benchmark lays them out: classnames.txt, zeroshot_classification_templates.txt (lines with {c}),
    test/nshards.txt, test/0.tar … of image + cls. Folders: one per class. 1,000 folders with WordNet ids are ImageNet and
    1,000 with the numbers 0 … 999 are ImageNet-V2, in the order of ImageNet's class names; any other set needs
    classnames.txt beside the folders, a line per folder in sorted order, and may have
    zeroshot_classification_templates.txt (else "a photo of a {c}.").

    Args:
        path: the folder of the set.
        transform: PIL image (RGB) → anything a DataLoader can collate.
        rank, world_size: the share of the samples that the dataset holds.

    Raises:
        UserError: for a folder that is neither, or lacks a file; the message says which.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"--zeroshot {root} is not a folder; give the folder of a classification set.")
    if (root / "test" / "nshards.txt").is_file():
        names, templates = read_prompts(root)
        dataset = ShardClassification(numbered_shards(root), len(names), transform, rank=rank, world_size=world_size)
        return ClassificationSource(names, templates, dataset)
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if len(folders) == 1 and folders[0].name.startswith("ImageNetV2"):
        # The archive of ImageNet-V2 unpacks into one folder, which holds those of the classes.
        root = folders[0]
        folders = [folder for folder in root.iterdir() if folder.is_dir()]
    if {folder.name for folder in folders} == {str(number) for number in range(1000)}:
        # ImageNet-V2 names its folders by class number, which as text sorts 0, 1, 10, 100.
        folders.sort(key=lambda folder: int(folder.name))
    if not folders:
        raise UserError(f"--zeroshot {root} has neither test/nshards.txt nor class folders; see the layouts supported.")
    names, templates = _folder_names(root, folders)
    return ClassificationSource(
        names, templates, FolderClassification(folders, transform, rank=rank, world_size=world_size)
    )


def read_prompts(root: Path) -> tuple[list[str], list[Template]]:
    """Class names and templates of a set in clip_benchmark's layout: the lines of its two text files.

    Raises:
        UserError: if one of them is missing, empty, not UTF-8 or has an empty line between others.
    """
    return _lines(root / "classnames.txt"), _lines(root / "zeroshot_classification_templates.txt")


def numbered_shards(root: Path) -> list[Path]:
    """The paths root/test/0.tar … that root/test/nshards.txt promises, there or not.

    Raises:
        UserError: if that file does not hold the number of shards.
    """
    text = (root / "test" / "nshards.txt").read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= MOST_SHARDS:
        raise UserError(f"{root}/test/nshards.txt says {text[:40]!r}; it must hold the number of shards.")
    return [root / "test" / f"{number}.tar" for number in range(int(text))]


def _folder_names(root: Path, folders: list[Path]) -> tuple[list[str], list[Template]]:
    """The class names and templates of a set in folders."""
    own_names, own_templates = root / "classnames.txt", root / "zeroshot_classification_templates.txt"
    if not own_names.is_file():
        if len(folders) == 1000 and all(re.fullmatch(r"n\d{8}|\d{1,3}", folder.name) for folder in folders):
            return list(open_clip.IMAGENET_CLASSNAMES), list(open_clip.OPENAI_IMAGENET_TEMPLATES)
        raise UserError(
            f"--zeroshot {root} has {len(folders)} class folders that are not ImageNet's 1,000: "
            f"add {own_names}, one name per line in the sorted order of the folders."
        )
    names = _lines(own_names)
    if len(names) != len(folders):
        raise UserError(f"{own_names} has {len(names)} names for {len(folders)} class folders; give one per folder.")
    return names, _lines(own_templates) if own_templates.is_file() else list(DEFAULT_TEMPLATES)


def _lines(path: Path) -> list[Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; a classification set needs it, one entry per line.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; fetch or write it again.") from None
    if not any(lines):
        raise UserError(f"{path} is empty; it needs one entry per line.")
    if not all(lines):
        # Left out, every later class would get the label of its neighbour.
        raise UserError(f"{path}: line {lines.index('') + 1} is empty; it needs one entry per line.")
    return lines
