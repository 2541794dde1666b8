"""Every mistake that is found before training, and what the message says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.data import build_train_loader, check_train_data
from training.errors import UserError


def test_sound_data_passes(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [9, 9])
    check_train_data(kit.config(tmp_path), world_size=2)
    check_train_data(kit.config(f"{tmp_path}/{{00000..00001}}.tar"))
    check_train_data(kit.config(f"{tmp_path}/*.tar", dataset_resampled=True, train_num_samples=10**9))
    check_train_data(kit.config(None, dataset_type="synthetic"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_data": None}, "--train-data is missing"),
        ({"train_data": "{d}/nothing"}, "no shard matches.*nothing does not exist"),
        ({"train_data": "{d}/none*.tar"}, "no shard matches"),
        ({"train_data": "{d}/empty"}, "no shard matches, the folder .*empty holds no"),
        ({"train_data": "{d}/{{00000..00004}}.tar"}, "3 of 5 shards do not exist, the first is .*00002.tar"),
        ({"train_data": "{d}/{{00000..00001.tar"}, "cannot be expanded"),
        ({"train_data": "{d}::"}, "no shard matches ''"),
        ({"train_data": "{d}/data.parquet"}, "the kind of data does not show"),
        ({"dataset_type": "wds"}, "--dataset-type is 'wds'"),
        ({"workers": -1}, "--workers is -1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"train_num_samples": 0}, "--train-num-samples is 0"),
        ({"train_num_samples": 19}, "--train-num-samples 19 is more than the 18 samples"),
        ({"batch_size": 10}, "--batch-size 10 on 2 ranks takes 20 samples a step, but an epoch has 18"),
        ({"train_data_upsampling_factors": "1"}, "needs sampling with replacement"),
        ({"dataset_resampled": True}, "--dataset-resampled has no end"),
        ({"factors": "1::2"}, "2 factors and --train-data 1 sources"),
        ({"factors": "a"}, "not numbers"),
        ({"factors": "-1"}, "not negative"),
        ({"factors": "0"}, "not all zero"),
        ({"dataset_type": "synthetic", "dataset_resampled": True, "train_num_samples": 9}, "draws tar shards"),
    ],
)
def test_flags(kit, tmp_path: Path, flags: dict, message: str) -> None:
    kit.write_shards(tmp_path, [9, 9])
    (tmp_path / "empty").mkdir()
    data = flags.pop("train_data", "{d}")
    if "factors" in flags:
        flags = {
            "train_data_upsampling_factors": flags["factors"],
            "dataset_resampled": True,
            "train_num_samples": 16,
        }
    config = kit.config(data and data.format(d=tmp_path), **flags)
    with pytest.raises(UserError, match=message) as caught:
        check_train_data(config, world_size=2)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        build_train_loader(config, kit.plain_preprocess, kit.tokenize, 0, 2, False)


def test_a_shard_that_is_no_tar_is_named(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [4] * 30)
    (tmp_path / "00023.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 40)
    with pytest.raises(UserError, match=r"00023\.tar is not a tar file .*, as 1 of the 30 shards"):
        check_train_data(kit.config(tmp_path))


def test_empty_files_and_empty_archives(kit, tmp_path: Path) -> None:
    kit.write_shards(tmp_path, [])
    kit.write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(UserError, match=r"empty\.tar yields no sample"):
        check_train_data(kit.config(tmp_path))
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"zero\.tar is not a tar file"):
        check_train_data(kit.config(tmp_path))


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ([1, 2], r"no image, the first samples of .*00000.tar hold .json, .txt; .*\.png"),
        ([0, 2], r"no caption, the first samples of .*00000.tar hold .json, .png"),
        ([0, 1], r"needs integer keys, the first samples of .*00000.tar hold .png, .txt"),
    ],
)
def test_first_samples_of_each_source(kit, tmp_path: Path, left: list[int], message: str) -> None:
    kit.write_shards(tmp_path / "sound", [8])
    samples = [[kit.members_of(number)[member] for member in left] for number in range(8)]
    kit.write_tar(tmp_path / "bad" / "00000.tar", samples)
    config = kit.config(f"{tmp_path}/sound::{tmp_path}/bad")
    with pytest.raises(UserError, match=message):
        check_train_data(config)
    if left == [0, 1]:
        config.needs_keys = False
        check_train_data(config)


def test_one_odd_sample_at_the_start_is_no_obstacle(kit, tmp_path: Path) -> None:
    kit.write_tar(tmp_path / "0.tar", [kit.members_of(0)[1:], *(kit.members_of(i) for i in range(1, 8))])
    check_train_data(kit.config(tmp_path))


def test_a_stream_that_cannot_be_opened(kit) -> None:
    with pytest.raises(UserError, match="yields no sample"):
        check_train_data(kit.config("pipe:exit 3 # x.tar", train_num_samples=100))


@pytest.mark.parametrize("text", ["[1]", '{"00000.tar": "9"}', '{"00000.tar": -1}', "{"])
def test_a_sizes_file_that_makes_no_sense(kit, tmp_path: Path, text: str) -> None:
    kit.write_shards(tmp_path, [9])
    (tmp_path / "sizes.json").write_text(text)
    with pytest.raises(UserError, match=r"sizes\.json .*python -m training.data.index"):
        check_train_data(kit.config(tmp_path))


def test_keys_beyond_the_data_size(kit, tmp_path: Path) -> None:
    """Samples are looked at in the first shard and in the last."""
    kit.write_shards(tmp_path, [8, 8, 8])
    check_train_data(kit.config(tmp_path, data_size=24))
    with pytest.raises(UserError, match=r"--data_size 23 is too small: .*00002\.tar has a sample with the key 23"):
        check_train_data(kit.config(tmp_path, data_size=23))
    check_train_data(kit.config(tmp_path, data_size=3, needs_keys=False))


def test_rows_beyond_the_data_size(kit, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(kit.image_bytes(0))
    (tmp_path / "rows.csv").write_text("filepath\ttitle\n" + f"{tmp_path}/image.png\ta\n" * 8)
    check_train_data(kit.config(tmp_path / "rows.csv", data_size=8))
    with pytest.raises(UserError, match=r"--data_size 7 is too small: .*rows\.csv has a sample with the key 7"):
        check_train_data(kit.config(tmp_path / "rows.csv", data_size=7))


def test_synthetic_samples_beyond_the_data_size(kit) -> None:
    check_train_data(kit.config(None, dataset_type="synthetic", train_num_samples=20, data_size=20))
    with pytest.raises(UserError, match="--data_size 19 is too small: the synthetic data has a sample with the key 19"):
        check_train_data(kit.config(None, dataset_type="synthetic", train_num_samples=20, data_size=19))


def test_an_epoch_clearly_shorter_than_the_data_is_told(kit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kit.write_shards(tmp_path, [300])
    for flags in (
        {"train_num_samples": 300},
        {"train_num_samples": 298},
        {},
        {"train_num_samples": 9, "dataset_resampled": True},
    ):
        check_train_data(kit.config(tmp_path, **flags))
    assert not caplog.records
    check_train_data(kit.config(tmp_path, train_num_samples=200))
    assert [record.getMessage() for record in caplog.records] == [
        "--train-num-samples 200 leaves 100 of the 300 samples out of each epoch (known from tar headers): "
        "give 300 to use them all"
    ]
