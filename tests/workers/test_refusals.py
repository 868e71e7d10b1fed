"""The kinds of failure that both sides know: one table (`planrt.workers.wire.refusals`)."""

import pytest

from planrt import errors
from planrt.workers.client.session import Answered, ClientSession
from planrt.workers.machine.failures import failure_of
from planrt.workers.wire import messages as m
from planrt.workers.wire.refusals import RAISED, Refusal, kind_of

_NO_REFUSALS = [errors.PolicyError("no", rule="max_ops"), errors.SignatureError("no")]
"""What rooms below raise, and clients have errors of their own for."""
_TO_RAISE = [*(one("no") for one in Refusal.__subclasses__()), *_NO_REFUSALS]


def test_every_refusal_has_an_error_of_the_client():
    assert (
        len({one.kind for one in Refusal.__subclasses__()})
        == len(Refusal.__subclasses__())
        == len(RAISED) - len(_NO_REFUSALS)
    )
    for kind, raised in RAISED.items():
        assert issubclass(raised, errors.RemoteError)
        assert raised is not errors.RemoteError, kind


@pytest.mark.parametrize("error", _TO_RAISE, ids=kind_of)
def test_what_the_machine_raises_arrives_as_the_clients_error(error):
    session = ClientSession("bob", address="memory://bob")
    asked = session.request(m.CountObjects())
    answered = session.reply(m.Envelope(asked.id, failure_of(error)))
    assert isinstance(answered, Answered)
    assert type(answered.result) is RAISED[kind_of(error)]
    assert "no" in str(answered.result)


def test_every_error_of_a_worker_is_in_the_table():
    own = {
        one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.RemoteError)
    }
    assert own == {*RAISED.values(), errors.RemoteError}
