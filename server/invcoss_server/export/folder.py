"""All that is asked for of one model, in one new folder: there at once, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from invcoss_common.canonical import new_folder
from invcoss_server.export.card import write_card
from invcoss_server.export.huggingface import write_huggingface
from invcoss_server.export.monai import write_monai
from invcoss_server.export.onnx import write_onnx
from invcoss_server.export.source import ExportError, Source
from invcoss_server.export.timm import write_timm

WRITERS: dict[str, Callable[[Source, Path], None]] = {
    "timm": write_timm,
    "onnx": write_onnx,
    "monai": write_monai,
    "hf": write_huggingface,
}
TAKES = {"timm": {2}, "monai": {2, 3}}  # dimensions of an image; the others take any


def fitting(source: Source) -> tuple[str, ...]:
    """The formats that can have this model."""
    dimensions = {geometry.ndim for geometry in source.families.values()}
    return tuple(name for name in WRITERS if dimensions & TAKES.get(name, dimensions))


def export(source: Source, out: Path, formats: tuple[str, ...], site_names: bool) -> None:
    """Write `out`: README.md, the model card, and a folder for each of `formats`.

    Raises ExportError when `out` is there or a format can't have this model, ChainError when the ledger does not hold.
    """
    written = tuple(name for name in WRITERS if name in formats)
    if unfit := [name for name in written if name not in fitting(source)]:
        takes = " and ".join(f"{ndim}-D" for ndim in sorted(TAKES[unfit[0]]))
        raise ExportError(f"{unfit[0]} is for {takes} images; this is a model of {', '.join(source.modalities)}")
    try:
        with new_folder(out) as draft:
            write_card(source, draft / "README.md", written, site_names)
            for name in written:
                (draft / name).mkdir()
                WRITERS[name](source, draft / name)
            if "hf" in written:
                write_card(source, draft / "hf" / "README.md", ("hf",), site_names, alone=True)
            if "monai" in written:
                for bundle in (draft / "monai").iterdir():
                    write_card(source, bundle / "docs" / "README.md", ("monai",), site_names, alone=True)
    except FileExistsError:
        raise ExportError(f"{out} exists, and is never overwritten; choose another --out, or remove it") from None
    except BlockingIOError:
        raise ExportError(f"{out}: another export is running beside it; start this one again when it is done") from None
    except OSError as error:
        raise ExportError(f"{out}: can't be written ({error.strerror or error})") from None
