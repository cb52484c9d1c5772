"""Made-up site folders: drawn chest films, H&E tiles, CT slabs and head MRI in the formats a hospital would have.

Deterministic by seed; every case differs in size, position, rotation, noise and in a label that changes the picture.
Letters: axes are open grids in [-1, 1], x from the picture's left to its right (3-D: the patient's left to right),
y from top to bottom (3-D: back to front), z from feet to head; a mask is a float array in [0, 1] with soft edges.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image

from invcoss_common.errors import PlanError

Array = npt.NDArray[np.floating]
Rng = np.random.Generator

_PIXELS = 160  # side of a 2-D picture
_CT_SHAPE, _CT_SPACING_MM = (96, 96, 32), (4.0, 4.0, 4.0)  # x, y, z
_MRI_SHAPE, _MRI_SPACING_MM = (72, 84, 52), (2.5, 2.5, 3.5)
# Optical density per unit of stain in R, G, B (Ruifrok and Johnston 2001, normalised rows).
_HAEMATOXYLIN, _EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)


def write_phantoms(folder: Path, modality: str, cases: int, seed: int) -> None:
    """Write `cases` pictures of a built-in modality and their `labels.csv` (file, case, label, split) to `folder`.

    Labels take turns; one case in five is in split test. Raises PlanError for a modality that has no phantom.
    """
    try:
        phantom = _PHANTOMS[modality]
    except KeyError:
        known = ", ".join(sorted(_PHANTOMS))
        raise PlanError(f"no phantom for modality '{modality}', only for {known}; give the site a folder") from None
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(cases):
        name = f"{modality}-{number:04d}"
        label = phantom.labels[number % len(phantom.labels)]
        image = phantom.draw(np.random.default_rng([seed, number]), label)
        phantom.write(folder / f"{name}{phantom.suffix}", image)
        rows.append((f"{name}{phantom.suffix}", name, label, "test" if number % 5 == 3 else "train"))
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file", "case", "label", "split"), *rows])


def _soft(distance: Array, edge: float) -> Array:
    """Mask that is 1 where `distance` is negative and 0 where it is positive, over about `edge` on either side."""
    return np.asarray(1 / (1 + np.exp(np.clip(distance / (edge / 2), -40, 40))))


def _ball(axes: Sequence[Array], centre: Sequence[float], radii: Sequence[float], edge: float = 0.03) -> Array:
    """Mask of an ellipse or ellipsoid."""
    radius = np.sqrt(sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii, strict=True)))
    return _soft((radius - 1) * min(radii), edge)


def _band(distance: Array, width: float) -> Array:
    """Mask of a flat band with soft edges around distance 0."""
    square = (distance / width) ** 2
    return np.asarray(np.exp(-square * square))


def _turn(x: Array, y: Array, degrees: float) -> tuple[Array, Array]:
    """The coordinates x, y seen by an object that is rotated in their plane."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return c * x + s * y, c * y - s * x


def _axes(shape: tuple[int, ...]) -> list[Array]:
    return list(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True))


def _clouds(rng: Rng, shape: tuple[int, ...], grain: float | Sequence[float]) -> Array:
    """Smooth noise of mean 0 and deviation 1, with blobs of about `grain` pixels (one value, or one per axis)."""
    grains = np.broadcast_to(grain, len(shape))
    spectrum = np.fft.rfftn(rng.standard_normal(shape))
    for axis, (n, g) in enumerate(zip(shape, grains, strict=True)):
        frequency = np.fft.rfftfreq(n) if axis == len(shape) - 1 else np.fft.fftfreq(n)
        gain = np.exp(-2 * (np.pi * frequency * g / 2) ** 2)
        spectrum *= gain.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    noise = np.fft.irfftn(spectrum, shape, axes=range(len(shape)))
    return np.asarray((noise - noise.mean()) / noise.std())


def _paint(image: Array, mask: Array, value: float | Array) -> None:
    """Lay `value` over `image` where `mask` is 1, in place."""
    image += mask * (value - image)


