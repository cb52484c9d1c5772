"""The leak audit on real images: are planted copies of training images found, and are honest synthetic images kept?

    python benchmarks/leak_audit.py --plan plans/real-small.toml --data DIR --run runs/real-small

Models and pools are those of a finished run of the plan (`invcoss-server simulate PLAN --data DIR --out RUN`); without
one, each modality is trained and inverted briefly. No real image, nor a picture of one, is written.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from monai.networks.layers import GaussianFilter
from rich.console import Console
from torch import Tensor

from invcoss_common.artefacts import ArtefactStore
from invcoss_common.config import Plan, load_plan
from invcoss_common.model import MultiModalMAE
from invcoss_common.pools import pool_from_bytes
from invcoss_common.seeds import derive_seed, generator_for
from invcoss_common.weights import read_model
from invcoss_server.state import RunState
from invcoss_site.audit import Audit, Calibration, audit_against, calibrate, membership_auc, wilson
from invcoss_site.batches import whole_images
from invcoss_site.policy import AuditSettings
from measurement import MEASUREMENTS, mean, write_measurement
from retention import METHODS, Stage, buffer_of, site_images, trained

SHARES = (0.01, 0.05, 0.2)  # of a pool that is replaced by copies; at least one image
WANTED_RECALL, WANTED_DROPPED = 0.95, 0.05
BLUR = {2: (0.5, 1.5), 3: (0.5, 1.0)}  # SD in pixels, by number of axes
NOISE = (0.02, 0.1)  # SD; images lie in [0, 1]
SHIFT, SHIFT_DEPTH = 3.0, 1.0  # at most so many pixels an axis
SCALE = (0.9, 1.1)
CONTRAST, BRIGHTNESS = (0.8, 1.2), (-0.1, 0.1)


def blurred(image: Tensor, random: torch.Generator) -> Tensor:
    axes = image.dim() - 2
    smooth: Tensor = GaussianFilter(axes, uniform(random, BLUR[axes]))(image)
    return smooth


def noisy(image: Tensor, random: torch.Generator) -> Tensor:
    return image + uniform(random, NOISE) * torch.randn(image.shape, generator=random)


def shifted(image: Tensor, random: torch.Generator) -> Tensor:
    size = image.shape[2:]
    limits = [SHIFT] * len(size) if len(size) == 2 else [SHIFT_DEPTH, SHIFT, SHIFT]
    steps = [2 * uniform(random, (-limit, limit)) / extent for limit, extent in zip(limits, size, strict=True)]
    return moved(image, torch.eye(len(size)), torch.tensor(steps[::-1]))


def rescaled(image: Tensor, random: torch.Generator) -> Tensor:
    axes = image.dim() - 2
    return moved(image, torch.eye(axes) / uniform(random, SCALE), torch.zeros(axes))


def relit(image: Tensor, random: torch.Generator) -> Tensor:
    return (image - 0.5) * uniform(random, CONTRAST) + 0.5 + uniform(random, BRIGHTNESS)


Distortion = Callable[[Tensor, torch.Generator], Tensor]  # of one image (1, C, *size) in [0, 1]
SINGLE: dict[str, Distortion] = {
    "blur": blurred,
    "re-scaling": rescaled,
    "shift": shifted,
    "brightness": relit,
    "noise": noisy,
}
KINDS = ("exact", *SINGLE, "all five")


def rotated(image: Tensor, random: torch.Generator) -> Tensor:
    """Turned by 10 degrees in the last two axes."""
    axes, angle = image.dim() - 2, math.radians(10)
    matrix = torch.eye(axes)
    matrix[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return moved(image, matrix, torch.zeros(axes))


def cropped(image: Tensor, random: torch.Generator) -> Tensor:
    """The central half of the area, or of a volume, enlarged."""
    axes = image.dim() - 2
    return moved(image, torch.eye(axes) * 0.5 ** (1 / axes), torch.zeros(axes))


LIMITS: dict[str, Distortion] = {"turned by 10 degrees": rotated, "central half, enlarged": cropped}
BLEND = "mean of two training images"
LIMIT_COPIES = 24


def distorted(image: Tensor, kind: str, random: torch.Generator) -> npt.NDArray[np.uint8]:
    """A copy of `image` (1, C, *size) after the distortions of `kind`, as a pool would hold it."""
    for name, change in SINGLE.items():
        if kind in (name, "all five"):
            image = change(image, random)
    copy: npt.NDArray[np.uint8] = (image[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return copy


def moved(image: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """`image` sampled linearly at `matrix` x + `shift`, axes in the order (x, y, z) and [-1, 1] long; edges go on."""
    grid = F.affine_grid(torch.cat([matrix, shift[:, None]], dim=1)[None], list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


def uniform(random: torch.Generator, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=random))


@dataclass(frozen=True)
class Found:
    """One planted copy and what the audit made of it."""

    modality: str
    kind: str
    share: float
    seed: int
    score: float
    flagged: bool
    flagged_by_features: bool


def model_and_pool(stage: Stage, run: Path | None, work: Path) -> tuple[MultiModalMAE, npt.NDArray[np.uint8]]:
    """The model after this stage and the pool inverted from it: those of `run`, or made here in short."""
    if run is None:
        folder = work / f"{stage.number}"
        model = trained(stage, None, [], METHODS["invcoss"], folder)
        pool = buffer_of(stage, model, METHODS["invcoss"], folder)
        assert pool is not None
        return model, pool
    plan, name = stage.plan, f"stage-{stage.number:02d}-{stage.name}.safetensors"
    families = [plan.geometry(number) for number in range(stage.number + 1)]
    model = read_model(run / "models" / name, plan.model_shape, families)
    made = RunState.open(run / "state.db")[0].stage(stage.number).pool  # with the images that its own audit dropped
    assert made is not None
    return model, pool_from_bytes(ArtefactStore(run / "artefacts").path(made).read_bytes())


def fresh_pools(stage: Stage, model: MultiModalMAE, asked: argparse.Namespace) -> list[npt.NDArray[np.uint8]]:
    """More honest pools: the same model inverted again with other seeds, in fewer steps."""
    pools = []
    for seed in range(stage.plan.seed + 1, stage.plan.seed + 1 + asked.fresh):
        inversion = stage.plan.inversion.model_copy(update={"steps": asked.inversion_steps})
        plan = stage.plan.model_copy(update={"seed": seed, "inversion": inversion})
        folder = asked.work / plan.digest()[:12] / f"{asked.run.name if asked.run else 'short'}-{stage.number}"
        pool = buffer_of(Stage(plan, stage.number, stage.images), model, METHODS["invcoss"], folder)
        assert pool is not None
        pools.append(pool)
    return pools


def plant(
    pool: npt.NDArray[np.uint8], images: Tensor, share: float, seed: int
) -> tuple[npt.NDArray[np.uint8], dict[int, str]]:
    """`pool` with a share of its images replaced by copies of different training `images`, and their kinds by place."""
    random = generator_for(seed, "plant", str(share))
    count = max(1, round(share * len(pool)))
    places = torch.randperm(len(pool), generator=random)[:count].tolist()
    sources = torch.randperm(len(images), generator=random)[:count].tolist()
    first = int(torch.randint(len(KINDS), (), generator=random))
    kinds = [KINDS[(first + i) % len(KINDS)] for i in range(count)]
    mixed = pool.copy()
    for place, source, kind in zip(places, sources, kinds, strict=True):
        mixed[place] = distorted(images[source : source + 1], kind, random)
    return mixed, dict(zip(places, kinds, strict=True))


def limits(known: Calibration, images: Tensor, seed: int) -> dict[str, float]:
    """Share found of copies that are changed in ways that the audit does not look for."""
    random = generator_for(seed, "limits")
    rows = torch.randperm(len(images), generator=random)[: 2 * LIMIT_COPIES]
    chosen, others = images[rows[:LIMIT_COPIES]], images[rows[LIMIT_COPIES:]]
    changed = {
        name: torch.cat([change(image[None], random) for image in chosen]) for name, change in LIMITS.items()
    } | {BLEND: (chosen + others) / 2}
    pools = {name: (copies.clamp(0, 1) * 255).round().to(torch.uint8).numpy() for name, copies in changed.items()}
    return {name: mean(list(map(float, audit_against(pool, known).flagged))) for name, pool in pools.items()}


def planted(name: str, known: Calibration, audit: Audit, kinds: dict[int, str], share: float, seed: int) -> list[Found]:
    return [
        Found(
            name,
            kind,
            share,
            seed,
            round(audit.items[place].score, 4),
            audit.flagged[place],
            audit.items[place].features.nearness < known.feature_threshold,
        )
        for place, kind in sorted(kinds.items())
    ]


def recall(found: list[Found]) -> float:
    return mean([float(one.flagged) for one in found])


def rated(found: list[Found]) -> str:
    """Recall with its 95 % interval and the number of copies."""
    share = wilson(sum(one.flagged for one in found), len(found), 0.95)
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}] of {len(found)}"


def report(
    found: list[Found], rows: dict[str, dict[str, object]], figures: dict[str, float], asked: argparse.Namespace
) -> str:
    names = list(rows)
    met = {True: "met", False: "MISSED"}
    source = f"finished run `{asked.run.name}`" if asked.run else "short training and inversion made for this"
    lines = [
        "# Leak audit: planted copies of training images in synthetic pools",
        "",
        f"Real images, plan `{asked.plan.stem}`; models and pools of a {source}, one pool a modality, "
        f"and {asked.fresh} more each from inverting the same model again ({asked.inversion_steps} steps) for the "
        "honest images. "
        f"In {asked.seeds} seeds, "
        f"{', '.join(f'{s:.0%}' for s in SHARES)} of each pool (at least one image) were replaced by copies of "
        "training images, each with one kind of distortion, or all five at once. A copy is found when the audit "
        "drops it. "
        "The audit's settings are its defaults; the sizes looked for (`scales`) and the two measures that decide were "
        "chosen on these images with other copies, so expect somewhat less on other images.",
        "",
        f"- recall of planted copies: **{rated(found)}** (wanted {WANTED_RECALL:.0%}: "
        f"{met[figures['recall'] >= WANTED_RECALL]}); mean over modalities {figures['recall_mean']:.1%}",
        f"- the same without 'all five': {rated([f for f in found if f.kind != 'all five'])}",
        f"- honest synthetic images dropped, mean over modalities: **{figures['honest_dropped_share']:.1%}** (wanted "
        f"at most {WANTED_DROPPED:.0%}: {met[figures['honest_dropped_share'] <= WANTED_DROPPED]}; worst single "
        f"pool {figures['honest_dropped_share_worst_pool']:.1%}: "
        f"{met[figures['honest_dropped_share_worst_pool'] <= WANTED_DROPPED]})",
        f"- membership inference by the model's own loss: mean AUC **{figures['membership_auc']:.3f}** "
        "(0.5 tells nothing)",
        "",
        "| recall, [95 % interval] | " + " | ".join(names) + " | all |",
        "| --- |" + " --- |" * (len(names) + 1),
    ]
    for kind in (*KINDS, "together"):
        of = [f for f in found if kind in (f.kind, "together")]
        cells = [rated([f for f in of if f.modality == name]) for name in names] + [rated(of)]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"By features of the model alone, at the same rate, {figures['recall_features']:.1%} would be found: they are "
        "shown at the site but decide nothing.",
        "",
        "| | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for label in next(iter(rows.values())):
        lines.append(f"| {label} | " + " | ".join(str(rows[name][label]) for name in names) + " |")
    lines += [
        "",
        f"Distortions, at the input size, uniform in these ranges: Gaussian blur of SD {BLUR[2][0]}-{BLUR[2][1]} "
        f"pixels ({BLUR[3][0]}-{BLUR[3][1]} in volumes); noise of SD {NOISE[0]}-{NOISE[1]} (values lie in [0, 1]); "
        f"shift up to {SHIFT:g} pixels an axis ({SHIFT_DEPTH:g} along depth); re-scaling by {SCALE[0]}-{SCALE[1]}; "
        f"contrast {CONTRAST[0]}-{CONTRAST[1]} and brightness {BRIGHTNESS[0]:+g} to {BRIGHTNESS[1]:+g}.",
        "",
        "How to read it: 'threshold' is the score (0 a copy, about 1 as near as a typical image of another case) that "
        "the nearest few held-out images set. 'Nearest image is a training one' compares with what chance gives where "
        "there are more training images. Ratios are distances to the nearest training over the nearest held-out image, "
        "for equally many of both; sub-volumes of one CT overlap, so held-out CTs have each other as nearest. "
        "Intervals take images as independent; several of one patient are not, so they are too narrow for CT and "
        "pathology. Honest images come from few inversions of one model: what others lose is not known. "
        f"'Found, turned' and the next two are changes that the audit does not look for, {LIMIT_COPIES} copies each, "
        "not in the recall. No picture is shown, as a planted leak is a real image.",
        "",
        "Regenerate: `invcoss-server simulate plans/real-small.toml --data DIR --out runs/real-small`, then "
        "`python benchmarks/leak_audit.py --data DIR --run runs/real-small`.",
    ]
    return "\n".join(lines)


def short(plan: Plan, asked: argparse.Namespace) -> Plan:
    """`plan` with the lengths of a model and pool that are made only for this."""
    return plan.model_copy(
        update={
            "train": plan.train.model_copy(update={"steps": asked.train_steps, "epochs": None}),
            "inversion": plan.inversion.model_copy(update={"steps": asked.inversion_steps}),
            "stages": tuple(stage.model_copy(update={"steps": None, "epochs": None}) for stage in plan.stages),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=Path("plans/real-small.toml"))
    parser.add_argument("--data", type=Path, required=True, help="the folder that the plan's site folders are in")
    parser.add_argument("--run", type=Path, help="folder of a finished run of the plan; unset: short training here")
    parser.add_argument("--train-steps", type=int, default=150, help="of each modality, without --run")
    parser.add_argument("--inversion-steps", type=int, default=100, help="of fresh pools, and of all without --run")
    parser.add_argument("--fresh", type=int, default=1, help="more honest pools of each model")
    parser.add_argument("--seeds", type=int, default=5, help="times that copies are planted")
    parser.add_argument("--work", type=Path, default=Path("runs/leak-audit"), help="keeps what is made here")
    parser.add_argument("--out", type=Path, default=MEASUREMENTS)
    asked = parser.parse_args()
    plan = load_plan(asked.plan)
    if asked.run is None:
        plan = short(plan, asked)
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    found: list[Found] = []
    rows: dict[str, dict[str, object]] = {}
    raw: dict[str, object] = {}
    figures: dict[str, float] = {}
    for number, images in enumerate(site_images(plan, asked.data, asked.work)):
        stage = Stage(plan, number, images)
        name = stage.name
        model, pool = model_and_pool(stage, asked.run, asked.work / plan.digest()[:12])
        began = time.perf_counter()
        known = calibrate(images.train, images.heldout, model, stage.geometry)
        honest = audit_against(pool, known)
        seconds = time.perf_counter() - began
        sized = torch.cat(list(whole_images(images.train, stage.geometry, 256)))
        refused: dict[float, list[bool]] = {share: [] for share in SHARES}
        here: list[Found] = []
        for seed in range(asked.seeds):
            for share in SHARES:
                mixed, kinds = plant(pool, sized, share, derive_seed(plan.seed, name, seed))
                audit = audit_against(mixed, known)
                here += planted(name, known, audit, kinds, share, seed)
                refused[share].append(audit.refused)
        beyond = limits(known, sized, derive_seed(plan.seed, name))
        member = membership_auc(
            model,
            images.train,
            images.heldout,
            stage.geometry,
            mask_ratio=plan.train.mask_ratio,
            draws=plan.evaluate.mask_draws,
            batch_size=plan.evaluate.batch_size,
            seed=plan.seed,
        )
        found += here
        honest_audits = [honest, *(audit_against(more, known) for more in fresh_pools(stage, model, asked))]
        flags = [flag for audit in honest_audits for flag in audit.flagged]
        lost = wilson(sum(flags), len(flags), 0.95)
        dropped = lost.value
        figures |= {
            f"recall_{name}": recall(here),
            f"honest_dropped_share_{name}": dropped,
            f"honest_dropped_share_worst_pool_{name}": max(mean(list(map(float, a.flagged))) for a in honest_audits),
            f"membership_auc_{name}": member.auc.value,
        }
        rows[name] = {
            "training / held-out / synthetic images": f"{len(images.train)} / {len(images.heldout)} / {len(pool)}",
            **{f"found, {kind}": f"{value:.0%}" for kind, value in beyond.items()},
            "honest images dropped": f"{dropped:.1%} [{lost.low:.1%}, {lost.high:.1%}] of {len(flags)}",
            "copies in the run's pool": honest.copies,
            "honest images dropped, pool by pool (the run's first)": ", ".join(
                f"{sum(audit.flagged)} of {len(audit.flagged)}" for audit in honest_audits
            ),
            "honest pools refused": f"{sum(audit.refused for audit in honest_audits)} of {len(honest_audits)}",
            **{f"pools with {s:.0%} planted refused": f"{mean(list(map(float, refused[s]))):.0%}" for s in SHARES},
            "threshold": f"{known.threshold:.2f}",
            "lowest and median score of the run's pool": f"{min(i.score for i in honest.items):.2f}, "
            f"{float(np.median([i.score for i in honest.items])):.2f}",
            "nearest image is a training one (by chance)": f"{honest.closer.value:.0%} [{honest.closer.low:.0%}, "
            f"{honest.closer.high:.0%}] ({honest.closer_by_chance:.0%})",
            "median ratio: pool / held-out": f"{honest.median_ratio:.2f} / {honest.null_median_ratio:.2f}",
            "membership AUC [95 % interval]": f"{member.auc.value:.3f} [{member.auc.low:.3f}, {member.auc.high:.3f}]",
            "seconds of one audit": f"{seconds:.0f}",
        }
        raw[name] = {
            "honest": honest.summary(),
            "limits": beyond,
            "honest_dropped": lost.model_dump(mode="json"),
            "membership": member.model_dump(mode="json"),
        }
        console.print(f"{name}: recall {rated(here)}, honest dropped {dropped:.1%}, audit {seconds:.0f} s")
    per = list(rows)
    figures["recall"] = recall(found)
    figures["recall_mean"] = mean([figures[f"recall_{name}"] for name in per])
    figures["recall_features"] = mean([float(one.flagged_by_features) for one in found])
    for kind in KINDS:
        figures[f"recall_{kind.replace(' ', '_').replace('-', '')}"] = recall([f for f in found if f.kind == kind])
    figures["honest_dropped_share"] = mean([figures[f"honest_dropped_share_{name}"] for name in per])
    figures["honest_dropped_share_worst_pool"] = max(figures[f"honest_dropped_share_worst_pool_{name}"] for name in per)
    figures["membership_auc"] = mean([figures[f"membership_auc_{name}"] for name in per])
    page = report(found, rows, figures, asked)
    config: dict[str, object] = {
        "plan": plan.model_dump(mode="json"),
        "settings": AuditSettings().model_dump(mode="json"),
        "seeds": asked.seeds,
        "shares": SHARES,
        "run": asked.run.name if asked.run else None,
    }
    raw["planted"] = [vars(one) for one in found]
    written = write_measurement("leak-audit", figures, config, raw, page, asked.out)
    console.print(page)
    console.print(f"{written} and .md beside it")


if __name__ == "__main__":
    main()
