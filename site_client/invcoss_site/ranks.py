"""Several processes, one training: a site with several GPUs trains under torchrun, with DistributedDataParallel.

A process is known by its rank, 0 for the first; a process that torchrun did not start is alone and the first. Every
process draws the random numbers of the whole batch and works on its part of it, so that loss and gradients are those of
one process up to rounding.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.run import main as torchrun
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=7)  # how long processes wait for the first one, which alone reads a site's images
# The processes are on one machine and nothing of theirs listens on the network: they meet in files, and talk over the
# loopback interface. torchrun's own way (--standalone) opens ports that unpickle what they are sent.
QUIET = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Images start..stop of a batch. Means over the parts, times their `weight`, average to the mean over the batch."""

    start: int
    stop: int
    weight: float


def processes(asked: int | None) -> int:
    """How many processes train: one a GPU, or `asked` if that is fewer; without a GPU `asked`, or one."""
    gpus = torch.cuda.device_count()
    return min(asked or gpus, gpus) if gpus else asked or 1


def launch(count: int, folder: Path, command: Sequence[str]) -> None:
    """Run python with the arguments `command` as `count` processes and wait; this process becomes torchrun.

    They meet in `folder`. stdin is inherited. One that dies ends the others; ChildFailedError is then raised.
    """
    meeting = folder / "meeting"
    shutil.rmtree(meeting, ignore_errors=True)  # of a killed visit
    meeting.mkdir(parents=True)
    os.environ.update(QUIET)
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-endpoint", str(meeting / "agent")]
    torchrun([*rendezvous, "--log-dir", str(meeting), "--nproc-per-node", str(count), *command])


def rank() -> int:
    """The number of this process among its own; also that of its GPU."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def count() -> int:
    """How many processes work together."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def device() -> torch.device:
    """This process's own GPU, or the CPU."""
    return torch.device("cuda", rank()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def joined(folder: Path) -> Iterator[None]:
    """The processes that `launch` started in `folder` can work together inside; all enter and leave it."""
    if count() == 1:
        yield
        return
    if device().type == "cuda":
        torch.cuda.set_device(device())
    backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
    store = dist.FileStore(str(folder / "meeting" / "ranks"), count())  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank(), world_size=count(), timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: it would wait for the others


def from_first(value: T | None) -> T:
    """`value` as the first process gave it, in every process, which may have to wait for it."""
    box = [value]
    if count() > 1:
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    assert box[0] is not None
    return box[0]


def part_of(images: int) -> Part:
    """This process's part of a batch of so many images; parts differ by one at most.

    With fewer images than processes the last ones, which still have to take part, repeat the first at weight 0.
    """
    size, larger = divmod(images, count())
    start = rank() * size + min(rank(), larger)
    stop = start + size + (rank() < larger)
    return Part(start, stop, (stop - start) * count() / images) if stop > start else Part(0, 1, 0.0)


def averaged(values: Tensor) -> Tensor:
    """The mean of `values` over the processes, the same in all of them."""
    if count() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / count()


def synchronised(model: nn.Module) -> nn.Module:
    """`model` for training: each backward pass through it leaves the mean gradient of the processes.

    A step uses the parameters of the image families it sees only, so DDP has to find out which ones.
    """
    if count() == 1:
        return model
    devices = [device()] if device().type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)


def unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, backward passes through the `synchronised` model only add to this process's own gradient."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