def _draw_xray(rng: Rng, label: str) -> Array:
    """Frontal chest film: uint8 (H, W), dense is bright."""
    y, x = _axes((_PIXELS, _PIXELS))
    x, y = _turn(x, y, rng.uniform(-4, 4))
    x = (x - rng.uniform(-0.05, 0.05)) / rng.uniform(0.92, 1.05)
    y = (y - rng.uniform(-0.04, 0.06)) / rng.uniform(0.94, 1.06)
    shoulders = np.minimum(-0.98 + 0.28 * np.abs(x) ** 1.4 - y, np.abs(x) - 0.24)  # below the shoulder line, or neck
    torso = 0.88 + 0.3 * _soft(y + 0.22, 0.2)  # wider above the armpits
    body = _soft(np.maximum(np.abs(x) - torso, shoulders), 0.05)
    film = 0.62 * body * (1 - 0.12 * x**2)
    sick_side = rng.choice([-1, 1])
    for side in (-1, 1):  # -1 is the picture's left, which is the patient's right
        film = _half_chest(film, rng, side * x, y, side, label if side == sick_side else "normal")
        film += (
            0.17
            * body
            * _band(y + 0.64 + 0.14 * side * x - 0.05 * np.sin(5 * side * x), 0.038)
            * _soft(np.abs(side * x - 0.43) - 0.36, 0.04)
        )  # clavicle
        film += 0.14 * body * _ball((side * x, y), (0.93, -0.56), (0.15, 0.16))  # head of the humerus
    big = 1.45 if label == "cardiomegaly" else 1.0
    heart = _ball(_turn(x - 0.10, y - 0.27, 35), (0.22 * big - 0.19, 0), (0.34 * big, 0.25 * big), 0.05)
    middle = _soft(np.abs(x + 0.01) - 0.13 - 0.03 * np.clip(y, -0.5, 1), 0.05)
    middle = np.maximum(middle, _ball((x, y), (0.12, -0.27), (0.11, 0.12)))  # with the aortic knob
    _paint(film, np.maximum(heart, middle * _soft(-0.75 - y, 0.2)) * body, 0.76)
    film += 0.07 * body * _soft(np.abs(x) - 0.085, 0.03) * (0.8 + 0.2 * np.sin(y * 42))  # vertebrae
    film -= 0.17 * body * _soft(np.abs(x) - 0.042, 0.03) * _soft(y + 0.16, 0.08)  # windpipe
    film += (0.06 * _soft(0.55 - y, 0.3) + 0.018 * _clouds(rng, film.shape, 7)) * body
    film = film * rng.uniform(0.92, 1.05) + rng.uniform(0.0, 0.04) + rng.normal(0, 0.012, film.shape)
    return np.asarray(np.clip(film, 0, 1) * 255).astype(np.uint8)


