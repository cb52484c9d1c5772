"""The leak audit: is a synthetic image a copy of one of this site's training images? Runs where those images are.

Every synthetic image is compared with all training and all held-out images. How near the held-out images of the site
come to its training images, though nobody learned from them, is the yardstick (`calibrate`): a synthetic image that
comes nearer than all but a small share of them is dropped, and a pool with too many such images is refused. The fewer
held-out images there are, the stricter. Measured in `docs/measurements/leak-audit_*`; what it can't see is in
`docs/privacy.md`.

N = images compared, M = images compared with, C = channels, V = variants of an image, D = encoder width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from monai.metrics.regression import compute_ssim_and_cs
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from invcoss_common.errors import DataError
from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE, masked_error, target_patches
from invcoss_common.records import Interval
from invcoss_common.seeds import generator_for
from invcoss_common.tokens import random_mask
from invcoss_site.policy import AuditSettings
from invcoss_site.sample_store import StoredImages

# uint8, or floats in [0, 1]
Images = npt.NDArray[np.uint8] | npt.NDArray[np.float16] | npt.NDArray[np.float32] | StoredImages
OnProgress = Callable[[int, int], None]

WINDOW = 7  # side of SSIM's Gaussian window (SD 1.5), smaller only where an image is
TINY = 1e-6


class Comparison(BaseModel):
    """One image by one measure: distances to the nearest training and held-out image, and to a typical held-out one."""

    model_config = ConfigDict(frozen=True)

    train: float
    heldout: float
    typical: float

    @property
    def nearness(self) -> float:
        """Distance to the nearest training image over that to a typical image of other cases; 0 is a copy."""
        return max(self.train, TINY) / max(self.typical, TINY)


class Item(BaseModel):
    """One image against the site's: by pixels (1 - correlation), structure (1 - SSIM) and features (1 - cosine).

    `ratio` is the distance by pixels to the nearest training image over that to the nearest held-out image, as expected
    for equally many of both; `closer` says whether the very nearest image is a training image.
    """

    model_config = ConfigDict(frozen=True)

    pixels: Comparison
    structure: Comparison
    features: Comparison
    ratio: float
    closer: bool

    @property
    def score(self) -> float:
        """What decides: geometric mean of the nearness by pixels and by structure, so that a copy is near in both.

        Features do not count: slight blur or shift moves them too far (docs/measurements/leak-audit_*).
        """
        return math.sqrt(self.pixels.nearness * self.structure.nearness)


class Audit(BaseModel):
    """What the audit of a pool found. `summary` may leave the site; `items` stay, as they tell about single images."""

    model_config = ConfigDict(frozen=True)

    kept: tuple[bool, ...] = Field(description="per image of the pool; all False if it is refused")
    refused: bool
    copies: int = Field(description="exact or near copies of a training image")
    beyond: Interval = Field(description="share of the pool nearer to training than the threshold allows")
    refuse_share: float = Field(description="refused when `beyond` is surely above this, or no image is left")
    closer: Interval = Field(description="share of the pool whose nearest image of all is a training image")
    closer_by_chance: float = Field(description="that share if training and held-out images were alike to the model")
    median_ratio: float = Field(description="median of the items' `ratio`")
    null_median_ratio: float = Field(description="the same of the held-out images")
    features_beyond: float = Field(description="share of the pool that features alone would drop")
    threshold: float = Field(description="score below which an image is dropped")
    false_positive_rate: float = Field(description="largest expected share of innocent images below the threshold")
    pool_images: int
    train_images: int
    heldout_images: int
    items: tuple[Item, ...]
    flagged: tuple[bool, ...] = Field(description="per image: below the threshold, or a copy")

    def summary(self) -> dict[str, Any]:
        """All but the scores of single images, ready for JSON."""
        return self.model_dump(mode="json", exclude={"items", "flagged"})


class Membership(BaseModel):
    """Membership inference on the model: how well its loss tells training from held-out images; 0.5 is not at all."""

    model_config = ConfigDict(frozen=True)

    auc: Interval
    train_images: int
    heldout_images: int


@dataclass(frozen=True)
class _Side:
    """Images at the common resolution (M, C, *extent) float16 and their features (M, D), unit rows."""

    images: Tensor
    features: Tensor


@dataclass(frozen=True)
class Calibration:
    """A site's images ready to be compared with, and the scores of its held-out images: the null distribution."""

    model: MultiModalMAE
    geometry: Geometry
    settings: AuditSettings
    train: _Side
    heldout: _Side
    centre: Tensor
    spread: Tensor
    null: tuple[Item, ...]
    threshold: float
    feature_threshold: float
    false_positive_rate: float


