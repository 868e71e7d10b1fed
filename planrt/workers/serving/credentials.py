"""What a worker has to know and to keep for itself: its private key, what proves its users, its token at other workers.

They are files, most of the time, and read as late as possible: with isolation, when the process is there of which those
for clients' work are copies. So no such process ever had them in its memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from planrt.errors import OptionError
from planrt.workers.serving.secret_files import token_from
from planrt.workers.serving.users_file import WatchedUsers
from planrt.workers.transport.callers import check_open
from planrt.workers.transport.tls import ServerTls, server_tls
from planrt.workers.wire.proofs import check_strength, is_verifier


@dataclass(frozen=True, slots=True)
class Known:
    """Holds what was read."""

    tls: ServerTls | None
    users: Mapping[str, str] = field(repr=False)
    watched: WatchedUsers | None
    """The file of users, where they are in one."""
    token: str = field(repr=False)
    """Of the user that the worker is at others."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Holds the arguments of a worker that say where they are: see `WebsocketServerWorker`.

    `listens` is the host that it listens on, None where its transport has none; `encrypted` whether that is TLS.
    """

    users: Mapping[str, str] | str | Path | None = field(repr=False)
    require_user: bool
    cert: str | Path | None
    key: str | Path | None
    client_ca: str | Path | None
    deny: str | Path | None
    token: str | Path = field(repr=False)
    listens: str | None
    encrypted: bool
    insecure: bool

    def check(self, users: Mapping[str, str] | None = None) -> None:
        """Raises OptionError where others reach the worker, and it cannot know who they are, or lets nobody in.
        `users` are those that were read; None before that.
        """
        any_users = bool(users) if users is not None else bool(self.users)
        if self.listens is not None:
            known = any_users or self.client_ca is not None
            check_open(self.listens, tls=self.encrypted, known=known, insecure=self.insecure)
        if self.require_user and not any_users and self.client_ca is None:
            raise OptionError("--require-user lets nobody in without users: add --users, or --tls-client-ca")

    def read(self) -> Known:
        """Reads them all.

        Raises:
            OptionError: one cannot be read, or is not what it should be.
        """
        tls = server_tls(self.cert, self.key, self.client_ca, self.deny)
        watched = WatchedUsers(self.users) if isinstance(self.users, str | Path) else None
        users = watched.users if watched is not None else self.users
        assert users is None or isinstance(users, Mapping)  # noqa: S101 - for the type checker
        for user, token in (users or {}).items():
            if not is_verifier(token):
                check_strength(user, token)
        self.check(users or {})
        token = token_from(self.token) if isinstance(self.token, Path) else self.token
        return Known(tls, users or {}, watched, token)
