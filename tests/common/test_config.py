"""The plan: every mistake that an operator can make is told in one line, and the digest stands for the content."""

import tomllib
from pathlib import Path

import pytest

from invcoss_common.config import load_plan, parse_plan
from invcoss_common.errors import PlanError

PLANS = sorted((Path(__file__).parents[2] / "plans").glob("*.toml"))

GOOD = """
name = "demo"
size = "nano"

[train]
steps = 10

[[stages]]
site = "north"
modality = "xray"

[[stages]]
site = "south"
modality = "ct"
spacing_mm = [2.0, 1.0, 1.0]
epochs = 3

[simulation.north]
phantoms = 12

[simulation.south]
folder = "ct"
index = ["train.csv", "lists/test.csv"]
"""


def plan_of(text=GOOD):
    return parse_plan(tomllib.loads(text), "plan.toml")


def refusal(tmp_path, text):
    """The one line with which load_plan refuses `text`."""
    path = tmp_path / "relay.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: "), "names the file"
    assert line.count(str(path)) == 1
    assert line.isprintable(), "one line"
    return line.removeprefix(f"{path}: ")


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new, 1)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_in_the_repository_loads(path):
    plan = load_plan(path)
    for stage in range(len(plan.stages)):
        train = plan.train_for(stage)
        assert (train.steps is None) != (train.epochs is None)
        assert plan.geometry(stage).tokens >= 4


def test_there_are_plans():
    assert PLANS


def test_a_plan_answers_for_each_stage():
    plan = plan_of()
    assert plan.sites == ("north", "south")
    assert plan.geometry(0).size == (64, 64) and plan.geometry(1).size == (16, 32, 32)
    assert (plan.train_for(0).steps, plan.train_for(0).epochs) == (10, None)
    assert (plan.train_for(1).steps, plan.train_for(1).epochs) == (None, 3)
    assert plan.train_for(1).lr == plan.train.lr


def test_a_modality_of_ones_own(tmp_path):
    own = '[modalities.ultrasound]\nndim = 2\nnormalisation = "range"\nhorizontal_flip = false\n'
    plan = plan_of(changed('modality = "xray"', 'modality = "ultrasound"') + own)
    assert not plan.modality(0).horizontal_flip and plan.geometry(0).channels == 1


