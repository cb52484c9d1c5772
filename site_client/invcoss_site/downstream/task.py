"""What a downstream task is, as data: its input, classes and recipe; the nine published ones, and a site's own.

The published recipes are those of MedCoSS (arXiv:2311.17597), which InvCoSS is compared with.
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from invcoss_common.errors import PlanError
from invcoss_common.modality import MODALITIES, Modality

TEXT = "text"
SEEDS = (0, 10, 100)  # published: the mean of three runs
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Window(_Part):
    """Values in a file's own units cut to [low, high], then made (x - mean) / sd."""

    low: float
    high: float
    mean: float = 0.0
    sd: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Window:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class OwnData(_Part):
    """Where a site's own task finds its cases: in an index, or in folders. Paths are relative to the data folder.

    An index is a CSV file whose first line names the columns, or JSON lines. Without one, `images` is a pattern such as
    `*/*.png`: the folder of a file is its class, or, to segment, `masks` is its mask, such as `masks/{stem}_mask.png`.
    """

    index: str = ""
    file: str = Field(default="file", description="column of the image's path")
    label: str = Field(default="label", description="column of the class, to classify")
    mask: str = Field(default="mask", description="column of the mask's path, to segment")
    text: str = Field(default="text", description="column of the text, for input = 'text'")
    patient: str = Field(default="", description="column of patient, case or document; empty: each row is its own")
    split: str = Field(default="split", description="column of train, val or test; if there is none, by patient")
    folder: str = Field(default="", description="rows whose path is under this folder only")
    where: dict[str, str] = Field(
        default_factory=dict, description="column = pattern, such as 'lung*' or, not empty, '?*': rows that match only"
    )
    images: str = ""
    masks: str = ""

    @model_validator(mode="after")
    def _one_way(self) -> OwnData:
        if bool(self.index) == bool(self.images):
            raise ValueError("set exactly one of index and images")
        if self.masks and "{stem}" not in self.masks:
            raise ValueError("masks must say where the image's name goes, such as masks/{stem}_mask.png")
        return self


