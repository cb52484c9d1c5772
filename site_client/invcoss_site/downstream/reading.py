"""From a case to what the model takes: image or tokens, and target. One case at a time is in memory.

B = batch, C = channels, K = classes, L = tokens; S = shape of an image, which is the task's size but for volumes that
are segmented window by window: those keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from invcoss_common.errors import DataError
from invcoss_common.seeds import derive_seed, generator_for
from invcoss_site.downstream.augment import augmented
from invcoss_site.downstream.sets.cases import Case
from invcoss_site.downstream.stored import PREPARED, read_nrrd, read_prepared
from invcoss_site.downstream.task import TEXT, Task, Window
from invcoss_site.downstream.words import token_numbers
from invcoss_site.ingest import read_samples
from invcoss_site.ingest.masks import Mask, read_mask
from invcoss_site.ingest.sample import Sample, unreadable
from invcoss_site.ingest.values import MAX_VOXELS, Values, resample, unit_range

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FOREGROUND_SHARE = 0.5  # of the training windows whose middle lies in a mask, as published


@dataclass(frozen=True)
class Example:
    """A case as tensors: `image` float32 (C, *S), or int64 (L,) of text; `target` int64 (), or float32 (K, *S) of 0, 1.

    `spacing_mm` is the voxel size (D, H, W) of that image, where it is known.
    """

    image: Tensor
    target: Tensor
    spacing_mm: tuple[float, float, float] | None = None


def read_case(task: Task, case: Case, tokeniser: Tokenizer | None = None) -> Example:
    """The whole case as it is, for validation and test. Raises UnreadableFile that names the file.

    A prepared volume (.npz, .h5) keeps the values it has.
    """
    if task.input == TEXT:
        assert tokeniser is not None and case.label is not None
        return Example(token_numbers(tokeniser, [case.text], task.size[0])[0], torch.tensor(case.label))
    mask: Mask | None
    if case.files[0].suffix in PREPARED:
        values, mask = read_prepared(case.files[0])
        _check_values(task, case, mask)
        spacing, wanted = task.spacing_mm, None
    else:
        sample = read_sample(task, case)
        values, mask = _scaled(task, sample), _mask(task, case, sample)
        spacing, wanted = sample.spacing_mm, task.spacing_mm
    size = _size(case, values.shape[1:], spacing, wanted) if task.windowed else task.size
    if task.windowed and spacing and wanted and size != values.shape[1:]:
        d, h, w = (n * mm / m for n, mm, m in zip(values.shape[1:], spacing, size, strict=True))
        spacing = (d, h, w)
    image = torch.from_numpy(values if size == values.shape[1:] else resample(values, size))
    if task.kind == "classify":
        assert case.label is not None
        return Example(image, torch.tensor(case.label), None)
    assert mask is not None
    return Example(image, _targets(task, mask, size), spacing if task.windowed else None)


def read_sample(task: Task, case: Case) -> Sample:
    """The image as its file has it, of any case but text and prepared volumes. Raises UnreadableFile."""
    if case.files[0].suffix == ".nrrd":
        return read_nrrd(case.files[0])
    samples = read_samples(case.files, task.modality)
    if len(samples) != 1:
        text = "a whole slide where one picture is expected; cut it into tiles and list those"
        raise unreadable(case.files[0], "dimensions", text)
    return samples[0]


def _scaled(task: Task, sample: Sample) -> Values:
    """Values float32 (C, *spatial) as the task's intensity says."""
    if task.intensity == "unit":
        return unit_range(sample, task.modality)
    values = sample.pixels.astype(np.float32)
    if not np.isfinite(values).all():
        raise unreadable(sample.path, "not-finite", "some values are NaN or infinite; export it again")
    if isinstance(task.intensity, Window):
        cut = np.clip(values, task.intensity.low, task.intensity.high)
        return np.asarray((cut - task.intensity.mean) / task.intensity.sd, dtype=np.float32)
    axes = tuple(range(1, values.ndim))
    sd = values.std(axis=axes, keepdims=True)
    if not sd.any():
        raise unreadable(sample.path, "constant", "constant image; remove it")
    values = (values - values.mean(axis=axes, keepdims=True)) / np.where(sd == 0, 1, sd)
    return np.asarray(values, dtype=np.float32)


def _mask(task: Task, case: Case, sample: Sample) -> Mask | None:
    """The mask's values int64 (1, *spatial), as the file has them."""
    if task.kind == "classify":
        return None
    assert case.mask is not None
    if case.mask.suffix == ".nrrd":
        found = read_nrrd(case.mask)
        if found.pixels.shape != sample.pixels.shape:
            text = f"mask has shape {found.pixels.shape[1:]} and its image {sample.pixels.shape[1:]}; pair it rightly"
            raise unreadable(case.mask, "mask", text)
        mask = found.pixels.astype(np.int64)
        _check_values(task, case, mask)
        return mask
    return read_mask(sample, case.mask, _known(task))


def _known(task: Task) -> set[int] | None:
    """The values a mask may have; None for any."""
    if () in task.class_values:
        return None
    return {0}.union(*task.class_values)


