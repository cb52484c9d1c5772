"""The pre-trained trunk as an encoder of a task's inputs: images of the task's own size, or text.

The decoder of pre-training stays behind. B = batch, C = channels, L = tokens, D = width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from monai.networks.layers import DropPath
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from invcoss_common.config import WireDtype
from invcoss_common.errors import DataError, WeightsError
from invcoss_common.modality import SIZES, Geometry, ModelShape
from invcoss_common.model import MultiModalMAE, as_input, build_model
from invcoss_common.tokens import patchify, sincos_positions
from invcoss_common.weights import read_model

DROP_PATH = 0.1  # share of blocks that are passed over in training, as published


class Encoded(NamedTuple):
    """Tokens (B, L, D) but the class token: normalised ones of the last layer, and those at quarters of the depth."""

    tokens: Tensor
    quarters: tuple[Tensor, Tensor, Tensor]

    @property
    def pooled(self) -> Tensor:
        """The mean (B, D) of the tokens."""
        return self.tokens.mean(dim=1)


class ImageTokens(nn.Module):
    """Images (B, C, *size) in [0, 1] as tokens (B, L, D), by the model's tokeniser for these patches."""

    positions: Tensor

    def __init__(self, tokeniser: nn.Module, geometry: Geometry, width: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.tokeniser = tokeniser
        self.register_buffer("positions", sincos_positions(geometry.grid, width), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        assert tuple(images.shape[1:]) == (self.geometry.channels, *self.geometry.size), tuple(images.shape)
        tokens: Tensor = self.tokeniser(patchify(as_input(images, self.geometry), self.geometry.patch))
        return tokens + self.positions


class TextTokens(nn.Module):
    """Token numbers (B, L), padded to one length, as tokens (B, L, D), by a table that fine-tuning learns."""

    positions: Tensor

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.register_buffer("positions", sincos_positions((length,), width), persistent=False)

    def forward(self, numbers: Tensor) -> Tensor:
        tokens: Tensor = self.table(numbers)
        return tokens + self.positions


class Encoder(nn.Module):
    """A trunk behind one way to make tokens. `causal`: a token sees those before it only, as published for text."""

    def __init__(
        self, trunk: MultiModalMAE, embed: ImageTokens | TextTokens, *, causal: bool = False, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.width = trunk.shape.width
        self.causal = causal
        self.embed = embed
        self.cls_token = trunk.cls_token
        self.blocks = trunk.blocks
        self.norm = trunk.norm
        self.drop_path = DropPath(drop_path)
        depth = len(self.blocks)
        self.quarters = [math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3)]  # of 12: after blocks 3, 6, 9

    def forward(self, x: Tensor) -> Encoded:
        tokens = self.embed(x)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        states = []
        for block in self.blocks:
            x = x + self.drop_path(block(x, causal=self.causal) - x) if self.training else block(x, causal=self.causal)
            states.append(x[:, 1:])
        first, second, third = (states[number] for number in self.quarters)
        return Encoded(self.norm(x)[:, 1:], (first, second, third))


def image_encoder(
    model: MultiModalMAE, size: tuple[int, ...], channels: int, origin: Path | str, *, drop_path: float = DROP_PATH
) -> Encoder:
    """An encoder of images (B, `channels`, *`size`) that shares its weights with `model`, which came from `origin`.

    Raises WeightsError if the model has no tokeniser for as many dimensions, and DataError if its patches don't fit.
    """
    families = [family for family, known in sorted(model.families.items()) if known.ndim == len(size)]
    if not families:
        raise WeightsError(
            f"{origin}: this model never saw {len(size)}-D images (it has {_listed(model.families)}); "
            f"take one that was pre-trained on them"
        )
    patch = model.families[families[0]].patch
    if any(s < p or s % p for s, p in zip(size, patch, strict=True)):
        raise DataError(
            f"images of {_by(size)} can't be cut into the patches of {_by(patch)} of {origin}; "
            f"give the task a size that is a multiple of them"
        )
    geometry = Geometry(channels=channels, size=size, patch=patch)
    tokens = ImageTokens(model.tokenisers[families[0]], geometry, model.shape.width)
    return Encoder(model, tokens, drop_path=drop_path)


def text_encoder(model: MultiModalMAE, vocabulary: int, length: int, *, drop_path: float = DROP_PATH) -> Encoder:
    """An encoder of token numbers (B, `length`) in 0..`vocabulary`-1 that shares its trunk with `model`."""
    return Encoder(model, TextTokens(vocabulary, length, model.shape.width), causal=True, drop_path=drop_path)


def pretrained(path: Path) -> MultiModalMAE:
    """The model in a `model.safetensors` of a run, whose size and families are read off its tensors.

    Raises WeightsError that names the file, and what in it is not as in a model of one of our sizes.
    """
    tensors = _headers(path)
    sizes = {scale.model: name for name, scale in SIZES.items()}
    families = [_family(name) for name in sorted(tensors) if name.startswith("tokenisers.") and name.endswith("weight")]
    shape = next((shape for shape in sizes if _fits(tensors, shape)), None)
    if shape is None or not families or None in families:
        raise WeightsError(
            f"{path}: not the weights of a model of any of the sizes {_listed(sizes.values())}; "
            f"give the model.safetensors of a run"
        )
    dtype: WireDtype = "bfloat16" if tensors["cls_token"][1] == "BF16" else "float32"
    try:
        return read_model(path, shape, [family for family in families if family], dtype)
    except WeightsError as error:
        raise WeightsError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def from_scratch(model: MultiModalMAE, seed: int) -> MultiModalMAE:
    """Random initial weights for a model as large as `model`, with the same families: what pre-training is held to."""
    return build_model(model.shape, model.families.values(), seed)


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor in the file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file: {str(error)[:300]!r}") from None
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror or error})") from None


def _fits(tensors: dict[str, tuple[tuple[int, ...], str]], shape: ModelShape) -> bool:
    depths = (shape.depth, shape.decoder_depth)
    return (
        tensors.get("cls_token", ((), ""))[0] == (1, 1, shape.width)
        and tensors.get("decoder_norm.weight", ((), ""))[0] == (shape.decoder_width,)
        and tuple(sum(n.startswith(p) and n.endswith("norm1.weight") for n in tensors) for p in _STACKS) == depths
    )


_STACKS = ("blocks.", "decoder_blocks.")


def _family(tokeniser: str) -> Geometry | None:
    """A geometry, of a single patch, of the family that `tokenisers.<family>.weight` belongs to, if it is one."""
    ndim, _, sides = tokeniser.split(".")[1].partition("d_")
    try:
        patch = tuple(int(side) for side in sides.split("x"))
        return Geometry(channels=1, size=patch, patch=patch) if ndim == str(len(patch)) else None
    except ValueError:
        return None


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
