"""A survey of a folder: counts, splits, copies, doubts, reasons and signs, as JSON and as a page that stays there."""

import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from tests.site_client.dicoms import dataset, save, save_series, slice_of
from tests.site_client.test_ingest import chest, nifti
from tests.site_client.test_inventory import write_index

import invcoss_site
from invcoss_common.errors import DataError
from invcoss_common.modality import MODALITIES
from invcoss_site import survey as survey_module
from invcoss_site.cli_data import FailOn, check_data
from invcoss_site.inventory import Item
from invcoss_site.survey import _looked_at, take_survey, take_text_survey
from invcoss_site.survey_facts import Facts, blank
from invcoss_site.survey_report import KINDS, page
from invcoss_site.survey_summary import Survey

RANDOM = np.random.default_rng(0)
FILM = np.kron(chest(), np.ones((2, 2), np.uint8))
AIR = RANDOM.normal(0, 400, (12, 14, 16)).clip(-1024, 1000).astype(np.int16)


def film(path, **options):
    """A film that is like no other one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((FILM + RANDOM.integers(0, 9, FILM.shape)).clip(0, 255).astype(np.uint8)).save(path, **options)
    return path


def films(folder, count=6):
    """Films a.png, b.png, ... and an index with a case each; the last one is held out."""
    rows = []
    for number in range(count):
        name = f"{'abcdefghij'[number]}.png"
        film(folder / name)
        rows.append({"file": name, "patient": f"p{number}", "split": "test" if number == count - 1 else "train"})
    return rows


def survey(folder, modality="xray", index=(), **options):
    return take_survey(folder, modality, MODALITIES[modality], tuple(index), jobs=1, **options)


def kinds(remarks):
    return {one.file: one.kind for one in remarks}


def test_counts_of_an_index(tmp_path):
    rows = films(tmp_path)
    rows[1]["patient"], rows[2]["split"] = "p0", "val"
    film(tmp_path / "unlisted.png")
    write_index(tmp_path, rows)
    found = survey(tmp_path, index=["labels.csv"])
    assert found.images.model_dump() == {"train": 5, "heldout": 1, "train_cases": 4, "heldout_cases": 1}
    splits = {one.name: (one.images, one.cases, one.quarantined) for one in found.splits}
    assert splits == {"train": (4, 3, 0), "val": (1, 1, 0), "test": (1, 1, 0)}
    assert (found.unlisted, found.found, found.files, found.formats) == (1, 6, 6, {"picture": 6})
    assert found.shapes == {"192 × 192": 6} and found.enlarged == 0
    assert 0 <= found.values["lowest"].lowest < found.values["median"].median < found.values["highest"].highest <= 255
    assert not found.quarantined and not found.duplicates and not found.in_two_splits and found.enough


def test_every_damaged_file_is_named_and_none_ends_it(tmp_path):
    films(tmp_path)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(film(tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "words.png").write_text("a text\n")
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(tmp_path / "constant.png")
    np.savez(tmp_path / "pickled.npz", a=np.array([{"an": "object"}], dtype=object))
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    found = survey(tmp_path)
    assert kinds(found.quarantined) == {
        "empty.png": "empty",
        "cut.jpg": "truncated",
        "words.png": "not-this-format",
        "constant.png": "constant",
        "pickled.npz": "not-this-format",
    }
    assert found.images.train + found.images.heldout == 7
    for one in found.quarantined:
        assert one.text.startswith(f"{tmp_path / one.file}: ") and one.kind in KINDS


def test_the_same_content_and_the_same_instance_are_duplicates(tmp_path):
    rows = films(tmp_path, 4)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    Image.fromarray(pixels).save(tmp_path / "copy.tif")
    first = dataset(FILM, PatientID="1", Modality="DX")
    save(tmp_path / "x.dcm", first)
    other = dataset(255 - FILM // 2, PatientID="2", Modality="DX")
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = first.SOPInstanceUID
    save(tmp_path / "y.dcm", other)
    rows += [
        {"file": name, "patient": name, "split": split}
        for name, split in (("copy.tif", "test"), ("x.dcm", "train"), ("y.dcm", "train"))
    ]
    write_index(tmp_path, rows)
    found = survey(tmp_path, index=["labels.csv"])
    assert [(one.how, one.files, one.both_sides) for one in found.duplicates] == [
        ("content", ("a.png", "copy.tif"), True),
        ("DICOM instance UID", ("x.dcm", "y.dcm"), False),
    ]
    assert found.patients == 2 and found.modalities == {"DX": 2}


def test_a_patient_in_two_splits_is_found_by_index_and_by_dicom(tmp_path):
    rows = films(tmp_path, 4)
    rows[0]["patient"] = "p3"  # which is held out
    rows[1]["split"], rows[2]["patient"] = "val", "p1"  # val and train: both are trained on
    for name, case, split in (("x.dcm", "c1", "train"), ("y.dcm", "c2", "test")):
        save(tmp_path / name, dataset(FILM + RANDOM.integers(0, 9, FILM.shape, dtype=np.uint8), PatientID="one"))
        rows.append({"file": name, "patient": case, "split": split})
    write_index(tmp_path, rows)
    found = survey(tmp_path, index=["labels.csv"])
    texts = "\n".join(one.text for one in found.in_two_splits)
    assert len(found.in_two_splits) == 4
    assert texts.count("its case is in train and test") == 2
    assert "b.png: its case of the index is in train and val" in texts
    assert "x.dcm: its DICOM patient is in test and train" in texts
    assert found.images.train == 3 and found.images.heldout == 1  # the first clash is not used at all


def test_doubts_on_films_are_warnings(tmp_path):
    films(tmp_path)
    Image.fromarray(255 - FILM).save(tmp_path / "inverted.png")
    Image.fromarray(FILM[:30].repeat(8, axis=1)).save(tmp_path / "long.png")
    image = Image.open(film(tmp_path / "letters.png")).resize((512, 512))
    ImageDraw.Draw(image).text((20, 20), "MEIER ANNA 12.03.1961", fill=255, font=ImageFont.load_default(24))
    image.save(tmp_path / "letters.png")
    save(tmp_path / "ct.dcm", dataset(FILM, Modality="CT"))
    found = survey(tmp_path)
    assert kinds(found.warnings) == {
        "inverted.png": "inverted",
        "long.png": "shape",
        "letters.png": "burnt-in",
        "ct.dcm": "modality",
    }
    assert not found.quarantined


def test_volumes_their_spacing_axes_scanners_and_doubts(tmp_path):
    for number in range(4):
        nifti(tmp_path / f"{number}.nii.gz", (AIR + number).astype(np.int16), np.diag([-2.0, 2, 3, 1]))
    nifti(tmp_path / "wide.nii.gz", AIR, np.diag([20.0, 2, 3, 1]))
    nifti(tmp_path / "warm.nii.gz", AIR.clip(-90, 300))
    nifti(tmp_path / "offset.nii.gz", (AIR + 1024).astype(np.uint16))
    scan = (AIR[:6] + 1024).astype(np.uint16)
    save_series(tmp_path / "good", scan, Manufacturer="ACME", ManufacturerModelName="One", Modality="CT")
    save_series(tmp_path / "gap", scan)[2].unlink()
    for number in range(3):
        save(tmp_path / "mixed" / f"{number}.dcm", slice_of(scan[number], (0, 0, number), series="1.1"))
        save(tmp_path / "mixed" / f"b{number}.dcm", slice_of(scan[number, :9, :9], (0, 0, number), series="1.2"))
    found = survey(tmp_path, "ct")
    assert kinds(found.quarantined) == {"offset.nii.gz": "units", "gap/001.dcm": "gap"} | {
        f"mixed/{name}0.dcm": "too-small" for name in ("", "b")
    }
    assert kinds(found.warnings) == {"wide.nii.gz": "spacing", "warm.nii.gz": "units"}
    assert (found.scanners, found.axes["LAS"].files) == ({"ACME One": 1, "not named": 3}, 4)
    assert [(one.lowest, one.median, one.highest) for one in found.spacings_mm][2] == (1.0, 2.0, 20.0)
    assert found.files == found.found + 5 + 4 + 2 + 2  # the further slices


def test_masks_of_an_index_are_paired_and_counted(tmp_path):
    rows = []
    for number in range(6):
        nifti(tmp_path / f"{number}.nii.gz", (AIR + number).astype(np.int16))
        rows.append({"file": f"{number}.nii.gz", "case": number, "split": "test" if number == 5 else "train"})
    classes = (AIR > 0).astype(np.uint8)
    odd = classes.copy()
    odd[0, 0, 0] = 77
    for number, mask in enumerate((classes, classes, classes[:10], odd)):
        nifti(tmp_path / f"m{number}.nii.gz", mask)
        rows[number]["lung_mask"] = f"m{number}.nii.gz"
    write_index(tmp_path, rows)
    found = survey(tmp_path, "mri", ["labels.csv"], mask_classes=(0, 1))
    assert (found.masks.fit, found.masks.classes, found.unlisted) == (2, {0: 2, 1: 2}, 0)
    refused = {one.file: one.text for one in found.masks.refused}
    assert "mask has shape (10, 14, 16) and its image" in refused["2.nii.gz"]
    assert "class 77 is not one of 0, 1" in refused["3.nii.gz"]
    assert found.images.train + found.images.heldout == 6
    assert survey(tmp_path, "mri", ["labels.csv"]).masks.classes == {0: 3, 1: 3, 77: 1}


def test_texts_are_counted_and_bad_lines_named(tmp_path):
    lines = [
        {"id": str(n), "text": f"Text {n} of Dr. Meier.", "split": "test" if n > 7 else "train"} for n in range(10)
    ]
    lines[1]["text"] = lines[0]["text"]
    text = "\n".join(map(json.dumps, lines)) + '\n{"id": "x", \n{"id": "0", "text": "again"}\n\n'
    (tmp_path / "a.jsonl").write_text(text)
    found = take_text_survey(tmp_path)
    assert found.images.model_dump() == {"train": 8, "heldout": 2, "train_cases": 8, "heldout_cases": 2}
    assert [re.search(r"line \d+", one.text)[0] for one in found.quarantined] == ["line 11", "line 12", "line 13"]
    assert [one.files for one in found.duplicates] == [("a.jsonl: 0", "a.jsonl: 1")]
    assert [(one.what, one.images) for one in found.identity] == [("a title before a name", 10)]


def test_signs_are_counted_once_a_sort_over_all_files(tmp_path):
    for number in range(5):
        pixels = FILM + RANDOM.integers(0, 9, FILM.shape, dtype=np.uint8)
        save(tmp_path / f"{number}.dcm", dataset(pixels, PatientName="Meier^Anna", PatientID=f"secret{number}"))
    found = survey(tmp_path)
    told = {(one.level, one.where): one.images for one in found.identity}
    assert told == {("identity", "PatientName"): 5, ("identity", "PatientID"): 5}
    assert found.patients == 5
    assert not re.search("Meier|secret", found.model_dump_json() + page(found))


def die(item: Item, data: Path) -> Facts:
    if item.path.name == "b.png":
        os._exit(139)
    return Facts.model_validate({**blank(item, data), "images": 1})


def test_a_decoder_that_dies_takes_its_own_file_only(tmp_path, monkeypatch):
    forked = multiprocessing.get_context("fork")  # because each spawned process imports for seconds
    monkeypatch.setattr(survey_module, "_pool", lambda jobs: ProcessPoolExecutor(jobs, forked))
    items = [Item(tmp_path / f"{letter}.png", letter, False, (tmp_path / f"{letter}.png",)) for letter in "abcd"]
    found = list(_looked_at(partial(die, data=tmp_path), items, 2, tmp_path))
    assert [one.file for one in found] == ["a.png", "b.png", "c.png", "d.png"]
    assert [one.images for one in found] == [1, 0, 1, 1]
    assert found[1].quarantined.kind == "fault" and "decoder died" in found[1].quarantined.text


def test_the_page_has_nothing_from_elsewhere_and_takes_no_name_for_markup(tmp_path):
    films(tmp_path)
    film(tmp_path / "<b>x.png")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "<script>alert(1)<.png")
    text = page(survey(tmp_path, thumbnails=True))
    assert "&lt;b&gt;x.png" in text and "<b>" not in text
    assert "&lt;script&gt;alert(1)&lt;.png" in text and "<script" not in text
    assert text.count("<img") == text.count('src="data:image/jpeg;base64,') == 8  # 7 usual ones and the constant one
    assert not re.search(r"(?:src|href)=\"(?!#|data:)|https?:|@import|url\(", text)


def test_the_page_of_many_findings_names_some_and_counts_all(tmp_path):
    films(tmp_path)
    for number in range(230):
        (tmp_path / f"empty-{number:03}.png").write_bytes(b"")
    found = survey(tmp_path, thumbnails=True)
    text = page(found)
    assert len(found.quarantined) == 230 and "and 30 more, which are in the JSON" in text
    assert "empty-199.png" in text and "empty-200.png" not in text


def run(capsys, folder, *fail_on, modality="xray", **options):
    """The JSON that check-data prints and the message of its error, if there is one."""
    error = ""
    try:
        check_data(folder, modality, fail_on=list(fail_on), jobs=1, as_json=True, **options)
    except DataError as raised:
        error = str(raised)
        assert raised.exit_code == 4
    return json.loads(capsys.readouterr().out), error


def test_the_command_fails_on_what_is_named_and_prints_all_the_same(tmp_path, capsys):
    films(tmp_path, 10)
    assert run(capsys, tmp_path, *FailOn)[1] == ""
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(255 - FILM).save(tmp_path / "inverted.png")
    film(tmp_path / "MEIER^ANNA.png")
    told, error = run(capsys, tmp_path)
    assert not error and len(told["quarantined"]) == len(told["warnings"]) == len(told["identity"]) == 1
    for level in FailOn:
        assert f"--fail-on: {level.value} 1" in run(capsys, tmp_path, level)[1]
    assert run(capsys, tmp_path, *FailOn)[1].endswith("quarantined 1, warnings 1, identity 1")


def test_too_few_images_fail_and_are_told(tmp_path, capsys):
    film(tmp_path / "a.png")
    (tmp_path / "empty.png").write_bytes(b"")
    told, error = run(capsys, tmp_path)
    assert told["found"] == 2 and "empty.png: file is empty" in error and "are usable, but" in error


def test_the_json_has_every_part_and_rows_and_labels_of_an_index_are_judged(tmp_path, capsys):
    rows = [{**row, "label": "ill"} for row in films(tmp_path)]
    rows[0]["label"] = ""
    rows += [{"file": file, "patient": "p9", "split": "train", "label": "ill"} for file in ("no.png", "../up.png", "")]
    write_index(tmp_path, rows)
    told, _ = run(capsys, tmp_path, index=["labels.csv"], label=["ill", "well"], report=tmp_path / "page.html")
    assert [re.search(r"row (\d+): (.*?);", one["text"]).groups() for one in told["quarantined"]] == [
        ("2", "its label (none) is not one of ill, well"),
        ("8", "'no.png' does not exist"),
        ("9", "its file lies outside the data folder"),
        ("10", "no file is named"),
    ]
    assert told.keys() == Survey.model_fields.keys()
    assert "5 images of 5 cases can be used" in (tmp_path / "page.html").read_text("utf-8")
    assert {"file", "case", "split", "images", "values", "content", "warnings"} <= told["each"][0].keys()
    with pytest.raises(DataError, match="no such folder"):
        check_data(tmp_path / "nowhere", "xray")


def test_what_works_for_a_coordinator_knows_no_survey():
    """So nothing of a survey, which names files, can come before the guard."""
    folder = Path(invcoss_site.__file__).parent
    own = {"cli.py", "cli_data.py", "burnt_in.py", "deidentify.py"}
    others = [path for path in folder.rglob("*.py") if path.name not in own and not path.name.startswith("survey")]
    imports = re.compile(r"^\s*(?:from|import) .*(?:survey|cli_data|deidentify|burnt_in)", re.M)
    assert len(others) > 40
    assert not [path.name for path in others if imports.search(path.read_text("utf-8"))]
