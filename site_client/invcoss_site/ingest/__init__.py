"""Turns one file of a site into an array: the reader is chosen by how many dimensions the modality has."""

from __future__ import annotations

from pathlib import Path

from invcoss_common.errors import DataError, UnreadableFile
from invcoss_common.modality import Modality
from invcoss_site.ingest.image import read_picture
from invcoss_site.ingest.nifti import read_volume
from invcoss_site.ingest.values import Values

SUFFIXES: dict[int, tuple[str, ...]] = {2: (".png", ".jpg", ".jpeg", ".tif", ".tiff"), 3: (".nii", ".nii.gz")}
FORMATS: dict[int, str] = {2: "PNG, JPEG or TIFF", 3: "NIfTI"}
_READERS = {2: read_picture, 3: read_volume}


def suffixes(modality: Modality) -> tuple[str, ...]:
    """How the names of a modality's files end, in lower case; raises DataError if there is no reader."""
    if modality.ndim not in SUFFIXES:
        raise DataError(f"no reader for {modality.ndim}-D images; the modality needs ndim 2 or 3")
    return SUFFIXES[modality.ndim]


def read_image(path: Path, modality: Modality, spacing_mm: tuple[float, float, float] | None) -> Values:
    """Image as float32 (C, *spatial) in [0, 1]; spatial is (H, W), or (D, H, W) at `spacing_mm` if that is given.

    Raises UnreadableFile, with path, reason and remedy, for whatever must not be trained on.
    """
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise UnreadableFile(f"{path}: can't be opened ({error.strerror}); check name and permissions") from None
    if not size_bytes:
        raise UnreadableFile(f"{path}: file is empty; copy it again")
    return _READERS[modality.ndim](path, modality, spacing_mm)
