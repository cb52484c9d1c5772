"""DP-SGD: a model that tells hardly more of a site than if any one case had not been there (docs/privacy.md).

Each step draws cases by Poisson sampling and one image of each, clips every image's own gradient, and adds Gaussian
noise to the sum. All random numbers come from a key that never leaves the site. torch's own generators can't be trusted
with that: on a CPU they have 2^32 states to start from, so whoever saw a result could try all of them.

Opacus is used for the accounting only (privacy.py): its samplers of per-image gradients know no bare parameters, such
as the class and mask tokens, and are slower here than `torch.func` (docs/measurements), which needs none.

B = batch, N = training images, C = channels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from invcoss_common.canonical import write_atomic
from invcoss_common.config import DpConfig, TrainConfig
from invcoss_common.modality import Geometry
from invcoss_common.model import MultiModalMAE, reconstruction_loss
from invcoss_common.tokens import Mask, random_mask
from invcoss_site.batches import TrainingBatches

SEED_FILE = "dp-secret"  # in the folder of a hop's secrets
BITS = 52  # of a random word: with half a unit added it is still exact as float64

CaseNumbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Private:
    """What makes a training private: the noise asked for, the case number of each image (N,), the visit's key."""

    config: DpConfig
    case_of: CaseNumbers
    key: bytes

    @cached_property
    def images_of(self) -> list[npt.NDArray[np.intp]]:
        """The images of each case."""
        order = np.argsort(self.case_of, kind="stable")
        return np.split(order, np.unique(self.case_of[order], return_index=True)[1][1:])

    @property
    def cases(self) -> int:
        return len(self.images_of)

    def sample_rate(self, train: TrainConfig) -> float:
        """Probability of a case to be in one step; the plan's batch is what a step has on average."""
        return min(1.0, train.batch_size * train.accumulate / self.cases)

    def drawn(self, case: int, words: Tensor) -> tuple[int, torch.Generator]:
        """An image of `case`, and what its crop and mask are drawn with, from two random words."""
        own = self.images_of[case]
        return int(own[int(words[0]) % len(own)]), torch.Generator().manual_seed(int(words[1]))

    @property
    def name(self) -> str:
        """What tells this visit from any other with other random numbers; it doesn't tell the key."""
        return _derived(self.key, "name").hex()

    def stream(self, purpose: str, number: int = 0) -> Stream:
        """Random numbers for one use only: the same purpose and number give the same ones."""
        return Stream(_derived(self.key, f"{purpose}/{number}"))


class Stream:
    """Random numbers from ChaCha20 under a key, one after the other."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, *shape: int) -> Tensor:
        """Whole numbers 0 <= n < 2^52, int64."""
        stream = bytearray(self._cipher.update(bytes(8 * torch.Size(shape).numel())))
        words = torch.frombuffer(stream, dtype=torch.int64) if stream else torch.zeros(0, dtype=torch.int64)
        out: Tensor = (words & (2**BITS - 1)).reshape(shape)
        return out

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float64, up to 8.2 in size: beyond is a probability of 2^-52."""
        out: Tensor = torch.special.ndtri(uniform(self.words(*shape)))
        return out


def uniform(words: Tensor) -> Tensor:
    """Random words as numbers of the open interval (0, 1)."""
    out: Tensor = (words.double() + 0.5) / 2**BITS
    return out


def visit_key(folder: Path, *about: str) -> bytes:
    """The key of one visit, from the secret in `folder`, made on first use, and what the visit is about.

    A visit that was killed finds its secret and does the same steps with the same noise again; any other, were it of
    the same hand-off, has other noise.
    """
    file = folder / SEED_FILE
    if not file.exists():
        write_atomic(file, os.urandom(32))
    return _derived(file.read_bytes(), "/".join(("visit", *about)))


def _derived(key: bytes, purpose: str) -> bytes:
    return HKDF(SHA256(), length=32, salt=None, info=f"invcoss dp {purpose}".encode()).derive(key)