# What is changed in a good plan, the field that the message must name, and the reason it must give.
MISTAKES = {
    "unknown modality": ('modality = "xray"', 'modality = "x-ray"', "stage 1", "unknown modality 'x-ray'; known"),
    "misspelt field": ("steps = 10", "steps = 10\nlerning_rate = 1.0", "train.lerning_rate", "check the spelling"),
    "misspelt table": ("[train]", "[training]\nsteps = 1\n[train]", "training", "check the spelling"),
    "misspelt field of a stage": ("epochs = 3", "epoch = 3", "stages.1.epoch", "check the spelling"),
    "unknown size": ('size = "nano"', 'size = "huge"', "size", "found 'huge'"),
    "no size": ('size = "nano"', "", "size", "required"),
    "no name": ('name = "demo"', "", "name", "required"),
    "a name that is no name": ('name = "demo"', 'name = "../demo"', "name", "found '../demo'"),
    "a name with a line break": ('name = "demo"', 'name = "de\\nmo"', "name", "found"),
    "no training": ("[train]\nsteps = 10", "", "train", "required"),
    "neither steps nor epochs": ("steps = 10", "", "train", "exactly one of steps and epochs"),
    "steps and epochs": ("steps = 10", "steps = 10\nepochs = 1", "train", "exactly one of steps and epochs"),
    "steps and epochs of a stage": ("epochs = 3", "epochs = 3\nsteps = 4", "stages.1", "not both"),
    "no steps": ("steps = 10", "steps = 0", "train.steps", "greater than or equal to 1 (found 0)"),
    "not a number": ("steps = 10", 'steps = "ten"', "train.steps", "found 'ten'"),
    "a fraction of a step": ("steps = 10", "steps = 10.5", "train.steps", "found 10.5"),
    "everything masked": ("steps = 10", "steps = 10\nmask_ratio = 1.0", "train.mask_ratio", "less than 1"),
    "nothing masked": ("steps = 10", "steps = 10\nmask_ratio = 0", "train.mask_ratio", "greater than 0"),
    "batch of none": ("steps = 10", "steps = 10\nbatch_size = 0", "train.batch_size", "found 0"),
    "rate of nan": ("steps = 10", "steps = 10\nlr = nan", "train.lr", "found nan"),
    "clipping at infinity": ("steps = 10", "steps = 10\nclip_norm = inf", "train.clip_norm", "finite"),
    "no checkpoint ever": ("steps = 10", "steps = 10\ncheckpoint_every_s = inf", "train.checkpoint_every_s", "finite"),
    "impossible momentum": ("steps = 10", "steps = 10\nbetas = [0.9, 1.0]", "train.betas.1", "less than 1"),
    "three momenta": ("steps = 10", "steps = 10\nbetas = [0.9, 0.9, 0.9]", "train.betas", "2 items"),
    "warm-up longer than training": ("steps = 10", "steps = 10\nwarmup = 1.5", "train.warmup", "found 1.5"),
    "unknown precision": ("steps = 10", 'steps = 10\nprecision = "fp8"', "train.precision", "found 'fp8'"),
    "negative seed": ('size = "nano"', 'size = "nano"\nseed = -1', "seed", "found -1"),
    "no threads": ('size = "nano"', 'size = "nano"\nthreads = 0', "threads", "found 0"),
    "pool of one": ("[simulation.north]", "[inversion]\npool_size = 1\n[simulation.north]", "inversion.pool_size", "2"),
    "unknown generator": (
        "[simulation.north]",
        '[inversion]\ngenerator = "gan"\n[simulation.north]',
        "inversion.generator",
        "found 'gan'",
    ),
    "endless weight": (
        "[simulation.north]",
        "[inversion]\nnorm_weight = inf\n[simulation.north]",
        "inversion.norm_weight",
        "found inf",
    ),
    "unknown replay": ("[simulation.north]", '[replay]\nloss = "x"\n[simulation.north]', "replay.loss", "found 'x'"),
    "unknown wire type": (
        "[simulation.north]",
        '[relay]\nwire_dtype = "float16"\n[simulation.north]',
        "relay.wire_dtype",
        "float16",
    ),
    "parts too large": ("[simulation.north]", "[relay]\npart_mib = 999\n[simulation.north]", "relay.part_mib", "999"),
    "no stage": (GOOD[GOOD.index("\n[train]") :], "stages = []\ntrain = { steps = 1 }", "stages", "at least 1"),
    "stages missing": (GOOD[GOOD.index("[[stages]]") :], "", "stages", "required"),
    "a site that is a path": ('site = "north"', 'site = "a/b"', "stages.0.site", "found 'a/b'"),
    "spacing in 2-D": ('modality = "xray"', 'modality = "xray"\nspacing_mm = [1, 1, 1]', "stage 1", "spacing_mm"),
    "spacing of two axes": ("[2.0, 1.0, 1.0]", "[2.0, 1.0]", "stages.1.spacing_mm.2", "required"),
    "spacing of nothing": ("[2.0, 1.0, 1.0]", "[0.0, 1.0, 1.0]", "stages.1", "between 0.05 and 100 mm"),
    "spacing of nan": ("[2.0, 1.0, 1.0]", "[nan, 1.0, 1.0]", "stages.1.spacing_mm.0", "finite"),
    "phantoms and folder": ("phantoms = 12", 'phantoms = 12\nfolder = "x"', "simulation.north", "exactly one"),
    "neither phantoms nor folder": ("phantoms = 12", "", "simulation.north", "exactly one"),
    "too few phantoms": ("phantoms = 12", "phantoms = 3", "simulation.north.phantoms", "found 3"),
    "folder outside": ('folder = "ct"', 'folder = "../ct"', "simulation.south", "'../ct' must stay inside"),
    "absolute folder": ('folder = "ct"', 'folder = "/etc"', "simulation.south", "'/etc' must stay inside"),
    "folder with a line break": ('folder = "ct"', 'folder = "../a\\nb"', "simulation.south", "must stay inside"),
    "index outside": ("lists/test.csv", "a/../../b.csv", "simulation.south", "'a/../../b.csv' must stay inside"),
    "a site without a stage": ("[simulation.north]", "[simulation.west]", "simulation", "no stage visits: west"),
    "modality of no dimension": (
        "[simulation.north]",
        '[modalities.us]\nndim = 4\nnormalisation = "range"\n[simulation.north]',
        "modalities.us.ndim",
        "found 4",
    ),
    "window upside down": (
        "[simulation.north]",
        '[modalities.us]\nndim = 2\nnormalisation = "window"\nlow = 5\nhigh = -5\n[simulation.north]',
        "modalities.us",
        "low (5.0) must be below high (-5.0)",
    ),
    "window of nan": (
        "[simulation.north]",
        '[modalities.us]\nndim = 2\nnormalisation = "window"\nlow = nan\nhigh = 5\n[simulation.north]',
        "modalities.us.low",
        "finite",
    ),
    "percentile above 100": (
        "[simulation.north]",
        '[modalities.us]\nndim = 2\nnormalisation = "percentile"\nhigh = 101\n[simulation.north]',
        "modalities.us",
        "between 0 and 100",
    ),
    "volumes in colour": (
        "[simulation.north]",
        '[modalities.us]\nndim = 3\nchannels = 3\nnormalisation = "range"\n[simulation.north]',
        "modalities.us",
        "2-D",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_file_field_and_reason(tmp_path, mistake):
    old, new, field, reason = MISTAKES[mistake]
    line = refusal(tmp_path, changed(old, new))
    assert line.startswith((f"{field}: ", f"plan: {field}: ", f"plan: {field} "))
    assert reason in line


def test_an_unknown_modality_is_answered_with_the_known_ones(tmp_path):
    line = refusal(tmp_path, changed('modality = "ct"', 'modality = "c\\nt"'))
    assert "stage 2" in line and "ct, mri, pathology, xray" in line and "[modalities." in line


def test_of_many_mistakes_the_first_is_told_and_the_rest_counted(tmp_path):
    assert "(and 1 more)" in refusal(tmp_path, changed("steps = 10", "steps = 0\nlr = -1.0"))


def test_a_plan_from_elsewhere_is_refused_by_the_same_words():
    data = tomllib.loads(changed('modality = "xray"', 'modality = "x-ray"'))
    with pytest.raises(PlanError, match=r"^hand-off: plan: stage 1: unknown modality"):
        parse_plan(data, "hand-off")


NOT_TOML = {
    "text": "this is a plan\n",
    "cut off": GOOD[:-40] + '"',
    "json": '{"name": "demo"}',
    "a field twice": 'name = "a"\nname = "b"\n',
    "lists in lists": "name = " + "[" * 5000,
    "a number of thousands of digits": "name = " + "9" * 5000,
    "not utf-8": GOOD.encode() + b"# \xff",
    "utf-16": GOOD.encode("utf-16"),
}


@pytest.mark.parametrize("case", NOT_TOML)
def test_a_file_that_is_not_toml(tmp_path, case):
    assert refusal(tmp_path, NOT_TOML[case]).startswith("not a TOML file: ")


def test_an_empty_file(tmp_path):
    assert "required" in refusal(tmp_path, "")


def test_a_missing_file(tmp_path):
    with pytest.raises(PlanError, match=r"none\.toml: can't read the plan \(No such file or directory\)$"):
        load_plan(tmp_path / "none.toml")
    with pytest.raises(PlanError, match=r"can't read the plan \(Is a directory\)$"):
        load_plan(tmp_path)


def test_the_digest_is_of_the_content_not_of_the_writing():
    digest = plan_of().digest()
    assert len(digest) == 64
    for text in (
        GOOD,
        "# a comment\n" + GOOD.replace(" = ", "="),
        changed("steps = 10", "lr = 0.0015  # the default\nsteps = 10"),
        changed('name = "demo"\nsize = "nano"', 'size = "nano"\nname = "demo"'),
    ):
        assert plan_of(text).digest() == digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "demo"', 'name = "demo2"'),
        ('size = "nano"', 'size = "tiny"'),
        ('size = "nano"', 'size = "nano"\nseed = 1'),
        ("steps = 10", "steps = 11"),
        ("steps = 10", "epochs = 10"),
        ("steps = 10", "steps = 10\nlr = 0.00150001"),
        ("[2.0, 1.0, 1.0]", "[1.0, 2.0, 1.0]"),
        ("phantoms = 12", "phantoms = 13"),
        ('site = "south"\nmodality = "ct"', 'site = "south"\nmodality = "mri"'),
    ],
)
def test_any_change_changes_the_digest(old, new):
    assert plan_of(changed(old, new)).digest() != plan_of().digest()
