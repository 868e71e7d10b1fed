"""Which workers a run uses: those named, or those that run at the usual addresses, and what they serve."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from planrt.command_line import one_line
from planrt.errors import ConnectError, DataError, HandshakeError, OptionError, TransportError
from planrt.fl.data import digits as data
from planrt.fl.data.digits import TESTING
from planrt.fl.runs.identity import Identity

if TYPE_CHECKING:
    from planrt.workers import WebsocketClientWorker

USUAL_ADDRESSES = {
    worker_id: f"ws://127.0.0.1:{8777 + number}"
    for number, worker_id in enumerate((*data.PARTITIONS, TESTING))
}
"""Where `scripts/start_websocket_servers.py` puts the workers."""


HANDSHAKE_SECONDS: Final = 3.0
"""Seconds that a worker that is there may take for a handshake."""


def given_addresses(named: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Returns the addresses by worker id.

    Raises:
        OptionError: a name twice, or the workers cannot both train and evaluate.
    """
    addresses = dict(named)
    if len(addresses) < len(named):
        raise OptionError("--worker: two workers have the same name")
    if TESTING not in addresses:
        raise OptionError("no worker to evaluate the models: add --worker testing=ws://HOST:PORT")
    if len(addresses) < 2:
        raise OptionError("no worker to train on: add --worker NAME=ws://HOST:PORT")
    return addresses


NOBODY: Final = Identity()


def running_addresses(identity: Identity = NOBODY) -> dict[str, str] | None:
    """Returns the usual addresses if all four workers answer a handshake there, None if none does.

    With a `ca` they are looked for at ``wss://``.

    Raises:
        ConnectError: only some do. HandshakeError: one does not take the identity. OptionError: none answers,
            and the identity is for workers that run.
    """
    usual = {
        worker_id: uri if identity.ca is None else uri.replace("ws://", "wss://")
        for worker_id, uri in USUAL_ADDRESSES.items()
    }
    answering = [worker_id for worker_id, uri in usual.items() if _listens(uri)]
    if answering:  # a handshake needs torch: only when somebody is there
        answering = [
            worker_id for worker_id in answering if _shakes_hands(worker_id, usual[worker_id], identity)
        ]
    if not answering and (identity.ca, identity.cert, identity.key) != (None, None, None):
        raise OptionError(
            "--ca, --cert and --key are for workers that run: start them, or name them with --worker"
        )
    if not answering:
        return None
    missing = [f"{worker_id} at {uri}" for worker_id, uri in usual.items() if worker_id not in answering]
    if missing:
        raise ConnectError(
            f"{', '.join(answering)} running, but no answer from {', '.join(missing)}: start all four with "
            "scripts/start_websocket_servers.py, stop them all, or name the ones to use with --worker",
            address=usual[TESTING],
        )
    return usual


def _listens(uri: str) -> bool:
    parts = urlsplit(uri)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), timeout=1).close()
    except OSError:
        return False
    return True


def _shakes_hands(worker_id: str, uri: str, identity: Identity) -> bool:
    from planrt.workers import WebsocketClientWorker

    try:
        with WebsocketClientWorker(worker_id, uri=uri, timeout=HANDSHAKE_SECONDS, **identity.shown()):
            pass
    except HandshakeError:
        if identity != NOBODY:  # which it did not take: that is no reason to start others
            raise
        return False
    except TransportError:
        return False
    return True


async def connect(
    addresses: Mapping[str, str],
    stack: contextlib.AsyncExitStack,
    identity: Identity = NOBODY,
    *,
    needed: int | None = None,
) -> dict[str, WebsocketClientWorker]:
    """Connects to all; `stack` closes the connections.

    Where fewer are `needed` to train on, those that cannot be had are left out, and named in a notice.

    Raises:
        ConnectError, HandshakeError: the first one that cannot be had, and must.
    """
    from planrt.workers import WebsocketClientWorker

    workers = {}
    spare = 0 if needed is None else len(addresses) - 1 - needed  # one of them evaluates
    for worker_id, uri in addresses.items():
        try:
            workers[worker_id] = await WebsocketClientWorker.connect(worker_id, uri, **identity.shown())
        except TransportError as error:
            if worker_id == TESTING or spare <= 0:
                raise
            spare -= 1
            print(f"Notice: the run goes on without {worker_id}: {one_line(error)}")
            continue
        stack.push_async_callback(workers[worker_id]._leave)
    return workers


def dataset_of(workers: Mapping[str, WebsocketClientWorker], wanted: str) -> str:
    """Returns the name of the data set that all workers serve ("own" if it is neither MNIST nor the digits).

    Raises:
        DataError: a worker has nothing under the key it needs, or not all serve the same and `wanted`.
    """
    names = {}
    for worker_id, worker in workers.items():
        key = data.TEST_KEY if worker_id == TESTING else data.TRAIN_KEY
        if key not in worker.datasets:
            keys = ", ".join(map(repr, sorted(worker.datasets))) or "none"
            raise DataError(f"worker {worker_id!r} has no data set {key!r} (it has: {keys})")
        tags = worker.datasets[key].tags
        names[worker_id] = next((name for name in ("mnist", "digits") if f"#{name}" in tags), "own")
    if len(set(names.values())) > 1:
        listed = ", ".join(f"{worker_id} {name}" for worker_id, name in names.items())
        raise DataError(
            f"the workers serve different data sets ({listed}): restart them with the same --dataset"
        )
    name = names[TESTING]
    if wanted not in ("auto", name):
        raise DataError(
            f"--dataset {wanted}: the workers that run serve {name}; restart them with that data set"
        )
    return name
