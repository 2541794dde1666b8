"""What a worker makes of an encoded picture: decoded, cropped, resized, and nothing else that could wait for the device.

open_clip's transform for training begins with a random crop that is resized and ends with ToTensor and Normalize. Those two
ends are taken over here, what lies between them runs as it is. Pixels leave as uint8: `training.pixels` makes floats of them.

"exact" gives, bit for bit, the pixels that the whole transform has before it normalises. "fast" draws the same crop and
differs in two ways:

- A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves the crop at least as large as the model's input: the
  decoder leaves out work (libjpeg's scaled inverse DCT). The crop's edges move to the nearest pixel of the reduced picture.
- PyTorch resizes instead of PIL, by the same filter with weights of 16 bits, several times as fast where the processor has
  AVX2.

Any other transform gets the decoded picture as it is, and what it returns is passed on as float32.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transform import MaybeConvertMode
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomResizedCrop, ToTensor
from torchvision.transforms.functional import resized_crop

from training.data.samples import BrokenSampleError, Problem

Preprocess = Callable[[Image.Image], Tensor]
Source = bytes | str | Image.Image

# What pictures come in. Pillow knows many more formats, and runs programs for some (Ghostscript for EPS), whatever the suffix.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Such a picture is left out here and counted, by the size in its header, before Pillow has allocated anything.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_REDUCTIONS = (8, 4, 2)
_TORCH_MODES = {InterpolationMode.BICUBIC: "bicubic", InterpolationMode.BILINEAR: "bilinear"}


class Box(NamedTuple):
    """A crop, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Cut(NamedTuple):
    """A decoded picture in RGB, possibly at reduced size, and the crop in pixels of that size."""

    picture: Image.Image
    box: Box


class Pictures(Protocol):
    """How encoded pictures become what a batch is made of, in two steps."""

    def decode(self, source: Source) -> Any:
        """Everything that damage of the picture can disturb.

        Args:
            source: the encoded bytes, the path of a file, or a picture.

        Raises:
            BrokenSampleError: the picture cannot be opened or decoded.
        """
        ...

    def transform(self, decoded: Any) -> Tensor:
        """The rest; an error in here is a mistake in the transforms. [H, W, 3] uint8 or [3, H, W] float32."""
        ...


