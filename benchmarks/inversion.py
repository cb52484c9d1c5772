"""Inversion with InvUNet against a DCGAN-like decoder and direct pixels: time, memory and quality, in 2-D and 3-D.

    python benchmarks/inversion.py --plan plans/real-small.toml --data DIR

All invert the same models with the same statistics, steps and learning rates, each in a process of its own, and take
turns. N = images, C = channels, D = encoder width.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from invcoss_common.canonical import canonical_json, sha256_hex, write_atomic
from invcoss_common.config import InversionConfig, Plan, TrainConfig, load_plan
from invcoss_common.modality import SIZES, Modality
from invcoss_common.model import MultiModalMAE, build_model
from invcoss_common.phantoms import write_phantoms
from invcoss_common.pools import pool_from_bytes, pool_to_bytes
from invcoss_common.seeds import derive_seed, generator_for
from invcoss_common.statistics import record_statistics, statistics_from_bytes, statistics_to_bytes
from invcoss_common.weights import model_from_bytes, model_to_bytes
from invcoss_server.inversion import InversionProgress, OnProgress, invert
from invcoss_server.pool import contact_sheet
from invcoss_server.synthesis import POOL, Job
from invcoss_site.batches import whole_images
from invcoss_site.evaluate import heldout_loss
from invcoss_site.inventory import take_inventory
from invcoss_site.prepare import prepare
from invcoss_site.trainer import train
from measurement import MEASUREMENTS, Meter, mean, plus_minus, spread, stem, write_measurement

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODALITIES = {"2d": "xray", "3d": "ct"}
GENERATORS = {"invunet": "InvUNet", "dcgan": "DCGAN-like decoder", "pixels": "direct pixels"}
NAMES = GENERATORS | {"gaussian": "per-pixel Gaussian (control)", "real": "real training images (reference)"}
NEIGHBOURS = 5
PHANTOMS = 300  # cases of a modality where the plan gives no number

PRDC = ("precision", "recall", "density", "coverage")
COST = ("seconds_per_image", "peak_mb", "peak_mb_per_batch_image")
TERMS = ("task", "norm", "image", "repulsive")
QUALITY = ("mean_image_rmse", "sd_ratio", "log_spectrum_error", "mim_ratio", *PRDC)
TABLES = {
    "Cost": COST,
    "Loss terms, mean over the last tenth of the steps, unweighted": tuple(f"{term}_loss" for term in TERMS),
    "Quality": QUALITY,
    "In the inverted model's own features": tuple(f"own_{name}" for name in PRDC),
}
WANTED = {"mim_ratio": (0.3, 1.5), "sd_ratio": (0.7, 1.2)}  # what we ask of a pool; 1 is best
READING = f"""## How to read it

- Peak MB is the most that one inversion held beyond its loaded model, in a process of its own.
- Precision, recall, density and coverage (k = {NEIGHBOURS}) compare with held-out real images in the features of an
  independent encoder: the same architecture, trained with another seed on the same images.
