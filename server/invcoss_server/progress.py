"""What the operator sees while a relay runs: a bar for each visit and inversion, a line for each finished stage."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from invcoss_common.config import Plan
from invcoss_server.events import waiting


class ProgressView:
    """Shows the events of a relay; a context manager, so that the terminal is left in order."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.console = Console()
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.key = ""
        self.task: TaskID | None = None

    def __enter__(self) -> ProgressView:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Show one event; kinds that are not known are left out."""
        match event["event"]:
            case "sites":
                self._bar("sites", "making the sites' folders", event["of"], event["done"], "")
                if event["done"] == event["of"]:
                    self._bar("start", "starting Flower", None, 0, "")
            case "stage":
                where = f"stage {event['stage'] + 1} of {event['stages']}"
                self._say(f"[bold]{where}[/bold]: {event['modality']} at {event['site']}")
                self._bar(where, f"bringing the model to {event['site']}", None, 0, "")
            case "status" if event["state"] in ("queued", "running"):
                detail = ""
                if event["phase"] == "training":
                    wait = f"{event['data_wait_share']:.0%} waiting for data"
                    detail = f"{event['images_per_s']:.0f} images/s, {wait}, loss {event['loss']:.3f}"
                words = waiting(event) or f"{event['hop']} at {event['site']}: {event['phase']}"
                self._bar(words, words, event["steps"] or None, event["step"], detail)
            case "inversion":
                detail = f"{event['images_per_s']:.2f} images/s, task {event['task']:.3f}, norm {event['norm']:.3f}"
                self._bar(f"inversion {event['stage']}", "inversion", event["steps"], event["step"], detail)
            case "hop" if event["loss"] is not None:
                mib = event["sent_bytes"] / 2**20
                self._say(
                    f"  {event['hop']}: held-out loss {event['loss']:.3f} at {event['site']} ({mib:.1f} MiB sent)"
                )
            case "audited":
                done = "refused" if event["refused"] else f"{event['dropped']} dropped, the others released"
                auc = f"membership AUC {event['membership']:.2f}"
                self._say(f"  pool of {event['images']} images: {done} by {event['site']}; {auc}")
            case "unreleased":
                stage = event["stage"] + 1
                self._say(f"  left out: the pool of stage {stage}, which {event['site']} has not released and is away")
            case "absent":
                self._say(f"  site {event['site']} is away; waiting for it")
            case "skipped":
                self._say(f"  left out: the run goes on without site {event['site']}")
            case "closed":
                self._say(f"  {event['hop']}: {event['site']} lets no artefact cross now; waiting until it does")
            case "fallback":
                self._say(f"  {event['hop']}: {event['site']} is of protocol {event['protocol']}: plain float32")
            case "released":
                losses = zip(self.plan.stages, event["losses"], strict=False)
                known = ", ".join(f"{s.modality} {v:.3f}" for s, v in losses if v is not None)
                self._say(f"  released; losses {known}")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def _bar(self, key: str, words: str, total: int | None, done: int, detail: str) -> None:
        """Move the bar of `key`, replacing that of another key."""
        if key != self.key or self.task is None:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.key, self.task = key, self.progress.add_task(words, total=total, detail=detail)
        self.progress.update(self.task, total=total, completed=done, detail=detail)
