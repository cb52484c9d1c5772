"""A MONAI bundle for each modality: the encoder in plain torch, and how to run it on a folder of images.

MONAI's own `models/model.pt` is a pickle; the weights are `models/model.safetensors` here, and the inference
configuration loads them.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import monai
import numpy as np
import safetensors
import torch

from invcoss_common import __version__
from invcoss_common.modality import Geometry, Modality
from invcoss_common.weights import write_tensors
from invcoss_server.export.encoder import Encoder
from invcoss_server.export.source import Source
from invcoss_server.export.tensors import torch_tensors

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
SCRIPTS = ("encoder.py", "features.py", "preprocess.py")
LICENSE = """\
scripts/ is part of InvCoSS-relay and under the Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0).
The weights in models/ belong to those who trained them; they have to choose a licence before this bundle is handed on.
Not a medical device; research and development use.
"""


def write_monai(source: Source, folder: Path) -> None:
    """Write a bundle MODALITY/ for every 2-D and 3-D modality."""
    for name in source.modalities:
        if source.geometry(name).ndim > 1:
            _write_bundle(source, name, folder / name)


def encoder_arguments(source: Source, families: dict[str, Geometry]) -> dict[str, Any]:
    """The arguments of the encoder.Encoder with these families."""
    shape = source.model.shape
    inputs = {name: geometry.model_dump(mode="json") for name, geometry in families.items()}
    return {"width": shape.width, "depth": shape.depth, "heads": shape.heads, "families": inputs}


def _write_bundle(source: Source, name: str, folder: Path) -> None:
    geometry, row = source.geometry(name), source.row(name)
    families = {geometry.family: source.families[geometry.family]}
    for part in ("configs", "scripts", "docs"):
        (folder / part).mkdir(parents=True)
    write_tensors(folder / "models" / "model.safetensors", torch_tensors(source.model, families))
    arguments = encoder_arguments(source, families)
    for file, config in (
        ("metadata.json", _metadata(source, name, geometry)),
        ("inference.json", _inference(arguments, geometry, row)),
    ):
        (folder / "configs" / file).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for script in SCRIPTS:
        text = files("invcoss_server.export").joinpath(script).read_text(encoding="utf-8")
        (folder / "scripts" / script).write_text(text, encoding="utf-8")
    (folder / "scripts" / "__init__.py").touch()
    (folder / "LICENSE").write_text(LICENSE, encoding="utf-8")


def _metadata(source: Source, name: str, geometry: Geometry) -> dict[str, Any]:
    channels = ("image",) if geometry.channels == 1 else ("red", "green", "blue")
    return {
        "schema": SCHEMA,
        "version": __version__,
        "changelog": {__version__: f"exported from model {source.sha256}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"safetensors": safetensors.__version__},
        "name": f"{source.plan.name} encoder, {name}",
        "task": f"Features of {name} images, for fine-tuning and retrieval",
        "description": "Vision transformer, pre-trained as a masked auto-encoder at one site after the other, "
        "without images leaving a site; docs/README.md is its model card",
        "authors": f"the sites and the coordinator of run {source.plan.name}",
        "copyright": "see LICENSE",
        "intended_use": "Research and development; not a medical device",
        "references": ["InvCoSS, arXiv:2512.19213"],
        "invcoss": source.facts(),
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": name,
                    "num_channels": geometry.channels,
                    "spatial_shape": list(geometry.size),
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": {str(number): channel for number, channel in enumerate(channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "feature",
                    "format": "class token, then one token a patch",
                    "num_channels": 1 + geometry.tokens,
                    "spatial_shape": [source.model.shape.width],
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {"0": "class token"},
                }
            },
        },
    }


def _inference(arguments: dict[str, Any], geometry: Geometry, row: Modality) -> dict[str, Any]:
    volume = geometry.ndim == 3
    preparing: dict[str, Any] = {"_target_": "scripts.preprocess.prepare", "_mode_": "callable"}
    preparing |= {"size": list(geometry.size), "normalisation": row.normalisation}
    if row.normalisation != "range":
        preparing |= {"low": row.low, "high": row.high}
    elif not volume:
        preparing |= {"low": 0, "high": 255}
    mode = "L" if geometry.channels == 1 else "RGB"
    picture = {"reverse_indexing": False, "converter": f"$lambda image: image.convert('{mode}')"}
    loading: dict[str, Any] = {"_target_": "LoadImaged", "keys": "image"}
    loading |= {"reader": "NibabelReader"} if volume else {"reader": "PILReader", **picture}
    turning = {  # towards the head, the back, the left, as the sites do
        "_target_": "Orientationd",
        "keys": "image",
        "axcodes": "SPL",
        "labels": [["L", "R"], ["P", "A"], ["I", "S"]],
    }
    return {
        "imports": ["$import glob", "$from safetensors.torch import save_file"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output": "$@bundle_root + '/features.safetensors'",
        "batch_size": 8,
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": {"_target_": f"scripts.encoder.{Encoder.__name__}", **arguments},
        "network": {
            "_target_": "scripts.features.load",
            "network": "@network_def",
            "path": "$@bundle_root + '/models/model.safetensors'",
            "device": "@device",
        },
        "datalist": "$[{'image': name} for name in sorted(glob.glob(@dataset_dir + '/*'))]",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                loading,
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                *([turning] if volume else []),
                {"_target_": "Lambdad", "keys": "image", "func": preparing},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": "@batch_size"},
        "features": {
            "_target_": "scripts.features.features",
            "network": "@network",
            "batches": "@dataloader",
            "device": "@device",
        },
        "run": ["$save_file({'tokens': @features}, @output)"],
    }