- In the inverted model's own features the inversion optimises what these scores look at: they prove no quality.
- Log-spectrum error is the mean absolute difference in log power per frequency; it sees missing fine detail.
- MIM ratio is the model's masked loss on the images over its loss on its training images.
- Mean-image RMSE and SD ratio (spread over images, mean over pixels) compare with held-out real images too.
- "Not told apart" means that the means differ by no more than the sum of the two standard deviations."""

Row = dict[str, float]
Rows = dict[str, list[Row]]  # by generator or control: a row for each seed


@dataclass(frozen=True)
class Subject:
    """One model to invert and the images to judge the outcome by: `train` and `heldout` (N, C, *size) in [0, 1]."""

    job: Job
    model: MultiModalMAE
    independent: MultiModalMAE
    train: Tensor
    heldout: Tensor
    facts: Row


def main() -> None:
    options = argparse.ArgumentParser(description="Compare the generators of inversion.")
    options.add_argument("--plan", type=Path, default=Path("plans/real-small.toml"))
    options.add_argument("--data", type=Path, help="folder with the sites' images; unset: phantoms")
    options.add_argument("--steps", type=int, help="inversion steps; unset: the plan's")
    options.add_argument("--images", type=int, help="images of a pool; unset: the plan's")
    options.add_argument("--train-steps", type=int, help="training steps; unset: the plan's")
    options.add_argument("--seeds", type=int, default=3, help="inversions of each model with each generator")
    options.add_argument("--work", type=Path, default=Path("runs/inversion-benchmark"), help="keeps data and models")
    options.add_argument("--out", type=Path, default=MEASUREMENTS)
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.child:
        measure(asked.child)
    else:
        plan = load_plan(asked.plan)
        changes = {"pool_size": asked.images or plan.inversion.pool_size, "steps": asked.steps or plan.inversion.steps}
        inversion = InversionConfig.model_validate(plan.inversion.model_dump() | changes)
        if inversion.pool_size <= NEIGHBOURS or asked.seeds < 1:
            options.error(f"at least {NEIGHBOURS + 1} images and one seed are needed")
        compare(plan.model_copy(update={"inversion": inversion}), asked)


def compare(plan: Plan, asked: argparse.Namespace) -> None:
    """Invert with every generator and seed, and write what was found."""
    torch.set_num_threads(plan.threads or torch.get_num_threads())
    results: dict[str, Rows] = {dimension: {name: [] for name in NAMES} for dimension in MODALITIES}
    sheets: dict[tuple[str, str], bytes] = {}
    asked.work.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True)) as bars, tempfile.TemporaryDirectory(dir=asked.work) as scratch:
        subjects = {dimension: subject(plan, modality, asked, bars) for dimension, modality in MODALITIES.items()}
        for seed in range(asked.seeds):
            turns = [*GENERATORS, *GENERATORS][seed % len(GENERATORS) :][: len(GENERATORS)]
            for dimension, known in subjects.items():
                for generator in turns:
                    folder = Path(scratch, f"{seed}-{dimension}-{generator}")
                    row, pool = in_child(known.job, generator, seed, folder, bars)
                    sheets.setdefault((dimension, generator), contact_sheet(pool, count=12))
                    row |= quality(known, torch.from_numpy(pool).float() / 255, plan)
                    results[dimension][generator].append(row)
                for control, images in controls(known, plan.inversion.pool_size, seed).items():
                    results[dimension][control].append(quality(known, images, plan))
    figures = {
        f"{metric}_{dimension}_{name}": mean([row[metric] for row in rows])
        for dimension, by_name in results.items()
        for name, rows in by_name.items()
        for metric in rows[0]
    }
    config: dict[str, object] = {
        "plan": plan.model_dump(mode="json", exclude={"simulation"}),
        "data": "real images" if asked.data else "phantoms",
        "generators": list(GENERATORS),
        "seeds": asked.seeds,
        "train_steps": {dimension: known.facts["train_steps"] for dimension, known in subjects.items()},
    }
    raw = {"runs": results, "subjects": {dimension: known.facts for dimension, known in subjects.items()}}
    page = report(results, subjects, plan.inversion, str(config["data"]))
    path = write_measurement("inversion", figures, config, raw, page, asked.out)
    write_atomic(path.with_suffix(".png"), picture(sheets))
    Console().print(str(path.with_suffix(".md")), highlight=False)


def subject(plan: Plan, modality: str, asked: argparse.Namespace, bars: Progress) -> Subject:
    """Prepare the images of the plan's first stage of `modality`, train two models on them and record statistics."""
    stage = next((n for n, s in enumerate(plan.stages) if s.modality == modality), None)
    if stage is None:
        raise SystemExit(f"the plan has no {modality} stage")
    kind, geometry, shape = plan.modality(stage), plan.geometry(stage), SIZES[plan.size].model
    inventory = take_inventory(*image_folder(plan, stage, asked))
    bar = bars.add_task(f"{modality}: images", total=None)
    spacing, cache = plan.stages[stage].spacing_mm, asked.work / "cache"
    images = prepare(
        inventory, kind, geometry, spacing, cache, lambda done, of: bars.update(bar, completed=done, total=of)
    )
    heldout = torch.from_numpy(np.ascontiguousarray(images.heldout)).float()
    if len(heldout) <= NEIGHBOURS:
        raise SystemExit(f"{modality}: {len(heldout)} held-out images are too few for {NEIGHBOURS} neighbours")
    whole = torch.cat(list(whole_images(images.train, geometry, plan.evaluate.batch_size)))
    config = plan.train_for(stage)
    if asked.train_steps:
        config = TrainConfig.model_validate(config.model_dump() | {"steps": asked.train_steps, "epochs": None})
    recipe = [part.model_dump(mode="json") for part in (config, geometry, shape, kind)]
    content = sha256_hex(np.ascontiguousarray(images.train).tobytes())

    def trained(seed: int) -> Path:
        path = Path(asked.work, f"{modality}-{sha256_hex(canonical_json([recipe, content, seed]))[:16]}.safetensors")
        if not path.exists():
            bar = bars.add_task(f"{modality}: training, seed {seed}", total=None)
            model, checkpoint = build_model(shape, [geometry], seed).to(DEVICE), path.with_suffix(".checkpoint")
            train(
                model,
                images.train,
                geometry,
                config,
                seed=derive_seed(seed, "stage", stage),
                flip=kind.horizontal_flip,
                checkpoint=checkpoint,
                on_progress=lambda now: bars.update(bar, completed=now.step, total=now.steps),
            )
            write_atomic(path, model_to_bytes(model))
            checkpoint.unlink(missing_ok=True)
        return path

    paths = trained(plan.seed), trained(plan.seed + 1)
    model, independent = (model_from_bytes(path.read_bytes(), shape, [geometry]).to(DEVICE) for path in paths)
    batches = (batch.to(DEVICE) for batch in whole.split(plan.evaluate.batch_size))
    seed = derive_seed(plan.seed, "statistics", stage)
    statistics = record_statistics(model, batches, geometry, config.mask_ratio, seed)
    write_atomic(paths[0].with_suffix(".statistics"), statistics_to_bytes(statistics))
    job = Job(
        model=paths[0],
        statistics=paths[0].with_suffix(".statistics"),
        shape=shape,
        families=(geometry,),
        geometry=geometry,
        inversion=plan.inversion,
        mask_ratio=config.mask_ratio,
        seed=plan.seed,
        threads=plan.threads,
    )
    facts = {
        "train_images": len(whole),
        "train_cases": images.train_cases,
        "train_steps": config.steps or 0,
        "train_loss": float(statistics.task_loss),
        "heldout_images": len(heldout),
        "heldout_cases": len({item.case for item in inventory.items if item.held_out}),
        "heldout_loss": mim(model, heldout, job, plan),
        "independent_heldout_loss": mim(independent, heldout, job, plan),
    }
    return Subject(job, model, independent, whole, heldout, facts)


