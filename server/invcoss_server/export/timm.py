"""The 2-D encoder as weights of timm's VisionTransformer, with the arguments that make the one they fit."""

from __future__ import annotations

import json
from pathlib import Path

from invcoss_common.weights import write_tensors
from invcoss_server.export.source import Source
from invcoss_server.export.tensors import timm_tensors


def write_timm(source: Source, folder: Path) -> None:
    """Write FAMILY/model.safetensors and FAMILY/config.json for every 2-D family."""
    families = {name: geometry for name, geometry in source.families.items() if geometry.ndim == 2}
    shape, facts = source.model.shape, source.facts()
    for family, geometry in families.items():
        write_tensors(folder / family / "model.safetensors", timm_tensors(source.model, geometry))
        config = {
            "architecture": "timm.models.vision_transformer.VisionTransformer",
            "arguments": {
                "img_size": list(geometry.size),
                "patch_size": list(geometry.patch),
                "in_chans": geometry.channels,
                "num_classes": 0,
                "embed_dim": shape.width,
                "depth": shape.depth,
                "num_heads": shape.heads,
            },
            "mean": [0.5] * geometry.channels,
            "std": [0.25] * geometry.channels,
            **facts,
        }
        (folder / family / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
