"""Sites whose Flower app runs in this process: what they send is kept, and every function of theirs may fail."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from inspect import CO_OPTIMIZED
from itertools import count
from pathlib import Path
from types import CodeType, FrameType

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from tests.federation.loopback import LoopbackCourier
from tests.security.canaries import Canaries
from tests.security.capture import asked, wire_things

import invcoss_common
import invcoss_site
from invcoss_common.errors import CredentialError, DataError, ProtocolError, SiteError, WeightsError
from invcoss_common.records import HandOff, Request, Response, from_bytes
from invcoss_common.wire import decode_response, encode_request
from invcoss_server.courier import checked
from invcoss_server.signatures import Signatures
from invcoss_site import app
from invcoss_site.home import SiteHome
from invcoss_site.launch import plain_error
from invcoss_site.visit import visit
from invcoss_site.work import take_lock, work

SITE, COMMON = (str(Path(package.__file__ or "").parent) for package in (invcoss_site, invcoss_common))
BASES = (Exception, OSError, ValueError, DataError, ProtocolError, CredentialError, WeightsError)
Place = tuple[str, CodeType]  # a step of the relay, and a function of ours that it calls


class Watch:
    """Notes every function that a site calls during a step; or raises `error` in one of them, once."""

    def __init__(self) -> None:
        self.step = ""
        self.seen: dict[Place, None] = {}
        self.place: Place | None = None
        self.error = Exception()
        self.fired = False

    @contextmanager
    def during(self, step: str) -> Iterator[None]:
        before, self.step = self.step, step
        try:
            yield
        finally:
            self.step = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        _forget_results()
        threading.setprofile(self._called)  # images are read by threads
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not self.step:
            return
        code = frame.f_code
        if self.place is not None:
            if code is self.place[1] and self.step == self.place[0] and not self.fired:
                self.fired = True
                raise self.error
        elif code.co_flags & CO_OPTIMIZED and _is_called_by_site(frame):  # not a module that is imported
            self.seen.setdefault((self.step, code))


class AppCourier(LoopbackCourier):
    """Reaches enrolled sites through their Flower app and `visit`; all that they answer is in `sent`."""

    def __init__(self, homes: dict[str, SiteHome], signatures: Signatures) -> None:
        super().__init__(homes, visit)
        self.signatures = signatures
        self.watch = Watch()
        self.sent: list[tuple[str, bytes]] = []

    def sign(self, handoff: bytes) -> str:
        return self.signatures.sign(handoff)

    def check(self, site: str, report: bytes, signature: str) -> None:
        self.signatures.check(site, report, signature)

    def carry(self, site: str, request: Request) -> Response:
        answer = self.ask(site, request)
        if answer.has_error():
            raise SiteError(f"site '{site}' refuses our app: {answer.error.reason}", site)
        return checked(site, decode_response(answer.content, request))

    def ask(self, site: str, request: Request) -> Message:
        """What Flower's node would send back; if the app raised, what Flower makes of its error in the launcher."""
        message = asked(encode_request(request))
        config = {"home": str(self.homes[site].root)}
        context = Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
        with self.watch.during(_steps(site, request)[0]):
            try:
                answer = app.app(message, context)
            except Exception as error:
                raised = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
                answer = Message(plain_error(raised, f"{type(error)}:<'{error}'>"), reply_to=message)
        self.sent += [(f"{site}, {request.verb}: {what}", data) for what, data in wire_things(answer)]
        return answer

    def start_here(self, home: SiteHome, hop: str) -> None:
        """In place of the agent: the work of a hop, here and now."""
        lock = take_lock(home, hop)
        assert lock is not None
        try:
            work(home, hop, visit)
        finally:
            os.close(lock)


