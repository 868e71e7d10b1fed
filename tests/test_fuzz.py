"""The fuzzers in small: they find nothing in a few seconds, and would find what they look for."""

import asyncio
import random
from dataclasses import replace
from typing import get_args

import pytest
from websockets.asyncio import server as websockets

from fuzz.arguments import Draw
from fuzz.calls import CRASH, HANG, PROBES, UNINITIALISED
from fuzz.calls import main as calls_main
from fuzz.child import Child
from fuzz.frames import Conversations, Fuzzer, _converse
from fuzz.frames import Summary as FramesSummary
from fuzz.frames import main as frames_main
from fuzz.messages import Messages
from fuzz.ops import FILLS, Pair, main
from fuzz.policies import draws as draws_policies
from fuzz.reading import Try, outcome, run, run_here
from fuzz.reading import main as reading_main
from fuzz.rows import Summary, check, names
from fuzz.rows import main as rows_main
from fuzz.texts import draws as draws_texts
from planrt.errors import TransportError, WireError
from planrt.plans.analysis.analysing import analyse
from planrt.serde.frames import FrameAssembler, encode
from planrt.workers.wire import messages as m

SEED = 11


def test_it_would_find_what_it_looks_for():
    """Each of the ops that no table has, one call of it."""
    made = {Draw(f"{SEED}/{number} op").random.choice(PROBES): number for number in range(40, 0, -1)}
    pair, kinds = Pair(SEED, pattern="fuzz.", plain=True, seconds=1.0), {}
    try:
        for probe, number in made.items():
            (finding,) = pair.run(range(number, number + 1)).findings
            assert finding.index == number
            assert finding.alone
            kinds[probe] = finding.kind
    finally:
        pair.close()
    assert kinds == {UNINITIALISED: "differs", CRASH: "ends its process", HANG: "hangs"}


def test_a_call_that_lacks_memory_in_one_process_is_not_compared():
    """What the other one did with more memory is no finding, in a backward pass neither (`Tensor.fix`, seed 6056)."""
    pair, number = Pair(SEED, pattern="Tensor.fix", seconds=60.0), 682
    pair._children[1] = Child(FILLS[1], SEED, "Tensor.fix", 250 << 20, plain=False, many=False)
    try:
        summary = pair.run(range(number, number + 1))
    finally:
        pair.close()
    assert (summary.calls, summary.findings, summary.refused_for_memory) == (1, [], 1)


def test_some_calls_find_nothing():
    pair = Pair(SEED, plain=True, seconds=60.0)
    try:
        summary = pair.run(range(250))
    finally:
        pair.close()
    assert summary.findings == []
    assert summary.calls == 250
    assert summary.made > 60
    assert summary.ops > 150


