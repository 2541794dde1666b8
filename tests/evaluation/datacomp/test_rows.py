"""Tables of the hub: every layout gives the same rows, in loader processes too; damage is one line."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from evaluation.datacomp.locate import table_files
from evaluation.datacomp.pairs import ImageShare, TableImages
from evaluation.datacomp.rows import Rows, decode_table_image, image_content
from evaluation.datacomp.tasks import TASKS
from evaluation.datacomp.winogavil import Instances
from evaluation.errors import UserError

from .sets import TYPES, encoded, write_set, write_table

FLICKR = TASKS["retrieval/flickr_1k_test_image_text_retrieval"]
WINOGAVIL = TASKS["misc/winogavil"]
LAYOUTS = ("cache", "parquet", "user-parquet", "hub")


def rows_of(path: Path, layout: str) -> Rows:
    write_set(FLICKR, path, layout=layout)
    return Rows(table_files(FLICKR, path), ("image", "caption"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_rows(tmp_path: Path, layout: str) -> None:
    wanted, got = rows_of(tmp_path / "wanted", "parquet"), rows_of(tmp_path / "got", layout)
    assert len(got) == len(wanted) == 17
    assert got.strings("caption") == wanted.strings("caption")
    order = [16, 0, 9, 8, 3, 16, 5]  # back and forth, over the edges of row groups and files
    assert [got.value(i, "image") for i in order] == [wanted.value(i, "image") for i in order]
    assert got.value(9, "caption")[0].startswith("a ")
    assert "number 9 " in got.value(9, "caption")[0]


def test_arrow_files_may_be_framed(tmp_path: Path) -> None:
    table = pyarrow.table({"caption": [["x"], ["y", "z"]]})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert Rows([tmp_path / "a.arrow"], ["caption"]).strings("caption") == [["x"], ["y", "z"]]


@pytest.mark.parametrize("layout", ["cache", "parquet"])
def test_loader_processes(tmp_path: Path, layout: str) -> None:
    write_set(FLICKR, tmp_path, layout=layout)
    source = TableImages(table_files(FLICKR, tmp_path))
    assert source.image(3).size  # a file is open, and a row group held, when the workers start
    share = ImageShare(source, Corner(), 1, 2)
    loader: Any = DataLoader(share, batch_size=3, num_workers=2, multiprocessing_context="fork")
    got = [(int(i), float(value)) for batch in loader for i, value in zip(batch["index"], batch["image"])]
    assert got == [(i, Corner()(source.image(i))) for i in range(1, 17, 2)]


class Corner:
    """A transform that gives one number."""

    def __call__(self, image: Image.Image) -> float:
        return float(sum(image.convert("RGB").getpixel((0, 0))))


def test_a_copy_opens_the_files_for_itself(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "parquet")
    first = rows.value(0, "image")
    copy = pickle.loads(pickle.dumps(rows))
    assert copy.value(0, "image") == first


def test_one_row_group_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(tmp_path, "parquet")
    read: list[int] = []
    original = pyarrow.parquet.ParquetFile.read_row_group

    def counted(self: Any, group: int, **options: Any) -> Any:
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    for i in range(len(rows)):
        rows.value(i, "image")
    assert read == [0, 1, 2, 0, 1, 2]  # 9 and 8 rows, three to a group
    assert len(rows._held[1]) == 2  # type: ignore[index]


def test_images_by_path_and_turned_images(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20), "red")
    image.paste("blue", (0, 0, 15, 20))
    (tmp_path / "a.png").write_bytes(encoded(image, "png"))
    content = image_content({"bytes": None, "path": str(tmp_path / "a.png")}, "row 0")
    assert decode_table_image(content, "row 0").size == (30, 20)
    turned = decode_table_image(encoded(image, "jpg", orientation=6), "row 0")
    assert turned.size == (20, 30)
    assert turned.getpixel((10, 2))[2] > 200  # the left half is on top
    assert image_content(b"plain", "row 0") == b"plain"
    with pytest.raises(UserError, match="row 0: its image has no bytes and no file"):
        image_content({"bytes": None, "path": str(tmp_path / "gone.png")}, "row 0")


def test_pyarrow_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(FLICKR, tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        Rows(table_files(FLICKR, tmp_path), ["image"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path: Path) -> None:
    path.write_bytes(b"\x93" * 300)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, scramble, empty])
@pytest.mark.parametrize("layout", ["cache", "parquet"])
def test_damaged_files(tmp_path: Path, layout: str, damage: Callable[[Path], None]) -> None:
    write_set(FLICKR, tmp_path, layout=layout)
    files = table_files(FLICKR, tmp_path)
    damage(files[1])
    with pytest.raises(UserError, match="cannot be read") as caught:
        TableImages(files).image(16)
    assert str(files[1]) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_pages(tmp_path: Path) -> None:
    """The footer is whole, what it points to is not."""
    write_set(FLICKR, tmp_path, layout="parquet")
    file = table_files(FLICKR, tmp_path)[0]
    content = bytearray(file.read_bytes())
    content[4:2000] = bytes(1996)
    file.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        TableImages([file]).image(0)


def test_other_columns(tmp_path: Path) -> None:
    write_set(FLICKR, tmp_path, layout="parquet")
    with pytest.raises(UserError, match="no column 'cue', only image, caption"):
        Rows(table_files(FLICKR, tmp_path), ("image", "cue"))


@pytest.mark.parametrize("captions", [[], None, ["a", None]])
def test_captions_that_are_none(tmp_path: Path, captions: Any) -> None:
    image = {"bytes": encoded(Image.new("RGB", (8, 8)), "png"), "path": "a.png"}
    rows = [{"image": image, "caption": ["fine"]}, {"image": image, "caption": captions}]
    write_table(FLICKR, tmp_path, rows, "parquet")
    with pytest.raises(UserError, match=r"row 1 of .*: caption must be a list of strings"):
        TableImages(table_files(FLICKR, tmp_path))


def test_no_rows(tmp_path: Path) -> None:
    schema = pyarrow.schema([("image", TYPES["image"]), ("caption", TYPES["caption"])])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "test.parquet")
    with pytest.raises(UserError, match="holds no row"):
        Rows([tmp_path / "test.parquet"], ["image"])


def test_instances_share_their_images(tmp_path: Path) -> None:
    write_set(WINOGAVIL, tmp_path, images=12, layout="parquet")
    files = table_files(WINOGAVIL, tmp_path)
    source = Instances(files)
    assert len(source) == 12
    contents = [[value["bytes"] for value in row] for row in Rows(files, ()).column("candidate_images")]
    distinct = {content for row in contents for content in row}
    assert len(source.places) == len(distinct) < sum(map(len, contents))
    for numbers, row in zip(source.images, contents):
        assert [contents[r][p] for r, p in (source.places[number] for number in numbers)] == row
    assert (
        source.image(4).tobytes()
        == Image.open(io.BytesIO(contents[source.places[4][0]][source.places[4][1]])).tobytes()
    )
    assert source.prompts[0] == "An otter 0"
    names, right = Rows(files, ()).value(7, "candidates"), Rows(files, ()).value(7, "associations")
    assert source.associated[7].tolist() == [name in right for name in names]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"associations": ["nothing"]}, "row 0 .*none of its candidates is an association"),
        ({"candidate_images": []}, "row 0 .*one image for each of its 2 candidates"),
        ({"cue": ""}, "row 0 .*no cue"),
    ],
)
def test_odd_instances(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    image = {"bytes": encoded(Image.new("RGB", (8, 8)), "png"), "path": "a.png"}
    row = {"candidates": ["a", "b"], "cue": "x", "associations": ["a"], "candidate_images": [image, image], **change}
    write_table(WINOGAVIL, tmp_path, [row], "parquet")
    with pytest.raises(UserError, match=message):
        Instances(table_files(WINOGAVIL, tmp_path))
