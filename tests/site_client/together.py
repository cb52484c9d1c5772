"""Small trainings that one process and several must end alike; under torchrun, each writes what it ended with.

python -m tests.site_client.together OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from invcoss_common.config import ReplayConfig, TrainConfig
from invcoss_common.errors import TrainingError
from invcoss_common.modality import Geometry, ModelShape
from invcoss_common.model import build_model
from invcoss_site import ranks
from invcoss_site.replay import ReplayPool, rehearsal
from invcoss_site.trainer import Progress, train

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for one another

SHAPE = ModelShape(width=32, depth=2, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
XRAY = Geometry(channels=1, size=(16, 16), patch=(4, 4))
CT = Geometry(channels=1, size=(4, 8, 8), patch=(2, 4, 4))
MRI = Geometry(channels=1, size=(4, 8, 8), patch=(4, 4, 4))
CONFIG = TrainConfig(steps=6, batch_size=4, lr=1e-2, precision="fp32", checkpoint_every_s=1e-9)
IMAGES = np.random.default_rng(0).random((10, 1, 20, 20)).astype(np.float16)
DAMAGED = IMAGES.copy()
DAMAGED[4] = np.nan

# name: (changes of CONFIG, changes of ReplayConfig or None, images)
CASES: dict[str, tuple[dict[str, object], dict[str, object] | None, np.ndarray]] = {
    "plain": ({}, None, IMAGES),
    "odd batch, accumulated": ({"batch_size": 5, "accumulate": 2}, None, IMAGES),
    "one image a batch": ({"batch_size": 1}, None, IMAGES),
    "replay": ({"batch_size": 6}, {}, IMAGES),  # three replayed images: an odd batch
    "replay, odd batch, accumulated": ({"batch_size": 5, "accumulate": 2}, {}, IMAGES),
    "replay as published": ({"batch_size": 6}, {"loss": "published"}, IMAGES),
    "skipped steps": ({"batch_size": 3}, {}, DAMAGED),
    "workers": ({"workers": 1, "steps": 2}, None, IMAGES),
    "resumed": ({}, {}, IMAGES),
}


def run(case: str, checkpoint: Path | None, watch: Callable[[Progress], None] | None = None) -> dict[str, torch.Tensor]:
    """Weights, `losses` and `counters` (step, skipped, images) after a training; `checkpoint` may hold its start."""
    changes, replay, images = CASES[case]
    config = CONFIG.model_copy(update=changes)
    rehearse = None
    if replay is not None:
        random = np.random.default_rng(2)
        pools = [ReplayPool(random.integers(0, 256, (5, 1, *g.size), dtype=np.uint8), g) for g in (CT, MRI)]
        teacher, how = build_model(SHAPE, [XRAY, CT, MRI], 5), ReplayConfig(**replay)
        teacher.norm.weight.data.copy_(torch.linspace(-3, 3, SHAPE.width))  # latents of a variance that is not always 1
        rehearse = rehearsal(teacher, pools, how, batch_size=config.batch_size, mask_ratio=0.75, seed=7)
    model = build_model(SHAPE, [XRAY, CT, MRI], 0)
    progress = train(model, images, XRAY, config, seed=7, rehearse=rehearse, checkpoint=checkpoint, on_progress=watch)
    counters = [progress.step, progress.skipped, progress.images]
    numbers = {"losses": torch.tensor(progress.losses, dtype=torch.float64), "counters": torch.tensor(counters)}
    return {**{f"model/{name}": tensor for name, tensor in model.state_dict().items()}, **numbers}


def main(out: Path) -> None:
    with ranks.joined(out):
        for case in CASES:
            ended = run(case, out / f"{case}.checkpoint")
            save_file(ended, out / f"{case}.rank{ranks.rank()}")
        try:
            train(build_model(SHAPE, [XRAY], 0), DAMAGED, XRAY, CONFIG.model_copy(update={"max_bad_steps": 0}), seed=7)
        except TrainingError as error:
            (out / f"error.rank{ranks.rank()}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
