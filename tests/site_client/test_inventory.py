"""Which files a site uses: by index and without one, by patient, and every bad row named."""

import csv
import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tests.site_client.dicoms import PATIENT, dataset, save, save_series

from invcoss_common.errors import DataError
from invcoss_common.modality import MODALITIES, geometry_for
from invcoss_site.home import load_home
from invcoss_site.inventory import split_of, take_inventory
from invcoss_site.visit import site_images

XRAY, CT, MRI = (MODALITIES[name] for name in ("xray", "ct", "mri"))
FILM = np.arange(1200, dtype=np.uint16).reshape(30, 40)
VOLUME = np.stack([FILM] * 5)


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def write_index(folder, rows, name="labels.csv"):
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def names(inventory, held_out):
    return [item.path.name for item in inventory.items if item.held_out == held_out]


def test_without_an_index_every_image_is_found_and_clutter_is_not(tmp_path):
    touch(tmp_path, "a.png", "deep/er/b.JPG", "c.tiff", ".DS_Store", ".hidden/d.png", "notes.txt", "v.nii.gz")
    inventory = take_inventory(tmp_path, XRAY)
    assert [item.path.name for item in inventory.items] == ["a.png", "c.tiff", "b.JPG"]
    assert {item.case for item in inventory.items} == {"a.png", "deep/er/b.JPG", "c.tiff"}


def test_a_bids_subject_is_one_case(tmp_path):
    touch(tmp_path, "sub-01/ses-1/sub-01_T1w.nii.gz", "sub-01/ses-2/sub-01_T1w.nii.gz", "sub-02/sub-02_T1w.nii")
    inventory = take_inventory(tmp_path, MODALITIES["mri"])
    assert sorted(item.case for item in inventory.items) == ["sub-01", "sub-01", "sub-02"]
    by_case = {(item.case, item.held_out) for item in inventory.items}
    assert len(by_case) == 2, "all images of a case are on one side"


def test_adding_cases_moves_no_case(tmp_path):
    touch(tmp_path, *(f"{n:03}.png" for n in range(60)))
    before = {item.case: item.held_out for item in take_inventory(tmp_path, XRAY).items}
    touch(tmp_path, *(f"{n:03}.png" for n in range(60, 300)))
    after = {item.case: item.held_out for item in take_inventory(tmp_path, XRAY).items}
    assert {case: after[case] for case in before} == before
    assert 0.12 < sum(after.values()) / len(after) < 0.28


def test_a_handful_of_cases_still_has_one_held_out(tmp_path):
    kept = [f"{n}.png" for n in range(100) if not split_of(f"{n}.png")][:4]
    touch(tmp_path, *kept)
    assert sum(item.held_out for item in take_inventory(tmp_path, XRAY).items) == 1


