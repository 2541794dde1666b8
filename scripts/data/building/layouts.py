"""The two layouts of a built folder: image-text pairs, and classification as clip_benchmark has it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from .shards import Members, shard_sizes, write_json, write_shards


def write_pairs(folder: Path, samples: Iterable[Members], count: int, per_shard: int) -> None:
    """Write a split of image-text pairs: KEY.png, KEY.txt, KEY.json with KEY = 000000000, 000000001, …; sizes.json.

    Args:
        folder: made here.
        samples: the members of every sample.
        count: how many samples there are.
        per_shard: samples in every shard but the last.
    """
    folder.mkdir(parents=True)
    sizes = shard_sizes(count, per_shard, "{:05d}.tar")
    pairs = ((f"{key:09d}", members) for key, members in enumerate(samples))
    write_shards(folder, pairs, list(sizes), per_shard)
    write_json(folder / "sizes.json", sizes)


def write_classification(
    folder: Path,
    classes: Sequence[str],
    templates: Sequence[str],
    samples: Iterable[tuple[bytes, str]],
    count: int,
    per_shard: int,
) -> None:
    """Write pictures with their class names in clip_benchmark's webdataset layout for classification.

    Args:
        folder: made here.
        classes: names of all classes; their order gives the labels.
        templates: prompts, with {c} in the class's stead.
        samples: a PNG and the name of its class, for every picture.
        count: how many pictures there are.
        per_shard: pictures in every shard but the last.
    """
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    prompts = folder / "zeroshot_classification_templates.txt"
    prompts.write_text("\n".join(templates) + "\n", encoding="utf-8")
    label_of = {name: label for label, name in enumerate(classes)}
    sizes = shard_sizes(count, per_shard, "{}.tar")
    pairs = (
        (f"s{index:07d}", {"png": png, "cls": str(label_of[name]).encode()})
        for index, (png, name) in enumerate(samples)
    )
    write_shards(folder / "test", pairs, list(sizes), per_shard)
    (folder / "test" / "nshards.txt").write_text(f"{len(sizes)}\n", encoding="utf-8")
