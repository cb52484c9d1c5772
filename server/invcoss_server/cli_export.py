"""The operator's command `export`: the encoder of a finished model, for other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from invcoss_common.command import AsJson, tell

commands = typer.Typer()


class Format(StrEnum):
    """What a model is exported as; the card is always written."""

    TIMM = "timm"
    ONNX = "onnx"
    MONAI = "monai"
    HF = "hf"
    CARD = "card"


@commands.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="folder of a run, or with --plan a safetensors file")],
    out: Annotated[Path, typer.Option(help="folder to make")],
    formats: Annotated[
        list[Format] | None, typer.Option("--format", help="may be repeated; default all that the model can have")
    ] = None,
    modalities: Annotated[
        list[str] | None, typer.Option("--modality", help="may be repeated; default all that the model has learned")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="plan of a safetensors file")] = None,
    without_site_names: Annotated[
        bool, typer.Option("--without-site-names", help="number the sites in the model card")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model's encoder for timm, ONNX, MONAI and plain torch (hf), with a model card."""
    from invcoss_server.export.folder import export as write  # here, because it needs seconds to import
    from invcoss_server.export.folder import fitting
    from invcoss_server.export.source import open_source

    source = open_source(model, plan, tuple(modalities or ()))
    chosen = tuple(formats) if formats else fitting(source)
    write(source, out, chosen, site_names=not without_site_names)
    written = [name for name in chosen if name != Format.CARD]
    values: dict[str, object] = {"out": str(out), "model_sha256": source.sha256, "formats": written}
    tell(
        as_json,
        {**values, "modalities": list(source.modalities)},
        f"model card: {out / 'README.md'}",
        *(f"{name + ':':11} {out / name}" for name in written),
    )
