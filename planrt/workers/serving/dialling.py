"""Which other workers a worker dials for its clients, and what it shows of itself there.

Clients say where their objects are to go, so a worker that dialled every address would let them knock at doors inside
its network. It dials what its owner listed: without a list what only this machine reaches, and virtual workers of its
process. A virtual worker's clients are its own program, which may dial what it likes.

What a worker proves there says that it may come in, and gives it no rights: it acts for clients of its own, and none of
them is to have more there than it would have by itself (`Hello.for_others`). With a ticket it acts in its client's
name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from planrt.errors import ConnectError, OptionError
from planrt.serde.frames import Limits
from planrt.workers.client.connection import Connection
from planrt.workers.client.redialling import Redialling
from planrt.workers.transport import addresses
from planrt.workers.transport.addresses import DialOptions
from planrt.workers.transport.callers import is_loopback
from planrt.workers.transport.pipes import Pipe
from planrt.workers.transport.tls import client_tls, is_for_clients
from planrt.workers.wire import messages as m
from planrt.workers.wire.proofs import TicketProof, Token

LINK_TIMEOUT = 10.0
"""Seconds for reaching another worker."""


class Dialling:
    """The way in which a worker reaches others.

    Args:
        peers: the addresses that it may dial, as ``HOST:PORT``, or ``HOST:*`` for all ports; None: of this machine.
        ca: the authorities of the others' certificates; the system's by default.
        cert, key: its own certificate and private key, shown to those that ask for one, if it is for clients too.
        token: the token of the user that it is at the others; as a `Path`, one that is in that file, and that whoever
            makes this sets (`token`) before anything is dialled.
        everywhere: whether it dials whatever its clients say.

    Raises:
        OptionError: one of these addresses is none, or `ca` cannot be read.
    """

    def __init__(
        self,
        peers: Sequence[str] | None = None,
        *,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        token: str | Path = "",
        everywhere: bool = False,
    ) -> None:
        self._everywhere = everywhere
        self._peers = None if peers is None else frozenset(map(_place, _several(peers)))
        if ca is not None:
            client_tls(ca)
        if cert is not None and not is_for_clients(cert):
            cert = key = None
        self._ca, self._cert, self._key = ca, cert, key
        self._shows_token = bool(token)
        self.token: Token = "" if isinstance(token, Path) else token
        """Proves who it is at the others."""
        self.opened_by: Callable[[str, m.PeerAddress], Awaitable[Pipe]] | None = None
        """Who opens connections in place of `open`, where this process may not: the worker's own process."""

    @property
    def dials(self) -> m.Dials:
        """The proofs that the worker shows of itself to others."""
        return m.Dials(self._shows_token, self._cert is not None)

    async def connect(
        self, worker_id: str, peer: m.PeerAddress, limits: Limits, ticket: TicketProof | None = None
    ) -> Connection:
        """Connects the worker `worker_id` to another one: as nobody, or in the name of the client that has given it a
        ticket.

        Raises:
            ConnectError: its owner does not allow that, or nobody answers. HandshakeError: it is not let in there.
        """
        self._check(worker_id, peer)
        shows = self._shows_token or (
            self._cert is not None and addresses.transport_of(peer.address).encrypted
        )
        redialling = Redialling(
            lambda: self.open(worker_id, peer, limits),
            token=self.token,
            for_others=shows,
            ticket=ticket,
            seconds=0.0,  # at the next use: who waits now is told at once
        )
        return await Connection.open(
            await redialling.dial(),
            peer.worker,
            timeout=LINK_TIMEOUT,
            limits=limits,
            token=self.token,
            for_others=shows,
            ticket=ticket,
            redialling=redialling,
        )

    async def open(self, worker_id: str, peer: m.PeerAddress, limits: Limits) -> Pipe:
        """Opens a connection from the worker `worker_id` to another one, on which nothing has been said yet.

        Raises:
            ConnectError, HandshakeError: as `connect`.
        """
        self._check(worker_id, peer)
        if self.opened_by is not None:
            return await self.opened_by(worker_id, peer)
        options = DialOptions(LINK_TIMEOUT, limits)
        if addresses.transport_of(peer.address).encrypted:
            options = DialOptions(LINK_TIMEOUT, limits, self._ca, self._cert, self._key)
        return await addresses.dial(peer.address, options)

    def _check(self, worker_id: str, peer: m.PeerAddress) -> None:
        if self._everywhere or addresses.transport_of(peer.address).within_process:
            return
        try:
            parts = urlsplit(peer.address)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise ConnectError(
                f"{peer.address!r} is no worker address: write ws://HOST:PORT", address=peer.address
            ) from None
        if self._peers is None:
            allowed = is_loopback(host) or (port is None and bool(host))
        else:
            allowed = f"{host}:{port}" in self._peers or f"{host}:*" in self._peers
        if not allowed:
            shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            raise ConnectError(
                f"worker {worker_id!r} does not dial {shown} for its clients: its owner may allow that with --peers "
                f"{shown} (peers=[...])",
                address=peer.address,
            )


def _several(peers: Sequence[str]) -> list[str]:
    if isinstance(peers, str) or not all(isinstance(one, str) for one in peers):
        raise OptionError('peers is a list of addresses, such as ["10.0.0.5:8777"]')
    return list(peers)


def _place(text: str) -> str:
    """``HOST:PORT`` in one form."""
    host, colon, port = text.rpartition(":")
    try:
        parts = urlsplit(f"//{host}:{'1' if port == '*' else port}")
        if colon and parts.hostname and parts.port and not parts.path and "@" not in text:
            return f"{parts.hostname}:{'*' if port == '*' else parts.port}"
    except ValueError:
        pass
    raise OptionError(f"{text!r:.80} is no address of a worker: write HOST:PORT, as 10.0.0.5:8777, or HOST:*")
