"""What is exported: the newest model of a run with all that is on record of it, or a loose file of weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from invcoss_common import __version__
from invcoss_common.canonical import sha256_file
from invcoss_common.config import Plan, load_plan
from invcoss_common.errors import InvcossError, PlanError, WeightsError
from invcoss_common.modality import Geometry, Modality
from invcoss_common.model import MultiModalMAE
from invcoss_common.weights import read_model
from invcoss_server.hops import families
from invcoss_server.state import RunState

TOKENISER = "tokenisers."


class ExportError(InvcossError):
    """A model can't be exported in a format that was asked for, or to where it was asked for."""


@dataclass(frozen=True)
class Source:
    """A model with its plan; `stages` (from 0) are those it has learned, `folder` and `state` are its run's.

    Without a run nobody can tell what a file has learned: its stages are then all that its tensors could serve.
    """

    model: MultiModalMAE
    sha256: str
    plan: Plan
    stages: tuple[int, ...]
    modalities: tuple[str, ...]
    folder: Path | None = None
    state: RunState | None = None

    def geometry(self, modality: str) -> Geometry:
        """Input geometry of one of `modalities`."""
        return self.plan.geometry(self._stage(modality))

    def row(self, modality: str) -> Modality:
        return self.plan.modality(self._stage(modality))

    def _stage(self, modality: str) -> int:
        return next(number for number in self.stages if self.plan.stages[number].modality == modality)

    @property
    def families(self) -> dict[str, Geometry]:
        """One geometry for each family that `modalities` need, as the tokeniser sees it."""
        found: dict[str, Geometry] = {}
        for geometry in map(self.geometry, self.modalities):
            seen = geometry.model_copy(update={"channels": geometry.input_channels})
            if found.setdefault(geometry.family, seen) != seen:
                raise PlanError(f"family {geometry.family} serves inputs of two sizes; export one --modality at a time")
        return found

    def facts(self) -> dict[str, object]:
        """Where the weights come from, and what their inputs are: the same in every format."""
        return {
            "run": self.plan.name,
            "model_sha256": self.sha256,
            "plan_sha256": self.plan.digest(),
            "software": f"invcoss {__version__}",
            "modalities": {name: self._input(name) for name in self.modalities},
        }

    def _input(self, modality: str) -> dict[str, object]:
        geometry, row = self.geometry(modality), self.row(modality)
        return {
            "family": geometry.family,
            "channels": geometry.channels,
            "size": list(geometry.size),
            "patch": list(geometry.patch),
            "normalisation": row.normalisation,
            **({} if row.normalisation == "range" else {"low": row.low, "high": row.high}),
        }


def open_source(path: Path, plan: Path | None, modalities: tuple[str, ...]) -> Source:
    """The model to export: `path` is a run's folder, or with its `plan` a file of weights.

    Without `modalities` all that the model has learned. Raises PlanError when there is no such run or nothing in it,
    WeightsError when the weights are not the run's or the plan's, or a modality is not among them.
    """
    if runs := ", ".join(sorted(str(file.parent) for file in path.glob("runs/*/state.db"))):
        raise PlanError(f"{path} is a consortium; name one of its runs: {runs}")
    if path.is_dir():
        if plan is not None:
            raise PlanError(f"{path} is a folder of a run, which has its own plan; leave --plan out")
        return _of_run(path, modalities)
    if plan is None:
        raise PlanError(f"{path} is not the folder of a run; for a file of weights, name its plan with --plan")
    return _of_file(path, load_plan(plan), modalities)


def _of_run(folder: Path, modalities: tuple[str, ...]) -> Source:
    state, plan = RunState.open(folder / "state.db")
    stages = [state.stage(number) for number in range(len(plan.stages))]
    done = [stage for stage in stages if stage.state == "released"]
    if not done or done[-1].model is None:
        raise PlanError(f"{folder}: no stage of run '{plan.name}' is released yet; there is no model to export")
    digest = done[-1].model.sha256
    file = folder / "artefacts" / digest
    if not file.is_file():
        raise WeightsError(f"{file}: the model of stage {done[-1].number + 1} is missing; bring the run's folder back")
    learned = tuple(stage.number for stage in stages[: done[-1].number + 1] if stage.state != "skipped")
    return _source(file, digest, plan, learned, modalities, folder, state)


def _of_file(path: Path, plan: Plan, modalities: tuple[str, ...]) -> Source:
    try:
        with safe_open(path, framework="pt") as file:
            names = [name.removeprefix(TOKENISER) for name in file.keys() if name.startswith(TOKENISER)]  # noqa: SIM118 - no dict
        digest = sha256_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file: {str(error)[:300]!r}") from None
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror or error})") from None
    inside = {name.split(".")[0] for name in names}
    stages = tuple(n for n in range(len(plan.stages)) if plan.geometry(n).family in inside)
    known = {plan.geometry(number).family for number in stages}
    if not inside or inside != known:
        strange = sorted(inside - known)
        what = f"it has the tokeniser {strange[0][:64]!r}" if strange else "it has no tokeniser"
        raise WeightsError(f"{path}: not a model of plan '{plan.name}': {what}; name the plan that it was made by")
    return _source(path, digest, plan, stages, modalities)


def _source(
    file: Path,
    digest: str,
    plan: Plan,
    stages: tuple[int, ...],
    modalities: tuple[str, ...],
    folder: Path | None = None,
    state: RunState | None = None,
) -> Source:
    learned = tuple(dict.fromkeys(plan.stages[number].modality for number in stages))
    if lacking := [name for name in modalities if name not in learned]:
        raise WeightsError(f"the model has not learned '{lacking[0]}'; it has: {', '.join(learned)}")
    if sha256_file(file) != digest:
        raise WeightsError(f"{file}: is not the model that the run's state names; bring the run's folder back")
    try:
        model = read_model(file, plan.model_shape, families(plan, stages)).eval()
    except WeightsError as error:
        raise WeightsError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    chosen = tuple(name for name in learned if not modalities or name in modalities)
    return Source(model, digest, plan, stages, chosen, folder, state)