def image_folder(plan: Plan, stage: int, asked: argparse.Namespace) -> tuple[Path, Modality, tuple[str, ...]]:
    """Folder, modality and index of a stage's images: the plan's under --data, or phantoms made on first use."""
    modality, source = plan.stages[stage].modality, plan.simulation.get(plan.stages[stage].site)
    if asked.data:
        if source is None or source.folder is None:
            raise SystemExit(f"the plan names no folder under --data for its {modality} stage")
        return asked.data / source.folder, plan.modality(stage), source.index
    cases = source.phantoms if source and source.phantoms else PHANTOMS
    folder = Path(asked.work, "phantoms", f"{modality}-{cases}-{plan.seed}")
    if not (folder / "labels.csv").exists():
        write_phantoms(folder, modality, cases, plan.seed)
    return folder, plan.modality(stage), ("labels.csv",)


def in_child(job: Job, generator: str, seed: int, folder: Path, bars: Progress) -> tuple[Row, npt.NDArray[np.uint8]]:
    """Cost, loss terms and pool of one inversion, made in a child process."""
    config = InversionConfig.model_validate(job.inversion.model_dump() | {"generator": generator})
    job = job.model_copy(update={"inversion": config, "seed": derive_seed(job.seed, "inversion", seed)})
    write_atomic(folder / "job.json", job.model_dump_json().encode())
    bar = bars.add_task(f"{job.geometry.ndim}-D {GENERATORS[generator]}, seed {seed}", total=None)
    command = [sys.executable, __file__, "--child", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            step, steps = map(int, line.split())
            bars.update(bar, completed=step, total=steps)
    if child.returncode:
        raise SystemExit(f"inversion with {generator} ended with status {child.returncode}")
    row: Row = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    return row, pool_from_bytes((folder / POOL).read_bytes())


def measure(folder: Path) -> None:
    """The child: do the inversion of `job.json`, and write its pool and what it took."""
    job = Job.model_validate_json((folder / "job.json").read_bytes())
    torch.set_num_threads(job.threads or torch.get_num_threads())
    model = model_from_bytes(job.model.read_bytes(), job.shape, job.families).to(DEVICE)
    statistics = statistics_from_bytes(job.statistics.read_bytes(), job.shape)
    config, ends = job.inversion, list[InversionProgress]()

    def note(now: InversionProgress) -> None:
        print(now.step, now.steps, flush=True)
        if (now.step - 1) % config.steps >= int(0.9 * config.steps):
            ends.append(now)

    def run(settings: InversionConfig, name: str, tell: OnProgress | None = None) -> npt.NDArray[np.uint8]:
        into, ratio, seed = folder / name, job.mask_ratio, job.seed
        return invert(
            model, statistics, job.geometry, settings, mask_ratio=ratio, seed=seed, folder=into, on_progress=tell
        )

    # The optimisers load much of PyTorch when they are first used: no generator's cost.
    run(config.model_copy(update={"generator": "pixels", "steps": 1, "pool_size": 2}), "warm-up")
    with Meter() as meter:
        pool = run(config, "pool", note)
    costs = (meter.seconds / len(pool), meter.peak_mb, meter.peak_mb / min(config.batch_size, len(pool)))
    row = dict(zip(COST, costs, strict=True))
    row |= {f"{term}_loss": mean([getattr(now, term) for now in ends]) for term in TERMS}
    write_atomic(folder / POOL, pool_to_bytes(pool))
    write_atomic(folder / "row.json", json.dumps(row).encode())


def controls(known: Subject, count: int, seed: int) -> dict[str, Tensor]:
    """As many images without inversion: drawn pixel by pixel from the training mean and spread, and real ones."""
    random = generator_for("controls", seed)
    chosen = torch.randperm(len(known.train), generator=random)[:count]
    noise = torch.randn(count, *known.train.shape[1:], generator=random)
    drawn = known.train.mean(dim=0) + known.train.std(dim=0) * noise
    return {"gaussian": drawn.clamp(0, 1), "real": known.train[chosen]}


def quality(known: Subject, images: Tensor, plan: Plan) -> Row:
    """How near `images` are to the held-out real ones."""
    real = known.heldout
    row = {
        "mean_image_rmse": float((images.mean(dim=0) - real.mean(dim=0)).square().mean().sqrt()),
        "sd_ratio": float(images.std(dim=0).mean() / real.std(dim=0).mean()),
        "log_spectrum_error": float((log_spectrum(images) - log_spectrum(real)).abs().mean()),
        "mim_ratio": mim(known.model, images, known.job, plan) / known.facts["train_loss"],
    }
    for prefix, model in (("", known.independent), ("own_", known.model)):
        far, near = (features(model, x, known.job) for x in (real, images))
        centre, width = far.mean(dim=0), far.std(dim=0) + 1e-6
        scores = prdc((far - centre) / width, (near - centre) / width)
        row |= {f"{prefix}{name}": score for name, score in zip(PRDC, scores, strict=True)}
    return row


def mim(model: MultiModalMAE, images: Tensor, job: Job, plan: Plan) -> float:
    draws, size = plan.evaluate.mask_draws, plan.evaluate.batch_size
    return heldout_loss(
        model, images, job.geometry, mask_ratio=job.mask_ratio, draws=draws, batch_size=size, seed=plan.seed
    )


@torch.no_grad()
def features(model: MultiModalMAE, images: Tensor, job: Job) -> Tensor:
    """Mean latent token (N, D) of unmasked images."""
    parts = (part.to(DEVICE) for part in images.split(64))
    return torch.cat([model.encode(part, job.geometry)[:, 1:].mean(dim=1).cpu() for part in parts])


def prdc(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[float, ...]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) of features (N, D)."""
    exact = "donot_use_mm_for_euclid_dist"  # an image is at distance 0 from itself, so it is its own first neighbour
    radius, fake_radius = (torch.cdist(x, x, compute_mode=exact).kthvalue(k + 1).values for x in (real, fake))
    distance = torch.cdist(real, fake, compute_mode=exact)
    inside = distance < radius[:, None]
    recalled, covered = (distance < fake_radius).any(dim=1), distance.amin(dim=1) < radius
    shares = [float(found.float().mean()) for found in (inside.any(dim=0), recalled, covered)]
    return shares[0], shares[1], float(inside.sum(dim=0).float().mean()) / k, shares[2]


def log_spectrum(images: Tensor) -> Tensor:
    """Log of the mean power per frequency; the floor is the noise of rounding to 8 bits, which only pools carry."""
    axes = tuple(range(2, images.dim()))
    waves = torch.fft.rfftn(images - images.mean(dim=axes, keepdim=True), dim=axes)
    floor = images[0, 0].numel() / (12 * 255**2)
    return torch.log(waves.abs().square().mean(dim=(0, 1)) + floor)


def report(results: dict[str, Rows], subjects: dict[str, Subject], inversion: InversionConfig, data: str) -> str:
    """The page: what was found, in sentences made from the numbers, and the tables."""
    seeds = len(results["2d"]["invunet"])
    lines = [
        "# Generators of inversion compared",
        "",
        f"Pools of {inversion.pool_size} synthetic images, {inversion.steps} steps with batches of "
        f"{inversion.batch_size}, on {data}. One model per dimension, inverted with {seeds} seed{'s'[: seeds > 1]}; "
        "± is the standard deviation over these. All use the plan's learning rates, which were chosen for InvUNet: the "
        "others need not be at their best.",
    ]
    for dimension, rows in results.items():
        facts = subjects[dimension].facts
        sides = [
            f"{facts[f'{s}_images']} {name} images of {facts[f'{s}_cases']} cases, masked loss {facts[f'{s}_loss']:.3f}"
            for s, name in (("train", "training"), ("heldout", "held-out"))
        ]
        title = f"{dimension[0]}-D ({MODALITIES[dimension]})"
        lines += ["", f"## {title}", "", f"- The inverted model: {'; '.join(sides)}.", *findings(rows)]
        for title, metrics in TABLES.items():
            lines += ["", f"### {title}", "", f"| | {' | '.join(map(heading, metrics))} |"]
            lines.append("|---" * (len(metrics) + 1) + "|")
            for name in (name for name in rows if metrics[0] in rows[name][0]):
                cells = [plus_minus([row[metric] for row in rows[name]]) for metric in metrics]
                lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    pictures = f"First seed; of a volume the middle slice:\n\n![Synthetic images]({stem('inversion')}.png)"
    return "\n".join([*lines, "", READING, "", pictures])


def heading(metric: str) -> str:
    words = metric.removeprefix("own_").replace("_", " ")
    for plain, proper in (("mb", "MB"), ("rmse", "RMSE"), ("sd ", "SD "), ("mim ", "MIM ")):
        words = words.replace(plain, proper)
    return words


def findings(rows: Rows) -> list[str]:
    """Sentences about one dimension, favourable or not."""

    def values(name: str, metric: str) -> list[float]:
        return [row[metric] for row in rows[name]]

    def scores(name: str, metric: str) -> list[float]:  # less is better
        return [abs(x - 1) if metric in WANTED else -x if metric in PRDC else x for x in values(name, metric)]

    def against(names: list[str], metrics: tuple[str, ...], whom: str) -> list[str]:
        verdicts: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
        for metric in metrics:
            rival = min(names, key=lambda name: mean(scores(name, metric)))
            ours, theirs = scores("invunet", metric), scores(rival, metric)
            gap, noise = mean(ours) - mean(theirs), spread(ours) + spread(theirs)
            verdict = "not told apart from" if abs(gap) <= noise else "worse than" if gap > 0 else "better than"
            numbers = f"{plus_minus(values('invunet', metric))} against {plus_minus(values(rival, metric))}"
            verdicts[verdict].append(f"{heading(metric)} ({numbers}{f', {NAMES[rival]}' if len(names) > 1 else ''})")
        return [f"- InvUNet is {verdict} {whom} in {'; '.join(found)}." for verdict, found in verdicts.items() if found]

    seconds = {name: mean(values(name, "seconds_per_image")) for name in GENERATORS}
    cheapest = min(seconds, key=lambda name: seconds[name])
    others = [name for name in seconds if name != cheapest]
    slower = [f"{NAMES[name]} {seconds[name] / seconds[cheapest]:.2f} times that" for name in others]
    unseen = mean(values("invunet", "log_spectrum_error")) / mean(values("real", "log_spectrum_error"))
    lines = [
        f"- Cheapest in time: {NAMES[cheapest]}; {' and '.join(slower)}.",
        *against(["dcgan", "pixels"], (*COST[:2], *QUALITY), "the better rival"),
        *against(["gaussian"], QUALITY, "the per-pixel Gaussian, which needs no inversion,"),
        f"- InvUNet's log-spectrum error is {unseen:.1f} times that of real training images.",
    ]
    for metric, (low, high) in WANTED.items():
        out = [NAMES[name] for name in GENERATORS if not low <= mean(values(name, metric)) <= high]
        if out:
            lines.append(f"- The {heading(metric)} wanted of a pool, {low} to {high}, is missed by {', '.join(out)}.")
    if len(rows["invunet"]) == 1:
        lines.append("- One seed only: no spread is known, so none of these differences is established.")
    return lines


def picture(sheets: dict[tuple[str, str], bytes]) -> bytes:
    """Contact sheets of synthetic images, one above the other, as PNG."""
    figure = Figure(figsize=(9, 1.05 * len(sheets)), layout="constrained")
    rows = [(dimension, generator) for dimension in MODALITIES for generator in GENERATORS]
    for axes, (dimension, generator) in zip(figure.subplots(len(sheets), 1), rows, strict=True):
        axes.imshow(np.asarray(Image.open(io.BytesIO(sheets[dimension, generator]))), interpolation="nearest")
        axes.set_title(f"{dimension[0]}-D, {NAMES[generator]}", fontsize=8, loc="left")
        axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
