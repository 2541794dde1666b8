"""Small sets of every task of the suite, in every layout, made from a seed. Needs nothing but numpy, Pillow and pyarrow."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from evaluation.datacomp.grouped import FIELDS, OBJECTIVES
from evaluation.datacomp.tasks import TASKS, Kind, Task

# The last two are images in the modes that datasets hold besides RGB.
FORMATS = (("webp", "RGB"), ("png", "RGB"), ("jpg", "RGB"), ("jpeg", "L"), ("png", "P"), ("png", "RGBA"))
NOUNS = ("otter", "lamp", "bridge", "violin", "cactus", "anchor", "teapot", "canyon", "ferry", "walnut", "glacier")
TEMPLATES = ("a photo of a {c}.", "{c}", "art of the {c}, in a scene")
# Objective → number of classes; the 14th to the 17th toxic class are not human, those after them crimes.
FACES = {"race": 7, "gender": 2, "age": 9, "toxic": 21}
# Highest value + 1 of the metadata fields that make groups.
GROUPS = {"slide": 6, "region": 5, "year": 4, "income_ds": 4, "age": 9, "gender": 2, "race": 7, "race_binary": 2}
MOST_CLASSES = 7
ORIENTATION = 0x0112


def picture(generator: np.random.Generator, shade: int, mode: str = "RGB") -> Image.Image:
    """Blocks of random colours, mostly those of a shade, of a random size."""
    height, width = generator.integers(20, 44, 2)
    base = np.random.default_rng(shade).integers(0, 256, (4, 4, 3))
    blocks = np.clip(base + generator.integers(-90, 90, (4, 4, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(blocks).resize((int(width), int(height)), Image.Resampling.BICUBIC)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(generator.integers(0, 256, (int(height), int(width)), dtype=np.uint8)))
        return image
    return image.convert(mode)


def encoded(image: Image.Image, extension: str, orientation: int | None = None) -> bytes:
    """The image as the content of a file; webp without loss."""
    file = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    image.save(file, {"jpg": "JPEG"}.get(extension, extension.upper()), lossless=True, exif=exif)
    return file.getvalue()


def array_bytes(values: Sequence[float]) -> bytes:
    """An `npy` member."""
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """A shard of (key, extension → content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_set(task: Task | str, data_dir: Path, *, seed: int = 0, images: int = 17, layout: str = "") -> Path:
    """Write a small set of a task.

    Args:
        task: it or its key.
        data_dir: the folder of all sets.
        seed: what the pixels, labels and metadata are drawn from, with the task's key.
        images: how many (instances for WinoGAViL).
        layout: for retrieval and WinoGAViL: "cache" (a prepared cache of the datasets library; the default), "parquet",
            "user-parquet", "hub" (a snapshot of the hub's client), "shards" (retrieval only).

    Returns:
        The folder that was written.
    """
    task = TASKS[task] if isinstance(task, str) else task
    generator = np.random.default_rng([seed, *task.key.encode()])
    if task.kind is Kind.RETRIEVAL:
        return _write_pairs(task, data_dir, generator, images, layout or "cache")
    if task.kind is Kind.WINOGAVIL:
        rows = [_instance(generator, number) for number in range(images)]
        return write_table(task, data_dir, rows, layout or "cache")
    folder = data_dir / task.folder
    classes = 0 if task.kind is Kind.FACES else min(task.classes or 0, MOST_CLASSES)
    write_shards(folder, [_labelled(task, generator, number, classes) for number in range(images)])
    if task.kind is Kind.FACES:
        names = [f"{objective}:{objective} {number}" for objective, most in FACES.items() for number in range(most)]
        templates = [f"{objective}:{template}" for objective in OBJECTIVES for template in TEMPLATES]
    else:
        # Sets with as many classes share their names, as ImageNet and its kin do.
        names, templates = [NOUNS[label] for label in range(classes)], list(TEMPLATES)
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    return folder


def write_shards(folder: Path, samples: Sequence[dict[str, bytes]], shards: int = 2) -> None:
    """Samples in test/0.tar … with test/nshards.txt."""
    size = -(-len(samples) // shards)
    for number in range(shards):
        mine = range(number * size, min((number + 1) * size, len(samples)))
        write_tar(folder / "test" / f"{number}.tar", [(f"s{i:07d}", samples[i]) for i in mine])
    (folder / "test" / "nshards.txt").write_text(f"{shards}")


def _labelled(task: Task, generator: np.random.Generator, number: int, classes: int) -> dict[str, bytes]:
    label = int(generator.integers(max(classes - 1, 1))) if classes > 2 else number % 2  # one class does not occur
    extension, mode = FORMATS[number % len(FORMATS)]
    sample = {extension: encoded(picture(generator, label, mode), extension)}
    if classes:
        sample["cls"] = str(label).encode()
    if task.key in FIELDS:
        values = [_metadata(field, generator, label) for field in FIELDS[task.key]]
        sample["npy"] = array_bytes(values)
    return sample


def _metadata(field: str, generator: np.random.Generator, label: int) -> int:
    if field == "y":
        return label
    value = int(generator.integers(GROUPS.get(field, 20)))
    # A group without samples, below the highest.
    return 0 if value == 1 and field in ("slide", "region", "race") else value


def _write_pairs(task: Task, data_dir: Path, generator: np.random.Generator, images: int, layout: str) -> Path:
    rows = []
    for number in range(images):
        shade = int(generator.integers(6))
        extension, mode = FORMATS[number % len(FORMATS)]
        turned = 6 if extension == "jpg" and layout != "shards" else None  # the datasets library heeds Exif
        content = encoded(picture(generator, shade, mode), extension, turned)
        captions = [f"a {NOUNS[shade]} number {number} seen from place {place}" for place in range(3 + number % 3)]
        rows.append({"image": {"bytes": content, "path": f"{number}.{extension}"}, "caption": captions})
    if layout != "shards":
        return write_table(task, data_dir, rows, layout)
    folder = data_dir / task.folder
    samples = [
        {row["image"]["path"].split(".")[1]: row["image"]["bytes"], "txt": "\n".join(row["caption"]).encode()}
        for row in rows
    ]
    write_shards(folder, samples)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def _instance(generator: np.random.Generator, number: int) -> dict[str, Any]:
    """Candidates from a common stock of images, which instances share."""
    size = (5, 6, 10, 12)[number % 4]
    stock = generator.choice(30, size, replace=False)
    names = [f"{NOUNS[i % len(NOUNS)]}_{i}" for i in stock.tolist()]
    images = [
        {"bytes": encoded(picture(np.random.default_rng(i + 100), i % 6), "png"), "path": f"{name}.png"}
        for i, name in zip(stock.tolist(), names)
    ]
    right = sorted(generator.choice(names, int(generator.integers(1, 4)), replace=False).tolist())
    cue = f"{NOUNS[number % len(NOUNS)]} {number}"
    return {
        "candidates": names,
        "cue": cue.title(),
        "associations": right,
        "score_fool_the_ai": number,
        "candidate_images": images,
    }


IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
TYPES = {
    "image": IMAGE,
    "caption": pyarrow.list_(pyarrow.string()),
    "candidates": pyarrow.list_(pyarrow.string()),
    "cue": pyarrow.string(),
    "associations": pyarrow.list_(pyarrow.string()),
    "score_fool_the_ai": pyarrow.int64(),
    "candidate_images": pyarrow.list_(IMAGE),
}
# The same types in the words of the datasets library.
STRING = {"dtype": "string", "_type": "Value"}
FEATURES = {
    "image": {"_type": "Image"},
    "caption": {"feature": STRING, "_type": "List"},
    "candidates": {"feature": STRING, "_type": "List"},
    "cue": STRING,
    "associations": {"feature": STRING, "_type": "List"},
    "score_fool_the_ai": {"dtype": "int64", "_type": "Value"},
    "candidate_images": {"feature": {"_type": "Image"}, "_type": "List"},
}


def write_table(task: Task, data_dir: Path, rows: Sequence[dict[str, Any]], layout: str) -> Path:
    """Rows as a table of the hub, in one of the layouts of `write_set`; two files, several row groups."""
    name = task.folder
    schema = pyarrow.schema([(column, TYPES[column]) for column in rows[0]])
    half = -(-len(rows) // 2)
    parts = [
        pyarrow.Table.from_pylist(list(part), schema=schema) for part in (rows[:half], rows[half:]) if len(part) > 0
    ]
    folders = {
        "cache": data_dir / "hf_cache" / f"nlphuji___{name}" / "TEST" / "1.1.0" / ("0" * 16),
        "parquet": data_dir / name,
        "user-parquet": data_dir / "nlphuji" / name / "TEST" / "test",
        "hub": data_dir / "hf_cache" / "hub" / f"datasets--nlphuji--{name}" / "snapshots" / ("a" * 40) / "data",
    }
    folder = folders[layout]
    folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        stem = f"test-{number:05d}-of-{len(parts):05d}"
        if layout == "cache":
            write_arrow(folder / f"{name}-{stem}.arrow", part)
        else:
            file = f"{number:04d}.parquet" if layout == "user-parquet" else f"{stem}.parquet"
            pyarrow.parquet.write_table(part, folder / file, row_group_size=3)
    if layout == "cache":
        write_info(folder, task, rows, parts)
    return folder


def write_arrow(path: Path, table: pyarrow.Table) -> None:
    """An Arrow stream, in batches of four rows."""
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def write_info(folder: Path, task: Task, rows: Sequence[dict[str, Any]], parts: Sequence[pyarrow.Table]) -> None:
    """What the datasets library writes beside a prepared split, as far as it reads it again."""
    split = {
        "name": "test",
        "num_bytes": sum(part.nbytes for part in parts),
        "num_examples": len(rows),
        "shard_lengths": [len(part) for part in parts],
        "dataset_name": task.folder,
    }
    info = {
        "config_name": "TEST",
        "dataset_name": task.folder,
        "features": {column: FEATURES[column] for column in rows[0]},
        "splits": {"test": split},
        "version": {"version_str": "1.1.0", "major": 1, "minor": 1, "patch": 0},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