class Task(_Part):
    """One labelled task. `size` is one input of the model: tokens, (H, W), or (D, H, W).

    To segment, class k is where a mask has one of `values[k]`, or, if that is empty, anything above 0; classes may
    overlap. Volumes are segmented window by window at `spacing_mm`, everything else is resized to `size`.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")
    title: str = ""
    kind: Literal["classify", "segment"]
    input: str = Field(description="'text', or a modality: how its files are read")
    size: tuple[Positive, ...] = Field(min_length=1, max_length=3)
    classes: tuple[str, ...] = Field(min_length=1)
    values: tuple[tuple[Positive, ...], ...] = Field(
        default=(), description="mask values of each class; empty: 1, 2, ..."
    )
    intensity: Literal["unit", "z-score"] | Window = Field(
        default="unit",
        description="unit: [0, 1] as in pre-training; z-score: mean 0, SD 1 per image and channel; or a window",
    )
    spacing_mm: tuple[float, float, float] | None = Field(
        default=None, description="voxel size (D, H, W) at which volumes are segmented; none: as the file has it"
    )
    augment: Literal["none", "colour", "spatial"] = Field(
        default="none", description="colour: jitter, grey, blur; spatial: as nnU-Net does"
    )
    flips: bool = Field(default=True, description="mirror images in training, and average over mirror images after it")
    overlap: Share = Field(default=0.5, description="of the windows that a volume is segmented in")
    clean: Literal["none", "organ-tumour"] = Field(default="none", description="what is done to predicted masks")
    dice_plus_one: bool = Field(default=False, description="1 is added to the denominator of Dice")
    epochs: Positive = 50
    iterations: Positive | None = Field(default=None, description="batches an epoch; none: as many as hold all cases")
    check_every: Positive | None = Field(default=None, description="batches between validations; none: every epoch")
    batch: Positive = 16
    lr: float = Field(default=1e-4, gt=0, le=1)
    weight_decay: float = Field(default=1e-4, ge=0, le=1)
    picked: Literal["best", "last"] = Field(default="best", description="which epoch's weights; best: on validation")
    vocabulary: int = Field(
        default=8192, ge=261, description="of the tokeniser that is trained on the text, if none is given"
    )
    data: OwnData | None = Field(default=None, description="of a site's own task")

    @model_validator(mode="after")
    def _fits(self) -> Task:
        known = (TEXT, *MODALITIES)
        if self.input not in known:
            raise ValueError(f"input '{self.input}' is not one of {', '.join(known)}")
        wanted = 1 if self.input == TEXT else MODALITIES[self.input].ndim
        if len(self.size) != wanted:
            raise ValueError(f"{self.input} needs a size of {wanted} number{'s' * (wanted > 1)}, not {self.size}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("two classes have the same name")
        if self.kind == "classify" and (len(self.classes) < 2 or self.values):
            raise ValueError("to classify needs two classes or more, and no values")
        if self.kind == "segment" and self.input == TEXT:
            raise ValueError("text can be classified only")
        if self.values and len(self.values) != len(self.classes):
            raise ValueError(f"{len(self.values)} values for {len(self.classes)} classes")
        if self.spacing_mm is not None and (self.kind == "classify" or wanted != 3 or min(self.spacing_mm) <= 0):
            raise ValueError("spacing_mm is three lengths above 0, for volumes that are segmented")
        if self.input == TEXT and (self.augment != "none" or self.intensity != "unit"):
            raise ValueError("augment and intensity are for images")
        if self.augment == "colour" and (wanted != 2 or self.kind == "segment" or self.intensity != "unit"):
            raise ValueError("colour is for 2-D images that are classified, with intensity 'unit'")
        if self.clean == "organ-tumour" and (self.kind == "classify" or len(self.classes) != 2):
            raise ValueError("organ-tumour is for two masks, the first of which holds the second")
        return self

    @property
    def ndim(self) -> int:
        return len(self.size)

    @property
    def modality(self) -> Modality:
        """How the files are read; KeyError for text."""
        return MODALITIES[self.input]

    @property
    def channels(self) -> int:
        """Channels C of an image; the encoder makes three of one where it needs them."""
        return self.modality.channels

    @property
    def windowed(self) -> bool:
        """Whether cases are volumes of any size that the model sees window by window."""
        return self.kind == "segment" and self.ndim == 3

    @property
    def class_values(self) -> tuple[tuple[int, ...], ...]:
        """The mask values of each class; an empty one is everything above 0."""
        if self.values:
            return self.values
        return ((),) if len(self.classes) == 1 else tuple((number,) for number in range(1, len(self.classes) + 1))

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("dice", "hd95") if self.kind == "segment" else ("acc", "auc", "f1")

    @property
    def mlp(self) -> bool:
        """Whether the classifier has a hidden layer; published for volumes and text."""
        return self.ndim != 2

    def steps(self, cases: int) -> int:
        """Batches an epoch over so many training cases."""
        return self.iterations or math.ceil(cases / self.batch)

    def validated(self) -> Task:
        """The task with the epoch picked on validation cases, where the published recipe takes the last one's."""
        return self.model_copy(update={"picked": "best"})


_COLOUR_224 = {"kind": "classify", "size": (224, 224), "augment": "colour"}
_WINDOWED = {
    "kind": "segment",
    "size": (64, 192, 192),
    "augment": "spatial",
    "iterations": 250,
    "batch": 2,
    "picked": "last",
}
_SPATIAL_2D = {"kind": "segment", "augment": "spatial", "iterations": 250, "intensity": "z-score", "epochs": 100}

