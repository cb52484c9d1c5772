"""Each published set is found in each of its layouts, a site's own as its task file says; a wrong folder is told."""

import json
import random
from collections import Counter

import pytest
from tests.site_client import published

from invcoss_common.errors import DataError
from invcoss_site.downstream.sets import PUBLISHED, find_cases
from invcoss_site.downstream.sets.cases import SPLITS, of_split, write_splits
from invcoss_site.downstream.sets.layouts import LAYOUTS
from invcoss_site.downstream.sets.volumes import LITS_TEST
from invcoss_site.downstream.task import TASKS, Task

LAYOUT_IDS = [maker.__name__ for _, maker, _ in published.SETS]


def counts(cases):
    return tuple(len(of_split(cases, split)) for split in SPLITS)


@pytest.mark.parametrize(("name", "make", "expected"), published.SETS, ids=LAYOUT_IDS)
def test_a_published_set_has_its_cases_and_splits(tmp_path, name, make, expected):
    make(tmp_path)
    task = TASKS[name]
    cases = find_cases(task, tmp_path)
    assert counts(cases) == expected
    assert cases == find_cases(task, tmp_path)
    assert all(path.is_file() for case in cases for path in (*case.files, *([case.mask] if case.mask else [])))
    assert not any(path.suffix == ".pkl" for case in cases for path in case.files)
    if task.kind == "classify":
        assert {case.label for case in cases} == set(range(len(task.classes)))


@pytest.mark.parametrize("name", ["lits", "vs", "la"])
def test_an_honest_validation_split_is_taken_from_train_alone(tmp_path, name):
    make = {"lits": published.lits, "vs": published.vs_raw, "la": published.la_prepared}[name]
    make(tmp_path)
    as_published = find_cases(TASKS[name], tmp_path)
    honest = find_cases(TASKS[name].validated(), tmp_path)
    train, val, test = counts(honest)
    assert val > 0 and (train + val, 0, test) == counts(as_published)
    assert {case.id for case in of_split(honest, "test")} == {case.id for case in of_split(as_published, "test")}
    assert not {case.patient for case in of_split(honest, "train")} & {case.patient for case in of_split(honest, "val")}


def test_all_nine_tasks_have_a_loader_and_a_layout():
    assert set(TASKS) == set(PUBLISHED) == set(LAYOUTS) == {name for name, _, _ in published.SETS}
    assert len(TASKS) == 9 and len(LITS_TEST) == 27


@pytest.mark.parametrize("name", TASKS)
def test_a_wrong_folder_shows_the_layout(tmp_path, name):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError) as caught:
            find_cases(TASKS[name], folder)
        assert str(folder) in str(caught.value) and LAYOUTS[name] in str(caught.value)


def test_the_published_cuts(tmp_path):
    published.chestxr(tmp_path)
    cases = find_cases(TASKS["chestxr"], tmp_path)
    assert [case.files[0].name for case in of_split(cases, "val")] == ["4.png"] * 3  # the last fifth by name
    published.vs_raw(tmp_path)
    vs = find_cases(TASKS["vs"], tmp_path)
    order = list(published.VS)  # of dataset.json, not by name
    random.seed(0)
    random.shuffle(order)
    assert {case.id for case in of_split(vs, "train")} == set(order[:8])


def test_vs_leaves_out_the_patient_that_the_publication_does(tmp_path):
    published.vs_converted(tmp_path)
    assert "vs_gk_168" not in {case.id for case in find_cases(TASKS["vs"], tmp_path)}


def test_ricord_series_are_found_by_patient_date_and_number(tmp_path):
    published.ricord_dicom(tmp_path)
    cases = find_cases(TASKS["ricord"], tmp_path)
    assert all(len(case.files) == 6 for case in cases)
    labels = {case.patient: case.label for case in cases}
    assert labels == {patient: label for _, label, patient, _ in published.RICORD}
    case = of_split(cases, "val")[0]
    assert case.files[0].parent.name == "601.000000-COR 3X3-33333"


