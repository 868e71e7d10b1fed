"""Sessions that outlive their connections: how they are kept, found again, and ended. No I/O.

A client that lost its connection shows the session's secret on a new one, after it has proved who it is, and goes on:
its objects, its requests under way and the order of its messages are those of the session, not of a connection. A
secret counts for the user of the session only. While the connection before still gives signs of life, the new one is
refused; when it gives none, it is closed first.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence

from planrt.errors import OptionError
from planrt.serde.frames import Limits
from planrt.workers.machine.events import Keep
from planrt.workers.machine.handshakes import RefusedError
from planrt.workers.machine.keeping.answers import Keeping
from planrt.workers.machine.sessions import Session
from planrt.workers.wire import messages as m


class KeptSessions:
    """The sessions of one worker that may go on over another connection, with a connection now or without.

    Raises:
        OptionError: limits that are no numbers of seconds or sessions.
    """

    def __init__(self, limits: Limits) -> None:
        seconds, most = limits.session_seconds, limits.kept_sessions
        if isinstance(seconds, bool) or not (
            isinstance(seconds, int | float) and math.isfinite(seconds) and seconds >= 0
        ):
            raise OptionError(
                f"sessions are kept for a number of seconds, 0 for not at all, not for {seconds!r}"
            )
        if not (isinstance(most, int) and most >= 1):
            raise OptionError(
                f"at least 1 session is kept of each client, not {most!r}: or session_seconds=0"
            )
        self.seconds = float(seconds)
        self._most, self._limits = most, limits
        self.epoch = secrets.token_hex(8)
        """Of this worker, from its start on."""
        self._by_name: dict[str, Session] = {}
        self._away: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def opened(self, session: Session, host: str) -> m.Kept | None:
        """Takes note of a session that was opened from the address `host`; returns what its client is told, None if it
        is not kept."""
        if not self.seconds or session.client is None or not session.client.resumes:
            return None
        whose = session.whose(host)
        if session.by is not None:  # so that links which were cut do not end what the user itself has left
            whose = f"{whose} by worker {session.by.worker}"
        kept = session.kept = Keeping(whose, self._limits)
        self._by_name[kept.name] = session
        return m.Kept(kept.name, self.seconds, self.epoch, kept.new_secret())

    def find(self, wanted: m.Resumption, user: str | None) -> Session | None:
        """Returns the session that a client of that user asks for; None if it is over.

        Raises:
            RefusedError: the secret is another one, or it is another user's session.
        """
        session = self._by_name.get(wanted.session)
        kept = None if session is None else session.kept
        if session is None or kept is None or kept.broken or session.over:
            return None
        if not kept.proves(wanted.secret):
            raise RefusedError("that is not the secret of this session", distrusted=True)
        if session.user != user:
            raise RefusedError("this session is another user's: prove the one that opened it")
        if wanted.seen > kept.answers.sent:
            raise RefusedError("the client has taken more answers of this session than were sent")
        return session

    def resumed(self, session: Session, connection: int, wanted: m.Resumption) -> m.Kept:
        """Lets a session go on over `connection`; returns what its client is told. Its answers that are left are to be
        sent again."""
        kept = session.kept
        assert kept is not None  # noqa: S101 - `find` has looked
        self._away.pop(kept.name, None)
        session.connection, kept.gives_way = connection, False
        kept.answers.acknowledge(wanted.seen)
        kept.told, kept.untold_bytes = kept.taken, 0
        return m.Kept(kept.name, self.seconds, self.epoch, resumed=True, seen=kept.taken)

    def left(self, session: Session) -> tuple[Keep | None, list[Session]]:
        """Takes note of a session that has lost its connection; returns how long it is kept, None if it is over, and
        which others are over instead, since their client has too many."""
        kept = session.kept
        if kept is None or kept.broken or session.over:
            return None, []
        kept.absence += 1
        self._away[kept.name] = session
        same = [one for one in self._away.values() if one.kept is not None and one.kept.client == kept.client]
        return Keep(kept.name, kept.absence, self.seconds), same[: max(0, len(same) - self._most)]

    def to_give_way(self, client: str, at_work: Sequence[Session]) -> Session | None:
        """Returns the session that `client` closed longest ago and that is not `at_work`."""
        for session in self._away.values():
            kept = session.kept
            if kept is not None and kept.gives_way and kept.client == client and session not in at_work:
                return session
        return None

    def all_give_way(self) -> bool:
        """Returns whether their clients have closed all of them."""
        return all(session.kept is not None and session.kept.gives_way for session in self._by_name.values())

    def expired(self, name: str, absence: int) -> Session | None:
        """Returns the session whose time is over, if it has been without a connection since."""
        session = self._away.get(name)
        kept = None if session is None else session.kept
        return session if kept is not None and kept.absence == absence else None

    def ended(self, session: Session) -> None:
        """Forgets a session that is over, and its answers."""
        if session.kept is not None:
            session.kept.give_up()
            self._by_name.pop(session.kept.name, None)
            self._away.pop(session.kept.name, None)

    def has(self, session: Session) -> bool:
        """Returns whether a session may go on still."""
        return session.kept is not None and session.kept.name in self._by_name

    def away(self) -> Iterator[Session]:
        """Returns the sessions that have no connection."""
        return iter(list(self._away.values()))
