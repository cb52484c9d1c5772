"""Published sets as they are distributed, in miniature: counts, patients, splits, order, and what is damaged."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.site_client.dicoms import save_series
from tests.site_client.fuzzing.seeds import film, nifti_bytes, slide_bytes, volume

from invcoss_common.errors import DataError
from invcoss_common.modality import MODALITIES, Geometry, Modality
from invcoss_site.home import load_home
from invcoss_site.ingest import read_samples
from invcoss_site.inventory import list_images, split_of, take_inventory
from invcoss_site.layouts import LAYOUTS
from invcoss_site.prepare import prepare
from invcoss_site.survey import take_survey

FILM, CT, MRI, SLIDE = (MODALITIES[name] for name in ("xray", "ct", "mri", "pathology"))
CUBE = Modality(ndim=3, channels=1, normalisation="range")


def listed(folder, layout, modality=FILM):
    """(first file, patient, split, held out) of each image, and the kinds and files of what is rejected."""
    found = list_images(folder, modality, layout=layout)
    used = [(one.path.relative_to(folder).as_posix(), one.case, one.split, one.held_out) for one in found.items]
    return used, [(one.path.relative_to(folder).as_posix(), one.reason) for one in found.rejected]


@pytest.fixture
def shuffled(monkeypatch):
    """Folders list what they hold in another order."""
    whole_glob, whole_iterdir = Path.glob, Path.iterdir
    backwards = {"glob": whole_glob, "iterdir": whole_iterdir}

    def shuffle():
        for name, whole in backwards.items():
            monkeypatch.setattr(
                Path, name, lambda self, *asked, _whole=whole: iter(sorted(_whole(self, *asked), reverse=True))
            )

    return shuffle


# MIMIC-CXR-JPG

FILMS = [  # subject, study, image, split
    ("10000032", "50414267", "02aa804e-bde0afdd", "train"),
    ("10000032", "53189527", "2a2277a9-b0ded155", "train"),
    ("10000764", "57375967", "096052b7-d256dc40", "validate"),
    ("11000935", "50578979", "d0b71acc-b5a62046", "test"),
    ("11000935", "51178377", "4dd5c5b1-1c3b2f0e", "test"),
]


def mimic(folder, films=FILMS):
    rows = [f"{image},{study},{subject},{split}\n" for subject, study, image, split in films]
    table = "dicom_id,study_id,subject_id,split\n" + "".join(rows)
    (folder / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(table.encode()))
    metadata = "dicom_id,subject_id,study_id,ViewPosition\n" + "".join(
        f"{one[2]},{one[0]},{one[1]},PA\n" for one in films
    )
    (folder / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(gzip.compress(metadata.encode()))
    (folder / "mimic-cxr-2.0.0-chexpert.csv.gz").write_bytes(
        gzip.compress(b"subject_id,study_id,Edema\n10000032,50414267,1\n")
    )
    for number, (subject, study, image, _) in enumerate(films):
        place = folder / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "index.html").write_text("x")
        Image.fromarray(np.roll(film(), number, axis=1)).save(place / f"{image}.jpg")
    return folder


def test_mimic_cxr_jpg(tmp_path):
    used, rejected = listed(mimic(tmp_path), "mimic-cxr-jpg")
    assert used == [
        ("files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg", "p10000032", "train", False),
        ("files/p10/p10000032/s53189527/2a2277a9-b0ded155.jpg", "p10000032", "train", False),
        ("files/p10/p10000764/s57375967/096052b7-d256dc40.jpg", "p10000764", "val", False),
        ("files/p11/p11000935/s50578979/d0b71acc-b5a62046.jpg", "p11000935", "test", True),
        ("files/p11/p11000935/s51178377/4dd5c5b1-1c3b2f0e.jpg", "p11000935", "test", True),
    ]
    assert rejected == []


def test_mimic_cxr_jpg_in_part_and_with_strangers(tmp_path):
    mimic(tmp_path)
    place = tmp_path / "files" / "p10" / "p10000032" / "s50414267"
    (place / "stranger.jpg").write_bytes((place / "02aa804e-bde0afdd.jpg").read_bytes())
    (tmp_path / "files/p11/p11000935/s51178377/4dd5c5b1-1c3b2f0e.jpg").unlink()
    moved = tmp_path / "files" / "p10" / "p10000764"
    moved.rename(tmp_path / "files" / "p10" / "p10000999")
    used, rejected = listed(tmp_path, "mimic-cxr-jpg")
    assert [one[1] for one in used] == ["p10000032", "p10000032", "p11000935"]
    reasons = {name.split("/")[-1]: reason for name, reason in rejected}
    assert "its split is not known" in reasons["stranger.jpg"]
    assert "another patient" in reasons["096052b7-d256dc40.jpg"]
    assert "1 of its films are not in files/" in reasons["mimic-cxr-2.0.0-split.csv.gz"]


# DeepLesion

SERIES = {  # slices, spacing, split
    "000001_01_01": ((103, 104, 105, 106, 107, 120, 121, 122, 123), "0.8, 0.8, 5", "3"),
    "000002_01_01": (range(8, 14), "0.7, 0.9, 2", "1"),
    "000002_02_01": (range(1, 6), "0.7, 0.7, 1", "1"),
    "000003_01_02": (range(50, 55), "0.9, 0.9, 5", "2"),
}


def deeplesion(folder, series=SERIES):
    rows = ["File_name,Patient_index,Slice_range,Spacing_mm_px_,DICOM_windows,Train_Val_Test\n"]
    for name, (numbers, spacing, split) in series.items():
        (folder / "Images_png" / name).mkdir(parents=True)
        for number in numbers:
            values = volume((1, 20, 24))[0].astype(np.int32) + number + 32768
            Image.fromarray(values.astype(np.uint16)).save(folder / "Images_png" / name / f"{number:03}.png")
        first = name.partition("_")[0]
        key = f"{name}_{numbers[1]:03}.png"
        rows.append(f'{key},{int(first)},"{numbers[0]}, {numbers[-1]}","{spacing}","-175, 275",{split}\n')
    (folder / "DL_info.csv").write_text("".join(rows))
    return folder


def test_deeplesion(tmp_path):
    used, rejected = listed(deeplesion(tmp_path), "deeplesion", CT)
    assert used == [
        ("Images_png/000001_01_01/103.png", "000001", "test", True),
        ("Images_png/000001_01_01/120.png", "000001", "test", True),
        ("Images_png/000002_01_01/008.png", "000002", "train", False),
        ("Images_png/000002_02_01/001.png", "000002", "train", False),
        ("Images_png/000003_01_02/050.png", "000003", "val", False),
    ]
    assert rejected == []


def test_a_series_of_deeplesion_is_a_volume_in_hounsfield_units(tmp_path):
    items = take_inventory(deeplesion(tmp_path), CT, layout="deeplesion").items
    (sample,) = read_samples(items[2].files, CT)
    assert sample.pixels.shape == (1, 6, 20, 24)
    assert sample.spacing_mm == pytest.approx((2, 0.9, 0.7))
    lowest_slice = sample.pixels[0, 0]  # towards the feet: the last one
    np.testing.assert_array_equal(lowest_slice, volume((1, 20, 24))[0] + 13.0)


def test_damaged_series_of_deeplesion(tmp_path):
    deeplesion(tmp_path, {**SERIES, "000004_01_01": (range(5), "1, 1, 1", "1")})
    (tmp_path / "Images_png" / "000002_02_01" / "003.png").unlink()
    (tmp_path / "Images_png" / "000009_01_01").mkdir()
    Image.fromarray(film()).save(tmp_path / "Images_png" / "000003_01_02" / "052.png")
    used, rejected = listed(tmp_path, "deeplesion", CT)
    assert len(used) == 5
    reasons = [reason for _, reason in rejected]
    assert sum("slices in a row" in reason for reason in reasons) == 2
    assert any("000009_01_01: DL_info.csv doesn't name it" in reason for reason in reasons)
    images = prepared(tmp_path, CT, "deeplesion", Geometry(channels=1, size=(4, 16, 16), patch=(2, 8, 8)), used=None)
    assert any("052.png" in one.reason for one in images.quarantined)


def prepared(folder, modality, layout, geometry, used):
    images = prepare(
        take_inventory(folder, modality, layout=layout),
        modality,
        geometry,
        None,
        folder.parent / f"{folder.name}-cache",
    )
    if used is not None:
        assert (len(images.train), len(images.heldout)) == used
    return images


# ADNI

SUBJECTS = ("002_S_0295", "002_S_0413", "005_S_0222", "941_S_1194")


def adni(folder, subjects=SUBJECTS):
    rows = ['"Image Data ID","Subject","Group","Modality","Description","Acq Date"\n']
    for number, subject in enumerate(subjects):
        place = folder / "ADNI" / subject / "MP-RAGE" / "2006-04-18_08_20_30.0" / f"I{13722 + number}"
        place.mkdir(parents=True)
        if number % 2:
            save_series(place, (volume((6, 16, 16)) + 1024).clip(0).astype(np.uint16), series=f"1.2.{number}")
        else:
            (place / f"ADNI_{subject}_MR_I{13722 + number}.nii").write_bytes(nifti_bytes(volume((16, 16, 8))))
        (place / "ADNI_meta.xml").write_text("<x/>")
        rows.append(f'"I{13722 + number}","{subject}","CN","MRI","MP-RAGE","4/18/2006"\n')
    (folder / "collection_11_24_2026.csv").write_text("".join(rows))
    return folder


def test_adni(tmp_path):
    used, rejected = listed(adni(tmp_path), "adni", MRI)
    assert [(case, split) for _, case, split, _ in used] == [(subject, "") for subject in SUBJECTS]
    assert rejected == []
    assert [len(item.files) for item in take_inventory(tmp_path, MRI, layout="adni").items] == [1, 6, 1, 6]
    assert any(held_out for *_, held_out in used) and not all(held_out for *_, held_out in used)


def test_adni_against_its_collection(tmp_path):
    adni(tmp_path)
    place = tmp_path / "ADNI" / "002_S_0295" / "MP-RAGE" / "2006-04-18_08_20_30.0"
    (place / "I13722").rename(place / "I99")
    (tmp_path / "ADNI" / "002_S_0413").rename(tmp_path / "ADNI" / "002_S_0414")
    used, rejected = listed(tmp_path, "adni", MRI)
    assert [case for _, case, _, _ in used] == ["005_S_0222", "941_S_1194"]
    reasons = " ".join(reason for _, reason in rejected)
    assert "has no such image" in reasons and "another subject" in reasons and "1 of its images are not in" in reasons


# TCGA

BARCODES = ("TCGA-AB-0001-01Z-00-DX1", "TCGA-AB-0001-01A-01-TS1", "TCGA-3X-AAV9-01Z-00-DX1", "TCGA-W5-AA2G-01Z-00-DX2")


def tcga(folder, barcodes=BARCODES):
    slide = slide_bytes("jpeg", "Aperio Image Library v11.2.1\n576x576 (256x256) JPEG/RGB Q=30|AppMag = 20|MPP = 0.5")
    lines = ["id\tfilename\tmd5\tsize\tstate\n"]
    for number, barcode in enumerate(barcodes):
        uuid = f"{number:08x}-0000-4000-8000-000000000000"
        (folder / uuid / "logs").mkdir(parents=True)
        (folder / uuid / "logs" / "x.parcel").write_bytes(b"x")
        (folder / uuid / f"{barcode}.{uuid.upper()}.svs").write_bytes(slide)
        lines.append(f"{uuid}\t{barcode}.{uuid.upper()}.svs\t{'0' * 32}\t{len(slide)}\treleased\n")
    (folder / "gdc_manifest.2026-11-24.txt").write_text("".join(lines))
    return folder


def test_tcga(tmp_path):
    used, rejected = listed(tcga(tmp_path), "tcga", SLIDE)
    assert [case for _, case, _, _ in used] == ["TCGA-AB-0001", "TCGA-AB-0001", "TCGA-3X-AAV9", "TCGA-W5-AA2G"]
    assert len({held_out for _, case, _, held_out in used if case == "TCGA-AB-0001"}) == 1
    assert rejected == []
    assert len(read_samples(take_inventory(tmp_path, SLIDE, layout="tcga").items[0].files, SLIDE)) > 0


def test_tcga_cut_off_withdrawn_and_strange(tmp_path):
    folders = sorted(path for path in tcga(tmp_path).iterdir() if path.is_dir())
    cut = next(folders[0].glob("*.svs"))
    cut.write_bytes(cut.read_bytes()[:-100])
    (folders[1] / "annotations.txt").write_text(
        "id\tsubmitter_id\tcategory\tclassification\tnotes\n1\t2\tSubject withdrew consent\tRedaction\tx\n"
    )
    next(folders[2].glob("*.svs")).rename(folders[2] / "case.svs")
    used, rejected = listed(tmp_path, "tcga", SLIDE)
    assert [case for _, case, _, _ in used] == ["TCGA-W5-AA2G"]
    reasons = " ".join(reason for _, reason in rejected)
    assert "in the manifest; download it again" in reasons and "withdrew consent" in reasons and "barcode" in reasons


# MedMNIST


def medmnist(folder, shape=(28, 28), name="pathmnist", counts=(5, 2, 3)):
    values = np.random.default_rng(0).integers(0, 256, (sum(counts), *shape), dtype=np.uint8)
    arrays = {}
    for split, part in zip(("train", "val", "test"), np.split(values, np.cumsum(counts)[:-1]), strict=True):
        arrays |= {f"{split}_images": part, f"{split}_labels": np.zeros((len(part), 1), np.uint8)}
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    return values


@pytest.mark.parametrize(("shape", "modality"), [((28, 28), FILM), ((64, 64, 3), SLIDE), ((28, 28, 3), FILM)])
def test_medmnist(tmp_path, shape, modality):
    values = medmnist(tmp_path, shape)
    items = take_inventory(tmp_path, modality, layout="medmnist").items
    assert [item.split for item in items] == ["train"] * 5 + ["val"] * 2 + ["test"] * 3
    assert [item.held_out for item in items] == [False] * 7 + [True] * 3
    assert len({item.case for item in items}) == 10
    (sample,) = read_samples(items[6].files, modality, items[6].part)
    assert sample.pixels.shape == (modality.channels, *shape[:2])
    if modality.channels == 3 or shape[2:] == ():
        planes = values[6].transpose(2, 0, 1) if shape[2:] else values[6][None]
        np.testing.assert_array_equal(sample.pixels, planes)


def test_cubes_of_medmnist_and_a_constant_one(tmp_path):
    values = medmnist(tmp_path, (28, 28, 28), "organmnist3d")
    values[1] = 7
    np.savez_compressed(
        tmp_path / "organmnist3d.npz", train_images=values[:5], val_images=values[5:7], test_images=values[7:]
    )
    geometry = Geometry(channels=1, size=(16, 16, 16), patch=(8, 8, 8))
    images = prepared(tmp_path, CUBE, "medmnist", geometry, used=(6, 3))
    (constant,) = images.quarantined
    assert "train_images[1]: constant image" in constant.reason
    assert images.train_cases == 6


def test_nothing_is_ever_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    trap = np.array([Trap()] * 3, dtype=object)
    np.savez_compressed(tmp_path / "trapmnist.npz", train_images=trap, val_images=trap, test_images=trap)
    assert b"executed" in pickle.dumps(trap)
    medmnist(tmp_path)
    used, rejected = listed(tmp_path, "medmnist")
    assert len(used) == 10
    assert len(rejected) == 3 and all("Python objects" in reason for _, reason in rejected)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", ["cut", "middle", "shape", "type", "missing"])
def test_damaged_arrays(tmp_path, damage):
    medmnist(tmp_path, (64, 64, 3))
    file = tmp_path / "pathmnist.npz"
    data = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "middle":
            file.write_bytes(data[:30_000] + bytes(400) + data[30_400:])
        case "shape":
            np.savez_compressed(
                file, **{f"{one}_images": np.zeros((3, 28, 30), np.uint8) for one in ("train", "val", "test")}
            )
        case "type":
            np.savez_compressed(file, **{f"{one}_images": np.zeros((3, 28, 28)) for one in ("train", "val", "test")})
        case "missing":
            np.savez_compressed(file, train_labels=np.zeros(3))
    found = list_images(tmp_path, FILM, layout="medmnist")
    if damage == "middle":  # the header is whole
        with pytest.raises(DataError, match=r"pathmnist\.npz: its train_images are damaged"):
            read_samples(found.items[0].files, FILM, found.items[0].part)
    else:
        assert not found.items and len(found.rejected) == 3
        assert all("pathmnist.npz: " in one.reason for one in found.rejected)


# all of them

SETS = {
    "mimic-cxr-jpg": (mimic, FILM),
    "deeplesion": (deeplesion, CT),
    "adni": (adni, MRI),
    "tcga": (tcga, SLIDE),
    "medmnist": (lambda folder: medmnist(folder), FILM),
}
MORE = {
    "mimic-cxr-jpg": lambda folder: mimic(folder, [*FILMS, ("10000001", "50000001", "00000000-00000000", "train")]),
    "deeplesion": lambda folder: deeplesion(folder, {**SERIES, "000001_09_01": (range(5), "1, 1, 1", "3")}),
    "adni": lambda folder: adni(folder, (*SUBJECTS, "001_S_0001")),
    "tcga": lambda folder: tcga(folder, (*BARCODES, "TCGA-00-0000-01Z-00-DX1")),
    "medmnist": lambda folder: (medmnist(folder), medmnist(folder, name="a-mnist")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_does_not_depend_on_the_listing(layout, tmp_path, shuffled):
    make, modality = SETS[layout]
    make(tmp_path)
    before = list_images(tmp_path, modality, layout=layout)
    shuffled()
    after = list_images(tmp_path, modality, layout=layout)
    assert before == after
    assert len(before.items) > 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_further_case_moves_no_other(layout, tmp_path):
    make, modality = SETS[layout]
    (tmp_path / "less").mkdir()
    (tmp_path / "more").mkdir()
    make(tmp_path / "less")
    MORE[layout](tmp_path / "more")
    less, _ = listed(tmp_path / "less", layout, modality)
    more, _ = listed(tmp_path / "more", layout, modality)
    assert len(more) > len(less)
    if any(split_of(case) for _, case, split, _ in less if not split):  # else one case of lowest rank stands in
        assert [one for one in more if one[1] in {case for _, case, *_ in less}] == less
    else:
        known = {one[:3] for one in less}
        assert [one[:3] for one in more if one[:3] in known] == [one[:3] for one in less]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_folder_is_refused_with_what_is_expected(layout, tmp_path):
    (tmp_path / "film.png").write_bytes(b"x")
    _, modality = SETS[layout]
    with pytest.raises(DataError, match=f"not laid out as {layout} is published, which is ") as caught:
        list_images(tmp_path, modality, layout=layout)
    assert LAYOUTS[layout].expected in str(caught.value)


def test_a_wrong_name_another_modality_and_an_index_are_refused(tmp_path):
    with pytest.raises(DataError, match="'mimic' is none of mimic-cxr-jpg, deeplesion"):
        list_images(tmp_path, FILM, layout="mimic")
    with pytest.raises(DataError, match="layout deeplesion holds images 3-D with 1 channels, and the modality is 2-D"):
        list_images(tmp_path, FILM, layout="deeplesion")
    with pytest.raises(DataError, match="leave one of them out"):
        list_images(tmp_path, FILM, ("index.csv",), layout="medmnist")


def test_a_site_names_its_layout(tmp_path):
    (tmp_path / "site.toml").write_text('name = "north"\ndata = "."\nlayout = "medmnist"\n')
    home = load_home(tmp_path)
    medmnist(tmp_path)
    assert len(take_inventory(home.data, FILM, home.index, home.only, layout=home.layout).items) == 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_survey_of_a_published_set(layout, tmp_path):
    make, modality = SETS[layout]
    make(tmp_path)
    survey = take_survey(tmp_path, "any", modality, (), (), layout, jobs=1)
    held_out = sum(item.held_out for item in list_images(tmp_path, modality, layout=layout).items)
    assert survey.images.heldout == held_out * (4 if layout == "tcga" else 1)
    assert not survey.quarantined