def audit_pool(
    pool: Images,
    train: Images,
    heldout: Images,
    model: MultiModalMAE,
    geometry: Geometry,
    settings: AuditSettings | None = None,
    on_progress: OnProgress = lambda _done, _of: None,
) -> Audit:
    """Compare `pool` (N, C, *size) with the site's images (M, C, *any size); the same input gives the same audit.

    `on_progress(done, of)` counts training images, held-out images twice, and synthetic images. Raises DataError when
    there is no image to compare with.
    """
    steps = len(train) + 2 * len(heldout) + len(pool)
    known = calibrate(train, heldout, model, geometry, settings, lambda done, _of: on_progress(done, steps))
    return audit_against(pool, known, lambda done, of: on_progress(steps - of + done, steps))


def calibrate(
    train: Images,
    heldout: Images,
    model: MultiModalMAE,
    geometry: Geometry,
    settings: AuditSettings | None = None,
    on_progress: OnProgress = lambda _done, _of: None,
) -> Calibration:
    """Compare the held-out images with the training images and with each other, and set the threshold.

    With n held-out images it is the k-th lowest of their scores, k = floor(rate (n + 1)): an innocent image that is
    exchangeable with them is below it with probability k / (n + 1) at most, whatever the distribution (split conformal
    prediction, Vovk et al. 2005). Where k would be 0 it is 1, the strictest threshold there is, and more innocent
    images are below it than the settings aim at: `false_positive_rate` says how many. Held-out images must be of other
    cases than training images. `on_progress(done, of)` counts training images, and held-out images twice. Raises
    DataError below two training images and one held-out image.
    """
    settings = settings or AuditSettings()
    if len(heldout) < 1 or len(train) < 2:
        raise DataError(
            f"{len(heldout)} held-out and {len(train)} training images are too few for a leak audit, which needs 1 and "
            "2; add cases, or hold some out"
        )
    order = max(1, math.floor(settings.false_positive_rate * (len(heldout) + 1) + 1e-9))
    read, steps = len(train) + len(heldout), len(train) + 2 * len(heldout)
    train_images, train_features = _prepared(train, model, geometry, settings, lambda done: on_progress(done, steps))
    heldout_images, heldout_features = _prepared(
        heldout, model, geometry, settings, lambda done: on_progress(len(train) + done, steps)
    )
    centre, spread = train_features.mean(dim=0), train_features.std(dim=0).clamp_min(TINY)
    known = Calibration(
        model,
        geometry,
        settings,
        _Side(train_images, F.normalize((train_features - centre) / spread, dim=1)),
        _Side(heldout_images, F.normalize((heldout_features - centre) / spread, dim=1)),
        centre,
        spread,
        (),
        0.0,
        0.0,
        order / (len(heldout) + 1),
    )
    null: list[Item] = []
    for first in range(0, len(heldout), settings.batch):
        rows = slice(first, min(first + settings.batch, len(heldout)))
        own = torch.arange(rows.start, rows.stop, device=centre.device)
        null += _compare(_Side(heldout_images[rows], known.heldout.features[rows]), known, own)
        on_progress(read + rows.stop, steps)
    scores = sorted(item.score for item in null)
    by_features = sorted(item.features.nearness for item in null)
    return replace(known, null=tuple(null), threshold=scores[order - 1], feature_threshold=by_features[order - 1])


