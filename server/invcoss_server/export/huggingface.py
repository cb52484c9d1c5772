"""A folder as model hubs have them: weights, configuration, preprocessing; its model card shows how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from invcoss_common.weights import write_tensors
from invcoss_server.export.encoder import Encoder
from invcoss_server.export.monai import encoder_arguments
from invcoss_server.export.source import Source
from invcoss_server.export.tensors import torch_tensors


def write_huggingface(source: Source, folder: Path) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json for all modalities together."""
    write_tensors(folder / "model.safetensors", torch_tensors(source.model, source.families))
    facts = source.facts()
    modalities = facts.pop("modalities")
    encoder = encoder_arguments(source, source.families)
    config = {"model_type": "invcoss", "architectures": [Encoder.__name__], "encoder": encoder, **facts}
    inputs = {"value_range": [0, 1], "image_mean": 0.5, "image_std": 0.25, "modalities": modalities}
    for name, values in (("config.json", config), ("preprocessor_config.json", inputs)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
