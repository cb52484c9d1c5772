"""The multi-modal masked auto-encoder (MAE, He et al. 2022; shared across modalities as in MedCoSS): all of it.

One encoder and one light decoder serve every modality; each geometry family (dimension and patch size) has its own
tokeniser, mask token and prediction head, made when the family first appears.

B = batch, C = channels, L = tokens of an image, V = visible tokens, P = values per patch, D = encoder width.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.tokens import Mask, patchify, sincos_positions

# Patches flatter than this are background: dividing them by their own spread would turn noise into the target.
# MAE uses 1e-6; images here are in [0, 1], so 1e-4 is a spread of 2.5 grey levels of 255.
TARGET_VARIANCE_FLOOR = 1e-4


class Attention(nn.Module):
    """Multi-head self-attention; `causal`: no token sees those after it (pre-training lets all see all)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:  # (B, T, D) -> (B, T, D)
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class Mlp(nn.Module):
    """Two linear layers with GELU, four times wider inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; parameter names are timm's, so that the encoder exports as a ViT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x), causal)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class MultiModalMAE(nn.Module):
    """Encoder on visible patches, decoder on all of them; images are floats in [0, 1], shaped (B, C, *size)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.families: dict[str, Geometry] = {}
        self.tokenisers = nn.ModuleDict()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)

        self.decoder_embed = nn.Linear(shape.width, shape.decoder_width)
        self.mask_tokens = nn.ParameterDict()
        self.decoder_blocks = nn.ModuleList(
            Block(shape.decoder_width, shape.decoder_heads) for _ in range(shape.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(shape.decoder_width, eps=1e-6)
        self.heads = nn.ModuleDict()

    def add_family(self, geometry: Geometry) -> None:
        """Give the model a tokeniser, mask token and head for this geometry's family, unless it has them."""
        family = geometry.family
        if family in self.families:
            return
        self.families[family] = geometry
        self.tokenisers[family] = nn.Linear(geometry.patch_values, self.shape.width)
        self.mask_tokens[family] = nn.Parameter(torch.zeros(1, 1, self.shape.decoder_width))
        self.heads[family] = nn.Linear(self.shape.decoder_width, geometry.patch_values)

    def encoder_norms(self) -> list[nn.LayerNorm]:
        """The 2 depth + 1 normalisation layers of the encoder, in order: where statistics are taken."""
        norms: list[nn.LayerNorm] = []
        for block in self.blocks:
            assert isinstance(block, Block)
            norms += [block.norm1, block.norm2]
        return [*norms, self.norm]

    def encode(self, images: Tensor, geometry: Geometry, keep: Tensor | None = None) -> Tensor:
        """Latent tokens (B, 1 + V, D), class token first; `keep` (B, V) selects the visible patches, None all."""
        patches = patchify(as_input(images, geometry), geometry.patch)
        tokens = self.tokenisers[geometry.family](patches) + _positions(geometry.grid, self.shape.width, patches)
        if keep is not None:
            tokens = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def decode(self, latent: Tensor, mask: Mask, geometry: Geometry) -> Tensor:
        """Predicted patches (B, L, P) from the latent (B, 1 + V, D) of the visible ones."""
        x = self.decoder_embed(latent)
        batch, _, width = x.shape
        hidden = self.mask_tokens[geometry.family].expand(batch, geometry.tokens - (x.shape[1] - 1), -1)
        tokens = torch.cat([x[:, 1:], hidden.to(x.dtype)], dim=1)
        tokens = tokens.gather(1, mask.restore.unsqueeze(-1).expand(-1, -1, width))
        tokens = tokens + _positions(geometry.grid, width, tokens)
        x = torch.cat([x[:, :1], tokens], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        out: Tensor = self.heads[geometry.family](self.decoder_norm(x)[:, 1:])
        return out

    def forward(self, images: Tensor, geometry: Geometry, mask: Mask) -> tuple[Tensor, Tensor]:
        """Latent (B, 1 + V, D) and prediction (B, L, P)."""
        latent = self.encode(images, geometry, mask.keep)
        return latent, self.decode(latent, mask, geometry)


def as_input(images: Tensor, geometry: Geometry) -> Tensor:
    """Images in [0, 1] as the tokeniser sees them: grey repeated to RGB in 2-D, centred and scaled to about [-2, 2]."""
    if images.shape[1] != geometry.input_channels:
        images = images.expand(-1, geometry.input_channels, *geometry.size)
    return (images - 0.5) / 0.25


def target_patches(images: Tensor, geometry: Geometry) -> Tensor:
    """What the decoder must predict (B, L, P): patches normalised by their own mean and variance (MAE, Sec. 3)."""
    patches = patchify(as_input(images, geometry) * 0.25, geometry.patch)
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True, unbiased=False)
    return (patches - mean) / (variance + TARGET_VARIANCE_FLOOR).sqrt()


def masked_error(prediction: Tensor, target: Tensor, mask: Mask) -> Tensor:
    """Mean squared error (B,) over the removed patches of each image; 1 is what predicting the patch mean scores."""
    error = (prediction.float() - target.float()).square().mean(dim=-1)
    return (error * mask.removed).sum(dim=1) / mask.removed.sum(dim=1)


def reconstruction_loss(prediction: Tensor, images: Tensor, geometry: Geometry, mask: Mask) -> Tensor:
    """The masked-reconstruction loss of MAE, a scalar; L_task of inversion is the same number."""
    return masked_error(prediction, target_patches(images, geometry), mask).mean()


def build_model(shape: ModelShape, geometries: Iterable[Geometry], seed: int) -> MultiModalMAE:
    """A freshly initialised model with the families of `geometries`; the same seed gives the same weights.

    Each family is drawn from its own seed, so that the order in which families appear does not matter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MultiModalMAE(shape)
        _initialise(model)
    for geometry in geometries:
        extend_model(model, geometry, seed)
    return model


def extend_model(model: MultiModalMAE, geometry: Geometry, seed: int) -> None:
    """Add the family of `geometry` to an existing model, if it is new, with weights drawn from `seed`."""
    family = geometry.family
    if family in model.families:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed ^ zlib.crc32(family.encode()))
        model.add_family(geometry)
        _initialise(model.tokenisers[family])
        _initialise(model.heads[family])
        nn.init.normal_(model.mask_tokens[family], std=0.02)


def _initialise(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform linear layers, zero biases, normal(0.02) class token."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, MultiModalMAE):
            nn.init.normal_(layer.cls_token, std=0.02)


@lru_cache(maxsize=64)
def _cached_positions(grid: tuple[int, ...], width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return sincos_positions(grid, width).to(device=device, dtype=dtype)


def _positions(grid: tuple[int, ...], width: int, like: Tensor) -> Tensor:
    return _cached_positions(grid, width, like.device, like.dtype)
