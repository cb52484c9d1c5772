"""Makes the nine published sets in miniature, each as distributed and as the published preparation leaves it."""

import json

import h5py
import nibabel as nib
import nrrd
import numpy as np
from PIL import Image
from tests.site_client.dicoms import save_series

ROLES = ("BACKGROUND", "CONCLUSIONS", "METHODS", "OBJECTIVE", "RESULTS")
SPACING = np.diag([0.8, 0.8, 1.5, 1.0])


def pixels(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def blob(shape):
    """A box in the middle of an array of this shape."""
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(side // 4, side - side // 4) for side in shape)] = 1
    return mask


def picture(path, seed, size=(40, 48), colour=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, (*size, 3) if colour else size)).save(path)
    return path


def mask_picture(path, size=(40, 48), value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blob(size) * np.uint8(value)).save(path)
    return path


def volume(path, values, affine=SPACING):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def hounsfield(seed, shape):
    return np.random.default_rng(seed).normal(0, 300, shape).astype(np.int16)


def prepared(path, seed, shape, classes):
    """nnU-Net's .npz, and beside it a .pkl that breaks whoever opens it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    mask = blob(shape).astype(np.float32) * classes
    mask[0, 0, 0] = -1  # outside the body
    if classes == 2:
        mask[mask == 2] = 1
        mask[tuple(side // 2 for side in shape)] = 2
    np.savez_compressed(path, data=np.stack([image, mask]))
    path.with_suffix(".pkl").write_bytes(b"cos\n_exit\n(I1\ntR.")


def pubmed(folder):
    root = folder / "PubMed_20k_RCT"
    root.mkdir(parents=True)
    for name, abstracts in (("train", 6), ("dev", 2), ("test", 2)):
        blocks = []
        for number in range(abstracts):
            lines = [f"{role}\tThe {name} group {number} had {role.lower()} of 5 % in 2019 ." for role in ROLES]
            blocks.append("\n".join([f"###{name}{number}", *lines, "", ""]))
        (root / f"{name}.txt").write_text("".join(blocks))


def chestxr(folder):
    for part, count in (("train", 5), ("validation", 2)):
        for number, kind in enumerate(("covid", "normal", "pneumonia")):
            for each in range(count):
                picture(folder / "Chest_XR" / part / kind / f"{each}.png", 10 * number + each)


def qata(folder, lists=False):
    root = folder / "QaTa-COV19-v2"
    for half, count in (("Train Set", 10), ("Test Set", 3)):
        for each in range(count):
            picture(root / half / "Images" / f"scan_{each}.png", each)
            mask_picture(root / half / "Ground-truths" / f"mask_scan_{each}.png")
    if lists:
        for split, chosen in (("train", range(2, 10)), ("val", (0, 1)), ("test", range(3))):
            (root / f"{split}.txt").write_text("".join(f"scan_{each}.png\n" for each in chosen))


def qata_listed(folder):
    qata(folder, lists=True)


RICORD = (
    ("train", 1, "419639-000101", "2.000000-NA-11111"),
    ("train", 0, "SITE2-000202", "3.000000-CHEST-WITH-CONTRAST-22222"),
    ("val", 1, "660042-000303", "601.000000-COR-3X3-33333"),
    ("test", 0, "440808-000404", "5.000000-THORAX-.4444"),
    ("test", 1, "419639-000505", "2.000000-NA-55555"),
)


def _ricord_lists(folder):
    for split in ("train", "val", "test"):
        lines = [
            f"RICORD_nii/MIDRC-RICORD-1{'BA'[label]}/ID{patient}_date01-02-2003_{series}.nii.gz {label}\n"
            for where, label, patient, series in RICORD
            if where == split
        ]
        (folder / f"RICORD_{split}.txt").write_text("".join(lines))


def ricord(folder, name="RICORD_nii", shape=(30, 26, 12)):
    for seed, (_, label, patient, series) in enumerate(RICORD):
        path = folder / name / f"MIDRC-RICORD-1{'BA'[label]}" / f"ID{patient}_date01-02-2003_{series}.nii.gz"
        volume(path, hounsfield(seed, shape))
    _ricord_lists(folder)


def ricord_resized(folder):
    ricord(folder, "RICORD_nii_resize", (24, 24, 8))


def ricord_dicom(folder):
    for _, label, patient, series in RICORD:
        collection = f"MIDRC-RICORD-1{'BA'[label]}"
        study = folder / collection / f"{collection}-{patient}" / "01-02-2003-NA-CT CHEST-04614"
        number, *words, tail = series.split("-")
        scan = np.random.default_rng(label).integers(0, 2000, (6, 24, 20)).astype(np.uint16)
        save_series(study / f"{number}-{' '.join(words)}-{tail}", scan, series=f"1.2.{tail.strip('.')}")
    _ricord_lists(folder)


def lits(folder):
    for number in (0, 1, 2, 4):
        mask = blob((20, 18, 10))
        mask[10, 9, 5] = 2
        part = folder / f"Training Batch {1 + number // 2}"
        volume(part / f"volume-{number}.nii", hounsfield(number, (20, 18, 10)))
        volume(part / f"segmentation-{number}.nii", mask)


def lits_prepared(folder):
    for number in (0, 1, 2, 4):
        path = folder / "Task100_MOTS" / "nnUNetData_plans_v2.1_stage1" / f"liver_{number}.npz"
        prepared(path, number, (10, 18, 20), classes=2)


VS = [f"vs_gk_{number}" for number in range(1, 11)]


def vs_converted(folder):
    for seed, name in enumerate([*VS, "vs_gk_168"]):
        volume(folder / name / "vs_gk_t1_refT1.nii.gz", pixels(seed, (20, 18, 10)).astype(np.int16))
        volume(folder / name / "vs_gk_seg_refT1.nii.gz", blob((20, 18, 10)))


def vs_raw(folder):
    root = folder / "Task061_VSseg"
    for seed, name in enumerate(VS):
        volume(root / "imagesTr" / f"{name}_0000.nii.gz", pixels(seed, (20, 18, 10)).astype(np.int16))
        volume(root / "labelsTr" / f"{name}.nii.gz", blob((20, 18, 10)))
    listed = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in VS]
    (root / "dataset.json").write_text(json.dumps({"training": listed}))


def vs_prepared(folder):
    root = folder / "Task061_VSseg"
    for seed, name in enumerate(VS):
        prepared(root / "nnUNetData_plans_v2.1_stage1" / f"{name}.npz", seed, (10, 18, 20), classes=1)
    (root / "VSseg_train.txt").write_text("".join(f"{name}\n" for name in VS[:8]))
    (root / "VSseg_test.txt").write_text("".join(f"{name}\n" for name in VS[8:]))


LA = [f"{letter * 20}" for letter in "ABCDEF"]


def _la_lists(folder):
    (folder / "train.list").write_text("".join(f"{name}\n" for name in LA[:5]))
    (folder / "test.list").write_text(f"{LA[5]}\n")


def la(folder):
    header = {
        "space": "left-posterior-superior",
        "space directions": np.diag([0.625] * 3),
        "space origin": np.zeros(3),
        "encoding": "gzip",
    }
    for seed, name in enumerate(LA):
        path = folder / "Training Set" / name
        path.mkdir(parents=True)
        nrrd.write(str(path / "lgemri.nrrd"), pixels(seed, (20, 18, 10)), header)
        nrrd.write(str(path / "laendo.nrrd"), blob((20, 18, 10)) * np.uint8(255), header)
    _la_lists(folder)


def la_prepared(folder):
    for seed, name in enumerate(LA):
        path = folder / "2018LA_Seg_Training Set" / name / "mri_norm2.h5"
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            file["image"] = np.random.default_rng(seed).normal(size=(18, 20, 10)).astype(np.float32)
            file["label"] = blob((18, 20, 10))
    _la_lists(folder)


NCT = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


def nct(folder):
    for part, count in (("NCT-CRC-HE-100K", 5), ("CRC-VAL-HE-7K", 1)):
        for number, kind in enumerate(NCT):
            for each in range(count):
                path = folder / "NCT_CRC_HE" / part / kind / f"{kind}-{each}.tif"
                picture(path, 10 * number + each, (32, 32), colour=True)


GLAS = [(f"train_{number}", "benign" if number % 2 else " malignant") for number in range(1, 11)]
GLAS += [("testA_1", "benign"), ("testB_1", " malignant")]


def _grades(folder):
    lines = ["name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"]
    lines += [f"{name}, {number // 2},{grade}, adenomatous" for number, (name, grade) in enumerate(GLAS)]
    (folder / "Grade.csv").write_text("\n".join(lines) + "\n")


def glas(folder):
    root = folder / "Warwick_QU_Dataset"
    for seed, (name, _) in enumerate(GLAS):
        picture(root / f"{name}.bmp", seed, (40, 60), colour=True)
        mask_picture(root / f"{name}_anno.bmp", (40, 60), value=3)  # the number of a gland
    _grades(root)


def glas_prepared(folder):
    root = folder / "Glas"
    for seed, (name, _) in enumerate(GLAS):
        half = root / ("test" if name.startswith("test") else "train")
        picture(half / "images" / f"{name}.png", seed, (64, 64), colour=True)
        mask_picture(half / "labels" / f"{name}.png", (64, 64))
    _grades(root)


# Task, what makes it, and how many cases are in train, val and test.
SETS = (
    ("pubmed20k", pubmed, (30, 10, 10)),
    ("chestxr", chestxr, (12, 3, 6)),
    ("qatav2", qata, (8, 2, 3)),
    ("qatav2", qata_listed, (8, 2, 3)),
    ("ricord", ricord_dicom, (2, 1, 2)),
    ("ricord", ricord, (2, 1, 2)),
    ("ricord", ricord_resized, (2, 1, 2)),
    ("lits", lits, (2, 0, 2)),
    ("lits", lits_prepared, (2, 0, 2)),
    ("vs", vs_converted, (8, 0, 2)),
    ("vs", vs_raw, (8, 0, 2)),
    ("vs", vs_prepared, (8, 0, 2)),
    ("la", la, (5, 0, 1)),
    ("la", la_prepared, (5, 0, 1)),
    ("nct-crc-he", nct, (36, 9, 9)),
    ("glas", glas, (8, 2, 2)),
    ("glas", glas_prepared, (8, 2, 2)),
)