def _half_chest(film: Array, rng: Rng, u: Array, y: Array, side: int, label: str) -> Array:
    """`film` with one lung, its vessels and its ribs; `u` is the distance from the midline towards that side."""
    width = np.where(u > 0.32, 0.46, 0.30)
    wall = ((np.abs(u - 0.32) / width) ** 2.4 + (np.clip(0.4 - y, 0, None) / 1.16) ** 2.4 - 1) * 0.3
    dome = (0.47 + 0.05 * side) + 0.55 * (u - 0.38) ** 2 + 0.5 * np.clip(u - 0.5, 0, None) ** 2
    chest = _soft(wall, 0.05) * _soft(0.1 - u, 0.03)
    lung = chest * _soft(y - dome, 0.03)
    angle, reach = np.arctan2(y + 0.02, u - 0.2), np.hypot(y + 0.02, u - 0.2)
    vessels = np.zeros_like(film)
    for start in rng.uniform(-1.6, 1.7, 12):  # they fan out from the hilum
        across = (angle - start - rng.normal(0, 1.1) * reach) * reach
        vessels = np.maximum(vessels, np.exp(-((across / 0.017) ** 2) - reach / rng.uniform(0.15, 0.4)))
    film = film + lung * (-0.46 + 0.2 * vessels + 0.16 * _ball((u, y), (0.19, 0.0), (0.09, 0.17), 0.12))
    cage = 0.085 * _soft(np.abs(u - 0.42) - 0.38, 0.05) * _soft(y - 0.62, 0.1) * _soft(wall - 0.03, 0.05)
    for level in np.arange(-0.74, 0.5, 0.145):
        back = y - level + 0.10 * np.sin(np.clip(u / 0.62, 0, 1) * 2.2) - 0.42 * np.clip(u - 0.3, 0, None) ** 2
        front = y - level - 0.24 + 0.55 * (u - 0.35)
        film += cage * (_band(back, 0.030) + 0.45 * _band(front, 0.034))
    if label == "effusion":  # fluid climbs the chest wall
        level = rng.uniform(-0.05, 0.22) - 0.55 * np.clip(u - 0.2, 0, None) ** 2
        _paint(film, chest * _soft(level - y, 0.06), 0.64)
    if label == "nodule":
        spot = (rng.uniform(0.42, 0.6), rng.uniform(-0.4, 0.0))
        _paint(film, _ball((u, y), spot, (rng.uniform(0.09, 0.14),) * 2, 0.05), 0.60)
    return film


def _stamp_nuclei(
    stain: Array, rng: Rng, spots: Array, radii: tuple[float, float], angles: Array, spread: float
) -> None:
    """Lay one dark ellipse per row (y, x) of `spots` on the haematoxylin map, in place; radii in pixels."""
    for (row, column), angle in zip(spots, angles, strict=True):
        size = [radius * float(np.exp(rng.normal(0, spread))) for radius in radii]
        reach = int(max(size)) + 2
        top, left = max(int(row) - reach, 0), max(int(column) - reach, 0)
        window = stain[top : max(int(row) + reach + 1, 0), left : max(int(column) + reach + 1, 0)]
        y, x = np.arange(window.shape[0])[:, None] + top - row, np.arange(window.shape[1])[None] + left - column
        nucleus = _ball(_turn(x, y, float(np.rad2deg(angle))), (0, 0), size, 1.0) * rng.uniform(0.75, 1.15)
        np.maximum(window, nucleus, out=window)


def _where(mask: Array, spots: Array) -> Array:
    """The rows (y, x) of `spots` that lie where `mask` is set."""
    rows, columns = np.clip(spots, 0, np.array(mask.shape) - 1).astype(int).T
    return np.asarray(spots[mask[rows, columns] > 0.5])