class FailingCourier(AppCourier):
    """The first request of each kind fails at every function that it calls, in turn, and the last time for the relay.

    `tried` counts the functions by step; `missed` are those that were not called again. A site's folder is as before
    for each, from a copy in `spare`.
    """

    def __init__(self, homes: dict[str, SiteHome], signatures: Signatures, canaries: Canaries, spare: Path) -> None:
        super().__init__(homes, signatures)
        self.canaries, self.spare = canaries, spare
        self.works = True
        self.tried: dict[str, int] = {}
        self.missed: list[Place] = []
        self._attempts, self._bases = count(1), count()
        self._failed_at_work: set[CodeType] = set()

    def ask(self, site: str, request: Request) -> Message:
        new = [step for step in _steps(site, request) if step not in self.tried]
        return self._fail_everywhere(site, request, new) if new else super().ask(site, request)

    def start_here(self, home: SiteHome, hop: str) -> None:
        if self.works:
            with self.watch.during(_work(home.name, hop)):
                super().start_here(home, hop)

    def _fail_everywhere(self, site: str, request: Request, steps: list[str]) -> Message:
        kept = self.spare / site
        shutil.copytree(self.homes[site].root, kept, ignore=shutil.ignore_patterns("cache"))
        self.watch.seen.clear()
        with self.watch.watching():
            answer = super().ask(site, request)
        self.tried |= dict.fromkeys(steps, 0)
        for step, code in list(self.watch.seen):
            if step not in steps or (step.startswith("work") and code in self._failed_at_work):
                continue
            if step.startswith("work"):
                self._failed_at_work.add(code)
            self.tried[step] += 1
            for cache_is_kept in (True, False):  # images are read again only where that is what is to fail
                self._put_back(site, cache_is_kept)
                answer = self._fail(site, request, (step, code))
                if self.watch.fired:
                    break
            else:
                self.missed.append((step, code))
        shutil.rmtree(kept)
        return answer

    def _put_back(self, site: str, cache_is_kept: bool) -> None:
        """A site's folder as it was before the request."""
        root = self.homes[site].root
        for entry in root.iterdir():
            if entry.is_file():
                entry.unlink()
            elif entry.name != "cache" or not cache_is_kept:
                shutil.rmtree(entry)
        shutil.copytree(self.spare / site, root, dirs_exist_ok=True)

    def _fail(self, site: str, request: Request, place: Place) -> Message:
        """Ask with a failure at `place`; where that is in the work that begins, ask for its status, too."""
        hop, working = _hop(request), place[0].startswith("work")
        if request.verb == "start":
            request = replace(request, fields={**request.fields, "attempt": next(self._attempts)})
        self.works = working
        self.watch.place, self.watch.error, self.watch.fired = place, self._error(), False
        with self.watch.watching():
            answer = super().ask(site, request)
        self.watch.place, self.works = None, True
        if working:
            super().ask(site, Request("status", {"hop": hop}, protocol=request.protocol))
        return answer

    def _error(self) -> Exception:
        """An error of which all carries canaries: its class, text, arguments, note and cause."""
        word, base = self.canaries.word, BASES[next(self._bases) % len(BASES)]
        kind = type(word("class of an error"), (base,), {})
        error: Exception = kind(word("text of an error"), word("argument of an error"))
        error.add_note(word("note of an error"))
        error.__cause__ = ValueError(word("cause of an error"))
        return error


def _is_called_by_site(frame: FrameType) -> bool:
    """Whether this is a function of the site, or one of the common package that it calls itself."""
    file, caller = frame.f_code.co_filename, frame.f_back
    return file.startswith(SITE) or (
        file.startswith(COMMON) and caller is not None and caller.f_code.co_filename.startswith(SITE)
    )


def _steps(site: str, request: Request) -> tuple[str, ...]:
    """The step of a relay that a request is, and the work that it begins."""
    hop = _hop(request)
    kind = f"{request.verb} {hop.split('-')[1]}" if hop else request.verb
    return (kind, _work(site, hop)) if request.verb == "start" else (kind,)


def _work(site: str, hop: str) -> str:
    return f"work at {site}: {hop.split('-')[1]}"


def _hop(request: Request) -> str:
    if request.verb == "start":
        return from_bytes(HandOff, str(request.fields["handoff"]).encode()).hop
    return str(request.fields.get("hop", ""))


def _forget_results() -> None:
    """So that functions with a cache are called again."""
    for module in [module for name, module in sys.modules.items() if name.startswith("invcoss_")]:
        for value in list(vars(module).values()):
            with suppress(AttributeError):
                value.cache_clear()
