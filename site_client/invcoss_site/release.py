"""The site's word on a pool made of its own model: which of its images may travel. Run where the site's images are.

The scores of single images stay here, in `audit.json` of the hop's folder; digests, numbers of rows and figures on the
whole pool leave. What is released is named by the digest of the file without the dropped images, which the coordinator
has to make to hand it on.
"""

from __future__ import annotations

from collections.abc import Callable

from invcoss_common.canonical import write_atomic
from invcoss_common.errors import ProtocolError
from invcoss_common.model import MultiModalMAE
from invcoss_common.pools import artefact_of, images_like, without_rows
from invcoss_common.records import Artefact, AuditFigures, HandOff, Pool, Release
from invcoss_site import journal
from invcoss_site.audit import Audit, audit_pool, membership_auc
from invcoss_site.home import SiteHome
from invcoss_site.policy import load_policy
from invcoss_site.prepare import SiteImages

AUDIT = "audit.json"  # in the hop's folder: the audit with the scores of single images, for the site's own eyes


def release_pool(
    handoff: HandOff, home: SiteHome, model: MultiModalMAE, images: SiteImages, on_progress: Callable[[int, int], None]
) -> Release:
    """Compare the hand-off's pool with this site's images; what of it may travel, once that is in the journal.

    Raises ProtocolError when the hand-off has not just one pool, of images as its task has them.
    """
    task, pool = handoff.task, _only_pool(handoff)
    settings, synthetic = load_policy(home.root).audit, images_like(home.artefacts.path(pool.artefact), task.geometry)
    audit = audit_pool(synthetic, images.train, images.heldout, model, task.geometry, settings, on_progress)
    few = task.evaluate.max_images
    membership = membership_auc(
        model,
        images.train[:few],
        images.heldout[:few],
        task.geometry,
        mask_ratio=task.train.mask_ratio,
        draws=task.evaluate.mask_draws,
        batch_size=task.evaluate.batch_size,
        seed=task.seed,
        confidence=settings.confidence,
        on_progress=on_progress,
    )
    write_atomic(home.hop_folder(handoff.hop) / AUDIT, audit.model_dump_json(indent=1).encode())
    dropped = () if audit.refused else tuple(row for row, keep in enumerate(audit.kept) if not keep)
    release = Release(
        stage=pool.stage,
        pool=pool.artefact.sha256,
        released=None if audit.refused else _without(home, pool.artefact, dropped),
        dropped=dropped,
        figures=_figures(audit),
        membership=membership.auc,
    )
    journal.audited(home, handoff, release)
    return release


def _only_pool(handoff: HandOff) -> Pool:
    """The pool to be audited, of the stage that the task is about."""
    if handoff.protocol < 2 or [pool.stage for pool in handoff.pools] != [handoff.task.stage]:
        raise ProtocolError("a hand-off for an audit has one pool, that of its own stage")
    return handoff.pools[0]


def _without(home: SiteHome, pool: Artefact, dropped: tuple[int, ...]) -> Artefact:
    return artefact_of(without_rows(home.artefacts.path(pool), dropped)) if dropped else pool


def _figures(audit: Audit) -> AuditFigures:
    """What the audit found of the pool as a whole; ratios are cut off where the protocol's bounds are."""
    values = {name: getattr(audit, name) for name in AuditFigures.model_fields}
    return AuditFigures(**{name: min(v, 1e6) if isinstance(v, float) else v for name, v in values.items()})
