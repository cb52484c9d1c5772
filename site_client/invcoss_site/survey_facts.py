"""What a survey knows of one image: read as a visit reads it, measured, doubted, and shown small."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image as Picture
from pydantic import BaseModel, ConfigDict, Field

from invcoss_common.errors import UnreadableFile
from invcoss_common.modality import Modality
from invcoss_site.burnt_in import Region, suspected_text
from invcoss_site.deidentify import Sign, signs_in_file, signs_in_name
from invcoss_site.ingest import format_of, read_samples
from invcoss_site.ingest.masks import read_mask
from invcoss_site.ingest.sample import Finding, Sample
from invcoss_site.ingest.values import Values, resample, unit_range
from invcoss_site.inventory import Item

BINS = 48  # of the histogram of values as the model takes them
LOOKED_AT = 200_000  # values of an image, evenly spread, that its percentiles and histogram are taken from
THUMBNAIL = 132  # pixels: height of each plane
USUAL_MM = (0.2, 10.0)  # voxel sizes outside it are read, and are unusual
DICOM_MODALITIES = {  # what files of a built-in modality say they are
    "xray": {"CR", "DX", "DR", "RG", "RF", "MG", "PX", "IO", "XA"},
    "ct": {"CT", "PT"},
    "mri": {"MR"},
    "pathology": {"SM", "GM", "XC"},
}
FORMAT_NAMES = {"picture": "picture", "slide": "whole slide", "volume": "NIfTI", "dicom": "DICOM"}


class Remark(BaseModel):
    """Something about a file: `kind` is for counting, `text` names the file and says what to do."""

    model_config = ConfigDict(frozen=True)

    file: str
    kind: str
    text: str


class Facts(BaseModel):
    """One image: a picture, a volume of one or many files, a slide, or a text."""

    model_config = ConfigDict(frozen=True)

    file: str = Field(description="within the folder; of a series the first file")
    case: str
    split: str = Field(description="as an index names it, or empty")
    held_out: bool
    files: int = 1
    images: int = Field(default=0, description="what a visit makes of it: tiles of a slide, else 1; 0 if quarantined")
    format: str = ""
    shape: tuple[int, ...] = Field(default=(), description="height and width, or depth (to the head), height, width")
    spacing_mm: tuple[float, ...] = Field(default=(), description="along depth, height, width")
    axes: str = Field(default="", description="which way they ran in the file")
    values: tuple[float, ...] = Field(
        default=(), description="lowest, 1st, 50th, 99th percentile, highest; in the file's own units"
    )
    histogram: tuple[int, ...] = Field(default=(), exclude=True)
    modality: str = Field(default="", description="as DICOM files say")
    scanner: str = ""
    patient: str = Field(default="", description="hash of the DICOM patient")
    uid: str = Field(default="", description="lowest SOP instance UID of its files, as a hash")
    content: str = Field(default="", description="hash of its values, whatever the format")
    quarantined: Remark | None = None
    warnings: tuple[Remark, ...] = ()
    mask_classes: tuple[int, ...] = Field(default=(), description="in the mask that an index names, if it fits")
    mask_refused: Remark | None = Field(
        default=None, description="the image is used all the same: a visit needs no mask"
    )
    signs: tuple[Sign, ...] = Field(default=(), exclude=True)
    thumbnail: bytes = Field(default=b"", exclude=True, repr=False)


def facts_of(
    item: Item, data: Path, name: str, modality: Modality, thumbnail: bool, mask_classes: Collection[int] | None = None
) -> Facts:
    """Read and measure one image, and its mask; whatever is wrong with them becomes a part of the answer."""
    facts = blank(item, data)
    signs = {*signs_in_name(item.path.relative_to(data))}
    for path in item.files:
        signs |= signs_in_file(path)
    facts |= {"signs": tuple(sorted(signs)), "format": FORMAT_NAMES.get(format_of(item.path, modality) or "", "")}
    warnings: list[Finding] = []
    samples: list[Sample] = []
    letters: Region | None = None
    if facts["format"] == "DICOM":
        facts |= _in_header(item)
    try:
        samples = read_samples(item.files, modality, item.part)
        facts |= _measured(samples)
        warnings += dict.fromkeys(one for sample in samples for one in sample.warnings)
        scaled = [unit_range(sample, modality) for sample in samples]
        facts["images"] = len(samples)
        counts = [np.histogram(_few(one), BINS, (0, 1))[0] for one in scaled]
        facts["histogram"] = tuple(np.sum(counts, axis=0).tolist())
        if modality.ndim == 2 and modality.channels == 1 and (letters := suspected_text(scaled[0][0])):
            text = "text seems to be burnt in; look at it, and leave it out if it names anybody"
            warnings.append(Finding(item.path, f"{item.path}: {text}", "burnt-in"))
        warnings += _doubts(item.path, samples[0], name, str(facts["modality"]))
        if item.mask:
            facts |= _of_mask(item.mask, str(facts["file"]), samples[0], mask_classes)
    except UnreadableFile as error:
        facts["quarantined"], warnings = Remark(file=str(facts["file"]), kind=error.kind, text=str(error)), []
    except Exception as error:  # a fault of a reader: a visit would end here, a survey must not
        facts["quarantined"], warnings = unexpected(item, data, type(error).__name__), []
    if thumbnail and samples:
        with suppress(Exception):  # of an image that is quarantined for its values
            facts["thumbnail"] = shown(samples[0], modality, letters)
    facts["warnings"] = tuple(Remark(file=str(facts["file"]), kind=one.kind, text=one.reason) for one in warnings)
    return Facts.model_validate(facts)


def _of_mask(path: Path, file: str, image: Sample, classes: Collection[int] | None) -> dict[str, object]:
    """Which classes the mask of an image has, or why the pair is refused."""
    try:
        return {"mask_classes": tuple(np.unique(read_mask(image, path, classes)).tolist())}
    except UnreadableFile as error:
        return {"mask_refused": Remark(file=file, kind=error.kind, text=str(error))}


def blank(item: Item, data: Path) -> dict[str, object]:
    """What is known of an image that was not read."""
    return {
        "file": (item.path / item.part).relative_to(data).as_posix(),
        "case": item.case,
        "split": item.split,
        "held_out": item.held_out,
        "files": len(item.files),
        "modality": "",
    }


def unexpected(item: Item, data: Path, what: str) -> Remark:
    """Of a file on which a reader fails in a way that it should not."""
    text = f"{item.path}: reading it failed ({what}); remove it, and report the fault without sending the file"
    return Remark(file=item.path.relative_to(data).as_posix(), kind="fault", text=text)


def _in_header(item: Item) -> dict[str, object]:
    """What DICOM headers say of modality, scanner, patient and instances."""
    found: dict[str, object] = {}
    uids = []
    tags = ["SOPInstanceUID", "Modality", "Manufacturer", "ManufacturerModelName", "PatientID"]
    for path in item.files:
        with suppress(Exception):  # of a damaged file
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
            uids.append(str(header.get("SOPInstanceUID", "")))
            maker, model = (str(header.get(tag) or "").strip() for tag in ("Manufacturer", "ManufacturerModelName"))
            found.setdefault("scanner", " ".join(filter(None, (maker, model))) or "not named")
            found.setdefault("modality", str(header.get("Modality") or ""))
            found.setdefault("patient", _hash(str(header.get("PatientID") or "").strip()))
    return {**found, "modality": found.get("modality", ""), "uid": _hash(min(uids, default=""))}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def _measured(samples: list[Sample]) -> dict[str, object]:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(str(sample.pixels.shape).encode())
        digest.update(np.ascontiguousarray(sample.pixels, np.float32).data)
    first = samples[0]
    few = np.concatenate([_few(sample.pixels) for sample in samples])
    finite = few[np.isfinite(few)]
    lowest, highest = (float(f([f(sample.pixels) for sample in samples])) for f in (np.min, np.max))
    values = (lowest, *np.percentile(finite, (1, 50, 99)).tolist(), highest) if finite.size else ()
    return {
        "shape": first.pixels.shape[1:],
        "spacing_mm": tuple(round(mm, 3) for mm in first.spacing_mm or ()),
        "axes": first.axes,
        "content": digest.hexdigest()[:32],
        "values": tuple(value for value in values if np.isfinite(value)),
    }


def _few(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    flat = values.reshape(-1)
    return flat[:: max(1, flat.size // LOOKED_AT)].astype(np.float32)


def _doubts(path: Path, sample: Sample, name: str, said: str) -> list[Finding]:
    """What is odd beyond what a visit warns of; `said` is the modality in a DICOM header."""
    found = []
    if said and said not in DICOM_MODALITIES.get(name, {said}):
        found.append(("modality", f"the file says that its modality is {said}; is it in the right folder?"))
    if sample.spacing_mm and not all(USUAL_MM[0] <= mm <= USUAL_MM[1] for mm in sample.spacing_mm):
        size = " x ".join(f"{mm:g}" for mm in sample.spacing_mm)
        found.append(("spacing", f"voxels of {size} mm (depth, height, width) are unusual; compare with the scanner"))
    return [Finding(path, f"{path}: {text}", kind) for kind, text in found]


def shown(sample: Sample, modality: Modality, letters: Region | None = None) -> bytes:
    """A small JPEG: a picture and its `letters`, or the middle planes of a volume (axial, coronal, sagittal)."""
    try:
        values = unit_range(sample, modality)
    except UnreadableFile:  # constant, or not in its units: as it is
        raw = np.nan_to_num(sample.pixels.astype(np.float32), posinf=0.0, neginf=0.0)
        low, high = float(raw.min()), float(raw.max())
        values = (raw - low) / (high - low or 1.0)
    if sample.spacing_mm is None:
        planes = [(values, 1.0)]
    else:
        depth, height, width = (side // 2 for side in values.shape[1:])
        d, h, w = sample.spacing_mm
        upright = values[:, ::-1]  # the head is up
        planes = [(values[:, depth], h / w), (upright[:, :, height], d / w), (upright[:, :, :, width], d / h)]
    tiles = [_fitted(np.ascontiguousarray(plane), stretch) for plane, stretch in planes]
    if letters:
        tiles.append(_fitted(np.ascontiguousarray(values[(slice(None), *letters)]), widest=2 * THUMBNAIL))
    strip = np.concatenate([np.pad(tile, ((0, 0), (0, 0), (0, 3))) for tile in tiles], axis=2)[:, :, :-3]
    pixels = (strip.clip(0, 1) * 255).astype(np.uint8)
    buffer = BytesIO()
    Picture.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _fitted(plane: Values, stretch: float = 1.0, widest: int = THUMBNAIL) -> Values:
    """A plane (C, h, w), its pixels `stretch` times as high as wide, at most `widest` wide, black around it."""
    height, width = plane.shape[1] * stretch, plane.shape[2]
    factor = min(THUMBNAIL / height, widest / width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    small = resample(plane.astype(np.float32), size)
    top = (THUMBNAIL - size[0]) // 2
    return np.pad(small, ((0, 0), (top, THUMBNAIL - size[0] - top), (0, 0)))
