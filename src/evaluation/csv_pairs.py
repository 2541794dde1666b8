"""Image–text pairs listed in a csv file, as open_clip's --csv-* flags describe it."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image

from evaluation.datasets import PairDataset, Share, Tokenizer, Transform, decode_image
from evaluation.errors import UserError


class CsvPairs(PairDataset):
    """The rows of a csv file: a column of image paths (used as they stand) and a column of captions.

    Args:
        path: the file, utf-8 with a header line.
        transform, tokenizer, rank, world_size, limit: as in PairDataset.
        image_key, caption_key: names of the two columns.
        separator: between columns; backslash-t stands for a tab, as shells pass it on.

    Raises:
        UserError: for a missing file or column, or no rows.
    """

    def __init__(
        self,
        path: str,
        transform: Transform | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        image_key: str = "filepath",
        caption_key: str = "title",
        separator: str = "\t",
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
    ) -> None:
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist; correct the path of the csv file.")
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=separator.replace("\\t", "\t"))
            missing = {image_key, caption_key} - set(reader.fieldnames or ())
            if missing:
                columns = ", ".join(reader.fieldnames or ()) or "none"
                names = ", ".join(sorted(missing))
                raise UserError(
                    f"{path} has no column {names}, its columns are {columns}: "
                    "give --csv-img-key, --csv-caption-key, --csv-separator."
                )
            self.rows = [(row[image_key] or "", (row[caption_key] or "").strip()) for row in reader]
        if not self.rows:
            raise UserError(f"{path} has a header and no rows; give a file with pairs.")
        total = len(self.rows) if limit is None else min(limit, len(self.rows))
        Share.__init__(self, total, rank, world_size)
        self.skipped = 0
        self.transform, self.tokenizer = transform, tokenizer

    def image(self, i: int) -> Image.Image:
        """The RGB image with global index i, of any rank's share."""
        path = Path(self.rows[i][0])
        try:
            return decode_image(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: the image cannot be read ({error.strerror}); correct the csv file.") from None

    def caption(self, i: int) -> str:
        """The caption with global index i."""
        return self.rows[i][1]

    def concept(self, i: int) -> str:
        """Always empty: a csv file says nothing of concepts."""
        return ""
