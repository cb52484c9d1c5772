"""Training batches as a pure function of the step number: sampling, cropping, flipping.

Because nothing is remembered between batches, a resumed run needs the step number only to draw the same batches, and
several processes can each prepare a part of them. Sub-volumes of a stored volume are drawn around their place in it.
N = training images, B = batch, C = channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from invcoss_common.modality import Geometry
from invcoss_common.seeds import generator_for
from invcoss_site.sample_store import StoredImages

FloatImages = npt.NDArray[np.float16] | StoredImages
Crop = tuple[int, int, int, int]  # top, left, height, width
Shift = tuple[float, float, float]  # of a sub-volume along D, H, W, as `StoredImages.around` takes it
FOREGROUND = 0.02  # least spread (standard deviation) of a sub-volume that is more than background
T = TypeVar("T")


class TrainingBatches(Dataset[Tensor]):
    """Batches (B, C, *geometry.size) float32 in [0, 1] by number, from `images` (N, C, *stored).

    Every image is seen once an epoch. In 2-D a random part (area share `crop_scale`..1, aspect 3/4..4/3) of the stored
    image is resized to the input size; a sub-volume that was cut from a larger volume is one near it, within half a
    stride, unless that is empty. `flip` mirrors the last axis (left-right) half of the time. Only the rows `part` are
    prepared.
    """

    def __init__(
        self,
        images: FloatImages,
        geometry: Geometry,
        *,
        batch_size: int,
        crop_scale: float,
        flip: bool,
        seed: int,
        part: slice = slice(None),
    ) -> None:
        self.images, self.geometry, self.batch_size, self.part = images, geometry, batch_size, part
        self.crop_scale, self.flip, self.seed = crop_scale, flip, seed

    def __getitem__(self, number: int) -> Tensor:
        generator = generator_for(self.seed, "batch", number)
        drawn = [self.draw(generator) for _ in range(self.batch_size)]  # for all rows, so that each is as in the whole
        first = number * self.batch_size
        return torch.stack(
            [self.augmented(self._index(first + i), *drawn[i]) for i in range(self.batch_size)[self.part]]
        )

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.images))
        return int(_order(len(self.images), self.seed, epoch)[place])

    def draw(self, generator: torch.Generator) -> tuple[bool, Crop | Shift | None]:
        """Whether an image is mirrored, and which part of it is used in 2-D, or how far a sub-volume is moved."""
        flip = self.flip and bool(torch.rand((), generator=generator) < 0.5)
        if self.geometry.ndim == 2:
            return flip, random_crop(self.images.shape[2], self.images.shape[3], self.crop_scale, generator)
        if isinstance(self.images, StoredImages) and self.images.are_parts:
            depth, height, width = (2 * torch.rand(3, generator=generator) - 1).tolist()
            return flip, (depth, height, width)
        return flip, None

    def augmented(self, index: int, flip: bool, place: Crop | Shift | None) -> Tensor:
        """Image `index` (C, *geometry.size) as drawn."""
        if place and len(place) == 3 and isinstance(self.images, StoredImages):
            near = _floats(self.images.around(index, place))
            image = near if _spread(near) >= FOREGROUND else _floats(self.images[index])
        elif place and len(place) == 4:
            top, left, height, width = place
            image = resize(_floats(self.images[index][:, top : top + height, left : left + width]), self.geometry)
        else:
            image = _floats(self.images[index])
        return image.flip(-1) if flip else image


def _floats(stored: npt.NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(stored)).float()


def _spread(image: Tensor) -> float:
    """Standard deviation of the values; `std` took half of the time of a batch of sub-volumes, this a tenth."""
    values = image.flatten()
    return math.sqrt(max(float(values @ values) / len(values) - float(values.mean()) ** 2, 0.0))


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator_for(seed, "order", epoch))


def random_crop(height: int, width: int, scale: float, generator: torch.Generator) -> Crop:
    """Top, left, height and width of a random part covering `scale`..1 of the area, aspect 3/4..4/3."""
    area_share, log_aspect, y, x = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    area = max((scale + (1 - scale) * area_share) * height * width, 1.0)
    aspect = math.exp((2 * log_aspect - 1) * math.log(4 / 3)) * width / height
    aspect = min(max(aspect, area / height**2), width**2 / area)  # large parts fit in at milder aspects only
    crop_width = min(max(round(math.sqrt(area * aspect)), 1), width)
    crop_height = min(max(round(math.sqrt(area / aspect)), 1), height)
    return round(y * (height - crop_height)), round(x * (width - crop_width)), crop_height, crop_width


def resize(image: Tensor, geometry: Geometry) -> Tensor:
    """A 2-D image (C, H, W) at the input size, antialiased."""
    return F.interpolate(image[None], size=geometry.size, mode="bilinear", antialias=True, align_corners=False)[0]


def whole_images(images: FloatImages, geometry: Geometry, batch_size: int) -> Iterator[Tensor]:
    """Every image once, un-augmented, at the input size: batches (B, C, *size) float32."""
    for start in range(0, len(images), batch_size):
        batch = _floats(images[start : start + batch_size])
        if batch.shape[2:] != geometry.size:
            batch = torch.stack([resize(image, geometry) for image in batch])
        yield batch


def batch_loader(batches: Dataset[T], start: int, stop: int, workers: int) -> DataLoader[T]:
    """Batches number start..stop in order, prepared ahead by `workers` processes (0: in this one)."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=False,
    )
