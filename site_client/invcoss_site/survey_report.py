"""Shows a survey to the people of the site: on the terminal, and as one HTML page with thumbnails that stays there."""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from invcoss_common import __version__
from invcoss_common.pages import templates
from invcoss_site.survey import SHOWN, SHOWN_ODD
from invcoss_site.survey_facts import Facts, Remark
from invcoss_site.survey_summary import Survey

NAMED = 200  # files named of each kind on the page; all are in the JSON
LEAST = 10  # groups of duplicates that are shown at once
TOLD = 12  # the same on the terminal

# What each kind of finding means to who looks after the images, and what to do.
KINDS: dict[str, tuple[str, str]] = {
    "missing": ("Can't be opened", "Check the name, and that the user of the agent may read it."),
    "empty": ("Empty files", "Copy or export them again."),
    "not-this-format": ("Not what the name says", "Export as one of the formats that are read, or remove."),
    "not-supported": ("A kind of file that is not read", "Export again, uncompressed."),
    "truncated": ("Incomplete files", "The transfer was cut off: copy or export them again."),
    "damaged": ("Damaged files", "Export them again from the PACS."),
    "no-image": ("No image in the file", "Reports, structured objects and the like: leave them out of the export."),
    "no-geometry": ("No position, orientation or spacing", "Export the original series, not a screen capture."),
    "spacing": ("Implausible or unusual spacing", "Compare with the scanner's protocol; correct the header."),
    "gap": ("Slices are missing", "Export the whole series."),
    "duplicates": ("Several images at one position", "Export one volume a folder (echoes, phases, time points)."),
    "tilt": ("Tilted gantry", "Nothing to do: straightened by resampling."),
    "dimensions": ("Not one picture or one volume", "Export one image, or one 3-D volume, a file."),
    "too-small": ("Too small", "Localisers and thumbnails: leave them out."),
    "too-large": ("Larger than any scan", "The header is wrong, or it is a mosaic: export it again."),
    "not-finite": ("Values that are not numbers", "Export again from the original."),
    "constant": ("Constant: nothing is seen on it", "Leave it out, and check that the folder is of this modality."),
    "units": ("Not in Hounsfield units", "Export with rescale slope and intercept; check for missing air."),
    "inverted": ("Black and white look exchanged", "Look at it; export with the right photometric interpretation."),
    "shape": ("Long and narrow", "Only the square in its middle is used: cut it first if that is not meant."),
    "grey": ("Grey where colour is expected", "Check that it belongs here; export in colour if there is any."),
    "mask": ("Mask does not fit", "Pair every mask with its own image."),
    "index": ("Rows of the index", "Correct the rows that are named."),
    "line": ("Lines of a text file", "Correct the lines that are named."),
    "burnt-in": ("Text seems to be burnt in", "Look at them. Leave out or black out what names a person."),
    "modality": ("The file says it is of another modality", "Move it to the folder of its modality."),
    "fault": ("Reading failed unexpectedly", "Remove it and report the fault; do not send the file."),
}


class Group(NamedTuple):
    """All findings of one kind, in words."""

    kind: str
    title: str
    remedy: str
    remarks: list[Remark]
    thumbnails: list[Facts]


def groups(remarks: Iterable[Remark], survey: Survey) -> list[Group]:
    """Findings by kind, the most frequent first."""
    found: dict[str, list[Remark]] = defaultdict(list)
    for one in remarks:
        found[one.kind].append(one)
    pictures = {one.file: one for one in survey.each if one.thumbnail}
    return [
        Group(
            kind,
            *KINDS.get(kind, (kind, "")),
            group,
            [pictures[file] for file in dict.fromkeys(one.file for one in group) if file in pictures][:SHOWN_ODD],
        )
        for kind, group in sorted(found.items(), key=lambda found: -len(found[1]))
    ]


def page(survey: Survey) -> str:
    """The survey as one self-contained page of HTML; it names files and shows images, so it stays at the site."""
    environment = templates("invcoss_site")
    environment.filters["base64"] = lambda blob: base64.b64encode(blob).decode()
    usual = [one for one in survey.each if one.thumbnail and one.images]
    step = max(1, len(usual) / SHOWN)
    return environment.get_template("survey.html.j2").render(
        survey=survey,
        quarantined=groups(survey.quarantined, survey),
        refused=groups(survey.masks.refused, survey),
        warned=groups(survey.warnings, survey),
        usual=[usual[int(n * step)] for n in range(min(SHOWN, len(usual)))],
        sure=[one for one in survey.identity if one.level == "identity"],
        unsure=[one for one in survey.identity if one.level == "suspicion"],
        leaks=[one for one in survey.duplicates if one.both_sides],
        named=NAMED,
        least=LEAST,
        software=__version__,
    )