def _draw_pathology(rng: Rng, label: str) -> Array:
    """H&E tile: uint8 (H, W, 3), stains mixed by optical density."""
    shape = (_PIXELS, _PIXELS)
    y, x = np.mgrid[:_PIXELS, :_PIXELS].astype(float)
    _, across = _turn(x, y, rng.uniform(0, 180))
    waves = (across + 8 * _clouds(rng, shape, 40)) * rng.uniform(0.45, 0.7) + 1.5 * _clouds(rng, shape, 15)
    eosin = 0.50 + 0.10 * np.sin(waves) + 0.10 * _clouds(rng, shape, 10)
    blue, nuclei = np.full(shape, 0.05), np.zeros(shape)
    stroma = np.ones(shape)
    if label == "tumour":
        nest = _soft(-1.1 - _clouds(rng, shape, 45), 0.2)
        _paint(eosin, nest, 0.36 + 0.05 * _clouds(rng, shape, 5))
        _paint(blue, nest, 0.22)
        stroma -= nest
        grid = np.mgrid[0:_PIXELS:10.5, 0:_PIXELS:10.5].reshape(2, -1).T
        spots = _where(nest, grid + rng.normal(0, 2.2, grid.shape))
        _stamp_nuclei(nuclei, rng, spots, (5.2, 4.2), rng.uniform(0, np.pi, len(spots)), 0.28)
    glands = {"gland": int(rng.integers(2, 5)), "inflammation": 1}.get(label, 0)
    for quarter in rng.permutation(4)[:glands]:
        centre = _PIXELS * (0.25 + 0.5 * np.array(divmod(quarter, 2))) + rng.normal(0, 6, 2)
        stroma *= 1 - _gland(rng, centre, y, x, eosin, blue, nuclei)
    spindles = _where(stroma, rng.uniform(0, _PIXELS, (70, 2)))
    angles = rng.uniform(0, np.pi) + rng.normal(0, 0.35, len(spindles))
    _stamp_nuclei(nuclei, rng, spindles, (6.0, 1.5), angles, 0.2)
    if label == "inflammation":
        swarm = _where(stroma * _soft(-0.2 - _clouds(rng, shape, 35), 0.2), rng.uniform(0, _PIXELS, (420, 2)))
        _stamp_nuclei(nuclei, rng, swarm, (2.9, 2.7), np.zeros(len(swarm)), 0.08)
    blue += nuclei * (0.85 + 0.12 * _clouds(rng, shape, 3))
    eosin *= 1 - 0.55 * np.clip(nuclei, 0, 1)
    density = np.clip(blue, 0, None)[..., None] * np.array(_HAEMATOXYLIN) * rng.uniform(0.85, 1.25)
    density += np.clip(eosin, 0, None)[..., None] * np.array(_EOSIN) * rng.uniform(0.85, 1.2)
    tile = 244 * np.exp(-density) + rng.normal(0, 3, (*shape, 3))
    return np.asarray(np.clip(tile, 0, 255)).astype(np.uint8)


def _gland(rng: Rng, centre: Array, y: Array, x: Array, eosin: Array, blue: Array, nuclei: Array) -> Array:
    """Add a gland at `centre` (y, x) to the stain maps, in place: white lumen in a ring of cells; returns its mask."""
    radius = rng.uniform(26, 38)
    waves = [(k, rng.uniform(0.05, 0.3 / k), rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4)]

    def edge(angle: Array) -> Array:
        return np.asarray(radius * (1 + sum(a * np.cos(k * angle + phase) for k, a, phase in waves)))

    reach = np.hypot(y - centre[0], x - centre[1])
    outline = edge(np.arctan2(y - centre[0], x - centre[1]))
    gland, lumen = _soft(reach - outline, 2), _soft(reach - rng.uniform(0.35, 0.58) * outline, 2)
    for mask, pink, purple in ((gland, 0.40, 0.16), (lumen, 0.03, 0.0)):
        _paint(eosin, mask, pink)
        _paint(blue, mask, purple)
    angles = np.arange(0, 2 * np.pi, 5.6 / radius)
    spots = centre + 0.83 * edge(angles)[:, None] * np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    _stamp_nuclei(nuclei, rng, spots + rng.normal(0, 0.7, spots.shape), (4.4, 2.3), angles, 0.12)
    return _soft(reach - outline - 4, 2)


def _draw_ct(rng: Rng, label: str) -> Array:
    """Axial slab of the trunk: int16 (x, y, z) in Hounsfield units, RAS."""
    x, y, z = _axes(_CT_SHAPE)
    x, y = _turn(x, y, rng.uniform(-5, 5))
    x, y = ((a - rng.uniform(-0.04, 0.04)) / rng.uniform(0.92, 1.08) for a in (x, y))
    z = z + rng.uniform(-0.15, 0.15)
    fat = rng.uniform(0.03, 0.08)
    hu = np.full(_CT_SHAPE, -1000.0)
    _paint(hu, _ball((x, y), (0, 0), (0.90, 0.62)), -100.0)  # skin and fat
    _paint(hu, _ball((x, y), (0, 0), (0.88 - fat, 0.60 - fat)), 50.0)  # muscle
    _SLABS[label](hu, rng, (x, y, z), label)
    for side in (-1, 1):  # muscles beside the spine
        _paint(hu, _ball((x, y), (side * 0.17, -0.47), (0.13, 0.09)), 55.0)
    _paint(hu, _ball((x, y), (0, -0.28), (0.15, 0.13)), 265 + 85 * np.sin(z * 16))  # vertebral bodies and discs
    for side in (-1, 1):
        _paint(hu, _ball((x, y), (side * 0.11, -0.43), (0.05, 0.09)), 420.0)
    _paint(hu, _ball((x, y), (0, -0.52), (0.04, 0.08)), 450.0)  # spinous process
    _paint(hu, _ball((x, y), (0, -0.43), (0.06, 0.05)), 25.0)  # spinal canal
    _paint(hu, _ball((x, y), (-0.12, -0.10), (0.075, 0.085)), 190.0)  # aorta, left
    hu += rng.uniform(8, 18) * rng.standard_normal(_CT_SHAPE)
    return np.asarray(np.clip(np.rint(hu), -1024, 3071)).astype(np.int16)


