"""Runs with a random model, whose state and ledger say what those of real ones do."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.server.releases import DATA, audited_of, release_of

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import Plan
from invcoss_common.model import MultiModalMAE, build_model
from invcoss_common.pools import pool_to_bytes
from invcoss_common.records import DpSpent, Report
from invcoss_common.weights import model_to_bytes
from invcoss_server.export.source import Source, open_source
from invcoss_server.state import Hop, RunState

MODALITIES = ("xray", "pathology", "ct", "mri")
DP = DpSpent(
    epsilon=3.5, visit_epsilon=3.5, delta=1e-5, noise_multiplier=1.25, statistics_noise=10.0, sample_rate=0.1, steps=40
)


def plan_of(learned: tuple[str, ...] = MODALITIES, **changes: object) -> Plan:
    stages = [{"site": f"{name}-clinic", "modality": name} for name in learned]
    return Plan.model_validate(
        {"name": "four", "size": "nano", "train": {"steps": 40}, "stages": stages, "seed": 5, **changes}
    )


def random_model(plan: Plan) -> MultiModalMAE:
    """A model in which no weight has the value that a forgotten one would have by chance."""
    geometries = [plan.geometry(number) for number in range(len(plan.stages))]
    model = build_model(plan.model_shape, geometries, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_run(folder: Path, plan: Plan, released: int | None = None, dp: DpSpent | None = None) -> RunState:
    """A run of `plan` in `folder`, of which all or the first stages are released; losses are (10 of + after) / 64."""
    state, store = RunState(folder / "state.db", plan), ArtefactStore(folder / "artefacts")
    for stage in range(len(plan.stages) if released is None else released):
        learned = plan.model_copy(update={"stages": plan.stages[: stage + 1]})
        model = store.put(model_to_bytes(random_model(learned)))
        for of in range(stage + 1):
            site, name = plan.stages[of].site, "train" if of == stage else f"eval-{of:02d}"
            report = Report(
                run=plan.name,
                hop=f"s{stage:02d}-{name}",
                sender=site,
                plan_digest=plan.digest(),
                code_version="0.1.0",
                metrics={"heldout_mim_loss": (10 * of + stage) / 64, **DATA},
                dp=dp if of == stage else None,
            )
            state.record(Hop(report.hop, stage, of, site, report, 1, 1, 0.0, 0.0, 0.0))
        pool = store.put(pool_to_bytes(torch.arange(4 * 64 + stage).to(torch.uint8)[-256:].reshape(4, 1, 8, 8).numpy()))
        state.move(stage, "auditing", model=model, pool=pool)
        state.keep_audit(stage, audited_of(plan, release_of(store, pool, (1,), stage=stage)))
        state.move(stage, "released")
    return state


def source_of(folder: Path, learned: tuple[str, ...] = MODALITIES) -> Source:
    make_run(folder, plan_of(learned))
    return open_source(folder, None, ())


def images_for(source: Source, modality: str, count: int = 3) -> torch.Tensor:
    geometry = source.geometry(modality)
    return torch.rand(count, geometry.channels, *geometry.size, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def tokens_of(source: Source, modality: str, images: torch.Tensor) -> torch.Tensor:
    """What our own model makes of them."""
    return source.model.encode(images, source.geometry(modality))
