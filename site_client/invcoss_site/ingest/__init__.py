"""Turns the files of a site into samples: one reader a format, all giving the same `Sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from invcoss_common.errors import DataError
from invcoss_common.modality import Modality
from invcoss_site.ingest import slide
from invcoss_site.ingest.arrays import read_image
from invcoss_site.ingest.checks import doubts
from invcoss_site.ingest.dicom import is_dicom, read_dicom_picture
from invcoss_site.ingest.image import read_picture
from invcoss_site.ingest.nifti import read_nifti
from invcoss_site.ingest.sample import Sample, check_not_empty
from invcoss_site.ingest.series import read_series
from invcoss_site.ingest.stack import read_stack

Format = Literal["picture", "slide", "volume", "dicom"]

DICOM = (".dcm", ".dicom", ".ima")
SUFFIXES: dict[int, tuple[str, ...]] = {
    2: (".png", ".jpg", ".jpeg", ".tif", ".tiff", *DICOM),
    3: (".nii", ".nii.gz", *DICOM),
}
ENDINGS = tuple(dict.fromkeys((*SUFFIXES[2], *SUFFIXES[3], *slide.SUFFIXES)))
FORMATS: dict[int, str] = {2: "PNG, JPEG, TIFF or DICOM", 3: "NIfTI or DICOM"}
# Images in formats that are not read: a person should know that they were left out. Never add one that needs pickle.
OTHERS = (".npz", ".npy", ".mha", ".mhd", ".nrrd", ".mgz", ".hdr", ".bmp", ".gif", ".webp", ".mrxs", ".czi")


def suffixes(modality: Modality) -> tuple[str, ...]:
    """How the names of a modality's files end, in lower case; raises DataError if there is no reader."""
    if modality.ndim not in SUFFIXES:
        raise DataError(f"no reader for {modality.ndim}-D images; the modality needs ndim 2 or 3")
    return (*SUFFIXES[modality.ndim], *(slide.SUFFIXES if modality.channels == 3 else ()))


def format_of(path: Path, modality: Modality) -> Format | None:
    """Which reader takes a file, by its name, or as DICOM by its first bytes; None if no reader does."""
    name = path.name.lower()
    if name.endswith(DICOM):
        return "dicom"
    if name.endswith(suffixes(modality)):
        if modality.ndim == 3:
            return "volume"
        return "slide" if name.endswith(slide.SUFFIXES) else "picture"
    return "dicom" if is_dicom(path) else None


def is_image(path: Path) -> bool:
    """Whether there is a reader for a file at all."""
    return path.name.lower().endswith(ENDINGS) or is_dicom(path)


def read_samples(files: Sequence[Path], modality: Modality, part: str = "") -> list[Sample]:
    """The images in `files`: one picture or volume in one file or series of slices, or the tiles of a slide.

    `part` is which image of a file of many, as the inventory says.
    Raises UnreadableFile, with path, reason and remedy, for whatever must not be trained on.
    """
    for path in files:
        check_not_empty(path)
    samples = [read_image(files[0], part, modality.ndim, modality.channels)] if part else _read(files, modality)
    return [replace(sample, warnings=(*sample.warnings, *doubts(sample, modality))) for sample in samples]


def _read(files: Sequence[Path], modality: Modality) -> list[Sample]:
    path = files[0]
    match format_of(path, modality):
        case "dicom":
            return [read_series(files) if modality.ndim == 3 else read_dicom_picture(path, modality)]
        case "volume":
            return [read_nifti(path)]
        case "slide":
            return slide.read_slide(path)
    if modality.channels == 3 and path.suffix.lower() in (".tif", ".tiff") and slide.is_slide(path):
        return slide.read_slide(path)
    return [read_stack(files) if modality.ndim == 3 else read_picture(path, modality.channels)]