def test_a_patient_in_two_splits_is_refused_by_name(tmp_path):
    published.pubmed(tmp_path)
    path = tmp_path / "PubMed_20k_RCT" / "test.txt"
    path.write_text(path.read_text().replace("###test0", "###train0"))
    with pytest.raises(DataError, match=r"test\.txt: patient train0 is in test and, with .*train\.txt, in train"):
        find_cases(TASKS["pubmed20k"], tmp_path)

    published.ricord(tmp_path)
    path = tmp_path / "RICORD_val.txt"
    path.write_text(path.read_text() + (tmp_path / "RICORD_test.txt").read_text())
    with pytest.raises(DataError, match=r"patient 440808-000404 is in test and, with .*, in val"):
        find_cases(TASKS["ricord"], tmp_path)

    published.vs_prepared(tmp_path)
    path = tmp_path / "Task061_VSseg" / "VSseg_test.txt"
    path.write_text(path.read_text() + "vs_gk_1\n")
    with pytest.raises(DataError, match=r"VSseg_test\.txt: patient vs_gk_1 is listed twice"):
        find_cases(TASKS["vs"], tmp_path)


def test_lines_and_labels_out_of_range_are_refused_by_name(tmp_path):
    published.pubmed(tmp_path)
    path = tmp_path / "PubMed_20k_RCT" / "dev.txt"
    path.write_text(path.read_text().replace("METHODS\t", "PURPOSE\t", 1))
    with pytest.raises(DataError, match=r"dev\.txt, line 4: not a role of BACKGROUND"):
        find_cases(TASKS["pubmed20k"], tmp_path)
    published.ricord(tmp_path)
    path = tmp_path / "RICORD_test.txt"
    path.write_text(path.read_text().replace(".nii.gz 0", ".nii.gz 2"))
    with pytest.raises(DataError, match=r"RICORD_test\.txt: .* is no volume with label 0 or 1"):
        find_cases(TASKS["ricord"], tmp_path)
    published.chestxr(tmp_path)
    (tmp_path / "Chest_XR" / "train" / "influenza").mkdir()
    with pytest.raises(DataError, match="influenza"):
        find_cases(TASKS["chestxr"], tmp_path)


def test_files_that_a_list_names_must_be_there(tmp_path):
    published.qata_listed(tmp_path)
    (tmp_path / "QaTa-COV19-v2/Train Set/Images/scan_3.png").unlink()
    with pytest.raises(DataError, match=r"scan_3\.png: no such file, though .*train\.txt names it"):
        find_cases(TASKS["qatav2"], tmp_path)
    published.lits(tmp_path)
    (tmp_path / "Training Batch 1" / "segmentation-1.nii").unlink()
    with pytest.raises(DataError, match="volume or segmentation is missing of 1"):
        find_cases(TASKS["lits"], tmp_path)
    published.glas(tmp_path)
    (tmp_path / "Warwick_QU_Dataset" / "testA_1_anno.bmp").unlink()
    with pytest.raises(DataError, match=r"testA_1_anno\.bmp"):
        find_cases(TASKS["glas"], tmp_path)


def test_split_lists_can_be_kept(tmp_path):
    published.qata(tmp_path)
    cases = find_cases(TASKS["qatav2"], tmp_path)
    write_splits(tmp_path / "kept", cases)
    kept = (tmp_path / "kept" / "val.txt").read_text().split()
    assert kept == [case.id for case in of_split(cases, "val")] and len(kept) == 2


OWN = {"name": "own", "kind": "classify", "input": "xray", "size": (32, 32), "classes": ("bad", "good")}


def own(data, **changes):
    return Task.model_validate({**OWN, **changes, "data": data})


def index_of(folder, rows, header="file,label,patient,split,kind"):
    for row in rows:
        name = row.split(",")[0]
        if name and not name.startswith(".."):
            published.picture(folder / name, 1)
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")


def rows_of(patients=10, splits=("",)):
    return [
        f"a/{n}.png,{('bad', 'good')[n % 2]},p{n // 2},{splits[n // 2 % len(splits)]},x" for n in range(2 * patients)
    ]


def test_an_index_without_splits_is_split_by_patient_always_alike(tmp_path):
    index_of(tmp_path, rows_of())
    task = own({"index": "labels.csv", "patient": "patient"})
    cases = find_cases(task, tmp_path)
    assert counts(cases) == (12, 4, 4)
    index_of(tmp_path, rows_of()[::-1])
    assert {(c.id, c.split) for c in find_cases(task, tmp_path)} == {(c.id, c.split) for c in cases}


def test_an_index_says_splits_columns_and_rows(tmp_path):
    index_of(tmp_path, [*rows_of(splits=("train", "val", "test")), "b/1.png,ugly,q,train,y", "a/99.png,,q,train,y"])
    source = {"index": "labels.csv", "patient": "patient", "folder": "a", "where": {"kind": "x*"}}
    cases = find_cases(own(source), tmp_path)
    assert counts(cases) == (8, 6, 6)
    assert Counter(case.label for case in cases) == {0: 10, 1: 10}