def audit_against(pool: Images, known: Calibration, on_progress: OnProgress = lambda _done, _of: None) -> Audit:
    """`audit_pool` against a site's images that were calibrated before; raises DataError for an empty pool.

    The pool is refused when no image is left, or when the share of dropped images is surely above what the settings
    allow, or twice what is expected of innocent images where few are held out.
    """
    settings = known.settings
    if not len(pool):
        raise DataError("the pool holds no image; there is nothing to audit")
    items: list[Item] = []
    for first in range(0, len(pool), settings.batch):
        images, features = _prepared(pool[first : first + settings.batch], known.model, known.geometry, settings)
        items += _compare(_Side(images, F.normalize((features - known.centre) / known.spread, dim=1)), known, None)
        on_progress(len(items), len(pool))
    copied = [
        item.pixels.train <= 1 - settings.copy_correlation and item.structure.train <= 1 - settings.copy_ssim
        for item in items
    ]
    flagged = [item.score < known.threshold or copy for item, copy in zip(items, copied, strict=True)]
    beyond = wilson(sum(flagged), len(items), settings.confidence)
    refuse_share = max(settings.refuse_share, 2 * known.false_positive_rate)
    refused = beyond.low > refuse_share or all(flagged)
    trained, held = len(known.train.images), len(known.heldout.images)
    return Audit(
        kept=tuple(not refused and not bad for bad in flagged),
        refused=refused,
        copies=sum(copied),
        beyond=beyond,
        refuse_share=refuse_share,
        closer=wilson(sum(item.closer for item in items), len(items), settings.confidence),
        closer_by_chance=trained / (trained + held),
        median_ratio=float(np.median([item.ratio for item in items])),
        null_median_ratio=float(np.median([item.ratio for item in known.null])),
        features_beyond=float(np.mean([item.features.nearness < known.feature_threshold for item in items])),
        threshold=known.threshold,
        false_positive_rate=known.false_positive_rate,
        pool_images=len(items),
        train_images=trained,
        heldout_images=held,
        items=tuple(items),
        flagged=tuple(flagged),
    )


@torch.no_grad()
def membership_auc(
    model: MultiModalMAE,
    train: Images,
    heldout: Images,
    geometry: Geometry,
    *,
    mask_ratio: float,
    draws: int,
    batch_size: int,
    seed: int,
    confidence: float = 0.95,
    on_progress: OnProgress = lambda _done, _of: None,
) -> Membership:
    """How well the model's masked-reconstruction loss, mean over `draws` masks, tells training from held-out images.

    The AUC is the probability that a training image has the lower loss; its interval is DeLong's (1988), for
    independent images: too narrow where a case has several, and all of [0, 1] with one image on a side. `on_progress`
    counts images. Raises DataError when there is none on a side.
    """
    if min(len(train), len(heldout)) < 1:
        raise DataError("membership needs a training and a held-out image at least; add cases")
    model.eval()
    steps, losses = len(train) + len(heldout), []
    for side, images, before in (("train", train, 0), ("heldout", heldout, len(train))):

        def tell(done: int, before: int = before) -> None:
            on_progress(before + done, steps)

        losses.append(_losses(model, images, geometry, mask_ratio, draws, batch_size, seed, side, tell))
    wins = (losses[0][:, None] < losses[1]).double() + 0.5 * (losses[0][:, None] == losses[1]).double()
    auc, reach = float(wins.mean()), 1.0
    if min(len(train), len(heldout)) > 1:
        error = math.sqrt(float(wins.mean(dim=1).var()) / len(train) + float(wins.mean(dim=0).var()) / len(heldout))
        reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Membership(
        auc=Interval(value=auc, low=max(0.0, auc - reach), high=min(1.0, auc + reach)),
        train_images=len(train),
        heldout_images=len(heldout),
    )