class PoissonBatches(Dataset[tuple[Tensor, Mask]]):
    """By step: images (B, C, *geometry.size) of the cases that are in it, cropped and flipped, and their masks.

    Cases are drawn independently, so B differs from step to step and may be 0. What is drawn for a case depends on its
    number and the step, never on which others are in it.
    """

    def __init__(self, source: TrainingBatches, private: Private, train: TrainConfig) -> None:
        self.source, self.private = source, private
        self.rate, self.mask_ratio = private.sample_rate(train), train.mask_ratio

    def __getitem__(self, step: int) -> tuple[Tensor, Mask]:
        words = self.private.stream("sample", step).words(self.private.cases, 3)
        geometry = self.source.geometry
        images = [torch.empty(0, self.source.images.shape[1], *geometry.size)]
        masks = [random_mask(0, geometry.tokens, self.mask_ratio, torch.Generator())]
        for case in (uniform(words[:, 0]) < self.rate).nonzero().flatten().tolist():
            image, generator = self.private.drawn(case, words[case, 1:])
            images.append(self.source.augmented(image, *self.source.draw(generator))[None])
            masks.append(random_mask(1, geometry.tokens, self.mask_ratio, generator))
        return torch.cat(images), together(masks)


def together(masks: list[Mask]) -> Mask:
    """One mask for the images of all of them."""
    return Mask(*(torch.cat([getattr(mask, name) for mask in masks]) for name in ("keep", "restore", "removed")))


def leave_private_gradient(
    model: MultiModalMAE,
    images: Tensor,
    mask: Mask,
    geometry: Geometry,
    private: Private,
    train: TrainConfig,
    step: int,
) -> None:
    """Leave the noised mean gradient of one step in `grad` of the parameters that images of this geometry use.

    `train.batch_size` images are worked on at a time, in float32 whatever `train.precision` is: not on every device
    can torch take the per-image gradient of a layer norm in bfloat16. The mean is over the cases that a step has on
    average, for how many it had is not to be told.
    """
    sums = {name: torch.zeros_like(value) for name, value in used_parameters(model, geometry).items()}
    for start in range(0, len(images), train.batch_size):
        stop = min(start + train.batch_size, len(images))
        gradients = image_gradients(model, images[start:stop], geometry, mask.rows(start, stop))
        for name, total in clipped_sum(gradients, private.config.clip_norm).items():
            sums[name] += total
    stream = private.stream("noise", step)
    spread = private.config.noise_multiplier * private.config.clip_norm
    expected = private.sample_rate(train) * private.cases
    for name, value in used_parameters(model, geometry).items():
        # In float64 and only then rounded: the float32 that come out don't show which the sum could have been.
        noise = spread * stream.normal(*value.shape).to(value.device)
        value.grad = ((sums[name].double() + noise) / expected).to(value.dtype)


def used_parameters(model: MultiModalMAE, geometry: Geometry) -> dict[str, torch.nn.Parameter]:
    """All parameters but those of other families, which these images can't change and noise would only spoil."""
    others = set(model.families) - {geometry.family}
    return {name: value for name, value in model.named_parameters() if not others.intersection(name.split("."))}


def image_gradients(model: MultiModalMAE, images: Tensor, geometry: Geometry, mask: Mask) -> dict[str, Tensor]:
    """The gradient (B, *shape) of each image's own loss, by parameter."""

    def loss(parameters: dict[str, Tensor], image: Tensor, keep: Tensor, restore: Tensor, removed: Tensor) -> Tensor:
        alone = Mask(keep[None], restore[None], removed[None])
        _, prediction = functional_call(model, parameters, (image[None], geometry, alone))
        return reconstruction_loss(prediction, image[None], geometry, alone)

    parameters = {name: value.detach() for name, value in used_parameters(model, geometry).items()}
    with sdpa_kernel(SDPBackend.MATH):  # the others can't be vmapped
        gradients: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))(
            parameters, images, mask.keep, mask.restore, mask.removed
        )
    return gradients


def clipped_sum(vectors: dict[str, Tensor], largest: float) -> dict[str, Tensor]:
    """Sums over the first axis, each row of all tensors together scaled down to a norm of `largest` at most.

    A row that isn't finite counts as zeros: skipping the step would tell that it was there.
    """
    norms = torch.stack([value.flatten(1).norm(dim=1) for value in vectors.values()]).norm(dim=0)
    scale = (largest / (norms + 1e-6)).clamp(max=1.0)  # as in Opacus: a little less, never more
    scale = torch.where(norms.isfinite(), scale, 0.0)
    return {
        name: torch.einsum("b,b...->...", scale, value.nan_to_num(0.0, 0.0, 0.0)) for name, value in vectors.items()
    }
