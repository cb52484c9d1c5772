"""What a model said, as files: a table of classes, masks as NIfTI or PNG on the image's own grid, a picture a case.

All of it stays at the site. Every file appears whole or not at all. K = classes, S = shape of one image.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from io import BytesIO, StringIO
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from scipy import ndimage
from torch import Tensor

from invcoss_common.canonical import new_file, sha256_hex, write_atomic
from invcoss_site.downstream.reading import Example, read_sample
from invcoss_site.downstream.sets.cases import Case
from invcoss_site.downstream.task import Task
from invcoss_site.ingest.volume import AXES

Masks = npt.NDArray[np.bool_]  # (K, *S)

SMALLEST_TUMOUR = 50  # voxels, up to which a predicted one is dropped, as published
TRUTH, PREDICTION = "#ffd60a", "#00d5ff"  # where there is one class: seen on grey and on H&E, by the colour-blind too
COLOURS = ("#39d353", "#ff9f1c", "#4cc9f0", "#f72585", "#ffe66d", "#b892ff")  # one a class, where there are several
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_ENDING = re.compile(r"\.(nii(\.gz)?|png|jpe?g|tiff?|bmp|dcm)$")


def write_classes(path: Path, task: Task, cases: Sequence[Case], probabilities: Tensor) -> None:
    """CSV with a line a case: id, split, true and predicted class, and the probability (N, K) of each class."""
    table = StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", "split", "label", "predicted", *(f"p_{name}" for name in task.classes)])
    for case, row in zip(cases, probabilities.tolist(), strict=True):
        assert case.label is not None
        best = task.classes[int(np.argmax(row))]
        writer.writerow([case.id, case.split, task.classes[case.label], best, *(f"{p:.6f}" for p in row)])
    write_atomic(path, table.getvalue().encode())


def file_name(case: Case) -> str:
    """A file name for a case, without ending: its id if that can be one, else with a digest that keeps it apart."""
    safe = _UNSAFE.sub("_", _ENDING.sub("", case.id)).strip("._")[:100]
    return safe if safe == case.id else f"{safe}-{sha256_hex(case.id.encode())[:8]}"


def cleaned(task: Task, masks: Masks) -> Masks:
    """Predicted masks (K, *S) after what the task does to them.

    organ-tumour, as published: the largest piece of organ or tumour is the organ; of the tumour, what lies in it stays,
    in pieces of more than 50 voxels.
    """
    if task.clean == "none" or not masks.any():
        return masks
    organ = _largest(masks[0])
    pieces, _ = ndimage.label(masks[1] & organ)
    kept = np.bincount(pieces.ravel()) > SMALLEST_TUMOUR
    kept[0] = False
    return np.stack([organ, kept[pieces]])


def _largest(mask: Masks) -> Masks:
    pieces, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return np.asarray(pieces == sizes.argmax())


def write_masks(folder: Path, task: Task, case: Case, example: Example, masks: Masks) -> Path:
    """The predicted masks (K, *S) as one file of classes, named after the case; its path.

    PNG for a picture, NIfTI for a volume, with the values that the task gives the classes (255 in a PNG of one class
    without a value); where classes overlap, the later one is seen. It lies on the image as its file has it, except for
    prepared volumes, NRRD, DICOM and volumes with leaning axes: there it keeps the grid that the model saw.
    """
    if task.ndim == 2:
        shape = read_sample(task, case).pixels.shape[1:]
        flat = _painted(task, _resized(masks, shape), only=255)
        path = folder / f"{file_name(case)}.png"
        buffer = BytesIO()
        Image.fromarray(flat).save(buffer, "PNG")
        write_atomic(path, buffer.getvalue())
        return path
    path = folder / f"{file_name(case)}.nii.gz"
    volume = _on_file(task, case, masks)
    if volume is None:
        volume = nib.Nifti1Image(_painted(task, masks, only=1), _affine(example.spacing_mm or (1.0, 1.0, 1.0)))
    with new_file(path) as draft:
        draft.write_bytes(b"")
        named = draft.with_name(f"{draft.name}.nii.gz")  # nibabel goes by the ending
        try:
            nib.save(volume, named)
            named.replace(draft)
        finally:
            named.unlink(missing_ok=True)
    return path


def _painted(task: Task, masks: Masks, only: int) -> npt.NDArray[np.uint8]:
    """One class a pixel (*S); `only` stands for a class without values."""
    flat = np.zeros(masks.shape[1:], np.uint8)
    for mask, values in zip(masks, task.class_values, strict=True):
        flat[mask] = min(values[0] if values else only, 255)
    return flat


def _resized(masks: Masks, shape: tuple[int, ...]) -> Masks:
    if masks.shape[1:] == shape:
        return masks
    resized = F.interpolate(torch.from_numpy(masks)[None].float(), shape, mode="nearest-exact")[0]
    return np.asarray(resized.numpy() > 0.5)


def _on_file(task: Task, case: Case, masks: Masks) -> nib.Nifti1Image | None:
    """The masks in the axes and voxels of the case's NIfTI file; None if it has none that they could lie on."""
    path = case.files[0]
    if not path.name.endswith((".nii", ".nii.gz")):
        return None
    image = nib.load(path)
    shape = tuple(int(side) for side in image.shape[:3])
    stored, seen = io_orientation(image.affine), axcodes2ornt(AXES)
    back = ornt_transform(seen, stored)
    turned = apply_orientation(np.empty(shape, np.bool_), ornt_transform(stored, seen)).shape
    unit = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    if np.abs(unit.T @ unit - np.eye(3)).max() > 0.01:  # they were straightened when read
        return None
    flat = _painted(task, _resized(masks, turned), only=1)
    return nib.Nifti1Image(np.ascontiguousarray(apply_orientation(flat, back)), image.affine)