def wilson(count: int, of: int, confidence: float) -> Interval:
    """The share `count` / `of` with Wilson's score interval (1927), which also holds near 0 and 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = count / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    reach = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return Interval(value=share, low=max(0.0, middle - reach), high=min(1.0, middle + reach))


def _losses(
    model: MultiModalMAE,
    images: Images,
    geometry: Geometry,
    mask_ratio: float,
    draws: int,
    batch_size: int,
    seed: int,
    side: str,
    tell: Callable[[int], None],
) -> Tensor:
    """Masked-reconstruction loss (M,) of each image at the input size."""
    device = model.cls_token.device
    total = torch.zeros(len(images), dtype=torch.float64)
    for first, batch in _batches(images, geometry.size, batch_size):
        rows = slice(first, first + len(batch))
        batch = batch.to(device)
        for draw in range(draws):
            random = generator_for(seed, "membership", side, draw, first)
            mask = random_mask(len(batch), geometry.tokens, mask_ratio, random).to(device)
            _, prediction = model(batch, geometry, mask)
            total[rows] += masked_error(prediction, target_patches(batch, geometry), mask).double().cpu()
        tell(rows.stop)
    return total / draws


def _batches(images: Images, size: tuple[int, ...], batch: int) -> Iterator[tuple[int, Tensor]]:
    """First row and images (B, C, *size) float32 in [0, 1], batch by batch: read from a mapped file when needed."""
    for first in range(0, len(images), batch):
        part = np.ascontiguousarray(images[first : first + batch])
        values = torch.from_numpy(part).float() / (255 if part.dtype == np.uint8 else 1)
        yield first, _resized(values, size)


def _resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Images (B, C, *any) at `size`: smoothed before they shrink, in 3-D by averaging."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    if len(size) == 2:
        return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    if all(new <= old for new, old in zip(size, images.shape[2:], strict=True)):
        return F.interpolate(images, size=size, mode="area")
    return F.interpolate(images, size=size, mode="trilinear", align_corners=False)


@torch.no_grad()
def _prepared(
    images: Images,
    model: MultiModalMAE,
    geometry: Geometry,
    settings: AuditSettings,
    tell: Callable[[int], None] = lambda _done: None,
) -> tuple[Tensor, Tensor]:
    """All images at the common resolution, float16, and their encoder features (M, D): the mean over tokens."""
    model.eval()
    device = model.cls_token.device
    extent = settings.extent_2d if geometry.ndim == 2 else settings.extent_3d
    small = tuple(min(n, extent) for n in geometry.size)
    shrunk, features = [], []
    for first, batch in _batches(images, geometry.size, settings.batch):
        batch = batch.to(device)
        shrunk.append(_resized(batch, small).half())
        features.append(model.encode(batch, geometry)[:, 1:].mean(dim=1).float())
        tell(first + len(batch))
    return torch.cat(shrunk), torch.cat(features)


def _compare(side: _Side, known: Calibration, own: Tensor | None) -> list[Item]:
    """Each image of `side` against the site's; `own` are their rows among the held-out images, which are left out.

    A single held-out image has no other one to be compared with: training images, which are of other cases than it
    just as well, stand in.
    """
    settings = known.settings
    variants = _variants(side.images.float(), settings)
    rows = torch.arange(len(variants), device=variants.device)
    to_train, place_train = _match(variants, known.train.images, settings.batch)
    to_heldout, place_heldout = _match(variants, known.heldout.images, settings.batch)
    by_features = 1 - side.features @ known.train.features.T
    by_features_heldout = 1 - side.features @ known.heldout.features.T
    unlearned = known.heldout.images
    if own is not None and len(unlearned) == 1:
        unlearned, to_heldout, place_heldout, by_features_heldout = (
            known.train.images,
            to_train,
            place_train,
            by_features,
        )
    elif own is not None:
        to_heldout[rows, own] = torch.nan
        by_features_heldout[rows, own] = torch.nan

    nearest = to_train.topk(min(settings.candidates, to_train.shape[1]), largest=False).indices
    chosen = torch.linspace(
        0, to_heldout.shape[1] - 1, min(settings.references, to_heldout.shape[1]), device=rows.device
    ).long()
    others = chosen.expand(len(rows), -1)
    ssim_train = _dissimilarity(variants, known.train.images, nearest, place_train)
    ssim_heldout = _dissimilarity(variants, unlearned, others, place_heldout)
    ssim_heldout[to_heldout[rows[:, None], others].isnan()] = torch.nan

    ratio = _expected_nearest(to_train, to_heldout) / _expected_nearest(to_heldout, to_train).clamp_min(TINY)
    pairs = ((to_train, to_heldout), (ssim_train, ssim_heldout), (by_features, by_features_heldout))
    measured = [
        torch.stack([train.amin(dim=1), _nan_low(heldout), heldout.nanmedian(dim=1).values], dim=1).tolist()
        for train, heldout in pairs
    ]
    return [
        Item(
            **{
                name: Comparison(train=row[i][0], heldout=row[i][1], typical=row[i][2])
                for name, row in zip(("pixels", "structure", "features"), measured, strict=True)
            },
            ratio=float(ratio[i]),
            closer=measured[0][i][0] < measured[0][i][1],
        )
        for i in range(len(rows))
    ]


def _variants(images: Tensor, settings: AuditSettings) -> Tensor:
    """The central part of each image (N, C, *extent) at every scale, and mirrored: (N, V, C, *template)."""
    size = images.shape[2:]
    wanted = [max(2, round(n * settings.template)) for n in size]
    found = []
    for image in (images, images.flip(-1)) if settings.mirrored else (images,):
        for scale in settings.scales:
            scaled = [max(round(n * scale), w) for n, w in zip(size, wanted, strict=True)]
            part = _resized(image, tuple(scaled))
            for axis, (n, w) in enumerate(zip(scaled, wanted, strict=True), start=2):
                part = part.narrow(axis, (n - w) // 2, w)
            found.append(part)
    return torch.stack(found, dim=1)


def _match(variants: Tensor, images: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Distance (N, M), 1 - correlation at the best variant and shift, and the place of that: (N, M) int64.

    Normalised cross-correlation at every shift for which the variant (N, V, C, *template) lies inside the image
    (M, C, *extent) (Lewis 1995); brightness and contrast cancel. A place numbers (variant, shift).
    """
    count = len(variants)
    kernels = variants.flatten(0, 1)
    axes = tuple(range(1, kernels.dim()))
    values = kernels[0].numel()
    kernels = kernels - kernels.mean(dim=axes, keepdim=True)
    kernels = kernels / kernels.square().sum(dim=axes, keepdim=True).sqrt().clamp_min(TINY * values)
    ones = torch.ones_like(kernels[:1])
    convolve = F.conv2d if kernels.dim() == 4 else F.conv3d
    distances, places = [], []
    for part in images.split(batch):
        part = part.float()
        part = part - part.mean(dim=axes, keepdim=True)
        energy = convolve(part.square(), ones) - convolve(part, ones).square() / values
        # Windows flatter than a grey level are background, which correlates with anything.
        spread = energy.clamp_min(values / 255**2).sqrt()
        correlation = (convolve(part, kernels) / spread).reshape(len(part), count, -1)
        best = correlation.max(dim=2)
        distances.append(1 - best.values.T)
        places.append(best.indices.T)
    return torch.cat(distances, dim=1).clamp_min(0), torch.cat(places, dim=1)