@pytest.mark.parametrize(
    "arguments", [["--calls", "0"], ["--first", "-1"], ["--seconds", "0"], ["--memory", "7"]]
)
def test_options_that_cannot_be(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        (main, ["--op", "nosuch"], "no op that pointers may post has 'nosuch' in its name"),
        (calls_main, [], "SEED, INDEX"),
        (calls_main, ["7", "x"], "invalid int value"),
        (calls_main, ["7", "3", "--op", "nosuch"], "no op that pointers may post has 'nosuch' in its name"),
        (calls_main, ["7", "--", "-3"], "numbers of calls begin with 0"),
    ],
)
def test_calls_that_there_are_not(program, arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        program(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_without_what_torchs_samples_need(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--calls", "3"])
    assert "torch's samples need expecttest: pip install '.[dev]', or add --plain" in capsys.readouterr().err


def test_a_call_is_shown_with_what_comes_of_it(capsys):
    assert calls_main(["7", "3", "4", "--op", "relu", "--plain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [one.split(":")[0] for one in lines[::2]] == ["3", "4"]
    assert all("relu" in one for one in lines)


# Rows


@pytest.mark.filterwarnings("ignore")
def test_claims_about_rows_of_some_plans_hold():
    summary, known = Summary(), names()
    for number in range(30):
        check(f"{SEED}/{number}", known, summary)
    assert summary.findings == ()
    assert summary.plans > 20
    assert summary.aggregates > 8


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_claim_would_be_found(monkeypatch):
    """Every kernel is taken for one that aggregates all rows."""
    import fuzz.rows
    from planrt.plans.analysis.report import Dependence

    def analysed(graph):
        report = analyse(graph)
        claim = [Dependence(source, "input", "x", "aggregated", 6, ("sum",)) for source in range(2)]
        outputs = tuple(replace(one, depends=tuple(claim)) for one in report.outputs)
        return replace(report, outputs=outputs)

    monkeypatch.setattr(fuzz.rows, "analyse", analysed)
    summary = Summary()
    for number in range(3):
        check(f"{SEED}/{number}", names(), summary)
    assert len(summary.findings) > 1


def test_rows_options(capsys):
    with pytest.raises(SystemExit) as ended:
        rows_main(["--plans", "0"])
    assert ended.value.code == 2


# Frames


def test_malformed_frames_do_nothing_to_a_worker_and_its_end_would_be_found():
    """Bounds of time and memory are for runs by hand, on a machine that does nothing else."""
    fuzzer = Fuzzer(SEED, answer=60.0, growth=1 << 30, warming=0)
    try:
        summary = fuzzer.run(1_000)
        fuzzer.served.process.kill()
        fuzzer.served.process.wait()
        ended = fuzzer.run(10)
    finally:
        fuzzer.close()
    assert summary.findings == []
    assert summary.frames >= 1_000
    assert 0 < summary.closed < summary.conversations  # by the worker, and by us once it has answered
    assert summary.failures["WireError"] > 20
    assert len(summary.failures) > 2  # how much is answered before a cut is a matter of time
    assert summary.asked > 0
    assert any(finding.startswith("exit: the worker ended with -9") for finding in ended.findings)
    assert any(finding.startswith("slow: the healthy client") for finding in ended.findings)


def test_every_kind_of_message_is_sent_and_most_of_what_is_sent_is_wrong():
    messages, kinds, wrong, malformed = Messages(), set(), 0, 0
    for number in range(1_500):
        drawn, _, _ = messages.drawn(random.Random(f"{SEED}/{number}"))
        try:
            kinds.add(type(m.from_wire(drawn).body))
        except WireError:  # a bound that the fuzzer does not know
            malformed += 1
        assembler = FrameAssembler(m.from_wire)
        try:
            assembler.feed(messages.hostile(random.Random(f"{SEED}/{number}")))
            assembler.finish()
        except TransportError:
            wrong += 1
    assert kinds == set(get_args(m.Body)) - {m.Prove}
    assert malformed < 150
    assert wrong > 900


def test_conversations_are_repeated_by_their_numbers():
    assert Conversations(3).one(17, 8777) == Conversations(3).one(17, 8777) != Conversations(4).one(17, 8777)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (None, "a good request at the end got no answer"),
        (m.Failure("KeyError", "'x'"), "KeyError: 'x'"),
        (m.Failure("LocalError", "x" * 70_000), "an answer that no client takes"),
        (m.Failure("LocalError", "no object"), ""),
    ],
)
def test_what_a_worker_answers_is_looked_at(answer, found):
    async def main():
        async def serve(connection):
            async for _ in connection:
                if answer is not None:
                    await connection.send(b"".join(encode(m.to_wire(m.Envelope(1, answer))).fragments()))
                    await connection.close()

        async with websockets.serve(serve, "127.0.0.1", 0, compression=None) as server:
            port = server.sockets[0].getsockname()[1]
            one = next(
                one for one in (Conversations(SEED).one(number, port) for number in range(99)) if one.in_step
            )
            seconds = 1.0 if answer is None else 60.0
            return await _converse(replace(one, parts=one.parts[:1]), port, seconds, FramesSummary())

    assert found in asyncio.run(main())
    assert bool(found) == bool(asyncio.run(main()))


@pytest.mark.parametrize(
    "arguments",
    [["--frames", "0"], ["--workers", "0"], ["--first", "-1"], ["--growth", "-1"], ["--answer", "0"]],
)
def test_frames_options(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        frames_main(arguments)
    assert ended.value.code == 2
    assert "must be above 0" in capsys.readouterr().err


# Texts, files and policies


def test_readers_that_end_hang_fill_memory_or_raise_would_be_found():
    said = []
    summary = run("fuzz.reading", SEED, range(24), seconds=1.0, memory=1 << 28, tell=said.append)
    assert summary.tries == 24
    assert 0 < summary.read < 24
    assert said == summary.findings
    for what in (
        "ends its process (-6)", "more processor time than", "more memory than", "KeyError: \"'x'\"",
        "an error that no terminal can show: ValueError",
    ):  # fmt: skip
        assert any(what in finding for finding in said), what
    again = run("fuzz.reading", SEED, range(3, 9), seconds=1.0, memory=1 << 28)
    assert set(again.findings) < set(said)


def test_what_an_error_says_is_looked_at():
    def refuses(text):
        def read():
            raise ValueError(text)

        return outcome(Try("", read, (ValueError,)))

    assert refuses("line 3: no number") == "ValueError"
    for text in ("", " ", "\u202e", "x" * 30_000, "a\x1b[2J"):
        assert refuses(text).startswith("FOUND")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("draws", "abouts"), [(draws_texts, 6), (draws_policies, 8)])
def test_what_is_read_is_refused_or_right(draws, abouts, tmp_path):
    summary = run_here(draws, SEED, range(150), tmp_path)
    assert summary.findings == []
    assert len(summary.abouts) >= abouts
    assert 4 < summary.read < 75  # most of what is drawn is wrong


@pytest.mark.parametrize(
    "arguments",
    [["--tries", "0"], ["--first", "-1"], ["--seconds", "0"], ["--seconds", "nan"], ["--memory", "7"]],
)
def test_options_of_readers(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        reading_main("fuzz.texts", "Doc.", draws_texts, arguments)
    assert ended.value.code == 2
    assert "must be above 0" in capsys.readouterr().err