_PUBLISHED: tuple[dict[str, object], ...] = (
    {
        "name": "pubmed20k",
        "title": "PubMed20k",
        "kind": "classify",
        "input": TEXT,
        "size": (112,),
        "classes": ("BACKGROUND", "CONCLUSIONS", "METHODS", "OBJECTIVE", "RESULTS"),
        "epochs": 5,
        "check_every": 500,
        "batch": 64,
        "lr": 2e-4,
    },
    {
        **_COLOUR_224,
        "name": "chestxr",
        "title": "ChestXR",
        "input": "xray",
        "classes": ("covid", "normal", "pneumonia"),
        "epochs": 80,
        "batch": 32,
        "lr": 5e-5,
    },
    {
        **_SPATIAL_2D,
        "name": "qatav2",
        "title": "QaTav2",
        "input": "xray",
        "size": (224, 224),
        "classes": ("infection",),
        "batch": 16,
        "lr": 1e-4,
    },
    {
        "name": "ricord",
        "title": "RICORD",
        "kind": "classify",
        "input": "ct",
        "size": (64, 192, 192),
        "classes": ("negative", "positive"),
        "intensity": {"low": -1024, "high": 325, "mean": 158.58, "sd": 324.70},  # as published
        "augment": "spatial",
        "epochs": 200,
        "batch": 8,
        "lr": 1e-5,
    },
    {
        **_WINDOWED,
        "name": "lits",
        "title": "LiTS",
        "input": "ct",
        "classes": ("liver", "tumour"),
        "values": ((1, 2), (2,)),
        # Of the volumes as distributed; the published layout holds values by nnU-Net's statistics of seven sets.
        "intensity": {"low": -325, "high": 325, "sd": 325},  # as DoDNet (CVPR 2021) for them
        "spacing_mm": (1.5, 0.8, 0.8),
        "clean": "organ-tumour",
        "dice_plus_one": True,
        "epochs": 100,
        "lr": 1e-4,
    },
    {
        **_WINDOWED,
        "name": "vs",
        "title": "VS",
        "input": "mri",
        "classes": ("schwannoma",),
        "values": ((1,),),
        "intensity": "z-score",
        "dice_plus_one": True,
        "epochs": 100,
        "lr": 1e-4,
    },
    {
        **_WINDOWED,
        "name": "la",
        "title": "LA",
        "input": "mri",
        "classes": ("atrium",),
        "intensity": "z-score",
        "spacing_mm": (0.625, 0.625, 0.625),
        "epochs": 80,
        "lr": 5e-5,
    },
    {
        **_COLOUR_224,
        "name": "nct-crc-he",
        "title": "NCT-CRC-HE",
        "input": "pathology",
        "classes": ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"),
        "epochs": 10,
        "check_every": 1000,
        "batch": 32,
        "lr": 1e-4,
    },
    {
        **_SPATIAL_2D,
        "name": "glas",
        "title": "GlaS",
        "input": "pathology",
        "size": (512, 512),
        "classes": ("gland",),
        "batch": 4,
        "lr": 1e-4,
    },
)
TASKS = {task.name: task for task in map(Task.model_validate, _PUBLISHED)}


def published_task(name: str) -> Task:
    """One of the nine by its name or title, in any case; raises PlanError that lists them."""
    for task in TASKS.values():
        if name.lower() in (task.name, task.title.lower()):
            return task
    titles = ", ".join(task.title for task in TASKS.values())
    raise PlanError(f"no task '{name}'; known are {titles}. For a task of your own give --task-file")


def load_task_file(path: Path) -> Task:
    """A site's own task from a TOML file; raises PlanError that names the file, the field and what is wrong."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: can't be read ({error.strerror})") from None
    except ValueError as error:
        raise PlanError(f"{path}: not TOML ({error})") from None
    try:
        task = Task.model_validate(table)
        if task.data is None:
            raise PlanError(f"{path}: no [data]; it says where the cases are, such as index = 'labels.csv'")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PlanError(
            f"{path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
    if task.kind == "segment" and task.data.images and not task.data.masks:
        raise PlanError(f"{path}: data.masks: to segment without an index, say where the masks are")
    return task
