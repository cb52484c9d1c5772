"""Reads what only published sets are stored in: nnU-Net's .npz, UA-MT's .h5 (both image and mask), and NRRD volumes.

Pickle is never allowed. h5py and pynrrd are of the extra `downstream`. D, H, W = sides of the volume.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from invcoss_common.errors import UnreadableFile
from invcoss_site.ingest.masks import Mask
from invcoss_site.ingest.sample import Sample, check_not_empty, unreadable
from invcoss_site.ingest.values import MAX_VOXELS, Values
from invcoss_site.ingest.volume import check_affine, check_shape, turned

PREPARED = (".npz", ".h5")
_TO_RAS = {  # NRRD's worlds, as signs of NIfTI's axes
    "left-posterior-superior": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
}
_SHORT = {"LPS": "left-posterior-superior", "RAS": "right-anterior-superior", "LAS": "left-anterior-superior"}


def read_prepared(path: Path) -> tuple[Values, Mask]:
    """The image, as it is stored, and the mask, both (1, D, H, W), of a prepared volume. Raises UnreadableFile."""
    check_not_empty(path)
    image, mask = _npz(path) if path.suffix == ".npz" else _h5(path)
    if image.shape != mask.shape:
        text = f"mask has shape {mask.shape} and its image {image.shape}; prepare the volume again"
        raise unreadable(path, "mask", text)
    if not np.isfinite(image).all():
        raise unreadable(path, "not-finite", "some values are NaN or infinite; prepare the volume again")
    if mask.dtype.kind == "f" and not np.array_equal(mask, np.rint(mask)):
        raise unreadable(path, "mask", "some classes are no whole numbers; prepare the volume again")
    whole = np.maximum(mask.astype(np.int64), 0)  # nnU-Net marks what lies outside the body as -1
    return np.ascontiguousarray(image[None], dtype=np.float32), np.ascontiguousarray(whole[None])


def _npz(path: Path) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """Image and mask of `data` (2, D, H, W)."""
    try:
        with zipfile.ZipFile(path) as packed:
            size_bytes = packed.getinfo("data.npy").file_size
        if size_bytes > 2 * 4 * MAX_VOXELS:
            raise unreadable(path, "too-large", "its array `data` is larger than any scan; prepare the volume again")
        with np.load(path, allow_pickle=False) as arrays:
            data = arrays["data"]
    except UnreadableFile:
        raise
    except Exception:  # damaged, not a zip, no such array, or objects that would need pickle
        text = "not a .npz file with an array `data` of plain numbers, or damaged; prepare the volume again"
        raise unreadable(path, "not-this-format", text) from None
    if data.ndim != 4 or len(data) != 2 or data.dtype.kind not in "iuf":
        text = f"its array `data` has shape {data.shape}, not (2, D, H, W) for image and mask; prepare it again"
        raise unreadable(path, "dimensions", text)
    return data[0], data[1]


def _h5(path: Path) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """Image and mask of the data sets `image` and `label`, stored as (H, W, D)."""
    try:
        import h5py
    except ImportError:
        raise unreadable(path, "not-supported", "HDF5 needs h5py; pip install 'invcoss[downstream]'") from None
    found = []
    try:
        with h5py.File(path, "r") as file:
            for name in ("image", "label"):
                if not isinstance(file.get(name, getlink=True), h5py.HardLink):  # others lead to other files
                    raise unreadable(path, "not-this-format", f"has no data set `{name}`; prepare the volume again")
                data = file[name]
                if len(data.shape) != 3 or data.dtype.kind not in "iufb":
                    text = f"data set `{name}` has shape {data.shape} where three sides are expected; prepare it again"
                    raise unreadable(path, "dimensions", text)
                check_shape(path, data.shape)
                found.append(data[()].transpose(2, 0, 1))
    except UnreadableFile:
        raise
    except Exception:  # h5py raises anything on damaged bytes
        raise unreadable(path, "not-this-format", "not an HDF5 file, or damaged; copy it again") from None
    return found[0], found[1]


def read_nrrd(path: Path) -> Sample:
    """NRRD volume as a sample (1, D, H, W), turned as any volume is. Raises UnreadableFile."""
    try:
        import nrrd
    except ImportError:
        raise unreadable(path, "not-supported", "NRRD needs pynrrd; pip install 'invcoss[downstream]'") from None
    check_not_empty(path)
    try:
        header = nrrd.read_header(str(path))
        sizes = tuple(int(side) for side in header["sizes"])
        space = str(header.get("space", ""))
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(header["space directions"], dtype=float).T  # a column leads along an axis
        affine[:3, 3] = np.asarray(header.get("space origin", (0, 0, 0)), dtype=float)
        affine[:3] *= np.array(_TO_RAS[_SHORT.get(space, space)])[:, None]
    except KeyError:
        text = "header has no orientation (space and space directions); export it again"
        raise unreadable(path, "no-geometry", text) from None
    except Exception:
        raise unreadable(
            path, "not-this-format", "not a 3-D NRRD file, or its header is damaged; copy it again"
        ) from None
    if "data file" in header or "datafile" in header:
        raise unreadable(path, "not-supported", "its voxels are in another file; save both as one .nrrd")
    check_shape(path, sizes)
    check_affine(path, affine)
    try:
        values = nrrd.read(str(path))[0]
    except Exception:
        raise unreadable(path, "truncated", "incomplete or damaged volume; copy it again") from None
    full_range = (0.0, 255.0) if values.dtype == np.uint8 else None
    return turned(path, np.ascontiguousarray(values, dtype=np.float32), affine, full_range)