def _chest(hu: Array, rng: Rng, axes: Sequence[Array], label: str) -> None:
    """Lungs with vessels, heart, ribs and breastbone; with `effusion`, fluid behind one lung."""
    x, y, z = axes
    sick_side = rng.choice([-1, 1])
    _paint(hu, _ball((x, y), (0, 0.01), (0.74, 0.475)), -60.0)  # mediastinal fat
    speckle = _clouds(rng, _CT_SHAPE, (2.2, 2.2, 3))
    for side in (-1, 1):
        lung = _ball(axes, (side * 0.40, -0.02, -0.1), (0.32 + 0.02 * side, 0.46, 1.9), 0.03)
        _paint(hu, lung, -840 + 500 * np.clip(speckle - 1.5, 0, 1) + 50 * (-y))
        if label == "effusion" and side == sick_side:
            _paint(hu, lung * _soft(y + rng.uniform(0.02, 0.14) - 0.1 * z, 0.04), 15.0)
    beat = rng.uniform(0.9, 1.15)
    _paint(hu, _ball(axes, (-0.10, 0.14, -0.75), (0.30 * beat, 0.24 * beat, 1.05), 0.03), 45.0)
    _paint(hu, _ball(axes, (-0.16, 0.10, -0.75), (0.13 * beat, 0.12 * beat, 0.7), 0.03), 170.0)
    _paint(hu, _ball(axes, (0.06, 0.18, -0.65), (0.11 * beat, 0.09 * beat, 0.7), 0.03), 140.0)
    _paint(hu, _ball(axes, (0.02, 0.16, 0.9), (0.09, 0.10, 0.9), 0.03), 190.0)  # ascending aorta
    _paint(hu, _ball(axes, (0.0, 0.02, 1.0), (0.055, 0.055, 0.8), 0.02), -980.0)  # windpipe
    ring = _soft(np.abs(np.hypot(x / 0.785, y / 0.515) - 1) - 0.032, 0.02) * _soft(0.10 - np.abs(x), 0.04)
    _paint(hu, ring * _soft(0.3 - np.sin((z * 2.4 - 3 * y) * 2 * np.pi), 0.4), 480.0)  # ribs, cut obliquely
    _paint(hu, _ball((x, y), (0, 0.51), (0.12, 0.035)), 320.0)


