"""What an owner says about what may wait or arrive: as options, as `Limits`, and wrongly."""

from __future__ import annotations

import pytest
import torch

import planrt
from planrt.errors import OptionError, PlanrtError
from planrt.fl import serve
from planrt.fl.runs.serve_options import WAITING
from planrt.serde.frames import Limits
from planrt.workers import websocket_server

WHOLE = [f"max-{name}" for name, counts, _ in WAITING if counts == "N"]
FIELDS = [name.replace("-", "_") for name, _, _ in WAITING]


@pytest.fixture(autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture
def started(monkeypatch):
    """The limits of workers that were started."""
    made = []
    monkeypatch.setattr(
        websocket_server.WebsocketServerWorker, "start", lambda self, *, ready: made.append(self._limits)
    )
    return made


def test_each_option_sets_its_limit_and_no_other(started):
    assert serve.main(["--id", "bob", "--empty"]) == 0
    for number, (name, counts, _) in enumerate(WAITING):
        value = f"{number + 1} MiB" if counts == "BYTES" else f"{number + 1}"
        assert serve.main(["--id", "bob", "--empty", f"--max-{name}", value]) == 0
        limits = started[-1]
        expected = (number + 1) * (2**20 if counts == "BYTES" else 1)
        assert getattr(limits, FIELDS[number]) == expected
        changed = [one for one in Limits.__slots__ if getattr(limits, one) != getattr(started[0], one)]
        shortens = {"message"} if "arriving" in name else set()  # no message is longer than what may arrive
        assert set(changed) == {FIELDS[number]} | shortens
    assert serve.main(["--id", "bob", "--empty", "--keep-sessions", "0", "--max-round-plans", "7"]) == 0
    assert (started[-1].session_seconds, started[-1].round_plans) == (0.0, 7)


@pytest.mark.parametrize("option", WHOLE)
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("0", "at least 1"),
        ("-1", "at least 1"),
        ("1.5", "whole number"),
        ("many", "whole number"),
        ("1e9", "whole"),
    ],
)
def test_numbers_wrongly(option, value, says, started, capsys):
    """One line, before anything starts; bytes are in `tests/test_numeric_options.py`."""
    with pytest.raises(SystemExit) as ended:
        serve.main(["--id", "bob", "--empty", f"--{option}={value}"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--{option}: must be" in line
    assert says in line
    assert not started


@pytest.mark.parametrize("field", [*FIELDS, "message", "header", "connections"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many", 2**63, [1]])
def test_limits_wrongly(field, value):
    with pytest.raises(OptionError, match=f"{field} must be a whole number, from 1 to"):
        Limits(**{field: value})


@pytest.mark.parametrize("field", ["keepalive", "patience"])
@pytest.mark.parametrize("value", [0, -1, True, "long", float("nan"), float("inf")])
def test_seconds_wrongly(field, value):
    with pytest.raises(OptionError, match=f"{field} must be a number of seconds above 0"):
        Limits(**{field: value})


@pytest.mark.parametrize("field", ["arriving_memory", "worker_arriving_memory"])
def test_what_can_never_arrive_is_not_sent(make_worker, field):
    """The client is told with the handshake, so the connection goes on."""
    worker = make_worker("bob", limits=Limits(**{field: 2 << 20}))
    x = torch.ones(1 << 18).send(worker)
    with pytest.raises(PlanrtError, match="over the limit of 2,097,152 bytes"):
        torch.ones(1 << 20).send(worker)
    assert x.sum().get().item() == 1 << 18
