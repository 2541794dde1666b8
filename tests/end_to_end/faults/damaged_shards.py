"""A copy of the data set in which something of every kind is broken."""

from __future__ import annotations

import json
import shutil

from end_to_end.corpus import SHARD_SIZES, Corpus


def damaged(corpus: Corpus) -> str:
    """Shards with pictures zeroed, a shard cut and one that holds nothing, made once; sizes from before the damage.

    Returns:
        --train-data, without the shard that holds nothing: it would be found before training.
    """
    copy = corpus.folder / "damaged"
    if not copy.exists():
        copy.mkdir()
        sizes = {}
        for number, size in enumerate(SHARD_SIZES):
            path = copy / f"{number:05d}.tar"
            shutil.copy(corpus.folder / path.name, path)
            sizes[path.name] = size
        (copy / "sizes.json").write_text(json.dumps(sizes))
        content = bytearray((copy / "00000.tar").read_bytes())
        for sample in (3, 17, 40):  # three members of a sample, each a header and one block of content at least
            at = content.index(b"\x89PNG", sample * len(content) // 50)
            content[at : at + 200] = bytes(200)
        (copy / "00000.tar").write_bytes(bytes(content))
        whole = (copy / "00002.tar").read_bytes()
        (copy / "00002.tar").write_bytes(whole[: len(whole) * 3 // 4])
        (copy / "00004.tar").write_bytes(b"")
    return f"{copy}/{{00000..00003}}.tar"