def _abdomen(hu: Array, rng: Rng, axes: Sequence[Array], label: str) -> None:
    """Liver, spleen, kidneys and bowel with gas in fat; with `liver_lesion`, a dark round spot in the liver."""
    x, y = axes[:2]
    _paint(hu, _ball((x, y), (0, 0.02), (0.72, 0.43)), -95.0)
    for _ in range(9):  # bowel loops
        at = (rng.uniform(-0.45, 0.35), rng.uniform(0.08, 0.32), rng.uniform(-1.2, 0.5))
        _paint(hu, _ball(axes, at, (0.12, 0.10, 0.3)), 35.0)
        if rng.random() < 0.5:
            _paint(hu, _ball(axes, (at[0], at[1] + 0.03, at[2]), (0.07, 0.05, 0.2)), -900.0)
    _paint(hu, _ball(axes, (-0.28, 0.18, 0.75), (0.24, 0.17, 0.6), 0.03), 30.0)  # stomach, gas on top
    _paint(hu, _ball(axes, (-0.28, 0.26, 0.75), (0.15, 0.07, 0.4), 0.03), -950.0)
    liver = np.maximum(
        _ball(axes, (0.36, 0.02, 0.35), (0.34, 0.40, 1.15), 0.03),
        _ball(axes, (0.08, 0.22, 0.6), (0.32, 0.17, 0.7), 0.03),
    ) * _ball((x, y), (0, 0.02), (0.73, 0.44))
    _paint(hu, liver, 105.0)
    if label == "liver_lesion":
        spot = (rng.uniform(0.32, 0.48), rng.uniform(-0.1, 0.16), rng.uniform(-0.2, 0.5))
        _paint(hu, _ball(axes, spot, (0.15, 0.15, 0.5), 0.03), 15.0)
    _paint(hu, _ball(axes, (-0.55, -0.12, 0.5), (0.14, 0.22, 0.7), 0.03), 125.0)  # spleen
    for side, level in ((-1, -0.35), (1, -0.5)):
        _paint(hu, _ball(axes, (side * 0.36, -0.22, level), (0.14, 0.12, 0.65), 0.03), 210.0)
        _paint(hu, _ball(axes, (side * 0.31, -0.19, level), (0.06, 0.05, 0.3), 0.03), -20.0)
    _paint(hu, _ball((x, y), (0.10, -0.09), (0.08, 0.07)), 150.0)  # vena cava


_SLABS = {"chest": _chest, "effusion": _chest, "abdomen": _abdomen, "liver_lesion": _abdomen}