def _check_values(task: Task, case: Case, mask: Mask) -> None:
    known = _known(task)
    if case.mask and known and (strange := sorted(set(_values(mask)) - known)):
        text = f"class {strange[0]} is not one of {', '.join(map(str, sorted(known)))}; correct the mask"
        raise unreadable(case.mask, "mask", text)


def _values(mask: Mask) -> list[int]:
    """The values in a mask, none below 0; `np.unique` would sort millions of voxels."""
    few = mask.max() < 1 << 16
    return [int(value) for value in (np.flatnonzero(np.bincount(mask.ravel())) if few else np.unique(mask))]


def _size(
    case: Case,
    found: tuple[int, ...],
    spacing: tuple[float, float, float] | None,
    wanted: tuple[float, float, float] | None,
) -> tuple[int, ...]:
    """The sides of a volume at the spacing that the task wants."""
    if spacing is None or wanted is None:
        return found
    size = tuple(max(1, round(n * mm / to)) for n, mm, to in zip(found, spacing, wanted, strict=True))
    if np.prod(size, dtype=float) > MAX_VOXELS:
        raise unreadable(case.files[0], "spacing", f"would have {size} voxels at {wanted} mm; check its spacing")
    return size


def _targets(task: Task, mask: Mask, size: tuple[int, ...]) -> Tensor:
    """One mask a class, float32 (K, *size) of 0 and 1, from the values (1, *spatial)."""
    channels = [torch.from_numpy(np.isin(mask[0], values) if values else mask[0] > 0) for values in task.class_values]
    targets = torch.stack(channels).float()
    if targets.shape[1:] == size:
        return targets
    return F.interpolate(targets[None], size, mode="nearest-exact")[0]


class Reader:
    """Reads cases, and keeps what it read while that takes less than `keep_mb` MB (10^6 bytes) in all."""

    def __init__(self, task: Task, tokeniser: Tokenizer | None = None, keep_mb: float = 0.0) -> None:
        self.task, self.tokeniser = task, tokeniser
        self._free = keep_mb * 1e6
        self._kept: dict[str, Example] = {}

    def __call__(self, case: Case) -> Example:
        """`read_case`; what is kept is not to be changed in place."""
        if kept := self._kept.get(case.id):
            return kept
        example = read_case(self.task, case, self.tokeniser)
        taken = example.image.nbytes + example.target.nbytes
        if taken <= self._free:
            self._free -= taken
            self._kept[case.id] = example
        return example


class TaskBatches(Dataset[tuple[Tensor, Tensor]]):
    """Augmented training batches by number, each a pure function of it, so that a resumed run draws the same ones.

    A batch is images float32 (B, C, *task.size), or tokens int64 (B, L), and targets int64 (B,) or float32
    (B, K, *task.size). Every case comes once before any comes again. `read` is `read_case` where none is given.
    """

    def __init__(
        self, task: Task, cases: Sequence[Case], seed: int, read: Callable[[Case], Example] | None = None
    ) -> None:
        if not cases:
            raise DataError(f"{task.name}: no training case")
        self.task, self.cases, self.seed, self.read = task, cases, seed, read or Reader(task)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rows = [self.row(position) for position in range(number * self.task.batch, (number + 1) * self.task.batch)]
        return torch.stack([image for image, _ in rows]), torch.stack([target for _, target in rows])

    def row(self, position: int) -> tuple[Tensor, Tensor]:
        """Image and target number `position` of all that are ever drawn."""
        epoch, place = divmod(position, len(self.cases))
        example = self.read(self.cases[int(_order(len(self.cases), self.seed, epoch)[place])])
        image, target = example.image, example.target
        if self.task.input == TEXT:
            return image, target
        if self.task.windowed:
            image, target = random_window(image, target, self.task.size, generator_for(self.seed, "window", position))
        seed = derive_seed(self.seed, "augment", position)
        mask = target if self.task.kind == "segment" else None
        image, changed = augmented(self.task, image, mask, seed)
        return image, target if changed is None else changed


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator_for(seed, "order", epoch))


def random_window(
    image: Tensor, target: Tensor, size: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A part (C, *size) of an image and (K, *size) of its target; every second one has foreground in its middle.

    What is smaller is filled up with 0, as when windows are predicted.
    """
    missing = [max(0, side - found) for side, found in zip(size, image.shape[1:], strict=True)]
    if any(missing):
        pads = [pad for more in reversed(missing) for pad in (more // 2, more - more // 2)]
        image, target = F.pad(image, pads), F.pad(target, pads)
    free = [found - side for side, found in zip(size, image.shape[1:], strict=True)]
    starts = [int(torch.randint(room + 1, (), generator=generator)) for room in free]
    centred = bool(torch.rand((), generator=generator) < FOREGROUND_SHARE)
    inside = target.any(dim=0).flatten().nonzero() if centred else torch.empty(0)
    if len(inside):
        chosen = inside[torch.randint(len(inside), (), generator=generator)]
        middle = np.unravel_index(int(chosen), target.shape[1:])
        starts = [min(max(int(at) - side // 2, 0), room) for at, side, room in zip(middle, size, free, strict=True)]
    part = (slice(None), *(slice(start, start + side) for start, side in zip(starts, size, strict=True)))
    return image[part].contiguous(), target[part].contiguous()
