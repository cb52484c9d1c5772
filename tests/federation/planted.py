"""Pools with copies of a site's training images planted into them: what the audit at the site is there to find."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from invcoss_common.config import Plan
from invcoss_common.pools import mapped_images, write_pool
from invcoss_server.synthesis import Job, OnProgress, synthesise_here
from invcoss_site.home import SiteHome
from invcoss_site.inventory import take_inventory
from invcoss_site.prepare import prepare

Pixels = npt.NDArray[np.uint8]


def training_images(plan: Plan, stage: int, home: SiteHome, count: int) -> Pixels:
    """The first training images of a stage (count, C, *size) as a pool would have them."""
    inventory = take_inventory(home.data, plan.modality(stage), home.index)
    geometry = plan.geometry(stage)
    images = prepare(inventory, plan.modality(stage), geometry, plan.stages[stage].spacing_mm, home.cache).train
    values = torch.from_numpy(np.ascontiguousarray(images[:count])).float()
    if geometry.ndim == 2:
        values = F.interpolate(values, size=geometry.size, mode="bilinear", antialias=True)
    copies: Pixels = (255 * values).round().to(torch.uint8).numpy()
    return copies


class Planting:
    """Synthesis that puts copies into `rows` of the first pool of some stages; counts seeds by stage.

    With `always` also into the pools that are made after a refused one.
    """

    def __init__(
        self, plan: Plan, homes: Mapping[str, SiteHome], rows: Mapping[int, tuple[int, ...]], always: bool = False
    ) -> None:
        self.plan = plan
        self.homes = homes
        self.rows = rows
        self.always = always
        self.seeds: dict[int, list[int]] = {}

    def __call__(self, job: Job, folder: Path, on_progress: OnProgress) -> Path:
        stage = int(folder.name.split("-")[1])
        seeds = self.seeds.setdefault(stage, [])
        seeds.append(job.seed)
        path, rows = synthesise_here(job, folder, on_progress), self.rows.get(stage, ())
        if rows and (self.always or job.seed == seeds[0]):
            images = mapped_images(path).copy()
            site = self.plan.stages[stage].site
            images[list(rows)] = training_images(self.plan, stage, self.homes[site], len(rows))
            write_pool(path, images)
        return path
