"""Plants words and pixels that are nowhere else in everything that a hospital's folders hold."""

from __future__ import annotations

import csv
import random
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.security.search import Pattern, pixel_patterns, prepared_patterns, word_patterns
from tests.site_client.dicoms import AXIAL, dataset, save

from invcoss_common.config import Plan
from invcoss_common.model import target_patches
from invcoss_common.phantoms import write_phantoms
from invcoss_common.seeds import derive_seed
from invcoss_site.batches import TrainingBatches, whole_images
from invcoss_site.home import SiteHome
from invcoss_site.inventory import take_inventory
from invcoss_site.prepare import prepare

Pixels = npt.NDArray[Any]

LETTERS = 14  # of a word: what is shortest in NIfTI's header has room for it
ACCENTED = string.ascii_letters + "äöüßøéñçğł"
NOISE = 24  # pixels a side of the patch of noise in the middle of every image
DESCRIPTION, ARTIST, COPYRIGHT = 270, 315, 33432  # TIFF's and EXIF's
TAGS = (DESCRIPTION, ARTIST, COPYRIGHT)
DICOM_TAGS = ("PatientID", "AccessionNumber", "StudyDescription", "InstitutionName", "ImageComments")


class Canaries:
    """Words, and patches of noise in images, by where they were planted."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}
        self.noise: dict[str, Pixels] = {}

    def word(self, where: str, letters: str = string.ascii_letters) -> str:
        """The word of a place; of letters only, so that it may be a name of anything."""
        return self.words.setdefault(where, "".join(random.Random(where).choices(letters, k=LETTERS)))

    def patterns(self) -> Iterator[Pattern]:
        for where, word in self.words.items():
            yield from word_patterns(where, word)
        for where, patch in self.noise.items():
            yield from pixel_patterns(where, patch)
            if patch.shape[-1] == 3:
                yield from pixel_patterns(where, patch.reshape(len(patch), -1))  # pixel after pixel


def prepared(home: SiteHome, plan: Plan, stage: int) -> Iterator[Pattern]:
    """The images of a stage in every form that its site computes with: cached, resized, cropped, as patches."""
    modality, geometry, train = plan.modality(stage), plan.geometry(stage), plan.train_for(stage)
    images = prepare(take_inventory(home.data, modality, home.index), modality, geometry, None, home.cache)
    batches = TrainingBatches(
        images.train,
        geometry,
        batch_size=train.batch_size,
        crop_scale=train.crop_scale,
        flip=modality.horizontal_flip,
        seed=derive_seed(plan.seed, "stage", stage),
    )
    assert train.steps
    whole = torch.cat(list(whole_images(images.train, geometry, train.batch_size)))
    cropped = torch.cat([batches[number] for number in range(train.steps)])
    yield from prepared_patterns(f"{home.name}: cached training images", np.asarray(images.train))
    yield from prepared_patterns(f"{home.name}: cached held-out images", np.asarray(images.heldout))
    yield from prepared_patterns(f"{home.name}: training images at the input size", whole.numpy())
    yield from prepared_patterns(f"{home.name}: crops that were trained on", cropped.numpy())
    patches = target_patches(torch.from_numpy(np.asarray(images.heldout, np.float32)), geometry)
    repeated = geometry.input_channels // geometry.channels  # a grey picture is given to the model in three colours
    yield from prepared_patterns(f"{home.name}: patches to be predicted", patches.numpy(), repeated)


def plant(canaries: Canaries, site: str, data: Path, modality: str, cases: int, seed: int) -> tuple[str, str]:
    """Fill `data` with images of `cases` cases, damaged files and texts; the names of two indexes.

    The second index names the damaged files only, the first all images.
    """
    plot = _Plot(canaries, site)
    folder = data / plot.word("folder of images")
    folder.mkdir(parents=True)
    good = [
        [f"{folder.name}/{path.name}", plot.word(f"case {number}"), "test" if number % 3 == 2 else "train"]
        for number, path in enumerate(plot.images(folder, modality, cases, seed))
    ]
    first = data / good[0][0]
    bad = [
        [f"{folder.name}/{path.name}", plot.word(f"damaged case {number}"), "train"]
        for number, path in enumerate(plot.damaged(folder, first))
    ]
    bad.append([f"{plot.word('missing file')}{first.suffix}", "a", "train"])
    bad.append([good[0][0], "b", plot.word("split")])
    bad.append([f"../{plot.word('file outside')}{first.suffix}", "c", "train"])
    report = folder / f"{plot.word('name of a report', ACCENTED)}.txt"
    report.write_text(f"Patient {plot.word('report', ACCENTED)}: no finding.\n", encoding="utf-8")
    (data / f".{plot.word('hidden file name')}").write_text(plot.word("hidden file"))
    names = f"{plot.word('name of the index')}.csv", f"{plot.word('name of the other index')}.csv"
    for name, rows in zip(names, (good + bad, bad), strict=True):
        with (data / name).open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(("file", "case", "split", "patient_name", "finding"))
            lines.writerows([*row, plot.word("patient", ACCENTED), plot.word("finding")] for row in rows)
    return names


class _Plot:
    """What is planted at one site."""

    def __init__(self, canaries: Canaries, site: str) -> None:
        self.canaries, self.site = canaries, site

    def word(self, where: str, letters: str = string.ascii_letters) -> str:
        return self.canaries.word(f"{self.site}: {where}", letters)

    def images(self, folder: Path, modality: str, cases: int, seed: int) -> Iterator[Path]:
        """Phantoms with words in their headers and noise in their middle; of a series of slices, its folder."""
        with tempfile.TemporaryDirectory() as draft:
            write_phantoms(Path(draft), modality, cases, seed)
            files = sorted(file for file in Path(draft).iterdir() if file.suffix != ".csv")
            for number, file in enumerate(files):
                rng, name = np.random.default_rng([seed, number]), folder / self.word(f"file name {number}")
                if file.name.endswith(".nii.gz"):
                    image = nib.load(file)
                    path, patch = self._volume(name, number, image, rng)
                else:
                    path, patch = self._picture(name, number, np.array(Image.open(file)), rng)
                self.canaries.noise[f"{self.site}: pixels of image {number}"] = patch
                yield path

    def damaged(self, folder: Path, good: Path) -> Iterator[Path]:
        """Files that a reader takes up and can't read."""
        ending, content = "".join(good.suffixes), good.read_bytes()
        header = nib.Nifti1Header()
        header.set_data_shape((32, 32, 32))
        header["descrip"] = self.word("header of a damaged volume").encode()
        header["magic"], header["vox_offset"] = b"n+1", 352
        files = (
            (ending, content[: len(content) // 2]),
            (ending, b""),
            (ending, self.word("text in place of an image").encode() * 40),
            (ending, _dicom(self.word("DICOM in place of an image"))),
            (ending, content[:40] + self.word("damaged header").encode() * 20 + content[-400:]),
            (".nii" if ".nii" in ending else ".tif", header.binaryblock + bytes(4) + bytes(1000)),
            (".dcm", _dicom(self.word("damaged DICOM file"))),
        )
        for number, (suffix, made) in enumerate(files):
            path = folder / f"{self.word(f'damaged file name {number}')}{suffix}"
            path.write_bytes(made)
            yield path

    def _picture(self, name: Path, number: int, pixels: Pixels, rng: np.random.Generator) -> tuple[Path, Pixels]:
        middle = _middle(pixels.shape, (NOISE, NOISE))
        pixels[middle] = _noisy(pixels[middle], 255, rng)
        path = name.with_name(name.name + (".png", ".jpg", ".tif", ".dcm")[number % 4])
        picture, exif = Image.fromarray(pixels), Image.Exif()
        for tag in TAGS:
            exif[tag] = self.word(f"EXIF tag {tag}")
        match path.suffix:
            case ".png":
                text = PngInfo()
                text.add_text("PatientName", self.word("PNG text"))
                text.add_itxt("Comment", self.word("PNG international text"), zip=True)
                picture.save(path, pnginfo=text, exif=exif)
            case ".jpg":
                picture.save(path, comment=self.word("JPEG comment").encode(), exif=exif, quality=95)
            case ".tif":
                picture.save(path, tiffinfo={tag: self.word(f"TIFF tag {tag}") for tag in TAGS})
            case ".dcm":
                save(path, dataset(pixels, **self._dicom_tags()))
                return path, pixels[middle]
        return path, np.array(Image.open(path))[middle]  # of JPEG not the same

    def _volume(self, name: Path, number: int, image: Any, rng: np.random.Generator) -> tuple[Path, Pixels]:
        voxels = np.asanyarray(image.dataobj).copy()
        middle = _middle(voxels.shape, (NOISE, NOISE, NOISE))
        voxels[middle] = _noisy(voxels[middle], 2000, rng)
        if number == 3:
            for z in range(voxels.shape[2]):
                place = {"ImagePositionPatient": [0.0, 0.0, 2.0 * z], "ImageOrientationPatient": list(AXIAL)}
                tags = self._dicom_tags() | {"PixelSpacing": [2.0, 2.0], "SeriesInstanceUID": f"1.2.{number}"}
                pixels = np.ascontiguousarray(voxels[:, :, z].T).astype(np.uint16)
                save(name / f"{self.word('file name of a slice')}{z:03}.dcm", dataset(pixels, **tags, **place))
            return name, voxels[middle]
        path = name.with_name(f"{name.name}.nii" if number % 2 else f"{name.name}.nii.gz")
        volume = nib.Nifti1Image(voxels, image.affine, image.header)
        for field in ("descrip", "db_name", "aux_file", "intent_name"):
            volume.header[field] = self.word(f"NIfTI {field}").encode()
        volume.header.extensions.append(nib.nifti1.Nifti1Extension("comment", self.word("NIfTI extension").encode()))
        nib.save(volume, path)
        return path, voxels[middle]

    def _dicom_tags(self) -> dict[str, Any]:
        words = {tag: self.word(f"DICOM {tag}") for tag in DICOM_TAGS}
        name, study = self.word("DICOM PatientName", ACCENTED), self.word("DICOM StudyInstanceUID", string.digits)
        return words | {"SpecificCharacterSet": "ISO_IR 192", "PatientName": name, "StudyInstanceUID": f"1.2.3{study}"}


def _noisy(pixels: Pixels, full: int, rng: np.random.Generator) -> Pixels:
    """`pixels` between 0 and `full`, with noise: so little that an audit sees the same image."""
    noise = rng.integers(-full // 10, full // 10 + 1, pixels.shape)
    return np.asarray(pixels.astype(np.int64).clip(full // 10, full - full // 10) + noise).astype(pixels.dtype)


def _middle(shape: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(shape, size, strict=False))


def _dicom(patient: str) -> bytes:
    """What begins like a DICOM file, with a patient's name and number, and then ends."""
    elements = (b"\x10\0\x10\0PN", b"\x10\0\x20\0LO")
    value = patient.encode().ljust(LETTERS + LETTERS % 2)
    return bytes(128) + b"DICM" + b"".join(tag + len(value).to_bytes(2, "little") + value for tag in elements)
