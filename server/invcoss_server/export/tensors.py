"""The encoder's weights under the names that other code has for them; every value is as it was trained.

D = encoder width, L = tokens, C = input channels.
"""

from __future__ import annotations

from torch import Tensor, cat, zeros
from torch.nn import Linear

from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE
from invcoss_common.tokens import sincos_positions

_TIMM_TO_TORCH = {  # of a block: timm's names, which are ours, to nn.TransformerEncoderLayer's
    "attn.qkv.": "self_attn.in_proj_",
    "attn.proj.": "self_attn.out_proj.",
    "mlp.fc1.": "linear1.",
    "mlp.fc2.": "linear2.",
}


def timm_tensors(model: MultiModalMAE, geometry: Geometry) -> dict[str, Tensor]:
    """State of the timm VisionTransformer that serves a 2-D geometry; positions, which are fixed here, are baked in."""
    weight, bias = _patch_embedding(model, geometry)
    positions = sincos_positions(geometry.grid, model.shape.width)[None]
    return {
        "cls_token": model.cls_token,
        "pos_embed": cat([zeros(1, 1, model.shape.width), positions], dim=1),  # the class token has none
        "patch_embed.proj.weight": weight,
        "patch_embed.proj.bias": bias,
        **{name: tensor for name, tensor in model.state_dict().items() if name.startswith(("blocks.", "norm."))},
    }


def torch_tensors(model: MultiModalMAE, families: dict[str, Geometry]) -> dict[str, Tensor]:
    """State of an encoder.Encoder with these families."""
    tensors: dict[str, Tensor] = {"class_token": model.cls_token}
    for family, geometry in families.items():
        weight, bias = _patch_embedding(model, geometry)
        tensors[f"patch_embed.{family}.weight"], tensors[f"patch_embed.{family}.bias"] = weight, bias
        tensors[f"positions.{family}"] = sincos_positions(geometry.grid, model.shape.width)[None]
    for name, tensor in model.state_dict().items():
        if name.startswith("norm."):
            tensors[f"trunk.{name}"] = tensor
        elif name.startswith("blocks."):
            for ours, theirs in _TIMM_TO_TORCH.items():
                name = name.replace(ours, theirs)
            tensors["trunk.layers." + name.removeprefix("blocks.")] = tensor
    return tensors


def _patch_embedding(model: MultiModalMAE, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Weight (D, C, *patch) and bias (D,) of the convolution that is the tokeniser: its rows have channels last."""
    tokeniser = model.tokenisers[geometry.family]
    assert isinstance(tokeniser, Linear)
    weight, bias = tokeniser.weight, tokeniser.bias
    return weight.reshape(len(weight), *geometry.patch, -1).movedim(-1, 1), bias
