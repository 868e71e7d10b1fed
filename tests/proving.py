"""The client's side of a handshake, for tests that talk to a worker in raw messages."""

from planrt.workers.machine.events import Connected, Received, Reply
from planrt.workers.wire import messages as m
from planrt.workers.wire.channel import Channel
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.proofs import Proving


def open_session(state, connection, token="", *, channel=None, session=None):
    """Opens a session on a `WorkerState` as the user with `token`, or as nobody; returns what it answered last."""

    def ask(body):
        for instruction in state.handle(Received(connection, m.Envelope(1, body), [])):
            if isinstance(instruction, Reply):
                return instruction.envelope.body
        raise AssertionError("no answer")

    if channel is not None:
        state.handle(Connected(connection, channel))
    binding = (channel or Channel()).binding
    proving = Proving(token, binding) if token else None
    hello = m.Hello(session or f"{connection}" * 32, own_versions(), proof=proving.first if proving else "")
    answer = ask(hello)
    if proving is not None and isinstance(answer, m.Challenge):
        answer = ask(m.Prove(proving.answer(answer.proof)))
    return answer
