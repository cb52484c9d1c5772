"""Tasks are data that is checked: the published recipes, the task files that are shipped, and what is wrong in one."""

from pathlib import Path

import pytest

from invcoss_common.errors import PlanError
from invcoss_common.modality import SIZES
from invcoss_site.downstream.task import TASKS, Task, load_task_file, published_task

SHIPPED = sorted(Path(__file__).parents[2].glob("plans/tasks/*.toml"))

# Epochs, batch, learning rate and size of the published table.
RECIPES = {
    "pubmed20k": (5, 64, 2e-4, (112,)),
    "chestxr": (80, 32, 5e-5, (224, 224)),
    "qatav2": (100, 16, 1e-4, (224, 224)),
    "ricord": (200, 8, 1e-5, (64, 192, 192)),
    "lits": (100, 2, 1e-4, (64, 192, 192)),
    "vs": (100, 2, 1e-4, (64, 192, 192)),
    "la": (80, 2, 5e-5, (64, 192, 192)),
    "nct-crc-he": (10, 32, 1e-4, (224, 224)),
    "glas": (100, 4, 1e-4, (512, 512)),
}


def test_the_nine_have_the_published_recipe():
    assert {n: (t.epochs, t.batch, t.lr, t.size) for n, t in TASKS.items()} == RECIPES
    assert {t.weight_decay for t in TASKS.values()} == {1e-4}
    assert [len(t.classes) for t in TASKS.values()] == [5, 3, 1, 2, 2, 1, 1, 9, 1]
    assert [n for n, t in TASKS.items() if t.picked == "last"] == ["lits", "vs", "la"]
    assert {t.iterations for t in TASKS.values() if t.kind == "segment"} == {250}
    assert TASKS["lits"].class_values == ((1, 2), (2,)) and TASKS["glas"].class_values == ((),)
    assert TASKS["pubmed20k"].mlp and TASKS["ricord"].mlp and not TASKS["chestxr"].mlp
    assert TASKS["vs"].windowed and not TASKS["ricord"].windowed
    assert TASKS["chestxr"].steps(33) == 2 and TASKS["glas"].steps(33) == 250


@pytest.mark.parametrize("size", ["small", "base"])
def test_the_nine_fit_the_patches_of_the_paper(size):
    for task in TASKS.values():
        if task.ndim > 1:
            assert not any(side % patch for side, patch in zip(task.size, SIZES[size].patch[task.ndim], strict=True))


def test_a_task_is_found_by_name_or_title():
    assert published_task("LiTS") is published_task("lits") is TASKS["lits"]
    assert published_task("NCT-CRC-HE").name == "nct-crc-he"
    with pytest.raises(PlanError, match=r"no task 'brats'; known are PubMed20k, .*GlaS.*--task-file"):
        published_task("brats")


def test_validation_picks_the_best_epoch():
    assert TASKS["la"].validated().picked == "best" and TASKS["la"].picked == "last"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_task_file_loads_and_fits_the_smallest_model(path):
    task = load_task_file(path)
    assert task.name == path.stem and task.title and f"plans/tasks/{path.name}" in path.read_text()
    if task.ndim > 1:
        assert not any(side % patch for side, patch in zip(task.size, SIZES["nano"].patch[task.ndim], strict=True))


def test_eight_task_files_are_shipped():
    tasks = [load_task_file(path) for path in SHIPPED]
    assert len(tasks) == 8
    assert {(task.input, task.kind) for task in tasks} == {
        ("text", "classify"),
        *((name, kind) for name in ("xray", "ct", "pathology") for kind in ("classify", "segment")),
        ("mri", "segment"),
    }


GOOD = {"name": "own", "kind": "segment", "input": "ct", "size": (16, 16, 16), "classes": ("a", "b")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "ultrasound"}, "'ultrasound' is not one of text, xray"),
        ({"size": (16, 16)}, "ct needs a size of 3 numbers"),
        ({"classes": ("a", "a")}, "two classes have the same name"),
        ({"kind": "classify", "classes": ("a",)}, "two classes or more"),
        ({"values": ((1,),)}, "1 values for 2 classes"),
        ({"input": "text", "size": (16,)}, "text can be classified only"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "three lengths above 0"),
        ({"kind": "classify", "spacing_mm": (1.0, 1.0, 1.0)}, "for volumes that are segmented"),
        ({"augment": "colour"}, "colour is for 2-D images"),
        ({"intensity": {"low": 5, "high": 5}}, "must be below high"),
        ({"clean": "organ-tumour", "classes": ("a",)}, "two masks"),
        ({"epoch": 3}, "Extra inputs"),
        ({"data": {"index": "a.csv", "images": "*.png"}}, "exactly one of index and images"),
        ({"data": {"images": "*.png", "masks": "mask.png"}}, "where the image's name goes"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    Task.model_validate(GOOD)
    with pytest.raises(ValueError, match=message):
        Task.model_validate({**GOOD, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", r"task\.toml: not TOML"),
        ('name = "x"\nkind = "classify"\ninput = "xray"\nsize = [32, 32]\nclasses = ["a", "b"]', r"no \[data\]"),
        ('name = "x"\nkind = "sort"', r"task\.toml: kind: Input should be"),
        (
            'name = "x"\nkind = "segment"\ninput = "xray"\nsize = [32, 32]\nclasses = ["a"]\n[data]\nimages = "*.png"',
            r"task\.toml: data\.masks",
        ),
        (
            'name = "x"\nkind = "classify"\ninput = "xray"\nsize = [32, 32]\nclasses = ["a", "b"]\n[data]\nindx = "a"',
            r"task\.toml: data\.\w+: |task\.toml: data: ",
        ),
    ],
)
def test_a_bad_task_file_is_told_by_file_and_field(tmp_path, text, message):
    path = tmp_path / "task.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        load_task_file(path)
    with pytest.raises(PlanError, match=r"none\.toml: can't be read"):
        load_task_file(tmp_path / "none.toml")
