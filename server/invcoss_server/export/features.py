"""What the inference configuration of a MONAI bundle calls: copied as it is into it."""

from collections.abc import Iterable

import torch
from safetensors.torch import load_file
from torch import nn


def load(network: nn.Module, path: str, device: torch.device) -> nn.Module:
    """`network` with the weights in `path`, ready for inference."""
    network.load_state_dict(load_file(path))
    return network.to(device).eval()


@torch.no_grad()
def features(network: nn.Module, batches: Iterable[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Tokens (N, 1 + L, width) of all images, in their order; the class token first."""
    return torch.cat([network(batch["image"].as_subclass(torch.Tensor).to(device)).cpu() for batch in batches])
