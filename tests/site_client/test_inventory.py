"""Which files a site uses: by index and without one, by patient, and every bad row named."""

import csv

import pytest

from invcoss_common.errors import DataError
from invcoss_common.modality import MODALITIES
from invcoss_site.inventory import split_of, take_inventory

XRAY = MODALITIES["xray"]


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
    assert len(reasons) == 7
    for reason, line, word in zip(
        reasons, (3, 4, 5, 6, 7, 8), ("exist", "outside", "outside", "no file", ".png", "training"), strict=False
    ):
        assert f"row {line}:" in reason
        assert word in reason
    assert "train and test" in reasons[-1]


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
    with pytest.raises(DataError, match="no PNG, JPEG or TIFF images"):
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
