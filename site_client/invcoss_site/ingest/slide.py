"""Cuts a whole-slide image into tiles of tissue with tiffslide (the extra `wsi`); never reads it as a whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from invcoss_common.errors import UnreadableFile
from invcoss_site.ingest.image import picture
from invcoss_site.ingest.sample import Sample, looks_like, unreadable

SUFFIXES = (".svs", ".ndpi", ".scn", ".bif")
UM_PER_PIXEL = 0.5  # of the tiles: as with a 20x objective
TILE = 256  # pixels a side
MOST_TILES = 100  # of a slide, spread over its tissue, as in the published pre-training on TCGA
MOST_PAGES = 1000  # of a TIFF
TISSUE = 0.5  # least share of a tile
_PLAUSIBLE_UM = (0.05, 20.0)  # a pixel of a slide
_OVERVIEW = 1 << 26  # pixels: largest level that is looked at as a whole

logging.getLogger("tifffile").disabled = True  # it tells of odd tags; what matters is checked here

if TYPE_CHECKING:
    from tiffslide import TiffSlide

Mask = npt.NDArray[np.bool_]


def is_slide(path: Path) -> bool:
    """Whether a file is a whole-slide image: by its name, or as a TIFF of several sizes of one picture in tiles."""
    if path.name.lower().endswith(SUFFIXES):
        return True
    try:
        with tifffile.TiffFile(path) as file:
            _check_pages(path, file)
            return bool(file.pages.first.is_tiled and len(file.series[0].levels) > 1)
    except Exception:  # it raises anything on what is no TIFF
        return False


def _check_pages(path: Path, file: tifffile.TiffFile) -> None:
    """Raises UnreadableFile for a TIFF of absurdly many pages, and finds circles of them, which are else followed."""
    pages = len(file.pages)
    if pages > MOST_PAGES:
        raise unreadable(path, "too-large", f"{pages} pages in one file, no slide has so many; export it again")


def read_slide(path: Path, um_per_pixel: float = UM_PER_PIXEL, most: int = MOST_TILES) -> list[Sample]:
    """Tiles (3, TILE, TILE) of tissue at `um_per_pixel`, row by row. Raises UnreadableFile."""
    try:
        import tiffslide
    except ImportError:
        text = "whole-slide images need tiffslide; pip install 'invcoss[wsi]'"
        raise unreadable(path, "not-supported", text) from None
    _check_whole(path)
    try:
        with tiffslide.TiffSlide(path) as slide:
            _check_pages(path, slide.ts_tifffile)
            return list(_tiles(path, slide, um_per_pixel, most))
    except UnreadableFile:
        raise
    except Exception:  # it raises anything on damaged bytes
        raise unreadable(path, "damaged", "damaged slide, or of an unknown kind; export it again") from None


def _check_whole(path: Path) -> None:
    """Raises UnreadableFile if a part of the slide lies beyond the end of its file: it would be filled up with grey."""
    try:
        with tifffile.TiffFile(path) as file:
            _check_pages(path, file)
            parts = [page for series in file.series for level in series.levels for page in level.pages if page]
            end = max(o + n for p in parts for o, n in zip(p.dataoffsets, p.databytecounts, strict=True))
    except Exception:
        text = f"not a whole-slide TIFF{looks_like(path)}, or damaged; export it again"
        raise unreadable(path, "not-this-format", text) from None
    found = path.stat().st_size
    if found < end:
        text = f"file is incomplete: its tiles end at byte {end:,}, and it has {found:,}; copy it again"
        raise unreadable(path, "truncated", text)


def _tiles(path: Path, slide: TiffSlide, um_per_pixel: float, most: int) -> Iterator[Sample]:
    step = TILE * _shrink(path, slide, um_per_pixel)  # side of a tile in pixels of the slide
    level = slide.get_best_level_for_downsample(step / TILE * 1.01)
    side = max(1, round(step / slide.level_downsamples[level]))
    places = _places(tissue_mask(_overview(path, slide)), slide.dimensions, step)
    if not places:
        raise unreadable(path, "no-image", "no tissue was found on this slide; remove it")
    for number in sorted({round(n) for n in np.linspace(0, len(places) - 1, min(most, len(places)))}):
        corner = (round(places[number][0]), round(places[number][1]))
        tile = slide.read_region(corner, level, (side, side)).convert("RGB")
        yield picture(path, np.asarray(tile.resize((TILE, TILE), Image.Resampling.BILINEAR)), 3)  # antialiased


def _shrink(path: Path, slide: TiffSlide, um_per_pixel: float) -> float:
    """By which factor the slide's pixels are smaller than those of the tiles."""
    found = [slide.properties.get(f"tiffslide.mpp-{axis}") for axis in "xy"]
    low, high = _PLAUSIBLE_UM
    if None in found or not all(low <= float(um) <= high for um in found):
        text = f"size of its pixels is not known or plausible ({found[0]} um); export it with its resolution"
        raise unreadable(path, "spacing", text)
    um = math.sqrt(float(found[0]) * float(found[1]))
    if um > 1.5 * um_per_pixel:
        text = f"{um:g} um a pixel is too coarse for tiles at {um_per_pixel:g}; scan it at a higher magnification"
        raise unreadable(path, "spacing", text)
    return um_per_pixel / um


def _overview(path: Path, slide: TiffSlide) -> npt.NDArray[np.uint8]:
    """The smallest level (h, w, 3) that still shows every tile as some pixels."""
    level = slide.level_count - 1
    width, height = slide.level_dimensions[level]
    if width * height > _OVERVIEW:
        text = f"its smallest level has {width} x {height} pixels; export it as a pyramid"
        raise unreadable(path, "too-large", text)
    return np.asarray(slide.read_region((0, 0), level, (width, height)).convert("RGB"))


def tissue_mask(overview: npt.NDArray[np.uint8]) -> Mask:
    """Where an overview (h, w, 3) of a stained slide shows tissue: what is colourful by Otsu's threshold."""
    saturation = np.asarray(Image.fromarray(overview).convert("HSV"))[..., 1]
    return saturation > otsu(np.bincount(saturation.ravel(), minlength=256))


def otsu(counts: npt.NDArray[np.integer[Any]]) -> int:
    """The value that divides a histogram so that the variance between its two parts is largest (Otsu 1979)."""
    values, share = np.arange(len(counts)), counts / counts.sum()
    below, sums = np.cumsum(share), np.cumsum(share * values)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below - sums) ** 2 / (below * (1 - below))
    return int(np.nanargmax(np.where(np.isfinite(between), between, 0.0)))


def _places(tissue: Mask, size: tuple[int, int], step: float) -> list[tuple[float, float]]:
    """Upper left corners (x, y) in pixels of the slide of all whole tiles with enough tissue, row by row."""
    width, height = size
    scale = tissue.shape[1] / width, tissue.shape[0] / height
    places = []
    for row, column in product(range(int(height / step)), range(int(width / step))):
        left, top = int(column * step * scale[0]), int(row * step * scale[1])
        right, bottom = math.ceil((column + 1) * step * scale[0]), math.ceil((row + 1) * step * scale[1])
        if tissue[top:bottom, left:right].mean() >= TISSUE:
            places.append((column * step, row * step))
    return places
