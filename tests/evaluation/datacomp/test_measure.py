"""Whole tasks with a small model: against plain loops, on loader processes, on several ranks, and with damage."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from evaluation.datacomp.errors import MissingData
from evaluation.datacomp.locate import table_files
from evaluation.datacomp.measure import TaskModel, measure_task, objective_prompts
from evaluation.datacomp.rows import Rows
from evaluation.datacomp.tasks import TASKS, Kind
from evaluation.datasets import ShardIndex
from evaluation.errors import UserError
from ranks import run_on_ranks

from .sets import FACES, array_bytes, encoded, write_set, write_shards
from .small_model import crash_on_the_last_rank, measure_on_this_rank, small_task_model

ONE_OF_EACH = (
    "vtab/caltech101",
    "vtab/pcam",
    "wilds/iwildcam",
    "wilds/camelyon17",
    "wilds/fmow",
    "fairness/dollar_street",
    "fairness/geode",
    "fairness/fairface",
    "fairness/utkface",
    "retrieval/flickr_1k_test_image_text_retrieval",
    "misc/winogavil",
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for key in ONE_OF_EACH:
        write_set(key, path)
    return path


@pytest.fixture(scope="module")
def alone(data_dir: Path) -> dict[str, dict[str, Any]]:
    """The metrics on one rank, in this process."""
    model = small_task_model()
    return {key: measure_task(TASKS[key], data_dir, model) for key in ONE_OF_EACH}


def text_feature(model: TaskModel, text: str) -> Tensor:
    feature = model.model.encode_text(model.tokenizer([text])).detach()[0].double()
    return feature / feature.norm()


def image_feature(model: TaskModel, image: Image.Image) -> Tensor:
    feature = model.model.encode_image(model.preprocess_val(image)[None]).detach()[0].double()
    return feature / feature.norm()


def head_by_loop(model: TaskModel, names: list[str], templates: list[str]) -> Tensor:
    rows = [sum(text_feature(model, template.replace("{c}", name)) for template in templates) for name in names]
    return torch.stack([row / row.norm() for row in rows])


def shard_samples(folder: Path) -> list[tuple[Image.Image, dict[str, bytes]]]:
    index = ShardIndex(sorted((folder / "test").glob("*.tar")))
    samples = []
    for i, members in enumerate(index.members):
        contents = {extension: index.read(member) for extension, member in members.items()}
        extension = next(name for name in contents if name not in ("cls", "npy"))
        path = folder / f"loop-{i}.{extension}"
        path.write_bytes(contents[extension])
        samples.append((Image.open(path).convert("RGB"), contents))
    return samples


def test_classification_by_loop(data_dir: Path, alone: dict[str, dict[str, Any]]) -> None:
    model, folder = small_task_model(), data_dir / "wds_vtab-caltech101_test"
    templates = (folder / "zeroshot_classification_templates.txt").read_text().split("\n")[:-1]
    head = head_by_loop(model, (folder / "classnames.txt").read_text().split("\n"), templates)
    first, fifth, recalls = [], [], dict[int, list[bool]]()
    for image, contents in shard_samples(folder):
        order = (head @ image_feature(model, image)).argsort(descending=True).tolist()
        label = int(contents["cls"])
        first.append(order[0] == label)
        fifth.append(label in order[:5])
        recalls.setdefault(label, []).append(order[0] == label)
    recall = float(np.mean([np.mean(hits) for hits in recalls.values()]))
    wanted = {"acc1": np.mean(first), "acc5": np.mean(fifth), "mean_per_class_recall": recall, "main_metric": recall}
    assert alone["vtab/caltech101"] == pytest.approx(wanted)
    assert len(recalls) < len(head)
    assert 0 < wanted["acc5"] < 1


def test_faces_by_loop(data_dir: Path, alone: dict[str, dict[str, Any]]) -> None:
    model, folder = small_task_model(), data_dir / "wds_fairface_test"
    prompts = objective_prompts(folder)
    assert {name: len(names) for name, (names, _) in prompts.items()} == FACES
    heads = {
        name: head_by_loop(model, names, list(map(str, templates))) for name, (names, templates) in prompts.items()
    }
    ages, crimes, by_race = [], [], []
    for image, contents in shard_samples(folder):
        feature = image_feature(model, image)
        array = np.frombuffer(contents["npy"][-32:], dtype=np.int64)  # age, gender, race, race_binary
        best = {name: int((head @ feature).argmax()) for name, head in heads.items()}
        ages.append(best["age"] == array[0])
        crimes.append(best["toxic"] >= 18)
        by_race.append((int(array[2]), best["gender"] == array[1]))
    got = alone["fairness/fairface"]
    assert got["acc_age_avg"] == pytest.approx(np.mean(ages))
    assert got["toxicity_crime_avg"] == pytest.approx(np.mean(crimes))
    assert got["count_race:3"] == sum(race == 3 for race, _ in by_race)
    assert got["acc_gender_avg"] == pytest.approx(np.mean([hit for _, hit in by_race]))
    assert got["main_metric"] is None


def test_winogavil_by_loop(data_dir: Path, alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    model = small_task_model()
    rows = Rows(table_files(TASKS["misc/winogavil"], data_dir), ())
    scores = []
    for row in range(len(rows)):
        candidates, right = rows.value(row, "candidates"), set(rows.value(row, "associations"))
        text = text_feature(model, rows.value(row, "cue").lower().join(["An " if row % 11 in (0, 5) else "A ", ""]))
        values = []
        for place, value in enumerate(rows.value(row, "candidate_images")):
            (tmp_path / f"{row}-{place}.png").write_bytes(value["bytes"])
            values.append(float(text @ image_feature(model, Image.open(tmp_path / f"{row}-{place}.png"))))
        order = sorted(range(len(candidates)), key=lambda i, values=values: -values[i])
        chosen = {candidates[i] for i in order[: len(right)]}
        scores.append((len(candidates), len(chosen & right) / len(chosen | right)))
    got = alone["misc/winogavil"]
    assert got["avg_jaccard_score"] == pytest.approx(np.mean([score for _, score in scores]))
    assert got["main_metric"] == pytest.approx(np.mean([score for size, score in scores if size >= 10]))


def test_every_kind_has_its_main_metric_and_is_json(alone: dict[str, dict[str, Any]]) -> None:
    for key, metrics in alone.items():
        json.dumps(metrics, allow_nan=False)
        main = TASKS[key].main_metric
        assert metrics["main_metric"] == (None if main is None else metrics[main]), key
    assert alone["vtab/pcam"]["acc5"] is None


@pytest.mark.parametrize("layout", ["cache", "parquet", "user-parquet", "hub", "shards"])
def test_retrieval_by_loop(tmp_path: Path, layout: str) -> None:
    """Shards convert to RGB before resizing; tables keep the mode and heed Exif."""
    task, model = TASKS["retrieval/mscoco_2014_5k_test_image_text_retrieval"], small_task_model()
    folder = write_set(task, tmp_path, layout=layout)
    images: list[Tensor] = []
    texts: list[tuple[int, Tensor]] = []
    if layout == "shards":
        pairs = [(image, contents["txt"].decode().split("\n")) for image, contents in shard_samples(folder)]
    else:
        table = pyarrow.concat_tables(
            [read_table(path) for path in sorted(folder.glob("*test*")) or sorted(folder.iterdir())]
        )
        files = [Image.open(io.BytesIO(image["bytes"])) for image in table["image"].to_pylist()]
        pairs = list(zip(map(ImageOps.exif_transpose, files), table["caption"].to_pylist()))
    for number, (image, captions) in enumerate(pairs):
        images.append(image_feature(model, image))
        texts.extend((number, text_feature(model, caption)) for caption in captions)
    scores = [[float(text @ image) for image in images] for _, text in texts]
    found = [owner == max(range(len(images)), key=row.__getitem__) for (owner, _), row in zip(texts, scores)]
    best = [max(range(len(texts)), key=lambda j, i=i: scores[j][i]) for i in range(len(images))]
    recall = {
        "image_retrieval_recall@1": float(np.mean(found)),
        "text_retrieval_recall@1": float(np.mean([texts[j][0] == i for i, j in enumerate(best)])),
    }
    got = measure_task(task, tmp_path, model)
    assert {name: got[name] for name in recall} == pytest.approx(recall)
    assert got["main_metric"] == pytest.approx(sum(recall.values()) / 2)
    assert model.samples[task.key] == len(images) == 17


def read_table(path: Path) -> Any:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path)
    return pyarrow.ipc.open_stream(path.read_bytes()).read_all()


def test_each_image_is_encoded_once_and_each_head_built_once(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_task_model()
    for key in ("fairness/fairface", "wilds/fmow"):
        model.model.images_seen = 0
        measure_task(TASKS[key], data_dir, model)
        assert model.model.images_seen == model.samples[key] == 17
    model.model.images_seen = 0
    measure_task(TASKS["misc/winogavil"], data_dir, model)
    rows = Rows(table_files(TASKS["misc/winogavil"], data_dir), ()).column("candidate_images")
    assert model.model.images_seen == len({value["bytes"] for row in rows for value in row})
    write_set("imagenet1k", tmp_path)
    write_set("imagenet_sketch", tmp_path)
    measure_task(TASKS["imagenet1k"], tmp_path, model)
    monkeypatch.setattr(model.model, "encode_text", None)  # a second head would fail
    measure_task(TASKS["imagenet_sketch"], tmp_path, model)


def test_loader_processes_and_batch_sizes_change_nothing(data_dir: Path, alone: dict[str, dict[str, Any]]) -> None:
    model = small_task_model(workers=2, batch_size=7)
    for key in ("wilds/camelyon17", "misc/winogavil", "retrieval/flickr_1k_test_image_text_retrieval"):
        assert measure_task(TASKS[key], data_dir, model) == alone[key]


def test_precision_is_the_setting_s(data_dir: Path, alone: dict[str, dict[str, Any]]) -> None:
    entered = []

    def autocast() -> Any:
        entered.append(1)
        return torch.autocast("cpu", torch.bfloat16)

    model = small_task_model(autocast_context=autocast)
    assert set(measure_task(TASKS["vtab/pcam"], data_dir, model)) == set(alone["vtab/pcam"])
    assert len(entered) >= 5 + 1
    assert model.head(["a", "b"], ["{c}"]).dtype == torch.float32


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_gives_the_numbers_of_one(
    data_dir: Path, tmp_path: Path, alone: dict[str, dict[str, Any]], world_size: int
) -> None:
    # 17 images are shared unevenly; of 2 images, the third and fourth rank have none; the damage is on one rank.
    small = tmp_path / "small"
    keys = ["vtab/pcam", "fairness/fairface", "retrieval/flickr_1k_test_image_text_retrieval", "misc/winogavil"]
    for key in keys:
        write_set(key, small, images=2)
    damaged = write_set("fairness/geode", small, images=5)
    index = ShardIndex([damaged / "test" / "0.tar"])
    content = bytearray((damaged / "test" / "0.tar").read_bytes())
    member = index.members[1]["npy"]
    content[member.offset : member.offset + member.size] = bytes(member.size)
    (damaged / "test" / "0.tar").write_bytes(content)
    wanted = [measure_task(TASKS[key], small, small_task_model()) for key in keys]

    runs = [(str(data_dir), list(ONE_OF_EACH)), (str(small), ["fairness/geode", *keys])]
    for results in run_on_ranks(measure_on_this_rank, world_size, runs, timeout=200):
        assert results[0] == alone
        message = results[1].pop("fairness/geode")
        assert "s0000001" in message
        assert "npy" in message
        assert list(results[1].values()) == wanted


def test_a_crash_on_one_rank_ends_the_work_of_all() -> None:
    first, last = run_on_ranks(crash_on_the_last_rank, 2, timeout=120)
    assert first == ["SharedError: rank 1 failed: ZeroDivisionError: integer division or modulo by zero", "1"]
    assert last == ["ZeroDivisionError: integer division or modulo by zero", "1"]


def test_features_that_are_not_finite(data_dir: Path) -> None:
    for weights in ("colours", "words"):
        model = small_task_model()
        with torch.no_grad():
            getattr(model.model, weights)[:] = math.nan
        for key in ("vtab/caltech101", "retrieval/flickr_1k_test_image_text_retrieval", "misc/winogavil"):
            with pytest.raises(UserError, match="not finite"):
                measure_task(TASKS[key], data_dir, model)


def sample(**members: bytes) -> dict[str, bytes]:
    image = encoded(Image.new("RGB", (8, 8), "green"), "png")
    return {"png": image, "cls": b"1", "npy": array_bytes([1, 1]), **members}


def without(name: str) -> dict[str, bytes]:
    return {key: content for key, content in sample().items() if key != name}


def pickled(values: list[Any]) -> bytes:
    """An npy member that only unpickling could read."""
    return array_bytes(np.array(values, dtype=object))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without("cls"), "s0000002 .*has no cls"),
        (without("npy"), "s0000002 .*has no npy"),
        (without("png"), "s0000002 .*has no image"),
        (sample(cls=b"40"), "s0000002 .*cls is '40'"),
        (sample(png=b"none"), "s0000002 .*image cannot be decoded"),
        (sample(npy=b"\x93NUMPY"), "s0000002 .*npy cannot be read"),
        (sample(npy=pickled([{}])), "s0000002 .*npy cannot be read.*allow_pickle"),
        (sample(npy=array_bytes([1])), r"s0000002 .*int64 of shape \(1,\)"),
        (sample(npy=array_bytes([[1, 2]])), r"s0000002 .*shape \(1, 2\)"),  # type: ignore[list-item]
        (sample(npy=array_bytes(["a", "b"])), "s0000002 .*vector of 2 numbers"),  # type: ignore[list-item]
        (sample(npy=array_bytes([-1, 0])), "'region' has values"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_samples_are_named(tmp_path: Path, broken: dict[str, bytes], message: str, workers: int) -> None:
    folder = write_set("fairness/geode", tmp_path, images=2)
    write_shards(folder, [sample(), sample(), broken, sample()])
    with pytest.raises(UserError, match=message) as caught:
        measure_task(TASKS["fairness/geode"], tmp_path, small_task_model(workers=workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", list(Kind))
def test_missing_sets(tmp_path: Path, kind: Kind) -> None:
    task = next(task for task in TASKS.values() if task.kind is kind)
    with pytest.raises(MissingData, match=task.folder):
        measure_task(task, tmp_path, small_task_model())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classnames.txt", "race:a\nno beginning\n", "'no beginning'"),
        ("classnames.txt", "race:a\ngender:b\nage:c\n", "no lines that begin with toxic:"),
        ("classnames.txt", "race:a\n\ngender:b\n", "line 2 is empty"),
        ("zeroshot_classification_templates.txt", "", "is empty"),
    ],
)
def test_text_files_of_faces(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = write_set("fairness/utkface", tmp_path, images=2)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        measure_task(TASKS["fairness/utkface"], tmp_path, small_task_model())


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    folder = write_set("vtab/pcam", tmp_path, images=2)
    (folder / "classnames.txt").write_bytes(b"caf\xe9\nbar")
    with pytest.raises(UserError, match="not UTF-8"):
        measure_task(TASKS["vtab/pcam"], tmp_path, small_task_model())