def _affine(spacing_mm: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """Of a volume (D, H, W) that runs to the head, the back and the left, its corner at the origin."""
    depth, height, width = spacing_mm
    affine = np.eye(4)
    affine[:3, :3] = ((0, 0, -width), (0, -height, 0), (depth, 0, 0))
    return affine


def write_overlay(path: Path, task: Task, case: Case, example: Example, masks: Masks) -> None:
    """PNG of a segmented case: the image with the outlines of truth (line) and prediction (dashes), and a legend.

    Of a volume, the three planes through the middle of where there is most of the truth, or else of the prediction.
    """
    image, truth = example.image.numpy(), example.target.numpy() > 0.5
    scores = ", ".join(_dice_text(task, truth, masks, number) for number in range(len(task.classes)))
    figure = Figure(dpi=110)
    FigureCanvasAgg(figure)
    panels = _planes(truth, masks) if task.ndim == 3 else [("", (slice(None), slice(None)))]
    spacing = example.spacing_mm or (1.0,) * task.ndim
    shapes = [_drawn_size(image.shape[1:], at, spacing) for _, at in panels]
    tallest = max(height for height, _ in shapes)
    widths = [width for _, width in shapes]  # all panels have one scale
    height_in = min(5.0, 11.0 * tallest / sum(widths))
    width_in = max(height_in * sum(widths) / tallest, 4.5)
    figure.set_size_inches(width_in + 0.2, height_in + 1.0)
    axes = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    low, high = np.percentile(image, (0.5, 99.5))
    for axis, (name, at), (height, width) in zip(axes, panels, shapes, strict=True):
        upright = _upright(at)
        shown = upright(np.moveaxis(image, 0, -1)[at])
        grey = shown.shape[-1] == 1
        picture = shown[..., 0] if grey else np.clip((shown - low) / max(high - low, 1e-9), 0, 1)
        axis.imshow(
            picture,
            cmap="gray" if grey else None,
            vmin=low if grey else None,
            vmax=high if grey else None,
            aspect=height / width * picture.shape[1] / picture.shape[0],
            interpolation="bilinear",
        )
        for number in range(len(task.classes)):
            line, dashes = _colours(task, number)
            _outline(axis, upright(truth[number][at]), line, "solid")
            _outline(axis, upright(masks[number][at]), dashes, (0, (3, 2)))
        axis.set_title(name, fontsize=9, color="0.3", pad=3)
        axis.set_axis_off()
    handles = []
    for number, kind in enumerate(task.classes):
        line, dashes = _colours(task, number)
        handles.append(Line2D([], [], color=line, label=f"{kind}: truth"))
        handles.append(Line2D([], [], color=dashes, linestyle=(0, (3, 2)), label=f"{kind}: prediction"))
    figure.suptitle(f"{_shortened(case.id)}\n{scores}", fontsize=9, y=0.99)
    legend = figure.legend(
        handles=handles, loc="lower center", ncols=min(len(handles), 4), fontsize=8, frameon=True, facecolor="0.25"
    )
    for text in legend.get_texts():
        text.set_color("white")
    below = 0.28 + 0.2 * ((len(handles) - 1) // 4)
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        wspace=0.03,
        bottom=below / (height_in + 1),
        top=1 - (0.62 if task.ndim == 3 else 0.45) / (height_in + 1),
    )
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def _dice_text(task: Task, truth: Masks, masks: Masks, number: int) -> str:
    both = int(truth[number].sum()) + int(masks[number].sum())
    name = task.classes[number]
    if not both:
        return f"{name}: none, none predicted"
    return f"{name}: Dice {2 * int((truth[number] & masks[number]).sum()) / both:.3f}"


def _colours(task: Task, number: int) -> tuple[str, str]:
    if len(task.classes) == 1:
        return TRUTH, PREDICTION
    colour = COLOURS[number % len(COLOURS)]
    return colour, colour


def _planes(truth: Masks, masks: Masks) -> list[tuple[str, tuple[int | slice, ...]]]:
    """Name and place of an axial, a coronal and a sagittal plane."""
    where = next((found for found in (truth.any(axis=0), masks.any(axis=0)) if found.any()), None)
    whole = slice(None)
    shape = truth.shape[1:]
    middle = [side // 2 for side in shape]
    if where is not None:
        middle = [int(where.sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]
    d, h, w = middle
    return [("axial", (d, whole, whole)), ("coronal", (whole, h, whole)), ("sagittal", (whole, whole, w))]


def _upright(at: tuple[int | slice, ...]):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Puts the head up: the first axis of a volume runs towards it, the first of a picture downwards."""
    turn = len(at) == 3 and isinstance(at[0], slice)
    return (lambda plane: plane[::-1]) if turn else (lambda plane: plane)


def _drawn_size(shape: tuple[int, ...], at: tuple[int | slice, ...], spacing: tuple[float, ...]) -> tuple[float, float]:
    """Height and width of a plane, in mm or pixels."""
    height, width = (n * mm for n, mm, part in zip(shape, spacing, at, strict=True) if isinstance(part, slice))
    return height, width


def _outline(axis, mask: Masks, colour: str, style: object) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    if mask.any():
        framed = np.pad(mask, 1).astype(float)  # so that an outline at the border is closed
        height, width = framed.shape
        drawn = axis.contour(
            np.arange(width) - 1,
            np.arange(height) - 1,
            framed,
            levels=[0.5],
            colors=colour,
            linewidths=1.3,
            linestyles=[style],
        )
        drawn.set_path_effects([withStroke(linewidth=2.4, foreground="black", alpha=0.6)])


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
