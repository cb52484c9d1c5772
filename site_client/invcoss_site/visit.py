"""The main path of a site: a hand-off comes in, images stay, a trained model and numbers go out. Start reading here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from invcoss_common import __version__
from invcoss_common.canonical import sha256_hex, write_atomic
from invcoss_common.metrics import CURVE_POINTS
from invcoss_common.model import MultiModalMAE
from invcoss_common.pools import images_like
from invcoss_common.records import DpSpent, HandOff, Phase, Report, Status, Task, to_bytes
from invcoss_common.seeds import derive_seed
from invcoss_common.statistics import record_statistics, statistics_from_bytes, statistics_to_bytes
from invcoss_common.weights import read_model, round_weights, write_model
from invcoss_site import ranks
from invcoss_site.batches import FloatImages, whole_images
from invcoss_site.dp import Private, visit_key
from invcoss_site.dp_statistics import private_statistics
from invcoss_site.evaluate import heldout_loss
from invcoss_site.home import SiteHome
from invcoss_site.inventory import take_inventory
from invcoss_site.permission import check_images
from invcoss_site.policy import load_policy
from invcoss_site.prepare import SiteImages, prepare
from invcoss_site.privacy import Charge, charge
from invcoss_site.release import release_pool
from invcoss_site.replay import Rehearse, ReplayPool, rehearsal
from invcoss_site.sample_store import StoredImages
from invcoss_site.trainer import Progress, steps_for, train

OnStatus = Callable[[Status], None]


def visit(handoff: HandOff, home: SiteHome, on_status: OnStatus) -> Report:
    """Do what `handoff` asks with this site's images and return what may leave.

    Artefacts of the hand-off are in `home.artefacts` already; those of the report are put there. A killed visit that
    is called again goes on from its checkpoint. Where several processes train together, the first calls this: it alone
    reads images, takes statistics and evaluates. Raises InvcossError with a text meant for this site only.
    """
    task = handoff.task
    if task.threads:
        torch.set_num_threads(task.threads)
    with ranks.joined(home.hop_folder(handoff.hop)):
        images = site_images(home, task, on_status)
        check_images(load_policy(home.root), task, len(images.train), images.train_cases, images.heldout_cases)
        private, spent = begin_private(handoff, home, images)
        model = load_model(handoff, home, ranks.device())
        progress = _train(handoff, home, model, images.train, on_status, private) if task.kind == "train" else None
    metrics = {
        "train_images": float(len(images.train)),
        "train_cases": float(images.train_cases),
        "heldout_images": float(len(images.heldout)),
        "quarantined_files": float(len(images.quarantined)),
    }
    report = Report(
        protocol=handoff.protocol,
        run=handoff.run,
        hop=handoff.hop,
        sender=home.name,
        plan_digest=handoff.plan_digest,
        code_version=__version__,
        metrics=metrics,
        dp=spent,
    )
    if task.kind == "audit":
        release = release_pool(handoff, home, model, images, counter(on_status, "auditing"))
        return report.model_copy(update={"release": release})
    if progress:
        report = _add_results(handoff, home, model, images.train, progress, on_status, report, private)
    loss = evaluate(model, images.heldout, task, on_status)
    return report.model_copy(update={"metrics": report.metrics | {"heldout_mim_loss": loss}})


def assist(handoff: HandOff, home: SiteHome) -> None:
    """The part of every process but the first in the `visit` of `handoff`: to train beside it."""
    if handoff.task.threads:
        torch.set_num_threads(handoff.task.threads)
    with ranks.joined(home.hop_folder(handoff.hop)):
        _train(handoff, home, load_model(handoff, home, ranks.device()), None, lambda _status: None)


def site_images(home: SiteHome, task: Task, on_status: OnStatus) -> SiteImages:
    """This site's images of the task's modality, ready for the model; damaged files are quarantined."""
    inventory = take_inventory(home.data, task.modality, home.index, home.only, layout=home.layout)
    tell = counter(on_status, "reading")
    limit = None if home.cache_gb is None else round(home.cache_gb * 1e9)
    return prepare(inventory, task.modality, task.geometry, task.spacing_mm, home.cache, tell, limit)


def begin_private(handoff: HandOff, home: SiteHome, images: SiteImages) -> tuple[Private | None, DpSpent | None]:
    """What makes this training private, and what the site's account is charged for all of it by now; else (None, None).

    Raises BudgetSpent before anything is charged, DataError where Opacus is not installed.
    """
    task, dp = handoff.task, handoff.dp
    if dp is None or task.kind != "train":
        return None, None
    key = visit_key(home.secrets(handoff.hop), sha256_hex(to_bytes(handoff)), images.key)
    private = Private(dp, images.case_of, key)
    asked = Charge(
        visit=private.name,
        run=handoff.run,
        hop=handoff.hop,
        noise_multiplier=dp.noise_multiplier,
        sample_rate=private.sample_rate(task.train),
        steps=steps_for(task.train, private.cases),
        statistics_noise=dp.statistics_noise,
    )
    return private, charge(home, load_policy(home.root).dp, asked, dp.delta)


def load_model(handoff: HandOff, home: SiteHome, device: torch.device) -> MultiModalMAE:
    file = home.artefacts.path(handoff.model)
    return read_model(file, handoff.task.model, handoff.task.families, handoff.wire_dtype).to(device)


def evaluate(model: MultiModalMAE, heldout: FloatImages, task: Task, on_status: OnStatus) -> float:
    """Held-out loss; the masks depend on the run's seed only, so that stages can be compared."""
    few = torch.from_numpy(np.ascontiguousarray(heldout[: task.evaluate.max_images]))
    return heldout_loss(
        model,
        few,
        task.geometry,
        mask_ratio=task.train.mask_ratio,
        draws=task.evaluate.mask_draws,
        batch_size=task.evaluate.batch_size,
        seed=task.seed,
        on_progress=counter(on_status, "evaluating"),
    )


