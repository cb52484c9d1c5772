"""The published sets of text and of 2-D images: PubMed 20k RCT, ChestXR, QaTa-COV19-v2, NCT-CRC-HE and GlaS."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from pathlib import Path

from invcoss_common.errors import DataError
from invcoss_site.downstream.sets.cases import Case, Split, existing, first_part, read_list, some
from invcoss_site.downstream.sets.layouts import entries, inside, wrong_folder
from invcoss_site.downstream.task import TASKS

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def pubmed20k(data: Path) -> list[Case]:
    """A case a sentence; a patient is an abstract."""
    folder = inside(data, "PubMed_20k_RCT")
    files: dict[Split, Path] = {"train": folder / "train.txt", "val": folder / "dev.txt", "test": folder / "test.txt"}
    if missing := [path.name for path in files.values() if not path.is_file()]:
        raise wrong_folder("pubmed20k", data, f"no {some(missing)}")
    return [case for split, path in files.items() for case in _sentences(path, split)]


def _sentences(path: Path, split: Split) -> Iterator[Case]:
    numbers = {name: number for number, name in enumerate(TASKS["pubmed20k"].classes)}
    abstract = ""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                line = line.strip()
                role, tab, text = line.partition("\t")
                if line.startswith("###"):
                    abstract = line.removeprefix("###")
                elif line and not (abstract and tab and text.strip() and role in numbers):
                    raise DataError(
                        f"{path}, line {number}: not a role of {', '.join(numbers)}, a tab and a sentence, "
                        f"below the ### line of an abstract; copy the set again"
                    )
                elif line:
                    yield Case(f"{abstract}-{number}", abstract, split, (path,), text.strip(), numbers[role])
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; copy the set again") from None


def chestxr(data: Path) -> list[Case]:
    """Per class the first four fifths by name train, the rest is val; the official validation set is test."""
    return _in_class_folders("chestxr", inside(data, "Chest_XR"), data, "train", "validation")


def nct_crc_he(data: Path) -> list[Case]:
    """Per class the first four fifths by name train, the rest is val; the set of 7,180 tiles is test.

    Which patient a tile is of is unknown, so tiles of one may be in train and val.
    """
    return _in_class_folders("nct-crc-he", inside(data, "NCT_CRC_HE"), data, "NCT-CRC-HE-100K", "CRC-VAL-HE-7K")


def _in_class_folders(name: str, folder: Path, data: Path, train: str, test: str) -> list[Case]:
    classes = TASKS[name].classes
    cases = []
    for part in (train, test):
        if not (folder / part).is_dir():
            raise wrong_folder(name, data, f"no folder {part}")
        found = [path.name for path in entries(folder / part) if path.is_dir()]
        if sorted(found) != sorted(classes):
            raise wrong_folder(
                name, folder / part, f"its folders are {some(found) or 'none'}, not {', '.join(classes)}"
            )
        for label, kind in enumerate(classes):
            pictures = _pictures(folder / part / kind)
            if not pictures:
                raise wrong_folder(name, folder / part / kind, "no pictures in it")
            kept = first_part([path.name for path in pictures])
            for path in pictures:
                split: Split = "test" if part == test else "train" if path.name in kept else "val"
                identity = f"{part}/{kind}/{path.stem}"
                cases.append(Case(identity, identity, split, (path,), label=label))
    return cases


def _pictures(folder: Path) -> list[Path]:
    return [path for path in entries(folder) if path.name.lower().endswith(PICTURES)]


def qatav2(data: Path) -> list[Case]:
    """By the published lists if they are there; else four fifths of the training set, sorted and shuffled, train."""
    folder = inside(data, "QaTa-COV19-v2")
    halves = {half: folder / half / "Images" for half in ("Train Set", "Test Set")}
    if missing := [half for half, images in halves.items() if not images.is_dir()]:
        raise wrong_folder("qatav2", data, f"no images of {some(missing)}")
    names = {half: [path.name for path in _pictures(images)] for half, images in halves.items()}
    splits: dict[Split, tuple[str, list[str]]]
    lists: dict[Split, Path] = {split: folder / f"{split}.txt" for split in ("train", "val", "test")}
    if all(path.is_file() for path in lists.values()):
        listed = {split: [words[0] for words in read_list(path)] for split, path in lists.items()}
        for split, path in lists.items():
            for name in listed[split]:
                existing(halves["Test Set" if split == "test" else "Train Set"] / name, path)
        splits = {split: ("Test Set" if split == "test" else "Train Set", listed[split]) for split in lists}
    else:
        order = list(names["Train Set"])
        random.Random(0).shuffle(order)  # noqa: S311 (a published split)
        kept = first_part(order)
        splits = {
            "train": ("Train Set", [name for name in order if name in kept]),
            "val": ("Train Set", [name for name in order if name not in kept]),
            "test": ("Test Set", names["Test Set"]),
        }
    cases = []
    for split, (half, members) in splits.items():
        for name in sorted(members):
            image = halves[half] / name
            mask = folder / half / "Ground-truths" / f"mask_{name}"
            if not mask.is_file():
                raise wrong_folder("qatav2", data, f"{image} has no mask {mask.name}")
            identity = f"{half.split()[0].lower()}/{image.stem}"
            cases.append(Case(identity, identity, split, (image,), mask=mask))
    return cases


def glas(data: Path) -> list[Case]:
    """Per grade the first four fifths of the training images by name train, the rest is val; test A and B are test.

    The published split is by image; patients have several, so that one may be in train and val.
    """
    folder = inside(data, "Warwick_QU_Dataset", "Warwick QU Dataset (Released 2016_07_08)", "Glas")
    table = folder / "Grade.csv"
    if not table.is_file():
        raise wrong_folder("glas", data, "no Grade.csv")
    grades = _grades(table)
    kept: set[str] = set()
    for grade in sorted(set(grades.values())):
        kept |= first_part([name for name in sorted(grades) if grades[name] == grade and not name.startswith("test")])
    cases = []
    for name in sorted(grades):
        image, mask = _glas_pair(folder, name)
        for path in (image, mask):
            if not path.is_file():
                raise wrong_folder("glas", data, f"{table.name} names {name}, and there is no {path}")
        split: Split = "test" if name.startswith("test") else "train" if name in kept else "val"
        cases.append(Case(name, name, split, (image,), mask=mask))
    return cases


def _glas_pair(folder: Path, name: str) -> tuple[Path, Path]:
    if (folder / "train" / "images").is_dir():
        half = folder / ("test" if name.startswith("test") else "train")
        return half / "images" / f"{name}.png", half / "labels" / f"{name}.png"
    return folder / f"{name}.bmp", folder / f"{name}_anno.bmp"


def _grades(path: Path) -> dict[str, str]:
    """Grade by image. Column 0 is the name, 1 the patient, 2 benign or malignant, with stray spaces."""
    rows = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            cells = [cell.strip() for cell in row]
            if number == 1 or not any(cells):
                continue
            if len(cells) < 3 or cells[2] not in ("benign", "malignant"):
                raise DataError(f"{path}, line {number}: no name, patient and benign or malignant; copy it again")
            rows[cells[0]] = cells[2]
    return rows
