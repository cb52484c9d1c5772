"""A check-up, step by step: what is well, what is not, and who must do what. Both commands `doctor` stand on it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from invcoss_common.errors import InvcossError

State = Literal["ok", "warning", "failed", "not tried"]

GIB = 1 << 30
LEAST_DISK_GIB, GOOD_DISK_GIB = 1, 20
GOOD_MEMORY_GIB = 4
MEMORY = Path("/proc/meminfo")
NVIDIA = Path("/proc/driver/nvidia")  # there while NVIDIA's driver is loaded


class Doubt(str):
    """What a step returns in place of plain text about something to see to that stops nothing."""

    __slots__ = ()


@dataclass(frozen=True)
class Step:
    """How one step went; `exit_code` is that of its error's class, 0 unless it failed."""

    step: str
    state: State
    text: str
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{self.state:<9}  {self.step:<14}  {self.text}"


class Checkup:
    """Goes through steps in order, tells each as it ends, and leaves out those that need one that did not go well."""

    def __init__(self, tell: Callable[[Step], None]) -> None:
        self.steps: list[Step] = []
        self._tell = tell
        self._cause: dict[str, str] = {}  # a step that failed or was not tried -> the one that failed

    @property
    def exit_code(self) -> int:
        """That of the first step that failed, 0 if none did."""
        return next((step.exit_code for step in self.steps if step.state == "failed"), 0)

    def step(self, name: str, look: Callable[[], str], needs: tuple[str, ...] = ()) -> None:
        """Do `look`, which returns what it found, perhaps as a Doubt, or raises why it failed."""
        causes = [self._cause[need] for need in needs if need in self._cause]
        step = Step(name, "not tried", f"because of '{causes[0]}'") if causes else _look(name, look)
        if step.state in ("failed", "not tried"):
            self._cause[name] = causes[0] if causes else name
        self.steps.append(step)
        self._tell(step)


def report(examine: Callable[[Checkup], None], as_json: bool) -> int:
    """Print the steps of `examine` as they end, or all as one JSON object; returns the exit code."""
    checkup = Checkup(lambda step: None if as_json else print(step, flush=True))
    examine(checkup)
    if as_json:
        steps = [{"step": step.step, "state": step.state, "text": step.text} for step in checkup.steps]
        print(json.dumps({"steps": steps, "ok": checkup.exit_code == 0}))
    return checkup.exit_code


def disk(folder: Path) -> str:
    """Free space where `folder` is; raises InvcossError below LEAST_DISK_GIB."""
    free = shutil.disk_usage(folder).free / GIB
    text = f"{free:.1f} GiB free at {folder}"
    if free < LEAST_DISK_GIB:
        raise InvcossError(f"{text}: too little for models and images; make room, at least {GOOD_DISK_GIB} GiB")
    if free < GOOD_DISK_GIB:
        return Doubt(f"{text}: enough for a trial; make room, at least {GOOD_DISK_GIB} GiB")
    return text


def memory() -> str:
    """Memory that is available now."""
    for line in MEMORY.read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024 / GIB
            if free < GOOD_MEMORY_GIB:
                return Doubt(
                    f"{free:.1f} GiB available: enough for a trial; end other programs or add memory, "
                    f"at least {GOOD_MEMORY_GIB} GiB"
                )
            return f"{free:.1f} GiB available"
    return Doubt("this machine does not say how much memory is available")


def gpu(work: str) -> str:
    """Name and memory of each GPU that PyTorch can use; `work` is what runs on the CPU if there is none."""
    import torch  # here, because it takes seconds

    with warnings.catch_warnings(record=True) as caught:  # a driver that is too old is only warned of
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if usable:
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return ", ".join(f"{card.name} ({card.total_memory / GIB:.0f} GiB)" for card in cards)
    if caught or NVIDIA.exists():
        why = str(caught[0].message).splitlines()[0] if caught else "this PyTorch was built without CUDA, or sees none"
        return Doubt(f"a GPU is there and can't be used ({why}): {work} runs on the CPU; install a driver that fits")
    return f"none: {work} runs on the CPU"


def software() -> str:
    """The versions that matter; raises InvcossError when what is installed is not what this software declares."""
    for requirement in map(Requirement, metadata.requires("invcoss") or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = "nothing"
        if found == "nothing" or not requirement.specifier.contains(found, prereleases=True):
            raise InvcossError(
                f"{requirement.name}: {found} is installed, and {requirement.specifier} is needed; "
                "install InvCoSS-relay again into an environment of its own"
            )
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("invcoss", "flwr", "torch"))


def _look(name: str, look: Callable[[], str]) -> Step:
    try:
        text = look()
    except InvcossError as error:
        return Step(name, "failed", _line(str(error)), error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return Step(name, "failed", _line(f"{where}{error.strerror or error}; see to it and try again"), 1)
    except Exception as error:  # one step that breaks must not hide the others
        return Step(name, "failed", _line(f"this check itself failed ({type(error).__name__}: {error}); report it"), 1)
    return Step(name, "warning" if isinstance(text, Doubt) else "ok", _line(text))


def _line(text: str) -> str:
    """One line that is fit for a terminal: some of it may be another program's words."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
