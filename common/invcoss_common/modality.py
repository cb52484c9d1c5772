"""The modality table and the size dial: what an image of each kind is, at each size of model.

Adding a modality is adding a row here, or a `[modalities.<name>]` table in a plan; no code branches on its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from invcoss_common.errors import PlanError

SizeName = Literal["nano", "tiny", "small", "base", "large"]


class Modality(BaseModel):
    """One row of the modality table: facts that hold at every size of model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ndim: Literal[1, 2, 3] = Field(description="spatial dimensions of one image")
    channels: Literal[1, 3] = Field(default=1, description="1 grey, 3 RGB")
    normalisation: Literal["range", "window", "percentile"] = Field(
        description="range: full range of the file's data type; window: fixed [low, high] in the file's units "
        "(Hounsfield for CT); percentile: [low, high] percentiles of the non-zero voxels"
    )
    low: float = 0.0
    high: float = 1.0
    horizontal_flip: bool = Field(default=True, description="may be mirrored left-right in training")

    @model_validator(mode="after")
    def _ordered(self) -> Modality:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.normalisation == "percentile" and not 0 <= self.low < self.high <= 100:
            raise ValueError("percentiles lie between 0 and 100")
        if self.channels == 3 and self.ndim != 2:
            raise ValueError(f"3 channels are for 2-D images; give this {self.ndim}-D modality channels = 1")
        return self


MODALITIES: dict[str, Modality] = {
    "xray": Modality(ndim=2, channels=1, normalisation="range"),
    "pathology": Modality(ndim=2, channels=3, normalisation="range"),
    "ct": Modality(ndim=3, channels=1, normalisation="window", low=-1000.0, high=1000.0),
    "mri": Modality(ndim=3, channels=1, normalisation="percentile", low=0.2, high=99.8),
}


class Geometry(BaseModel):
    """Shape of one model input of a modality: `channels x size`, cut into patches of `patch`.

    Values are floats in [0, 1]; axes are (H, W) in 2-D and (D, H, W) in 3-D.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: int
    size: tuple[int, ...]
    patch: tuple[int, ...]

    @model_validator(mode="after")
    def _fits(self) -> Geometry:
        if len(self.size) != len(self.patch):
            raise ValueError(f"size {self.size} and patch {self.patch} have different numbers of axes")
        bad = [f"{s} by {p}" for s, p in zip(self.size, self.patch, strict=True) if p < 1 or s < p or s % p]
        if bad:
            raise ValueError(f"size must be a multiple of patch on every axis; not so for {', '.join(bad)}")
        return self

    @property
    def ndim(self) -> int:
        return len(self.size)

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches per axis."""
        return tuple(s // p for s, p in zip(self.size, self.patch, strict=True))

    @property
    def tokens(self) -> int:
        """Number of patches L."""
        count = 1
        for n in self.grid:
            count *= n
        return count

    @property
    def input_channels(self) -> int:
        """Channels the tokeniser sees: X-ray and pathology share the 2-D one, so grey is repeated to three."""
        return 3 if self.ndim == 2 else 1

    @property
    def patch_values(self) -> int:
        """Values per patch P, over all input channels."""
        count = self.input_channels
        for p in self.patch:
            count *= p
        return count

    @property
    def family(self) -> str:
        """Name of the tokeniser and prediction head that serve this geometry, e.g. `2d_8x8`."""
        return f"{self.ndim}d_" + "x".join(map(str, self.patch))


class ModelShape(BaseModel):
    """Widths and depths of the masked auto-encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int

    def parameters(self, families: Iterable[Geometry]) -> int:
        """How many parameters a model of this shape has with these families, as model.py builds it."""
        trunk = self.width + _blocks(self.depth, self.width) + 2 * self.width  # class token, blocks, last norm
        decoder = self.decoder_width * (self.width + 1 + 2) + _blocks(self.decoder_depth, self.decoder_width)
        distinct = {geometry.family: geometry.patch_values for geometry in families}.values()
        heads = sum((p + 1) * self.width + self.decoder_width + (self.decoder_width + 1) * p for p in distinct)
        return trunk + decoder + heads


def _blocks(depth: int, width: int) -> int:
    return depth * width * (12 * width + 13)


class Scale(BaseModel):
    """One setting of the size dial: the model, and the image and patch size for 1, 2 and 3 dimensions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelShape
    size: dict[int, tuple[int, ...]]
    patch: dict[int, tuple[int, ...]]


def _scale(model: tuple[int, ...], size: tuple[tuple[int, ...], ...], patch: tuple[tuple[int, ...], ...]) -> Scale:
    names = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")
    return Scale(
        model=ModelShape(**dict(zip(names, model, strict=True))),
        size=dict(enumerate(size, start=1)),
        patch=dict(enumerate(patch, start=1)),
    )


# base is the paper's ViT-B/16: 224^2 in 2-D, 16x192x192 in 3-D, decoder 8 x 512.
SIZES: dict[SizeName, Scale] = {
    "nano": _scale((128, 3, 4, 96, 1, 4), ((256,), (64, 64), (16, 32, 32)), ((4,), (8, 8), (4, 8, 8))),
    "tiny": _scale((192, 6, 3, 128, 2, 4), ((256,), (96, 96), (16, 48, 48)), ((4,), (8, 8), (4, 8, 8))),
    "small": _scale((384, 12, 6, 256, 4, 8), ((512,), (224, 224), (16, 96, 96)), ((4,), (16, 16), (16, 16, 16))),
    "base": _scale((768, 12, 12, 512, 8, 16), ((512,), (224, 224), (16, 192, 192)), ((4,), (16, 16), (16, 16, 16))),
    "large": _scale((1024, 24, 16, 512, 8, 16), ((512,), (224, 224), (16, 192, 192)), ((4,), (16, 16), (16, 16, 16))),
}


def geometry_for(modality: Modality, size: SizeName) -> Geometry:
    """The geometry of `modality` at one setting of the size dial."""
    scale = SIZES[size]
    return Geometry(channels=modality.channels, size=scale.size[modality.ndim], patch=scale.patch[modality.ndim])


def lookup(name: str, table: dict[str, Modality]) -> Modality:
    """The row of `table` called `name`; raises PlanError naming the known ones."""
    try:
        return table[name]
    except KeyError:
        known = ", ".join(sorted(table))
        raise PlanError(
            f"unknown modality '{name}'; known are {known}. Correct the stage, or add a [modalities.{name}] table"
        ) from None
