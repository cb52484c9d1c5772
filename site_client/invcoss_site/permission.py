"""What the site's policy says of a hand-off: plain functions, without images or torch, because the desk asks too.

Each raises the subclass of PolicyRefused that is its kind of rule. The text is for this site only: it names the setting
in policy.toml and both values.
"""

from __future__ import annotations

from collections.abc import Iterable

from invcoss_common.chain import Record
from invcoss_common.errors import (
    AuditRequired,
    DpRequired,
    LimitExceeded,
    OutsideHours,
    PlanNotAllowed,
    TaskNotAllowed,
    TooFewCases,
)
from invcoss_common.records import HandOff, Task
from invcoss_site.policy import POLICY, SitePolicy, Work
from invcoss_site.transfer import within


def check(policy: SitePolicy, handoff: HandOff) -> None:
    """Every rule that needs the hand-off alone: plan, kind, modality, limits, differential privacy, audit."""
    _check_task(policy, handoff)
    _check_limits(policy.work, handoff)
    if handoff.task.kind == "train":
        _check_dp(policy, handoff)
        if policy.audit.required and not handoff.audited:
            raise AuditRequired(
                f"pools made of this model would go to other sites without this site's audit (relay.audit of the plan, "
                f"protocol {handoff.protocol}), and {_setting('audit', 'required')} is true"
            )


def check_images(policy: SitePolicy, task: Task, train_images: int, train_cases: int, heldout_cases: int) -> None:
    """The rules that need to know how many images there are: the length of a training, the cases behind what leaves."""
    looked_at = min(heldout_cases, task.evaluate.max_images)  # or a plan could ask about single images
    needed = [("min_heldout", policy.cases.min_heldout, looked_at, "held-out")]
    if task.kind == "train":
        needed.append(("min_train", policy.cases.min_train, train_cases, "training"))
        per_step = task.train.batch_size * task.train.accumulate
        if task.train.steps is None:
            assert task.train.epochs is not None
            _limit(policy.work, "max_steps", task.train.epochs * train_images / per_step, "steps")
        else:
            _limit(policy.work, "max_epochs", task.train.steps * per_step / train_images, "epochs")
    for name, least, found, which in needed:
        if found < least:
            raise TooFewCases(
                f"{found} {which} cases of {task.modality_name}, and {_setting('cases', name)} is {least}"
            )


def check_audit(policy: SitePolicy, handoff: HandOff, journal: Iterable[Record]) -> None:
    """Whether the site audits for this hand-off, by the records of its own `journal`.

    What an audit drops tells which images are near the site's own, so it is not done of any model nor without end: only
    of the one that the site trained for this stage and run, and of few pools of it. The same pool again tells nothing.
    """
    model, pools = handoff.model.sha256, {pool.artefact.sha256 for pool in handoff.pools}
    training = {"kind": "done", "run": handoff.run, "hop": f"s{handoff.task.stage:02d}-train"}
    trained, audited = False, set()
    for record in journal:
        if training.items() <= record.items():
            trained = trained or model in record["artefacts"]
        elif record["kind"] == "audited" and record.get("model") == model:
            audited.add(record.get("pool"))
    if not trained:
        raise TaskNotAllowed(
            f"an audit of model {model}, which by its journal this site did not train as {training['hop']} of run "
            f"'{handoff.run}'; pools are audited of its own models only"
        )
    asked, most = len(audited | pools), policy.audit.max_audits
    if asked > most and not pools <= audited:
        raise LimitExceeded(f"{asked} pools of one model, and {_setting('audit', 'max_audits')} is {most}")


def check_worked(policy: SitePolicy, seconds: float) -> None:
    """Whether the work on a hand-off may go on, so many seconds after its first start."""
    _limit(policy.work, "max_hours", seconds / 3600, "hours")


def check_size(policy: SitePolicy, size_bytes: int) -> None:
    """Whether there is room for artefacts of so many bytes."""
    _limit(policy.work, "max_disk_gb", size_bytes / 1e9, "GB")


def check_hours(policy: SitePolicy, clock: str) -> None:
    """Whether work may begin at `clock` ("HH:MM", local time)."""
    if policy.work.hours and not within(policy.work.hours, clock):
        raise OutsideHours(f"it is {clock}, and {_setting('work', 'hours')} is {policy.work.hours}")


def _check_task(policy: SitePolicy, handoff: HandOff) -> None:
    if policy.trust.plans and handoff.plan_digest not in policy.trust.plans:
        raise PlanNotAllowed(
            f"the plan {handoff.plan_digest} is not in {_setting('trust', 'plans')}; if this site agrees to it, add it"
        )
    for name, asked, allowed in (
        ("kinds", handoff.task.kind, policy.work.kinds),
        ("modalities", handoff.task.modality_name, policy.work.modalities or (handoff.task.modality_name,)),
    ):
        if asked not in allowed:
            raise TaskNotAllowed(f"'{asked}' is not in {_setting('work', name)}, which is: {', '.join(allowed)}")


def _check_limits(work: Work, handoff: HandOff) -> None:
    task = handoff.task
    _limit(work, "max_parameters", task.model.parameters(task.families), "parameters")
    _limit(work, "max_disk_gb", sum(artefact.size_bytes for artefact in handoff.artefacts) / 1e9, "GB")
    if task.kind == "train":
        _limit(work, "max_steps", task.train.steps or 0, "steps")
        _limit(work, "max_epochs", task.train.epochs or 0, "epochs")


def _check_dp(policy: SitePolicy, handoff: HandOff) -> None:
    dp = handoff.dp
    if dp is None:
        if policy.dp.required:
            raise DpRequired(f"the training is without differential privacy, and {_setting('dp', 'required')} is true")
        return
    if dp.noise_multiplier < policy.dp.min_noise_multiplier:
        least = policy.dp.min_noise_multiplier
        raise DpRequired(f"noise of {dp.noise_multiplier:g}, and {_setting('dp', 'min_noise_multiplier')} is {least:g}")
    if dp.delta > policy.dp.max_delta:
        raise DpRequired(f"a delta of {dp.delta:g}, and {_setting('dp', 'max_delta')} is {policy.dp.max_delta:g}")


def _limit(work: Work, name: str, asked: float, unit: str) -> None:
    most = getattr(work, name)
    if most is not None and asked > most:
        raise LimitExceeded(f"{_number(asked)} {unit}, and {_setting('work', name)} is {_number(most)}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1e5 else f"{value:.6g}"


def _setting(table: str, name: str) -> str:
    return f"[{table}] {name} in {POLICY}"