def _dissimilarity(variants: Tensor, images: Tensor, columns: Tensor, places: Tensor) -> Tensor:
    """1 - SSIM (N, K) of each image's variants and `images[columns]` where they match best; both standardised first."""
    template = variants.shape[3:]
    windows = images
    for axis, width in enumerate(template, start=2):
        windows = windows.unfold(axis, width, 1)  # a view; (M, C, *shifts, *template)
    shifts = windows.shape[2 : 2 + len(template)]
    windows = windows.movedim(1, 1 + len(template))  # (M, *shifts, C, *template)
    rows = torch.arange(len(variants), device=variants.device)[:, None].expand_as(columns)
    place = places[rows, columns]
    shift = torch.unravel_index(place % math.prod(shifts), shifts)
    mine = _standardised(variants[rows, place // math.prod(shifts)].flatten(0, 1))
    theirs = _standardised(windows[(columns, *shift)].flatten(0, 1).float())
    ssim, _ = compute_ssim_and_cs(
        mine, theirs, len(template), [min(WINDOW, n) for n in template], [1.5] * len(template), data_range=4.0
    )  # most values lie within two standard deviations of the mean, hence the range of 4
    distance: Tensor = 1 - ssim.flatten(1).mean(dim=1)
    return distance.reshape(columns.shape).clamp_min(0)


def _standardised(images: Tensor) -> Tensor:
    """Images with mean 0 and variance 1 each."""
    axes = tuple(range(1, images.dim()))
    return (images - images.mean(dim=axes, keepdim=True)) / images.std(dim=axes, keepdim=True).clamp_min(1 / 255)


def _expected_nearest(distances: Tensor, others: Tensor) -> Tensor:
    """Expected nearest distance (N,) of as many images as the smaller side has, drawn at random from `distances`.

    Exact: of M sorted distances number i (from 0) is the nearest of m with probability C(M-1-i, m-1) / C(M, m). NaN is
    an image that is left out.
    """
    lengths = [int((~side[0].isnan()).sum()) for side in (distances, others)]
    length, drawn = lengths[0], min(lengths)
    ordered = distances.sort(dim=1).values[:, :length].double()  # NaN comes last
    left = torch.arange(length - 1, drawn - 2, -1, dtype=torch.float64, device=distances.device)
    logs = _log_choose(left, drawn - 1) - _log_choose(torch.full_like(left, length), drawn)
    return (ordered[:, : len(left)] * logs.exp()).sum(dim=1)


def _log_choose(n: Tensor, k: int) -> Tensor:
    return torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _nan_low(distances: Tensor) -> Tensor:
    """Least of each row (N,), NaN left out."""
    return distances.nan_to_num(nan=math.inf).amin(dim=1)
