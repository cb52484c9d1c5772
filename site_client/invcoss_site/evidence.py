"""What left this site for one of its stages, verified anew and on one page: what a data protection officer can file.

From the site's journal and, while it is held, the spool; it stays at the site until somebody hands it on, and holds
digests, counts, declared numbers and names of tensors, but no file name or path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field

from invcoss_common import __version__
from invcoss_common.canonical import canonical_json, sha256_hex, write_atomic
from invcoss_common.chain import Head, Record, now, records, verify
from invcoss_common.errors import ChainError, DataError, ProtocolError
from invcoss_common.keys import fingerprint, key_digest, parse_signing_key
from invcoss_common.metrics import METRICS
from invcoss_common.pages import templates
from invcoss_common.records import HandOff, from_bytes
from invcoss_site.enrol import read_join
from invcoss_site.handoffs import has_joined
from invcoss_site.home import SiteHome
from invcoss_site.journal import JOURNAL, journal_key
from invcoss_site.policy import SitePolicy, load_policy, policy_digest
from invcoss_site.proofs import Check, Part, Work, work_of
from invcoss_site.trail import Trail, follow, stage_of


class Evidence(Part):
    """All that left a site for one stage of a run, and whether what says so holds."""

    site: str
    consortium: str
    run: str
    stage: int = Field(description="0 is that of s00-train")
    made: str
    software: str
    site_key: str = Field(description="fingerprint of the site's key; empty in a simulation, where nothing is signed")
    journal_head: str
    journal_newest: str
    journal: Check
    policy_sha256: str = Field(description="of policy.toml as it is now")
    policy: SitePolicy
    works: tuple[Work, ...]

    @property
    def checks(self) -> tuple[Check, ...]:
        return (self.journal, *(check for work in self.works for check in work.checks))

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.result == "failed")


def gather(
    home: SiteHome, stage: int, run: str | None, keys: Sequence[Ed25519PublicKey] = (), head: Head | None = None
) -> Evidence:
    """The evidence of one stage, verified with the site's own key and its earlier `keys`; `head` was written down.

    What can't be verified is a failed check in it. Raises DataError when there is no such stage, or several runs of it.
    """
    own = journal_key(home)
    keys = [*([own.public_key()] if own else []), *keys]
    journal, newest, check = _verified(home.root / JOURNAL, keys, head)
    trails = [*follow(_readable(home.root / JOURNAL))]
    trails += [trail for trail in _in_spool(home) if (trail.run, trail.hop) not in {(t.run, t.hop) for t in trails}]
    runs = {trail.run: None for trail in trails if stage_of(trail.hop) == stage}
    if run not in runs and (run or len(runs) != 1):
        known = ", ".join(sorted({f"s{stage_of(t.hop):02d} --run {t.run}" for t in trails})) or "nothing"
        raise DataError(f"no stage, or more than one, is that; give STAGE and --run of one of these: {known}")
    run = run or next(iter(runs))
    policy = load_policy(home.root)
    signers, latest = _signers(home, policy), {trail.hop: trail for trail in trails}
    coordinators = tuple(fingerprint(key_digest(parse_signing_key(key))) for key in policy.trust.coordinators)
    return Evidence(
        site=home.name,
        consortium=read_join(home.root / "join.json").consortium if has_joined(home) else "",
        run=run,
        stage=stage,
        made=now(),
        software=__version__,
        site_key=fingerprint(key_digest(own.public_key())) if own else "",
        journal_head=journal,
        journal_newest=newest,
        journal=check,
        policy_sha256=policy_digest(home.root),
        policy=policy.model_copy(update={"trust": policy.trust.model_copy(update={"coordinators": coordinators})}),
        works=tuple(
            work_of(home, trail, trail is latest[trail.hop], signers, keys)
            for trail in trails
            if (trail.run, stage_of(trail.hop)) == (run, stage)
        ),
    )


def write(home: SiteHome, evidence: Evidence) -> Path:
    """Write `ROOT/evidence/RUN-sNN.json` and `.html`, in place of earlier ones; the path of the page."""
    page = home.root / "evidence" / f"{evidence.run}-s{evidence.stage:02d}.html"
    content = canonical_json(evidence.model_dump(mode="json"))
    write_atomic(page.with_suffix(".json"), content)
    environment = templates("invcoss_site")
    template = environment.get_template("evidence.html.j2")
    html = template.render(evidence=evidence, metrics=METRICS, content=sha256_hex(content))
    write_atomic(page, html.encode())
    return page


def _verified(path: Path, keys: Sequence[Ed25519PublicKey], head: Head | None) -> tuple[str, str, Check]:
    """Head and newest time of the journal, and whether all of it holds."""
    try:
        found = verify(path, keys, head)
    except ChainError as error:
        return "", "", Check(what="journal", result="failed", text=str(error).replace(str(path), "the journal"))
    signed = "each signed by this site" if found.signed else "chained, but signed by nobody"
    text = f"{found.head.n} records from {found.first[:19]} to {found.newest[:19]} hold, {signed}"
    return str(found.head), found.newest, Check(what="journal", result="verified" if keys else "open", text=text)


def _readable(path: Path) -> Iterator[Record]:
    """The records of a journal up to one that is none."""
    with suppress(ChainError):
        yield from records(path)


def _in_spool(home: SiteHome) -> Iterator[Trail]:
    for file in sorted(home.spool.glob("s*/handoff.json")):
        with suppress(ProtocolError):
            handoff = from_bytes(HandOff, file.read_bytes())
            yield Trail(handoff.run, handoff.hop)


def _signers(home: SiteHome, policy: SitePolicy) -> list[Ed25519PublicKey]:
    """The keys with which a coordinator may sign hand-offs to this site; none in a simulation."""
    if not has_joined(home):
        return []
    return [*map(parse_signing_key, (read_join(home.root / "join.json").coordinator_key, *policy.trust.coordinators))]
