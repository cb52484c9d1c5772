"""The encoder in plain torch: copied as it is into what is exported, so it stands on nothing of ours."""

import math
from typing import Any

import torch
from torch import nn


class Encoder(nn.Module):
    """Images (N, C, *size), floats in [0, 1] -> tokens (N, 1 + L, width): class token, then patches, row by row."""

    def __init__(self, width: int, depth: int, heads: int, families: dict[str, Any]) -> None:
        super().__init__()
        self.families = families
        self.patch_embed, self.positions = nn.ModuleDict(), nn.ParameterDict()
        for name, family in families.items():
            size, patch = family["size"], family["patch"]
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
            self.patch_embed[name] = conv(family["channels"], width, patch, patch)
            self.positions[name] = nn.Parameter(torch.zeros(1, math.prod(size) // math.prod(patch), width))
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        self.trunk = nn.TransformerEncoder(block, depth, nn.LayerNorm(width, eps=1e-6), enable_nested_tensor=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = list(images.shape[2:])
        name, family = next((n, f) for n, f in self.families.items() if list(f["size"]) == size)
        images = images.expand(-1, family["channels"], *size)  # grey pictures are repeated to three channels
        patches = self.patch_embed[name]((images - 0.5) / 0.25).flatten(2).transpose(1, 2)
        tokens = patches + self.positions[name]
        out: torch.Tensor = self.trunk(torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1))
        return out