def test_an_index_decides_files_cases_and_splits(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png", "mask.png")
    rows = [("a.png", "p1", "train"), ("b.png", "p2", "val"), ("c.png", "p3", "test")]
    write_index(tmp_path, [dict(zip(("file", "patient", "split"), row, strict=True)) for row in rows])
    inventory = take_inventory(tmp_path, XRAY, ("labels.csv",))
    assert (names(inventory, False), names(inventory, True)) == (["a.png", "b.png"], ["c.png"])
    assert inventory.rejected == ()


def test_every_bad_row_is_named_and_nothing_outside_is_read(tmp_path):
    data = tmp_path / "data"
    touch(data, "good.png", "held.png", "twice.png", "text.txt", "odd.png")
    touch(tmp_path, "secret.png")
    rows = [
        ("good.png", "p1", "train"),
        ("missing.png", "p2", "train"),
        ("../secret.png", "p3", "train"),
        (str(tmp_path / "secret.png"), "p4", "train"),
        ("", "p5", "train"),
        ("text.txt", "p6", "train"),
        ("odd.png", "p7", "training"),
        ("twice.png", "p8", "train"),
        ("twice.png", "p8", "test"),
        ("held.png", "p9", "test"),
    ]
    write_index(data, [dict(zip(("file", "case", "split"), row, strict=True)) for row in rows])
    inventory = take_inventory(data, XRAY, ("labels.csv",))
    assert [item.path.name for item in inventory.items] == ["good.png", "held.png"]
    reasons = [rejected.reason for rejected in inventory.rejected]
    assert len(reasons) == 8
    assert {rejected.kind for rejected in inventory.rejected} == {"index"}
    for reason, line, word in zip(
        reasons, (3, 4, 5, 6, 7, 8), ("exist", "outside", "outside", "no file", ".png", "training"), strict=False
    ):
        assert f"row {line}:" in reason
        assert word in reason
    for reason, line in zip(reasons[-2:], (9, 10), strict=True):
        assert f"row {line}: its case is in train and test" in reason


def test_a_symbolic_link_out_of_the_folder_is_refused(tmp_path):
    data = tmp_path / "data"
    touch(data, "good.png")
    touch(tmp_path, "secret.png")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    write_index(data, [{"file": "good.png"}, {"file": "link.png"}])
    inventory = take_inventory(data, XRAY, ("labels.csv",))
    assert [item.path.name for item in inventory.items] == ["good.png"]
    assert "outside" in inventory.rejected[0].reason


def test_useless_folders_and_indexes_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        take_inventory(tmp_path / "none", XRAY)
    with pytest.raises(DataError, match="no PNG, JPEG, TIFF or DICOM images"):
        take_inventory(tmp_path, XRAY)
    touch(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"labels\.csv: can't read the index"):
        take_inventory(tmp_path, XRAY, ("labels.csv",))
    (tmp_path / "labels.csv").write_text("name,label\na.png,1\n")
    with pytest.raises(DataError, match="no column 'file'"):
        take_inventory(tmp_path, XRAY, ("labels.csv",))
    (tmp_path / "labels.csv").write_bytes(b"file\n\xff\xfe\n")
    with pytest.raises(DataError, match="not a UTF-8 CSV"):
        take_inventory(tmp_path, XRAY, ("labels.csv",))


def test_dicom_files_are_found_by_what_they_are_and_counted_by_patient(tmp_path):
    for number, patient in enumerate(("A1", "A1", "B2", " B2 ", "")):
        save(tmp_path / f"IM{number:05}", dataset(FILM, PatientID=patient))
    save(tmp_path / "1.2.840.113619.2", dataset(FILM, PatientID="C3"))
    save(tmp_path / "DICOMDIR", dataset(FILM))
    touch(tmp_path, "README", "notes.txt")
    items = take_inventory(tmp_path, XRAY).items
    assert [item.path.name for item in items] == ["1.2.840.113619.2", *(f"IM{n:05}" for n in range(5))]
    cases = [item.case for item in items]
    assert cases[1] == cases[2] == "dicom-" + hashlib.sha256(b"PatientID A1").hexdigest()[:16]
    assert cases[3] == cases[4]
    assert len(set(cases)) == 4, "the one without a patient is its study"


def test_slices_become_one_item_a_series(tmp_path):
    one, two = save_series(tmp_path / "p1", VOLUME, series="1.1"), save_series(tmp_path / "p2", VOLUME, series="1.1")
    save_series(tmp_path / "p2" / "scout", VOLUME[:1], series="1.3", PatientID="X")
    items = take_inventory(tmp_path, CT).items
    assert [list(item.files) for item in items[:1]] == [one]
    assert sorted(len(item.files) for item in items) == [1, 5, 5]
    assert items[1].files == tuple(two)
    assert items[0].case == items[1].case != items[2].case
    assert all(PATIENT not in item.case for item in items)


def test_damaged_slices_are_rejected_before_pixels_are_read(tmp_path):
    files = save_series(tmp_path, VOLUME)
    files[0].write_bytes(files[0].read_bytes()[:-500])
    (tmp_path / "empty.dcm").write_bytes(b"")
    inventory = take_inventory(tmp_path, CT)
    assert inventory.items[0].files == tuple(files[1:])
    assert sorted((one.path.name, one.kind) for one in inventory.rejected) == [
        ("001.dcm", "truncated"),
        ("empty.dcm", "empty"),
    ]


def test_an_index_names_folders_of_slices_or_each_slice(tmp_path):
    save_series(tmp_path / "a", VOLUME, series="1.1")
    save_series(tmp_path / "b", VOLUME, series="1.2")
    rows = [{"file": "a", "case": "c1", "split": "train"}]
    rows += [{"file": f"b/{n:03}.dcm", "case": "c2", "split": "test"} for n in range(1, 6)]
    rows += [{"file": "empty", "case": "c3", "split": "train"}]
    (tmp_path / "empty").mkdir()
    write_index(tmp_path, rows)
    inventory = take_inventory(tmp_path, CT, ("labels.csv",))
    found = [(item.case, item.held_out, len(item.files)) for item in inventory.items]
    assert found == [("c1", False, 5), ("c2", True, 5)]
    assert "row 8: 'empty' is a folder without DICOM files" in inventory.rejected[0].reason


def test_splits_are_by_patient_and_stay_when_cases_are_added(tmp_path):
    def held_out():
        return {item.case: item.held_out for item in take_inventory(tmp_path, XRAY).items}

    for number in range(40):
        save(tmp_path / f"{number:03}.dcm", dataset(FILM, PatientID=f"patient {number % 20}"))
    before = held_out()
    assert len(before) == 20
    for number in range(40, 120):
        save(tmp_path / f"{number:03}.dcm", dataset(FILM, PatientID=f"patient {number % 60}"))
    after = held_out()
    assert len(after) == 60
    assert {case: after[case] for case in before} == before


def test_bids_uses_raw_anatomy_only_and_a_pattern_chooses(tmp_path):
    touch(
        tmp_path,
        "dataset_description.json",
        "participants.tsv",
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_T2w.nii.gz",
        "sub-01/ses-a/func/sub-01_ses-a_bold.nii.gz",
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-02/anat/sub-02_space-orig_mask.nii.gz",
        "derivatives/seg/sub-02/anat/sub-02_T1w.nii.gz",
    )
    assert [item.path.name for item in take_inventory(tmp_path, MRI).items] == [
        "sub-01_ses-a_T1w.nii.gz",
        "sub-01_ses-a_T2w.nii.gz",
        "sub-02_T1w.nii.gz",
    ]
    chosen = take_inventory(tmp_path, MRI, only=("*_T1w.nii.gz",)).items
    assert [(item.path.name, item.case) for item in chosen] == [
        ("sub-01_ses-a_T1w.nii.gz", "sub-01"),
        ("sub-02_T1w.nii.gz", "sub-02"),
    ]
    assert take_inventory(tmp_path, MRI, only=("sub-02/*",)).items[0].case == "sub-02"
    (tmp_path / "dataset_description.json").unlink()
    assert len(take_inventory(tmp_path, MRI).items) == 6


def test_images_in_formats_that_are_not_read_are_named(tmp_path):
    touch(tmp_path, "a.png", "b.npz", "c.nrrd", "d.csv", "e.json", "f.txt")
    rejected = take_inventory(tmp_path, XRAY).rejected
    assert sorted((one.path.name, one.kind) for one in rejected) == [
        ("b.npz", "not-this-format"),
        ("c.nrrd", "not-this-format"),
    ]


def test_masks_and_labels_of_an_index(tmp_path):
    touch(tmp_path / "data", "a.png", "b.png", "c.png", "d.png", "e.png", "m.png")
    touch(tmp_path, "outside.png")
    rows = [
        ("a.png", "m.png", "sick"),
        ("b.png", "", "well"),
        ("c.png", "missing.png", "well"),
        ("d.png", "../outside.png", "well"),
        ("e.png", "", ""),
        ("m.png", "", "odd"),
    ]
    write_index(tmp_path / "data", [dict(zip(("file", "mask", "label"), row, strict=True)) for row in rows])
    inventory = take_inventory(tmp_path / "data", XRAY, ("labels.csv",), classes=("sick", "well"))
    assert [(item.path.name, item.mask and item.mask.name) for item in inventory.items] == [
        ("a.png", "m.png"),
        ("b.png", None),
    ]
    words = (
        "'missing.png' does not exist",
        "mask lies outside",
        r"label (none) is not one of sick, well",
        "label (odd)",
    )
    for finding, line, word in zip(inventory.rejected, (4, 5, 6, 7), words, strict=True):
        assert f"row {line}: " in finding.reason
        assert word in finding.reason
    assert len(take_inventory(tmp_path / "data", XRAY, ("labels.csv",)).items) == 4, (
        "labels are not needed to pre-train"
    )


def test_the_pattern_in_the_sites_settings_holds_in_a_visit(tmp_path):
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("a1.png", "a2.png", "a3.png", "b1.png", "b2.png")):
        values = np.random.default_rng(number).integers(0, 255, (40, 40), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "data" / name)
    (tmp_path / "site.toml").write_text('name = "north"\ndata = "data"\nonly = ["a*"]\n')
    task = SimpleNamespace(modality=XRAY, geometry=geometry_for(XRAY, "nano"), spacing_mm=None)
    images = site_images(load_home(tmp_path), task, lambda status: None)
    assert len(images.train) + len(images.heldout) == 3
