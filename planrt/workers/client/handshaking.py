"""The handshake over a pipe: the messages that a `ClientSession` asks for, and its answers."""

from __future__ import annotations

from typing import Any

from planrt.errors import HandshakeError
from planrt.serde.frames import encode
from planrt.workers.client.session import ClientSession
from planrt.workers.transport.pipes import Pipe
from planrt.workers.wire import messages as m
from planrt.workers.wire.proofs import TicketProof, Token


async def shake_hands(
    pipe: Pipe,
    session: ClientSession[Any],
    token: Token,
    *,
    for_others: bool,
    ticket: TicketProof | None = None,
) -> bool:
    """Opens or resumes a session over `pipe`; see `ClientSession.welcome`.

    Raises:
        HandshakeError: refused, or the worker closed the connection. ConnectionError: the connection has ended.
    """
    hello = session.hello(token, pipe.channel.binding, for_others=for_others, ticket=ticket)
    answer = await _exchange(pipe, hello)
    if (proof := session.challenged(answer)) is not None:
        answer = await _exchange(pipe, proof)
    return session.welcome(answer)


async def _exchange(pipe: Pipe, message: m.Envelope) -> m.Envelope:
    """Sends a message of the handshake; the answer."""
    await pipe.send(encode(m.to_wire(message)))
    received = await pipe.receive()
    if received is None:
        raise HandshakeError(f"{pipe.address} closed the connection in the handshake", address=pipe.address)
    return received.message


def no_answer(pipe: Pipe) -> HandshakeError:
    """Returns the error for a handshake that was not answered in time."""
    return HandshakeError(
        f"{pipe.address} accepts connections but gave no answer to the handshake: is it a planrt worker?",
        address=pipe.address,
    )
