"""What stands on the encoder: a classifier of pooled tokens, and a segmenter that decodes as UNETR does.

UNETR: Hatamizadeh et al. 2022. B = batch, C = channels, D = encoder width, K = classes, S = shape of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monai.networks.blocks import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
from torch import Tensor, nn

from invcoss_common.errors import WeightsError
from invcoss_common.model import as_input
from invcoss_site.downstream.encoder import Encoder, ImageTokens

STAGES = 4  # of the decoder, from the grid of tokens up to the image
FEATURES = 16  # channels at full resolution, as published; twice as many a stage further down


class Classifier(nn.Module):
    """Logits (B, K) from the mean token: LayerNorm and one layer, or (`mlp`) two, as published for 3-D and text."""

    def __init__(self, encoder: Encoder, classes: int, *, mlp: bool = False) -> None:
        super().__init__()
        width = encoder.width
        self.encoder = encoder
        hidden = [nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()] if mlp else []
        self.head = nn.Sequential(nn.LayerNorm(width), *hidden, nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x).pooled)
        return logits


class Segmenter(nn.Module):
    """Logits (B, K, *S), one mask per class, from the tokens of four depths and the image itself, in 2-D or 3-D.

    Each side of a patch is a power of two, its own per axis. The decoder has four stages; an axis that needs fewer
    doublings than that (a side of 8 needs three) keeps its length in the first ones, where a voxel is still a token.
    Raises WeightsError, naming `origin` of the weights, for other patches.
    """

    def __init__(self, encoder: Encoder, classes: int, origin: Path | str = "the encoder") -> None:
        super().__init__()
        assert isinstance(encoder.embed, ImageTokens)
        self.encoder = encoder
        self.geometry = encoder.embed.geometry
        ndim, width = self.geometry.ndim, encoder.width
        kernel = {"spatial_dims": ndim, "kernel_size": 3, "norm_name": "instance"}
        stages = list(zip(*(_growth(side, origin) for side in self.geometry.patch), strict=True))
        channels = [FEATURES * 8, FEATURES * 4, FEATURES * 2, FEATURES]  # after each stage

        self.skips = nn.ModuleList(  # the deeper the layer, the fewer stages up to where it joins
            _grow(kernel, width, channels[number], stages[: number + 1]) for number in range(STAGES - 1)
        )
        self.skips.append(
            UnetrBasicBlock(
                in_channels=self.geometry.input_channels, out_channels=FEATURES, stride=1, res_block=True, **kernel
            )
        )
        self.up = nn.ModuleList(
            UnetrUpBlock(in_channels=before, out_channels=after, upsample_kernel_size=stage, res_block=True, **kernel)
            for before, after, stage in zip([width, *channels[:-1]], channels, stages, strict=True)
        )
        self.out = UnetOutBlock(spatial_dims=ndim, in_channels=FEATURES, out_channels=classes)

    def forward(self, images: Tensor) -> Tensor:
        encoded = self.encoder(images)
        beside = [*(self._grid(tokens) for tokens in reversed(encoded.quarters)), as_input(images, self.geometry)]
        x = self._grid(encoded.tokens)
        for up, skip, state in zip(self.up, self.skips, beside, strict=True):
            x = up(x, skip(state))
        logits: Tensor = self.out(x)
        return logits

    def _grid(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) in their places (B, D, *grid)."""
        return tokens.transpose(1, 2).reshape(len(tokens), -1, *self.geometry.grid)


def _growth(side: int, origin: Path | str) -> list[int]:
    """How many times longer an axis gets at each stage, in all `side` times: 16 is 2 2 2 2, 8 is 1 2 2 2."""
    doublings = side.bit_length() - 1
    if side != 1 << doublings:
        raise WeightsError(
            f"{origin}: a patch side of {side} is no power of two, so that no decoder can be built on it; "
            f"use weights with patches of 4, 8 or 16"
        )
    each, more = divmod(doublings, STAGES)
    return [2 ** (each + (stage >= STAGES - more)) for stage in range(STAGES)]


def _grow(kernel: dict[str, object], width: int, channels: int, stages: Sequence[Sequence[int]]) -> nn.Sequential:
    """MONAI's UnetrPrUpBlock with a convolution after every stage but the first, and a growth of its own per stage."""
    layers: list[nn.Module] = []
    for number, stage in enumerate(stages):
        layers.append(
            UnetrPrUpBlock(
                in_channels=channels if number else width,
                out_channels=channels,
                num_layer=0,
                stride=1,
                upsample_kernel_size=stage,
                **kernel,
            )
        )
        if number:
            layers.append(UnetResBlock(in_channels=channels, out_channels=channels, stride=1, **kernel))
    return nn.Sequential(*layers)