def print_survey(survey: Survey, console: Console) -> None:
    """The survey as tables and lines, with the first findings of each kind."""

    def lines(title: str, texts: Iterable[str]) -> None:
        console.print(title)
        for text in texts:
            console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)

    table = Table("", "images", "cases")
    table.add_row("training", str(survey.images.train), str(survey.images.train_cases))
    table.add_row("held out", str(survey.images.heldout), str(survey.images.heldout_cases))
    console.print(table)
    table = Table("split", "images", "cases", "not used")
    for split in survey.splits:
        table.add_row(split.name, str(split.images), str(split.cases), str(split.quarantined))
    console.print(table)
    if survey.patients:
        lines(f"patients by DICOM: {survey.patients}", ())
    for title, counts in (
        ("files", survey.formats),
        ("DICOM modality", survey.modalities),
        ("scanner", survey.scanners),
    ):
        if counts:
            lines(f"{title}:", _most(counts))
    if survey.shapes:
        lines("shapes:", _most(survey.shapes))
    if survey.spacings_mm:
        names = ("depth", "height", "width")
        lines("voxel size in mm, lowest / median / highest:", (
            f"{name}: {one.lowest:g} / {one.median:g} / {one.highest:g}"
            for name, one in zip(names, survey.spacings_mm, strict=True)
        ))  # fmt: skip
    if survey.values:
        low, middle, high = (survey.values[name] for name in ("lowest", "median", "highest"))
        lines(
            "values in the files:", [f"{low.lowest:g} to {high.highest:g}, median of a usual image {middle.median:g}"]
        )
    if survey.enlarged:
        lines("enlarged:", [f"{survey.enlarged} images are smaller than the input of a {survey.size} model"])
    if survey.unlisted:
        lines("not in the index, so not used:", [f"{survey.unlisted} image files of the folder"])
    if survey.masks.fit or survey.masks.refused:
        classes = ", ".join(f"{one} in {n}" for one, n in survey.masks.classes.items())
        lines(f"masks: {survey.masks.fit} fit their images; classes: {classes or 'none'}", ())
    if survey.masks.refused:
        lines(f"masks refused, their images are used: {len(survey.masks.refused)}", _tell(survey.masks.refused))
    lines(f"not used: {len(survey.quarantined)}", _tell(survey.quarantined))
    if survey.warnings:
        lines(f"used, but look at them: {len(survey.warnings)}", _tell(survey.warnings))
    if survey.axes:
        texts = [f"{name}: {one.files}, first {one.first}" for name, one in survey.axes.items()]
        lines("axes as stored, all turned to one order:", texts)
    if survey.in_two_splits:
        lines(f"patients in two splits: {len(survey.in_two_splits)}", _tell(survey.in_two_splits))
    if survey.duplicates:
        lines(f"duplicates: {len(survey.duplicates)} groups", (
            f"same {one.how}{', on both sides of the split' if one.both_sides else ''}: {', '.join(one.files[:6])}"
            for one in survey.duplicates
        ))  # fmt: skip
    if survey.identity:
        signs = (f"{one.level}: {one.where}: {one.what}: {one.images}, first {one.files[0]}" for one in survey.identity)
        lines("signs of identity, by a heuristic, and in how many images:", signs)


def _tell(remarks: Iterable[Remark]) -> Iterator[str]:
    """The messages of findings, the first ones of each kind."""
    counts: Counter[str] = Counter()
    for one in remarks:
        counts[one.kind] += 1
        if counts[one.kind] <= TOLD:
            yield one.text
    for kind, count in counts.items():
        if count > TOLD:
            yield f"and {count - TOLD} more: {KINDS.get(kind, (kind, ''))[0].lower()} (all are in --json)"


def _most(counts: dict[str, int], most: int = 8) -> list[str]:
    shown = [f"{name}: {count}" for name, count in list(counts.items())[:most]]
    return [*shown, f"{len(counts) - most} others"] if len(counts) > most else shown
