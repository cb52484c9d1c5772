"""Probes of a task: a model's frozen features of all cases, and what kNN and a linear layer make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from invcoss_common.errors import PlanError
from invcoss_site.downstream.finetune import Start, batched_inputs, tokeniser_for
from invcoss_site.downstream.metrics import Score, classification_scorer, with_interval
from invcoss_site.downstream.model import entering, task_encoder, trunk
from invcoss_site.downstream.probe import PROBES, Probe, features, probe
from invcoss_site.downstream.reading import Reader
from invcoss_site.downstream.sets.cases import Case, of_split
from invcoss_site.downstream.task import Task
from invcoss_site.downstream.train import Machine


def probe_task(
    task: Task,
    cases: Sequence[Case],
    start: Start,
    machine: Machine,
    seed: int,
    on_item: Callable[[int, int], None] = lambda _done, _of: None,
) -> dict[Probe, dict[str, Score]]:
    """Scores of the test cases with their intervals, by probe. Raises PlanError for a task of masks."""
    if task.kind == "segment":
        raise PlanError(f"{task.name}: probes are for tasks that classify; use invcoss-site finetune")
    tokeniser = tokeniser_for(task, cases, start)
    vocabulary = tokeniser.get_vocab_size() if tokeniser else 0
    model = trunk(start.weights, random_init=start.random_init, seed=seed)
    encoder = task_encoder(task, model, vocabulary, start.weights, seed).to(machine.device)
    read = Reader(task, tokeniser)

    def inputs() -> Iterator[Tensor]:
        done = 0
        for batch in batched_inputs(cases, read, task.batch):
            yield entering(task, batch)
            done += len(batch)
            on_item(done, len(cases))

    known = features(encoder, inputs())
    labels = torch.tensor([case.label or 0 for case in cases])
    train, val, test = (torch.tensor([case.split == split for case in cases]) for split in ("train", "val", "test"))
    patients = [case.patient for case in of_split(cases, "test")]
    return {
        kind: with_interval(
            classification_scorer(
                probe(
                    kind,
                    (known[train], labels[train]),
                    (known[val], labels[val]),
                    known[test],
                    len(task.classes),
                ).numpy(),
                labels[test].numpy(),
            ),
            patients,
            seed=seed,
        )
        for kind in PROBES
    }