def counter(on_status: OnStatus, phase: Phase) -> Callable[[int, int], None]:
    """A function (done, of) that reports how far a phase is, so that nobody takes a long one for a standstill."""
    return lambda done, of: on_status(Status(state="running", phase=phase, step=done, steps=of))


def load_rehearsal(handoff: HandOff, home: SiteHome, device: torch.device) -> Rehearse | None:
    """The rehearsal of the hand-off's pools against the model as it arrived, or None in the first stage."""
    if not handoff.pools:
        return None
    task = handoff.task
    pools = [
        ReplayPool(images_like(home.artefacts.path(pool.artefact), pool.geometry), pool.geometry)
        for pool in handoff.pools
    ]
    return rehearsal(
        load_model(handoff, home, device),
        pools,
        task.replay,
        batch_size=task.train.batch_size,
        mask_ratio=task.train.mask_ratio,
        seed=derive_seed(task.seed, "stage", task.stage),
    )


def _train(
    handoff: HandOff,
    home: SiteHome,
    model: MultiModalMAE,
    images: StoredImages | None,
    on_status: OnStatus,
    private: Private | None = None,
) -> Progress:
    """Train `model` in place on the images of the first process; the others are told where they are, and map them."""
    task = handoff.task
    shared = ranks.from_first(images)

    def tell(progress: Progress) -> None:
        on_status(
            Status(
                state="running",
                phase="training",
                step=progress.step,
                steps=progress.steps,
                images_per_s=progress.images_per_s,
                data_wait_share=progress.data_wait_share,
                loss=min(progress.losses[-1], 1e4) if progress.losses else 0.0,
            )
        )

    return train(
        model,
        shared,
        task.geometry,
        task.train,
        seed=derive_seed(task.seed, "stage", task.stage),
        flip=task.modality.horizontal_flip,
        rehearse=load_rehearsal(handoff, home, model.cls_token.device),
        private=private,
        checkpoint=checkpoint_path(home, handoff.hop),
        on_progress=tell,
    )


def _add_results(
    handoff: HandOff,
    home: SiteHome,
    model: MultiModalMAE,
    images: FloatImages,
    progress: Progress,
    on_status: OnStatus,
    report: Report,
    private: Private | None,
) -> Report:
    """`report` with the trained model, its statistics over the training `images`, and the training's numbers."""
    task = handoff.task
    round_weights(model, handoff.wire_dtype)  # first, so that what is measured below is the model that leaves
    statistics = _statistics(handoff, home, model, images, on_status, private)
    metrics = report.metrics | {
        "train_mim_loss": float(statistics_from_bytes(statistics, task.model).task_loss),
        "train_seconds": progress.train_seconds,
        "images_per_s": progress.images_per_s,
        "data_wait_share": progress.data_wait_share,
        "skipped_steps": float(progress.skipped),
    }
    draft = home.hop_folder(handoff.hop) / "model.safetensors"
    write_model(draft, model, handoff.wire_dtype)
    return report.model_copy(
        update={
            "model": home.artefacts.adopt(draft),
            "statistics": home.artefacts.put(statistics),
            "metrics": metrics,
            "curve": shorten(progress.losses, CURVE_POINTS),
        }
    )


def _statistics(
    handoff: HandOff,
    home: SiteHome,
    model: MultiModalMAE,
    images: FloatImages,
    on_status: OnStatus,
    private: Private | None,
) -> bytes:
    """The file of the model's statistics over the training `images`; private ones are taken once."""
    task, tell = handoff.task, counter(on_status, "statistics")
    if private is None:
        batches = counted(images, task, model.cls_token.device, tell)
        seed = derive_seed(task.seed, "statistics", task.stage)
        return statistics_to_bytes(record_statistics(model, batches, task.geometry, task.train.mask_ratio, seed))
    file = home.hop_folder(handoff.hop) / f"statistics-{private.name[:16]}.safetensors"
    if not file.exists():  # again, with the same noise and not quite the same sums, they would tell more
        statistics = private_statistics(
            model, images, task.geometry, task.train.mask_ratio, private, task.evaluate.batch_size, tell
        )
        write_atomic(file, statistics_to_bytes(statistics))
    return file.read_bytes()


def counted(
    images: FloatImages, task: Task, device: torch.device, tell: Callable[[int, int], None]
) -> Iterator[Tensor]:
    """Every training image once, at the input size, in batches on `device`."""
    done = 0
    for batch in whole_images(images, task.geometry, task.evaluate.batch_size):
        yield batch.to(device)
        done += len(batch)
        tell(done, len(images))


def checkpoint_path(home: SiteHome, hop: str) -> Path:
    return home.hop_folder(hop) / "checkpoint.safetensors"


def shorten(values: list[float], points: int) -> tuple[float, ...]:
    """Means of at most `points` equal stretches of `values`, at most 1e4 as the protocol allows."""
    if not values:
        return ()
    return tuple(min(float(part.mean()), 1e4) for part in np.array_split(np.asarray(values), min(points, len(values))))