@dataclass(frozen=True)
class CropTransform:
    """open_clip's transform for training, taken apart.

    Attributes:
        crop: draws a part of the picture and gives it the model's input size.
        between: what is done to the resized picture, in order.
        mean, std: of each channel, for values in [0, 1].
    """

    crop: RandomResizedCrop
    between: tuple[Callable[[Any], Any], ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def take_apart(preprocess: Preprocess) -> CropTransform | None:
    """The parts of a transform that has the form described above; None for any other."""
    steps = getattr(preprocess, "transforms", [])
    if type(preprocess) is not Compose or len(steps) < 3:
        return None
    crop, *between, to_tensor, normalize = steps
    if type(crop) is not RandomResizedCrop or not isinstance(to_tensor, ToTensor) or type(normalize) is not Normalize:
        return None
    mean, std = tuple(map(float, normalize.mean)), tuple(map(float, normalize.std))
    if len(mean) != 3 or len(std) != 3:
        return None
    # Pictures are in RGB before the crop already; converting them once more would only copy them.
    kept = tuple(step for step in between if not isinstance(step, MaybeConvertMode))
    return CropTransform(crop, kept, mean, std)


def make_pictures(preprocess: Preprocess, decoding: str) -> Pictures:
    """What to do with pictures under --decode `decoding` ("fast" or "exact") so that they come out as `preprocess` says."""
    parts = take_apart(preprocess)
    if parts is None:
        return WholePictures(preprocess)
    quick = decoding == "fast" and parts.crop.interpolation in _TORCH_MODES
    return QuickCrops(parts) if quick else ExactCrops(parts)


class CropDraw:
    """RandomResizedCrop.get_params: the same crops from the same random numbers, in less time.

    It draws an area and an aspect ratio until a crop of both fits, six times as a rule where nearly all of a picture is
    wanted, and with torch's small tensors that costs a fifth of the decoding. Here one of them is used again and again.
    """

    TRIES = 10

    def __init__(self, crop: RandomResizedCrop) -> None:
        self.scale = tuple(crop.scale)
        self.ratio = tuple(crop.ratio)
        # In float32, as there.
        self.log_ratio = tuple(torch.log(torch.tensor(self.ratio)).tolist())
        self._number = torch.empty(1)

    def __call__(self, height: int, width: int) -> Box:
        """A crop of a picture of this size, in pixels, from torch's global generator."""
        number = self._number
        for _ in range(self.TRIES):
            area = height * width * number.uniform_(*self.scale).item()
            ratio = number.uniform_(*self.log_ratio).exp_().item()
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                top = torch.randint(0, height - high + 1, (1,)).item()
                left = torch.randint(0, width - wide + 1, (1,)).item()
                return Box(int(top), int(left), high, wide)
        # None fits: the middle, as much of it as has an allowed ratio.
        high, wide = height, width
        if width / height < min(self.ratio):
            high = round(width / min(self.ratio))
        elif width / height > max(self.ratio):
            wide = round(height * max(self.ratio))
        return Box((height - high) // 2, (width - wide) // 2, high, wide)


class WholePictures:
    """Any transform: it sees the decoded picture."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess

    def decode(self, source: Source) -> Image.Image:
        """The picture in RGB."""
        return _decode(_open(source))

    def transform(self, decoded: Image.Image) -> Tensor:
        """What the transform returns, as float32."""
        return self.preprocess(decoded).float()


class ExactCrops:
    """Pixels as torchvision's own RandomResizedCrop leaves them."""

    def __init__(self, parts: CropTransform) -> None:
        self.parts = parts
        self.draw = CropDraw(parts.crop)

    def decode(self, source: Source) -> Cut:
        """The whole picture and a crop drawn by torch's generator."""
        picture = _decode(_open(source))
        return Cut(picture, self.draw(picture.height, picture.width))

    def transform(self, decoded: Cut) -> Tensor:
        """[H, W, 3] uint8"""
        crop = self.parts.crop
        picture = resized_crop(decoded.picture, *decoded.box, crop.size, crop.interpolation)
        return _finished(picture, self.parts.between)


class QuickCrops:
    """The same crops from pictures decoded no larger than needed, resized by PyTorch."""

    def __init__(self, parts: CropTransform) -> None:
        self.parts = parts
        self.draw = CropDraw(parts.crop)
        self.mode = _TORCH_MODES[parts.crop.interpolation]
        self.size = tuple(parts.crop.size)

    def decode(self, source: Source) -> Cut:
        """The picture at the smallest size that will do, and the crop at that size."""
        picture = _open(source)
        generator = torch.default_generator
        before = generator.get_state()
        box = self.draw(picture.height, picture.width)
        try:
            box = self._reduce(picture, box)
            return Cut(_decode(picture), box)
        except BrokenSampleError:
            # A picture that is left out draws nothing, as where the crop is drawn after decoding.
            generator.set_state(before)
            raise

    def transform(self, decoded: Cut) -> Tensor:
        """[H, W, 3] uint8"""
        top, left, height, width = decoded.box
        # Copied: torch wants an array that may be written to.
        part = torch.from_numpy(np.array(np.asarray(decoded.picture)[top : top + height, left : left + width]))
        # A batch of one in channels-last form, for which PyTorch has its fastest way.
        part = F.interpolate(part.unsqueeze(0).permute(0, 3, 1, 2), self.size, mode=self.mode, antialias=True)
        pixels = part.permute(0, 2, 3, 1)[0].contiguous()
        return _finished(Image.fromarray(pixels.numpy()), self.parts.between) if self.parts.between else pixels

    def _reduce(self, picture: Image.Image, box: Box) -> Box:
        """Asks a JPEG's decoder for a reduced picture, if that leaves enough pixels; the crop at the size it will have."""
        if picture.format != "JPEG":
            return box
        for reduction in _REDUCTIONS:
            reduced = _in_units(box, reduction)
            if reduced.height >= self.size[0] and reduced.width >= self.size[1]:
                size = (picture.width // reduction, picture.height // reduction)
                # The decoder takes its largest reduction that leaves at least this size, or refuses.
                return box if picture.draft(None, size) is None else reduced
        return box


def _in_units(box: Box, reduction: int) -> Box:
    """The crop in a picture reduced so many times, its edges at the nearest pixels."""
    top, bottom = (round(edge / reduction) for edge in (box.top, box.top + box.height))
    left, right = (round(edge / reduction) for edge in (box.left, box.left + box.width))
    return Box(top, left, bottom - top, right - left)


def _finished(picture: Image.Image, steps: Sequence[Callable[[Any], Any]]) -> Tensor:
    """The resized picture after the remaining steps: [H, W, 3] uint8"""
    for step in steps:
        picture = step(picture)
    return torch.from_numpy(np.array(picture if picture.mode == "RGB" else picture.convert("RGB")))


@contextmanager
def _guarded() -> Iterator[None]:
    try:
        yield
    except BrokenSampleError:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenSampleError(Problem.HUGE_IMAGE) from error
    except Exception as error:
        # Decoders raise whatever their format suggests (SyntaxError, struct.error, …), for damage alone.
        raise BrokenSampleError(Problem.BAD_IMAGE) from error


def _open(source: Source) -> Image.Image:
    """The picture with its header read."""
    if isinstance(source, Image.Image):
        return source
    with _guarded():
        if isinstance(source, str):
            # Opening a named pipe would wait for a writer.
            if not os.path.isfile(source):
                raise BrokenSampleError(Problem.NO_IMAGE)
            picture = Image.open(source, formats=_formats())
        else:
            picture = Image.open(io.BytesIO(source), formats=_formats())
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and picture.width * picture.height > most:
            picture.close()
            raise BrokenSampleError(Problem.HUGE_IMAGE)
        return picture


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode(picture: Image.Image) -> Image.Image:
    """The picture, decoded, in RGB."""
    with _guarded(), picture:
        if picture.mode != "RGB":
            return picture.convert("RGB")
        picture.load()
        return picture
