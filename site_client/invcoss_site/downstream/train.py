"""The fine-tuning loop: the published recipe, validation, checkpoints of the best and the last weights, TensorBoard.

Randomness is drawn per step from the seed and the step number, so a run that was killed and resumed ends with the same
weights as one that was not (on a CPU; a GPU's sums have no fixed order). B = batch, K = classes, S = shape of an image.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from invcoss_common.errors import TrainingError
from invcoss_common.seeds import derive_seed
from invcoss_common.weights import check_tensors, schema_of, write_tensors
from invcoss_site.batches import batch_loader
from invcoss_site.downstream.model import OnTask
from invcoss_site.downstream.reading import TaskBatches
from invcoss_site.downstream.task import Task
from invcoss_site.trainer import restore_state, state_tensors

CLIP_NORM, POWER = 12.0, 0.9  # of the gradient; of the falling learning rate; as published
LAST, BEST, TENSORBOARD = "last.safetensors", "best.safetensors", "tensorboard"
SAVE_EVERY_S = 60.0

Validate = Callable[[OnTask], dict[str, float]]


@dataclass(frozen=True)
class Machine:
    """What a fine-tuning runs on: its device, number type, processes that read, and MB of memory to keep cases in."""

    device: torch.device
    bf16: bool = False
    workers: int = 0
    keep_mb: float = 0.0

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


@dataclass
class Standing:
    """Where a fine-tuning stands. `checks` holds step and score of each validation; `best_step` is 0 before any."""

    step: int = 0
    steps: int = 0
    images: int = 0
    best_step: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> float:
        return dict(self.checks).get(self.best_step, -math.inf)

    @property
    def images_per_s(self) -> float:
        return self.images / self.train_seconds if self.train_seconds else 0.0


def learning_rate(task: Task, epoch: int) -> float:
    """Falls from `task.lr` epoch by epoch, as published."""
    return task.lr * float((1 - epoch / task.epochs) ** POWER)


def task_loss(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K) and labels (B,); soft Dice and binary cross-entropy of masks (B, K, *S)."""
    if task.kind == "classify":
        return F.cross_entropy(logits.float(), targets)
    overlap: Tensor = DiceLoss(sigmoid=True)(logits.float(), targets)
    return overlap + F.binary_cross_entropy_with_logits(logits.float(), targets)


def total(scores: dict[str, float]) -> float:
    """What epochs are compared by: the sum of the scores, as published; one that is not defined counts as 0."""
    return sum(value for value in scores.values() if math.isfinite(value))


def fit(
    model: OnTask,
    batches: TaskBatches,
    folder: Path,
    machine: Machine,
    *,
    validate: Validate | None = None,
    on_progress: Callable[[Standing], None] = lambda _standing: None,
) -> Standing:
    """Train `model` in place on `batches`; it ends with the weights of the last step, or of the best validation.

    The state is kept in `folder`, from which a later call goes on. `validate` is called every `task.check_every` steps,
    or after each epoch, and at the end. Raises TrainingError as soon as the loss is not a finite number.
    """
    from torch.utils.tensorboard import SummaryWriter  # here, because it needs a second to import

    task, seed = model.task, batches.seed
    optimiser = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=task.weight_decay)
    per_epoch = task.steps(len(batches.cases))
    standing = Standing(steps=task.epochs * per_epoch)
    if (folder / LAST).exists():
        _load(folder / LAST, model, optimiser, standing)
    loader: Iterator[tuple[Tensor, Tensor]] = iter(
        batch_loader(batches, standing.step, standing.steps, machine.workers)
    )
    check_every = task.check_every or per_epoch
    saved_at = time.monotonic()
    cuda = [machine.device] if machine.device.type == "cuda" else []
    model.train()
    writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=standing.step + 1)  # what a killed run told later
    with writer, torch.random.fork_rng(devices=cuda):
        while standing.step < standing.steps:
            began = time.monotonic()
            torch.manual_seed(derive_seed(seed, "step", standing.step))
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(task, standing.step // per_epoch)
            inputs, targets = (part.to(machine.device, non_blocking=True) for part in next(loader))
            standing.wait_seconds += time.monotonic() - began
            with machine.autocast():
                loss = task_loss(task, model(inputs), targets)
            loss.backward()
            value = float(loss.detach())
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM))
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise TrainingError(
                    f"{task.name}: loss or gradient is no finite number at step {standing.step}; lower lr, "
                    f"or give --precision fp32"
                )
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            standing.step += 1
            standing.images += task.batch
            standing.losses.append(value)
            standing.train_seconds += time.monotonic() - began
            writer.add_scalar("train/loss", value, standing.step)
            writer.add_scalar("train/lr", optimiser.param_groups[0]["lr"], standing.step)
            improved = False
            if validate and (standing.step % check_every == 0 or standing.step == standing.steps):
                scores = validate(model)
                model.train()
                for name, score in scores.items():
                    writer.add_scalar(f"validation/{name}", score, standing.step)
                improved = total(scores) >= standing.best  # of equal ones the later: few cases are soon all right
                standing.checks.append((standing.step, total(scores)))
                if improved:
                    standing.best_step = standing.step
                    write_tensors(folder / BEST, model.state_dict())
            if improved or standing.step == standing.steps or time.monotonic() - saved_at > SAVE_EVERY_S:
                writer.flush()
                _save(folder / LAST, model, optimiser, standing)
                saved_at = time.monotonic()
            on_progress(standing)
    if validate:
        best = load_file(folder / BEST)
        check_tensors(best, schema_of(model.state_dict()))
        model.load_state_dict(best)
    model.eval()
    return standing


def _save(path: Path, model: OnTask, optimiser: torch.optim.AdamW, standing: Standing) -> None:
    tensors = state_tensors(model, optimiser)
    tensors["counters"] = torch.tensor([standing.step, standing.images, standing.best_step])
    tensors["seconds"] = torch.tensor([standing.train_seconds, standing.wait_seconds], dtype=torch.float64)
    tensors["losses"] = torch.tensor(standing.losses, dtype=torch.float64)
    tensors["checks"] = torch.tensor(standing.checks, dtype=torch.float64).reshape(-1, 2)
    write_tensors(path, tensors)


def _load(path: Path, model: OnTask, optimiser: torch.optim.AdamW, standing: Standing) -> None:
    try:
        tensors = load_file(path)
    except SafetensorError:
        raise TrainingError(f"{path}: not a checkpoint, or damaged; remove it to begin anew") from None
    standing.step, standing.images, standing.best_step = tensors.pop("counters").tolist()
    standing.train_seconds, standing.wait_seconds = tensors.pop("seconds").tolist()
    standing.losses = tensors.pop("losses").tolist()
    standing.checks = [(int(step), score) for step, score in tensors.pop("checks").tolist()]
    restore_state(tensors, model, optimiser)