def test_a_missing_validation_split_is_taken_from_train(tmp_path):
    index_of(tmp_path, rows_of(splits=("train", "test")))
    train, val, test = counts(find_cases(own({"index": "labels.csv", "patient": "patient"}), tmp_path))
    assert (train, val, test) == (8, 2, 10)


def test_every_bad_row_is_told_by_its_number(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    rows = ["a.png,good,p1,train,", "../secret.png,good,p2,train,", ",bad,p3,train,", "c.png,ugly,p4,train,"]
    rows += ["d.png,good,p5,later,", "e.png,good,,train,"]
    index_of(tmp_path / "data", rows)
    (tmp_path / "data" / "a.png").unlink()
    with pytest.raises(DataError) as caught:
        find_cases(own({"index": "labels.csv", "patient": "patient"}), tmp_path / "data")
    text = str(caught.value)
    assert "6 rows" in text and "row 2: 'a.png' does not exist" in text and "and 1 more" in text
    for part in (
        "row 3: its file lies outside",
        "row 4: column 'file' is empty",
        "row 5: its label (ugly)",
        "row 6: split",
    ):
        assert part in text


def test_a_patient_of_an_index_in_two_splits_is_refused(tmp_path):
    index_of(tmp_path, ["a.png,good,p1,train,", "b.png,bad,p1,test,", "c.png,bad,p2,val,"])
    with pytest.raises(DataError, match=r"b\.png: patient p1 is in test and, with .*a\.png, in train"):
        find_cases(own({"index": "labels.csv", "patient": "patient"}), tmp_path)


def test_a_column_that_is_not_there_is_named(tmp_path):
    index_of(tmp_path, rows_of())
    with pytest.raises(DataError, match="has no column 'subject', which the task file names"):
        find_cases(own({"index": "labels.csv", "patient": "subject"}), tmp_path)
    with pytest.raises(DataError, match=r"other\.csv: can't read the index"):
        find_cases(own({"index": "other.csv"}), tmp_path)


def test_json_lines_of_texts(tmp_path):
    lines = [{"id": f"s{n}", "text": f"Text {n}.", "label": ("bad", "good")[n % 2], "doc": n // 4} for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = own({"index": "texts.jsonl", "patient": "doc"}, input="text", size=(16,))
    cases = find_cases(task, tmp_path)
    assert counts(cases) == (24, 8, 8) and cases[0].text == "Text 0."
    (tmp_path / "texts.jsonl").write_text("{not json}\n")
    with pytest.raises(DataError, match="not UTF-8 CSV or JSON lines"):
        find_cases(task, tmp_path)


def test_folders_of_classes_and_pairs_of_image_and_mask(tmp_path):
    for number in range(10):
        published.picture(tmp_path / ("bad", "good")[number % 2] / f"{number}.png", number)
        published.picture(tmp_path / "images" / f"{number}.png", number)
        published.mask_picture(tmp_path / "masks" / f"{number}_mask.png")
    assert counts(find_cases(own({"images": "[bg]*/*.png"}), tmp_path)) == (6, 2, 2)
    paired = {"images": "images/*.png", "masks": "masks/{stem}_mask.png"}
    task = own(paired, kind="segment", classes=("spot",))
    cases = find_cases(task, tmp_path)
    assert counts(cases) == (6, 2, 2)
    assert all(case.mask == tmp_path / "masks" / f"{case.files[0].stem}_mask.png" for case in cases)
    (tmp_path / "masks" / "4_mask.png").unlink()
    with pytest.raises(DataError, match=r"images/4\.png: 'masks/4_mask\.png' does not exist"):
        find_cases(task, tmp_path)
    with pytest.raises(DataError, match=r"no file matches 'scans/\*\.png'"):
        find_cases(own({"images": "scans/*.png"}), tmp_path)


def test_a_folder_of_dicom_slices_is_one_case(tmp_path):
    published.ricord_dicom(tmp_path)
    series = sorted(tmp_path.glob("*/*/*/*/"))
    rows = [f"{path.relative_to(tmp_path)},{('bad', 'good')[n % 2]}" for n, path in enumerate(series)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    cases = find_cases(own({"index": "labels.csv"}, input="ct", size=(8, 16, 16)), tmp_path)
    assert sum(counts(cases)) == 5 and all(len(case.files) == 6 for case in cases)
