"""The encoder as ONNX, one file a modality, each compared with the model it was made of before it counts as made.

N = images, C = channels, L = patches, D = encoder width.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE
from invcoss_server.export.source import ExportError, Source

TOLERANCE = 1e-4  # largest difference of a feature; features are normalised, so their spread is about 1


class _Features(nn.Module):
    """Images (N, C, *size) in [0, 1] -> patch tokens (N, L, D) and class token (N, D)."""

    def __init__(self, model: MultiModalMAE, geometry: Geometry) -> None:
        super().__init__()
        self.model, self.geometry = model, geometry

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.encode(images, self.geometry)
        return tokens[:, 1:], tokens[:, 0]


def write_onnx(source: Source, folder: Path) -> None:
    """Write MODALITY.onnx for every modality, and config.json; raises ExportError without the extra `export`."""
    try:
        import onnxruntime  # noqa: F401 - here, because only this format needs them
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"format onnx needs {error.name}; pip install 'invcoss[export]', or name the others with --format"
        ) from None
    for name in source.modalities:
        _write(_Features(source.model, source.geometry(name)).eval(), folder / f"{name}.onnx")
    (folder / "config.json").write_text(json.dumps(source.facts(), indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _write(features: _Features, path: Path) -> None:
    geometry = features.geometry
    images = torch.rand(2, geometry.channels, *geometry.size, generator=torch.Generator().manual_seed(0))
    features(images)  # the model keeps its positions from now on; those of a traced call are no numbers
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it tells that torchvision is not there
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about its own parts
            torch.onnx.export(
                features,
                (images,),
                path,
                input_names=["images"],
                output_names=["patch_tokens", "class_token"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    finally:
        log.setLevel(level)
    _check(features, path)


@torch.no_grad()
def _check(features: _Features, path: Path) -> None:
    """Raise ExportError unless onnxruntime finds the same features, for another number of images than at export."""
    import onnxruntime

    geometry = features.geometry
    images = torch.rand(3, geometry.channels, *geometry.size, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(["patch_tokens", "class_token"], {"images": images.numpy()})
    for theirs, ours in zip(found, features(images), strict=True):
        difference = float((torch.from_numpy(theirs) - ours).abs().max())
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{path.name}: features differ by {difference:.1g} from the model's; choose other formats"
            )
