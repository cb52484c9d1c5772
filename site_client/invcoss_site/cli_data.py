"""The hospital's command `check-data`: a survey of a folder of images, shown, written down, judged for automation."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from invcoss_common.command import AsJson
from invcoss_common.errors import DataError
from invcoss_common.modality import MODALITIES, SizeName, lookup

if TYPE_CHECKING:
    from invcoss_site.survey_summary import Survey

commands = typer.Typer()


class FailOn(StrEnum):
    """What a caller won't have in a folder."""

    quarantined = "quarantined"
    warnings = "warnings"
    identity = "identity"


_MODALITIES = f"one of {', '.join(sorted(MODALITIES))}, text"


@commands.command()
def check_data(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder with the site's images")],
    modality: Annotated[str, typer.Option("--modality", help=_MODALITIES)],
    index: Annotated[
        list[str] | None, typer.Option(help="CSV file in FOLDER that lists files, cases and splits")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="pattern of the names to use, such as '*_T1w.nii.gz'")] = None,
    layout: Annotated[
        str | None, typer.Option(help="FOLDER is a published set as distributed: mimic-cxr-jpg, deeplesion, adni, ...")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="a label that rows of the index may have; other rows are not used")
    ] = None,
    mask_class: Annotated[
        list[int] | None, typer.Option(help="a class that masks of the index may have, 0 too; other masks are refused")
    ] = None,
    size: Annotated[
        SizeName, typer.Option(help="size of model, to count images that are smaller than its input")
    ] = "nano",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write an HTML page with thumbnails; it stays at the site")
    ] = None,
    fail_on: Annotated[
        list[FailOn] | None, typer.Option(help="exit with code 4 if there is any; may be given several times")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="processes that read; by default as many as pay")] = None,
    as_json: AsJson = False,
) -> None:
    """Read every image as a visit would, and say what will be used and what will not, and why; nothing is sent."""
    from invcoss_common.canonical import write_atomic  # here, because they need seconds to import
    from invcoss_site.survey import TEXT, take_survey, take_text_survey
    from invcoss_site.survey_report import page, print_survey

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reading", total=None)

        def on_item(done: int, of: int) -> None:
            progress.update(bar, completed=done, total=of)

        if modality == TEXT:
            if index or only or layout or label or mask_class:
                options = "--index, --only, --layout, --label and --mask-class"
                raise DataError(f"{options} are for images; texts hold their own splits")
            survey = take_text_survey(folder, on_item)
        else:
            row = lookup(modality, MODALITIES)
            survey = take_survey(
                folder,
                modality,
                row,
                tuple(index or ()),
                tuple(only or ()),
                layout or "",
                size=size,
                jobs=jobs,
                labels=label or (),
                mask_classes=mask_class,
                thumbnails=report is not None,
                on_item=on_item,
            )
    if report:
        write_atomic(report, page(survey).encode())
    if as_json:
        print(survey.model_dump_json())
    else:
        print_survey(survey, Console())
        if report:
            print(f"{report}: the same with thumbnails, for your own eyes; it names files, so it stays here")
    _judge(survey, fail_on or [])


def _judge(survey: Survey, fail_on: list[FailOn]) -> None:
    """Raises DataError for a folder that no visit can use, or with findings that the caller won't have."""
    if not survey.enough:
        needed, counts = "at least 2 and 1, of different cases, are needed", survey.images
        first = (
            f"; first of {len(survey.quarantined)} not used: {survey.quarantined[0].text}" if survey.quarantined else ""
        )
        text = (
            f"{counts.train} training and {counts.heldout} held-out images are usable, but {needed}; add cases, or say"
        )
        raise DataError(f"{survey.folder}: {text} in an index which are held out{first}")
    signs = [one.level for one in survey.identity]
    counted = {
        "quarantined": len(survey.quarantined) + len(survey.masks.refused),
        "warnings": len(survey.warnings)
        + len(survey.duplicates)
        + len(survey.in_two_splits)
        + signs.count("suspicion"),
        "identity": signs.count("identity"),
    }
    if found := [f"{level} {counted[level]}" for level in counted if level in fail_on and counted[level]]:
        raise DataError(f"{survey.folder}: there are findings of the kinds named by --fail-on: {', '.join(found)}")
