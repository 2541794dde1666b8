"""Decoding, cropping and resizing: to the bit what torchvision does, or near it where that is asked for."""

from __future__ import annotations

import io
import random
from itertools import product
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision import transforms

from training.data import Batch, build_train_loader
from training.data.pictures import Box, CropDraw, Cut, ExactCrops, QuickCrops, WholePictures, make_pictures, take_apart
from training.data.samples import BrokenSampleError
from training.pixels import Pixels

SIZE = 40


def photo(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    """Smooth colours, edges and some texture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    ImageDraw.Draw(coarse).ellipse([width // 4, height // 4, width // 2, height // 2], fill=(250, 20, 90))
    noise = rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def encoded(picture: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def rotated_by_exif(picture: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture, exif=exif)


KINDS = {
    "jpeg": encoded(photo()),
    "progressive": encoded(photo(), progressive=True),
    "full chroma": encoded(photo(), subsampling=0, quality=95),
    "grey jpeg": encoded(photo().convert("L")),
    "cmyk jpeg": encoded(photo().convert("CMYK")),
    "turned by exif": rotated_by_exif(photo()),
    "tall": encoded(photo(50, 300)),
    "large": encoded(photo(700, 500)),
    "smaller than the crop": encoded(photo(23, 31)),
    "one pixel": encoded(photo(1, 1)),
    "png": encoded(photo(), "PNG"),
    "palette": encoded(photo().convert("P"), "PNG"),
    "transparent": encoded(photo().convert("RGBA"), "PNG"),
    "grey with alpha": encoded(photo().convert("LA"), "PNG"),
    "black and white": encoded(photo().convert("1"), "PNG"),
    "webp": encoded(photo(), "WEBP"),
    "gif": encoded(photo(), "GIF"),
}


def preprocess(size: int | tuple[int, int] = SIZE, **augmentation: object) -> transforms.Compose:
    return open_clip.image_transform(size, is_train=True, aug_cfg=augmentation)


def ours(transform: transforms.Compose, data: object, mode: str, seed: int) -> torch.Tensor:
    """[H, W, 3] uint8, drawn from this seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    pictures = make_pictures(transform, mode)
    return pictures.transform(pictures.decode(data))


def whole_transform(transform: transforms.Compose, data: bytes, seed: int) -> torch.Tensor:
    """[3, H, W] float32: torchvision's way from the first step to the last."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    torch.manual_seed(seed)
    random.seed(seed)
    return transform(picture)


def normalised(pixels: torch.Tensor, transform: transforms.Compose) -> torch.Tensor:
    parts = take_apart(transform)
    on_cpu = Pixels(torch.device("cpu"), torch.float32, parts.mean, parts.std)
    return on_cpu(pixels.unsqueeze(0).permute(0, 3, 1, 2))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_torchvision_to_the_bit(kind: str) -> None:
    transform = preprocess()
    for seed in range(4):
        pixels = ours(transform, KINDS[kind], "exact", seed)
        assert pixels.dtype == torch.uint8
        assert torch.equal(normalised(pixels, transform), whole_transform(transform, KINDS[kind], seed))


@pytest.mark.parametrize(
    "augmentation",
    [
        {"scale": (0.2, 0.6)},
        {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.7},
        {"gray_scale_prob": 0.5, "color_jitter": (0.1, 0.1, 0.1, 0.0), "color_jitter_prob": 1.0},
    ],
)
@pytest.mark.parametrize("size", [SIZE, (24, 36)])
@pytest.mark.filterwarnings("ignore:Unused augmentation cfg items")
def test_augmentation_in_between_runs_as_before(augmentation: dict, size: int | tuple[int, int]) -> None:
    transform = preprocess(size, **augmentation)
    for seed in range(6):
        pixels = ours(transform, KINDS["jpeg"], "exact", seed)
        assert torch.equal(normalised(pixels, transform), whole_transform(transform, KINDS["jpeg"], seed))
        quick = ours(transform, KINDS["jpeg"], "fast", seed)
        assert (quick.float() - pixels.float()).abs().mean() < 6


def moved(data: bytes, seed: int, by: int) -> torch.Tensor:
    """What exact gives where the crop is shifted by so many pixels, as a measure of what a wrong crop would do."""
    pictures = ExactCrops(take_apart(preprocess()))
    torch.manual_seed(seed)
    cut = pictures.decode(data)
    box = cut.box._replace(top=cut.box.top + by, left=cut.box.left + by)
    return pictures.transform(cut._replace(box=box))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"one pixel"}))
def test_fast_is_near_exact(kind: str) -> None:
    """In levels of 255; these pictures change by 10 to 20 levels a pixel, and a wrong crop would show."""
    transform, quick, data = preprocess(), QuickCrops(take_apart(preprocess())), KINDS[kind]
    width, height = Image.open(io.BytesIO(data)).size
    for seed in range(4):
        exact, fast = (ours(transform, data, mode, seed).float() for mode in ("exact", "fast"))
        torch.manual_seed(seed)
        is_reduced = quick.decode(data).picture.width < width
        assert (exact - fast).abs().mean() < (6.0 if is_reduced else 0.2)
        wrong = moved(data, seed, max(1, min(width, height) // 20)).float()
        assert (exact - wrong).abs().mean() > 15.0


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "cmyk jpeg", "grey jpeg", "large", "tall"])
def test_fast_differs_by_the_edges_of_the_crop_most(kind: str) -> None:
    """With the crop that it has moved to whole pixels of the reduced picture, exact is nearer still."""
    quick, exact = QuickCrops(take_apart(preprocess())), ExactCrops(take_apart(preprocess()))
    whole = Image.open(io.BytesIO(KINDS[kind])).convert("RGB")
    for seed in range(4):
        torch.manual_seed(seed)
        cut = quick.decode(KINDS[kind])
        times = round(whole.width / cut.picture.width)
        box = Box(*(min(times * edge, side) for edge, side in zip(cut.box, 2 * (whole.height, whole.width))))
        difference = quick.transform(cut).float() - exact.transform(Cut(whole, box)).float()
        assert difference.abs().mean() < 2.0


@pytest.mark.parametrize("shortest", [80, 160, 320, 333])
def test_fast_decodes_no_more_than_it_needs(shortest: int) -> None:
    """The picture comes at 1/2, 1/4 or 1/8, and the crop from it is as large as the model's input at least."""
    quick = QuickCrops(take_apart(preprocess()))
    data = encoded(photo(shortest * 5 // 4, shortest))
    reductions = set()
    for seed in range(20):
        torch.manual_seed(seed)
        picture, box = quick.decode(data)
        assert min(box.height, box.width) >= SIZE
        assert box.top >= 0
        assert box.left >= 0
        assert box.top + box.height <= picture.height
        assert box.left + box.width <= picture.width
        reductions.add(round(shortest / picture.height))
    expected = {80: {1}, 160: {2}, 320: {4}, 333: {4}}[shortest]
    # A crop that is a little smaller than the picture may need the next size.
    assert reductions & expected
    assert reductions <= expected | {times * 2 for times in expected}
    assert max(reductions) * SIZE <= shortest


@pytest.mark.parametrize("options", [{"scale": (0.9, 1.0)}, {}, {"scale": (0.01, 0.2), "ratio": (0.2, 0.4)}])
def test_crops_are_drawn_as_torchvision_draws_them(options: dict) -> None:
    crop = transforms.RandomResizedCrop(SIZE, **options)
    draw, in_the_middle = CropDraw(crop), 0
    for seed, (height, width) in enumerate(product((1, 2, 31, 256, 500), (1, 3, 40, 257, 640, 2000))):
        for repeat in range(3):
            torch.manual_seed(100 * seed + repeat)
            found, following = draw(height, width), torch.rand(())
            torch.manual_seed(100 * seed + repeat)
            expected = crop.get_params(torch.empty(3, height, width), crop.scale, crop.ratio)
            assert tuple(found) == tuple(expected)
            assert torch.equal(torch.rand(()), following)
            in_the_middle += found.top == (height - found.height) // 2 and found.left == (width - found.width) // 2
    assert in_the_middle > 0


def test_fast_draws_what_exact_draws() -> None:
    """The crop is drawn on the size of the whole picture, with the same numbers; a broken picture draws none."""
    parts = take_apart(preprocess(scale=(0.3, 0.8)))
    quick, exact = QuickCrops(parts), ExactCrops(parts)
    data = encoded(photo(640, 480))
    for seed in range(8):
        torch.manual_seed(seed)
        picture, box = quick.decode(data)
        following = torch.rand(())
        torch.manual_seed(seed)
        with pytest.raises(BrokenSampleError):
            quick.decode(data[:2000])
        expected = exact.decode(data).box
        assert torch.equal(torch.rand(()), following)
        times = round(480 / picture.height)
        assert all(abs(times * mine - theirs) <= times for mine, theirs in zip(box, expected))


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("transform", [preprocess(), transforms.ToTensor()])
@pytest.mark.parametrize("kind", ["jpeg", "progressive", "large", "png", "gif", "webp"])
def test_a_picture_cut_short_is_a_broken_sample(kind: str, transform: object, mode: str) -> None:
    pictures = make_pictures(transform, mode)
    for share in (0.0, 0.05, 0.5, 0.9):
        data = KINDS[kind][: int(share * len(KINDS[kind]))]
        with pytest.raises(BrokenSampleError, match="cannot be decoded"):
            pictures.decode(data)
    with pytest.raises(BrokenSampleError, match="no image"):
        pictures.decode("/no/such/picture.jpg")


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_files_and_pictures_as_well_as_bytes(mode: str, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(KINDS["large"])
    assert torch.equal(
        ours(preprocess(), str(tmp_path / "0.jpg"), mode, 1), ours(preprocess(), KINDS["large"], mode, 1)
    )
    picture = photo(64, 64)
    before = picture.tobytes()
    assert torch.equal(ours(preprocess(), picture, mode, 1), ours(preprocess(), encoded(picture, "PNG"), mode, 1))
    assert picture.tobytes() == before


@pytest.mark.filterwarnings("ignore:Unused augmentation cfg items")
def test_what_is_taken_apart() -> None:
    parts = take_apart(preprocess((24, 36), gray_scale_prob=0.2))
    assert parts.mean == open_clip.OPENAI_DATASET_MEAN
    assert parts.std == open_clip.OPENAI_DATASET_STD
    assert list(parts.crop.size) == [24, 36]
    assert len(parts.between) == 1
    others = [
        open_clip.image_transform(SIZE, is_train=False),
        open_clip.image_transform(SIZE, is_train=True, aug_cfg={"use_timm": True}),
        transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]),
        transforms.Compose([transforms.RandomResizedCrop(8), transforms.ToTensor()]),
        lambda picture: torch.zeros(3, 8, 8),
    ]
    for transform in others:
        assert take_apart(transform) is None
        assert isinstance(make_pictures(transform, "fast"), WholePictures)
    nearest = transforms.RandomResizedCrop(8, interpolation=transforms.InterpolationMode.NEAREST)
    steps = [nearest, transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    assert isinstance(make_pictures(transforms.Compose(steps), "fast"), ExactCrops)


def test_any_other_transform_passes_floats_on(kit, tmp_path: Path) -> None:
    transform = open_clip.image_transform(SIZE, is_train=True, aug_cfg={"use_timm": True})
    batch = first_batch(kit, tmp_path, transform)
    assert batch.image.dtype == torch.float32
    assert batch.image.shape == (4, 3, SIZE, SIZE)


def first_batch(kit, folder: Path, transform: object, pin_memory: bool = False, **flags: object) -> Batch:
    if not (folder / "0.tar").exists():
        members = [
            [(f"{i}.jpg", encoded(photo(200, 150, seed=i))), (f"{i}.txt", f"picture {i}".encode())] for i in range(8)
        ]
        kit.write_tar(folder / "0.tar", members)
    config = kit.config(folder, needs_keys=False, **flags)
    return next(build_train_loader(config, transform, kit.tokenize, 0, 1, pin_memory).epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "pin_memory",
    [False, pytest.param(True, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_batches_hold_channels_last_bytes(kit, tmp_path: Path, workers: int, pin_memory: bool) -> None:
    for mode in ("fast", "exact"):
        image = first_batch(kit, tmp_path, preprocess(), pin_memory, workers=workers, decode=mode).image
        assert image.dtype == torch.uint8
        assert image.shape == (4, 3, SIZE, SIZE)
        assert image.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_the_same_from_a_worker_and_without(kit, tmp_path: Path) -> None:
    """As far as the random numbers go: worker 0 of one is the place of the process without workers."""
    batches = [first_batch(kit, tmp_path, preprocess(), workers=workers) for workers in (0, 1, 1)]
    assert torch.equal(batches[0].image, batches[1].image)
    assert torch.equal(batches[1].image, batches[2].image)
    other = first_batch(kit, tmp_path, preprocess(), workers=0, seed=1)
    assert not torch.equal(batches[0].image, other.image)
