"""Surveys a folder of images before any visit: every one is read, in parallel, and none ends it. Nothing leaves.

It reads as a visit reads, so what it quarantines a visit quarantines.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path

from invcoss_common.errors import DataError
from invcoss_common.modality import Modality, SizeName, geometry_for
from invcoss_site.deidentify import signs_in_text
from invcoss_site.ingest import is_image
from invcoss_site.ingest.text import SUFFIXES, read_texts
from invcoss_site.inventory import Inventory, Item, list_images, split_of
from invcoss_site.survey_facts import Facts, Remark, blank, facts_of, unexpected
from invcoss_site.survey_summary import Survey, summed

TEXT = "text"  # not a modality that is trained on yet, but its files can be surveyed
INLINE = 600  # images, and bytes of their files, up to which starting a process costs more time than it saves
INLINE_BYTES = 200 * 2**20
SHOWN = 24  # thumbnails of usual images, spread over the folder
SHOWN_ODD = 24  # thumbnails of images of each kind of finding

OnItem = Callable[[int, int], None]
Look = Callable[[Item], Facts]


def take_survey(
    data: Path,
    name: str,
    modality: Modality,
    index: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    layout: str = "",
    *,
    size: SizeName = "nano",
    jobs: int | None = None,
    labels: Collection[str] = (),
    mask_classes: Collection[int] | None = None,
    thumbnails: bool = False,
    on_item: OnItem | None = None,
) -> Survey:
    """Read every image of `data` with `jobs` processes; raises DataError without a folder, or for a useless index.

    `labels` are those that rows of the index may have, if any will do not, and `mask_classes` those of masks.
    """
    inventory = list_images(data, modality, index, only, labels, layout)
    items = inventory.items
    jobs = jobs or _jobs(items)
    chosen = {round(n * (len(items) - 1) / (SHOWN - 1)) for n in range(SHOWN)} if items else set()
    odd: Counter[str] = Counter()
    each = []
    look = partial(facts_of, data=data, name=name, modality=modality, thumbnail=thumbnails, mask_classes=mask_classes)
    for number, facts in enumerate(_looked_at(look, items, jobs, data)):
        kinds = {one.kind for one in (facts.quarantined, *facts.warnings) if one}
        wanted = number in chosen or any(odd[kind] < SHOWN_ODD for kind in kinds)
        odd.update(kinds)
        each.append(facts if wanted else facts.model_copy(update={"thumbnail": b""}))
        if on_item:
            on_item(number + 1, len(items))
    smallest = geometry_for(modality, size).size
    small = sum(any(n < m for n, m in zip(one.shape, smallest, strict=True)) for one in each if one.images)
    rejected = tuple(Remark(file=_within(one.path, data), kind=one.kind, text=one.reason) for one in inventory.rejected)
    unlisted = _unlisted(data, inventory) if index else 0
    return summed(data, name, each, rejected, size=size, enlarged=small, unlisted=unlisted)


def take_text_survey(data: Path, on_item: OnItem | None = None) -> Survey:
    """The same of the texts in `data`, each record an image of one axis; raises DataError without a folder."""
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; name the folder that holds the texts")
    files = sorted(path for path in data.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    each: list[Facts] = []
    rejected: list[Remark] = []
    for number, path in enumerate(files):
        file = _within(path, data)
        try:
            texts = read_texts(path)
        except DataError as error:
            rejected.append(Remark(file=file, kind=getattr(error, "kind", "damaged"), text=str(error)))
            continue
        rejected += [Remark(file=file, kind=one.kind, text=one.reason) for one in texts.rejected]
        warned = tuple(Remark(file=file, kind=one.kind, text=one.reason) for one in texts.warnings)
        for record in texts.records:
            held_out = record.split == "test" if record.split else split_of(record.id)
            each.append(
                Facts(
                    file=f"{file}: {record.id}",
                    case=record.id,
                    split=record.split,
                    held_out=held_out,
                    images=1,
                    format=file,
                    shape=(len(record.text),),
                    content=hashlib.sha256(record.text.encode()).hexdigest()[:32],
                    warnings=warned,
                    signs=tuple(signs_in_text("text of a record", record.text)),
                )
            )
            warned = ()
        if on_item:
            on_item(number + 1, len(files))
    return summed(data, TEXT, each, tuple(rejected))


def _within(path: Path, data: Path) -> str:
    return path.relative_to(data).as_posix() if path.is_relative_to(data) else path.name


def _looked_at(look: Look, items: Sequence[Item], jobs: int, data: Path) -> Iterator[Facts]:
    """What `look` makes of each item, in order, a few ahead; with several jobs in processes that may die."""
    if jobs == 1:
        yield from map(look, items)
        return
    remaining = iter(items)
    waiting: deque[tuple[Item, Future[Facts] | None]] = deque()
    pool = _pool(jobs)
    try:
        while True:
            try:
                for item in islice(remaining, 2 * jobs - len(waiting)):
                    waiting.append((item, None))
                    waiting[-1] = item, pool.submit(look, item)
                if not waiting:
                    return
                future = waiting[0][1]
                assert future is not None
                facts = future.result()
            except BrokenProcessPool:  # one of those that wait did it: each by itself tells which
                pool.shutdown()
                while waiting:
                    yield _alone(look, waiting.popleft()[0], data)
                pool = _pool(jobs)
            else:
                waiting.popleft()
                yield facts
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(items: Sequence[Item]) -> int:
    """As many processes as pay: each imports libraries for seconds."""
    size_bytes = sum(path.stat().st_size for item in items for path in item.files if path.exists())
    return min(os.cpu_count() or 1, 1 + len(items) // INLINE + size_bytes // INLINE_BYTES)


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def _alone(look: Look, item: Item, data: Path) -> Facts:
    with _pool(1) as pool:
        try:
            return pool.submit(look, item).result()
        except BrokenProcessPool:
            fault = unexpected(item, data, "its decoder died, or memory ran out")
            return Facts.model_validate({**blank(item, data), "quarantined": fault})


def _unlisted(data: Path, inventory: Inventory) -> int:
    listed = {path for item in inventory.items for path in (*item.files, item.mask)}
    listed |= {one.path for one in inventory.rejected}
    found = (path for path in data.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sum(path not in listed and is_image(path) for path in found)