def _draw_mri(rng: Rng, label: str) -> Array:
    """T1-weighted head: int16 (x, y, z), RAS, on an intensity scale of its own."""
    x, y, z = _axes(_MRI_SHAPE)
    x, y = _turn(x, y, rng.uniform(-6, 6))
    y, z = _turn(y, z, rng.uniform(-6, 6))
    x, y, z = (a / rng.uniform(0.93, 1.03) - rng.uniform(-0.03, 0.03) for a in (x, y, z))
    axes = (x, y, z)
    head = np.zeros(_MRI_SHAPE)
    neck = _ball((x, y), (0, -0.25), (0.55, 0.55)) * _soft(z + 0.3, 0.05)
    face = _ball(axes, (0, 0.45, -0.45), (0.55, 0.42, 0.55), 0.04)
    _paint(head, np.maximum(neck, face), 0.42 + 0.10 * _clouds(rng, _MRI_SHAPE, 7))
    _paint(head, _ball(axes, (0, -0.02, 0.13), (0.88, 0.94, 0.86)), 0.85)  # scalp fat
    _paint(head, _ball(axes, (0, -0.02, 0.13), (0.80, 0.86, 0.80)), 0.06)  # bone
    reach = np.sqrt((x / 0.73) ** 2 + ((y + 0.02) / 0.79) ** 2 + ((z - 0.13) / 0.72) ** 2)
    folds = np.abs(_clouds(rng, _MRI_SHAPE, (6, 6, 4)))  # 0 at the bottom of a fold
    inner = _soft(reach - 1, 0.03)
    _paint(head, inner, 0.36 + 0.1 * _clouds(rng, _MRI_SHAPE, 8))
    brain = inner * _soft(-0.34 - z - 0.12 * y, 0.04)  # above the skull base
    _paint(head, brain, 0.20)  # fluid around the folds
    shrink = 0.08 if label == "hydrocephalus" else 0.04
    joined = _soft(1 - np.hypot((y + 0.02) / 0.42, (z - 0.05) / 0.34), 0.1)  # 0 where the halves of the brain meet
    grey = _soft(reach - 1 + shrink + 0.22 * np.clip(0.3 - folds, 0, 1), 0.03)
    white = _soft(reach - 0.58 - 0.30 * np.clip(folds * 1.3, 0, 1), 0.04)
    _paint(head, brain * grey * (1 - _soft(np.abs(x) - 0.025, 0.03) * joined), 0.52)
    _paint(head, brain * white * (1 - _soft(np.abs(x) - 0.07, 0.03) * joined), 0.80)
    swell = 2.0 if label == "hydrocephalus" else rng.uniform(0.85, 1.15)
    for side in (-1, 1):
        u = side * x
        _paint(head, _ball((u, y, z), (0.27, 0.02, 0.06), (0.12, 0.17, 0.15)), 0.56)  # deep grey matter
        front = _ball((*_turn(u, y, -18), z), (0.10, 0.16, 0.18), (0.05 * swell, 0.24, 0.13 * swell))
        back = _ball((*_turn(u, y, 18), z), (0.10, -0.24, 0.16), (0.055 * swell, 0.26, 0.13 * swell))
        _paint(head, np.maximum(front, back), 0.14)  # ventricles
        cerebellum = _ball((u, y, z), (0.27, -0.48, -0.38), (0.26, 0.26, 0.24))
        _paint(head, cerebellum, 0.60 + 0.10 * np.sin(60 * z))
        _paint(head, _ball((u, y, z), (0.30, 0.70, -0.35), (0.15, 0.15, 0.17)), 0.20)  # eyes
    _paint(head, _ball(axes, (0, -0.18, -0.42), (0.12, 0.13, 0.45)), 0.72)  # brain stem
    if label == "tumour":
        spot = (rng.choice([-1, 1]) * rng.uniform(0.3, 0.42), rng.uniform(-0.35, 0.35), rng.uniform(0.15, 0.4))
        size = rng.uniform(0.18, 0.25)
        _paint(head, _ball(axes, spot, (size * 1.5,) * 3, 0.15), 0.45)  # swelling
        _paint(head, _ball(axes, spot, (size,) * 3), 1.05)
        _paint(head, _ball(axes, spot, (size * 0.5,) * 3), 0.18)
    bias = 1 + 0.12 * _clouds(rng, _MRI_SHAPE, 60)
    head = np.abs(head * bias + 0.02 * rng.standard_normal(_MRI_SHAPE))  # magnitude, so noise in air is positive
    scale = 10 ** rng.uniform(2, 4)  # scanners don't agree on units
    return np.asarray(np.clip(head * scale, 0, 32767)).astype(np.int16)


def _write_png(path: Path, image: Array) -> None:
    Image.fromarray(image).save(path)


def _write_nifti(spacing_mm: tuple[float, float, float]) -> Callable[[Path, Array], None]:
    def write(path: Path, image: Array) -> None:
        affine = np.diag([*spacing_mm, 1.0])
        affine[:3, 3] = -np.array(spacing_mm) * (np.array(image.shape) - 1) / 2  # the centre is at 0
        volume = nib.Nifti1Image(image, affine)
        volume.header.set_xyzt_units("mm")
        nib.save(volume, path)

    return write


class _Phantom(NamedTuple):
    """How one modality is drawn and written, and the labels that take turns."""

    draw: Callable[[Rng, str], Array]
    labels: tuple[str, ...]
    suffix: str
    write: Callable[[Path, Array], None]


_PHANTOMS = {
    "xray": _Phantom(_draw_xray, ("normal", "nodule", "effusion", "cardiomegaly"), ".png", _write_png),
    "pathology": _Phantom(_draw_pathology, ("gland", "tumour", "inflammation", "stroma"), ".png", _write_png),
    "ct": _Phantom(_draw_ct, tuple(_SLABS), ".nii.gz", _write_nifti(_CT_SPACING_MM)),
    "mri": _Phantom(_draw_mri, ("normal", "tumour", "hydrocephalus"), ".nii.gz", _write_nifti(_MRI_SPACING_MM)),
}
