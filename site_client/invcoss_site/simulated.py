"""The folder of a site in a simulation, made from the plan on first use: phantoms, or images under `--data`.

    python -m invcoss_site.simulated PLAN OUT [DATA]

makes those of all sites of a plan, side by side, and prints a line for each.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from invcoss_common.canonical import write_atomic
from invcoss_common.config import Plan, load_plan
from invcoss_common.errors import DataError, InvcossError, PlanError
from invcoss_site.home import SiteHome, load_home, write_home
from invcoss_site.policy import POLICY

SMALL = b"""\
# A simulated site may be as small as one likes, and a plan may go without the audit (relay.audit).
[cases]
min_train = 1
min_heldout = 1
[audit]
required = false
"""


def simulated_home(plan: Plan, site: str, data: Path | None, out: Path) -> SiteHome:
    """The home of `site` under `out/sites`; made unless it is there.

    Raises PlanError when the plan does not say where the site's images come from, DataError when they are not there.
    """
    root = out / "sites" / site
    if (root / "site.toml").is_file():
        return load_home(root)
    source = plan.simulation.get(site)
    if source is None:
        raise PlanError(f"site '{site}' has no images; add [simulation.{site}] with phantoms or folder to the plan")
    write_atomic(root / POLICY, SMALL)
    if source.folder is None:
        _make_phantoms(plan, site, root / "data")
        return write_home(root, site, Path("data"), ("labels.csv",))
    folder = (data or Path()) / source.folder
    if data is None or not folder.is_dir():
        raise DataError(f"site '{site}': no folder {folder}; --data must name the folder that '{source.folder}' is in")
    return write_home(root, site, folder.resolve(), source.index)


def _make_phantoms(plan: Plan, site: str, folder: Path) -> None:
    from invcoss_common.phantoms import write_phantoms  # here, because a site's desk needs neither torch nor these
    from invcoss_common.seeds import derive_seed

    kinds = sorted({stage.modality for stage in plan.stages if stage.site == site})
    if len(kinds) > 1:
        raise PlanError(f"site '{site}' learns {' and '.join(kinds)}; phantoms of one modality only, or use a folder")
    unfinished = folder.with_name("data.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_phantoms(unfinished, kinds[0], plan.simulation[site].phantoms or 0, derive_seed(plan.seed, "phantoms", site))
    unfinished.replace(folder)


def main() -> None:
    """Make the folders of all sites; an InvcossError is one line on stderr and the error's exit code."""
    plan_file, out, *data = sys.argv[1:]
    try:
        plan = load_plan(Path(plan_file))
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
            source = Path(data[0]) if data else None
            waiting = [processes.submit(simulated_home, plan, site, source, Path(out)) for site in plan.sites]
            for made in as_completed(waiting):
                print(made.result().name, flush=True)
    except InvcossError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
