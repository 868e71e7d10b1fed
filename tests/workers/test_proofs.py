"""Tokens are proved and never travel: SCRAM-SHA-256 by its RFCs' own example, and by those who try to get around it."""

import asyncio
import contextlib
import re
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import planrt
from planrt.errors import HandshakeError, OptionError
from planrt.workers import WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.machine.events import Close, Connected, Disconnected, Distrust, Received
from planrt.workers.machine.state import WorkerState
from planrt.workers.serving.guesses import FREE, LONGEST_WAIT, MOST_WAITING, Guesses
from planrt.workers.wire import messages as m
from planrt.workers.wire import proofs
from planrt.workers.wire.channel import Channel
from planrt.workers.wire.messages import own_versions
from planrt.workers.wire.proofs import Checking, ProofError, Proving, Verifier, fake_verifier, token_id
from tests.proving import open_session

TOKEN = "correct horse battery staple"
VERIFIER = Verifier.of(TOKEN)


@pytest.fixture(scope="module", autouse=True)
def hook():
    planrt.TorchHook(torch)


def find(id):
    return VERIFIER if id == VERIFIER.id else fake_verifier(id, b"secret")


def exchange(token=TOKEN, theirs=None, mine=None):
    """The four messages of a handshake; `theirs` and `mine` are the bindings that client and worker see."""
    client = Proving(token, theirs)
    worker = Checking(client.first, find, mine)
    answer = client.answer(worker.challenge)
    return client, worker, answer


# ------------------------------------------------------------------------------------------- the standard


def test_the_example_of_the_rfc():
    """RFC 7677, section 3."""
    import base64

    salt = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
    keys = proofs._keys("pencil", salt, 4096)
    known = Verifier("user", 4096, salt, keys.stored, keys.server)
    client = Proving("pencil", nonce="rOprNGfwEbeRWgbNEkqO", id="user")
    assert client.first == "n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    worker = Checking(client.first, lambda _: known, nonce="%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
    assert worker.challenge == (
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    )
    answer = client.answer(worker.challenge)
    assert answer == (
        "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    )
    final = worker.verify(answer)
    assert final == "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
    client.check(final)


def test_neither_the_token_nor_what_proves_it_travels_or_is_kept():
    client, worker, answer = exchange()
    said = f"{client.first} {worker.challenge} {answer} {worker.verify(answer)}"
    keys = proofs._keys(TOKEN, VERIFIER.salt, VERIFIER.iterations)
    kept = f"{VERIFIER} {VERIFIER!r} {keys!r}"
    for secret in (TOKEN, proofs._encoded(keys.client)):
        assert secret not in said + kept
    assert Verifier.parse(str(VERIFIER)) == VERIFIER


@pytest.mark.parametrize(
    "text",
    [
        "SCRAM-SHA-256$",
        "SCRAM-SHA-256$15000:a:b$c",
        f"{VERIFIER}0",
        str(VERIFIER)[:-1],
        "SCRAM-SHA-256$1:a$b:c$d",
    ],
)
def test_a_verifier_that_was_cut(text):
    with pytest.raises(OptionError, match="cut or changed"):
        Verifier.parse(text)


# --------------------------------------------------------------------------------------- who tries to get by


@pytest.mark.parametrize("token", ["", "correct horse battery stapl", TOKEN.upper(), "someone else's token"])
def test_other_tokens_prove_nothing(token):
    _, worker, answer = exchange(token or "x")
    with pytest.raises(ProofError, match="none of this worker's users"):
        worker.verify(answer)


def test_a_recorded_proof_is_worth_nothing():
    client, worker, answer = exchange()
    worker.verify(answer)
    again = Checking(client.first, find)
    with pytest.raises(ProofError):
        again.verify(answer)


def test_a_proof_is_bound_to_its_channel():
    """Somebody in between, with a certificate of their own, passes everything on."""
    certificate, other = b"1" * 32, b"2" * 32
    _, worker, answer = exchange(theirs=certificate, mine=certificate)
    worker.verify(answer)
    _, worker, answer = exchange(theirs=other, mine=certificate)
    with pytest.raises(ProofError, match="in between"):
        worker.verify(answer)
    with pytest.raises(ProofError, match="TLS ends before"):
        exchange(theirs=certificate, mine=None)
    with pytest.raises(ProofError, match="without TLS"):
        exchange(theirs=None, mine=certificate)


def test_what_a_client_said_does_not_prove_a_worker():
    client, worker, answer = exchange()
    for reflected in (
        answer,
        client.first,
        worker.challenge,
        f"v={answer.rpartition('p=')[2]}",
        "",
        "v=",
        "v=AAAA",
    ):
        with pytest.raises(ProofError):
            client.check(reflected)


def test_a_worker_that_does_not_know_the_token_is_found_out():
    client = Proving(TOKEN)
    liar = Checking(client.first, lambda name: Verifier(name, 15_000, b"s" * 16, bytes(32), bytes(32)))
    client.answer(liar.challenge)
    with pytest.raises(ProofError, match="does not know"):
        client.check(f"v={proofs._encoded(bytes(32))}")
    with pytest.raises(ProofError):
        Proving(TOKEN).check(f"v={proofs._encoded(bytes(32))}")  # before it asked for anything


@pytest.mark.parametrize(
    "challenge",
    [
        "",
        "r=,s=AAAA,i=4096",
        "r={nonce},s=AAAA,i=4096",
        "r=x{nonce}y,s=AAAA,i=4096",
        "r={nonce}y,s=AAAA,i=1",
        "r={nonce}y,s=AAAA,i=999999999",
        "r={nonce}y,s=AAAA,i=-4096",
        "r={nonce}y,s=???,i=4096",
        "m=ext,r={nonce}y,s=AAAA,i=4096",
        "s=AAAA,r={nonce}y,i=4096",
        "r={nonce}é,s=AAAA,i=4096",
    ],
)
def test_challenges_that_a_client_does_not_answer(challenge):
    client = Proving(TOKEN, nonce="n" * 20)
    with pytest.raises(ProofError):
        client.answer(challenge.format(nonce="n" * 20))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_changed_character_anywhere_proves_nothing(data):
    _, worker, answer = exchange()
    place = data.draw(st.integers(0, len(answer) - 1))
    other = data.draw(st.sampled_from("AZaz09+/=,:é"))
    changed = answer[:place] + other + answer[place + 1 :]
    if changed == answer or _same_bytes(changed, answer):
        return
    with pytest.raises(ProofError):
        worker.verify(changed)


def _same_bytes(one, other):
    """Whether two proofs are the same bytes: the last character before the padding has bits that mean nothing."""
    first, second = one.rpartition(",p="), other.rpartition(",p=")
    try:
        return first[0] == second[0] and proofs._decoded(first[2]) == proofs._decoded(second[2])
    except ProofError:
        return False


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text_in_place_of_a_message(text):
    _, worker, _ = exchange()
    with pytest.raises(ProofError):
        worker.verify(text)
    with pytest.raises(ProofError):
        Checking(f"n,,{text}", find).verify(text)


# ------------------------------------------------------------------------------------- the worker's machine


@pytest.fixture
def state():
    return WorkerState("bob", users={"ann": TOKEN, "ben": "another token of somebody"})


def ask(state, body, connection=1):
    return state.handle(Received(connection, m.Envelope(1, body), []))


def hello(proof="", token=""):
    return m.Hello("s" * 32, own_versions(), token, proof)


def user_of(state, connection=1):
    return state._parts.sessions[connection].user


def test_who_proves_a_token_is_its_user(state):
    assert isinstance(open_session(state, 1, TOKEN), m.Welcome)
    assert user_of(state) == "ann"


def test_who_shows_nothing_is_nobody_and_needs_one_message(state):
    (reply,) = ask(state, hello())
    assert isinstance(reply.envelope.body, m.Welcome)
    assert user_of(state) is None
    assert "proof" not in m.to_wire(reply.envelope)["body"]  # what older clients read has nothing new in it
    assert not {"proof", "token"} & m.to_wire(m.Envelope(1, hello()))["body"].keys()


def test_wrong_and_unknown_tokens_look_alike(state):
    forms = []
    for number, first in enumerate((Proving(TOKEN).first, Proving("a token of nobody's").first), start=1):
        (reply,) = ask(state, hello(first), number)
        forms.append(re.sub(r"[A-Za-z0-9+/_-]{20,}", "*", reply.envelope.body.proof))
        distrust, refusal, close = ask(state, m.Prove("c=biws,r=x,p=AAAA"), number)
        assert (type(distrust), type(close)) == (Distrust, Close)
        forms.append(refusal.envelope.body.message)
    assert forms[:2] == forms[2:]
    unknown = [
        ask(state, hello(Proving("a token of nobody's").first), n)[0].envelope.body.proof for n in (5, 6)
    ]
    assert (
        len({text.split(",")[1] for text in unknown}) == 1
    )  # the same salt every time, as of a token that there is


def test_a_token_in_clear_is_refused(state):
    distrust, reply, close = ask(state, hello(token=TOKEN))
    assert "sent in clear" in reply.envelope.body.message
    assert TOKEN not in reply.envelope.body.message
    assert isinstance(distrust, Distrust)
    assert isinstance(close, Close)
    assert not state._parts.sessions


@pytest.mark.parametrize(
    "bodies", [["prove"], ["hello", "hello"], ["hello", "count"], ["all", "prove"], ["all", "hello"]]
)
def test_messages_out_of_their_order_open_nothing(state, bodies):
    client = Proving(TOKEN)
    said = {"hello": hello(client.first), "prove": m.Prove("c=biws,r=x,p=AAAA"), "count": m.CountObjects()}
    for name in bodies:
        if name == "all":
            open_session(state, 1, TOKEN)
            before = user_of(state)
            continue
        instructions = ask(state, said[name])
        if len(instructions) == 1:  # the challenge
            continue
        *_, reply, close = instructions
        assert isinstance(reply.envelope.body, m.Failure)
        assert isinstance(close, Close)
    if "all" in bodies:
        assert user_of(state) == before
    else:
        assert not state._parts.sessions


def test_one_connections_challenge_is_not_anothers(state):
    client = Proving(TOKEN)
    (reply,) = ask(state, hello(client.first), 1)
    answer = client.answer(reply.envelope.body.proof)
    ask(state, hello(client.first), 2)
    for instructions in (ask(state, m.Prove(answer), 2), ask(state, m.Prove(answer), 3)):
        assert any(isinstance(one, Close) for one in instructions)
    assert not state._parts.sessions
    (reply,) = ask(state, m.Prove(answer), 1)
    assert isinstance(reply.envelope.body, m.Welcome)


def test_a_proof_counts_once_and_a_challenge_ends_with_its_connection(state):
    client = Proving(TOKEN)
    (reply,) = ask(state, hello(client.first))
    answer = client.answer(reply.envelope.body.proof)
    state.handle(Disconnected(1))
    *_, close = ask(state, m.Prove(answer))
    assert isinstance(close, Close)
    assert not state._parts.sessions
    assert not state._parts.handshakes._checking
    assert not state._parts.handshakes._channels


def test_a_certificates_name_is_a_user_and_a_token_goes_before_it(state):
    channel = Channel("10.0.0.1", b"c" * 32, "carol")
    assert isinstance(open_session(state, 1, channel=channel), m.Welcome)
    assert user_of(state) == "carol"
    assert isinstance(open_session(state, 2, TOKEN, channel=channel), m.Welcome)
    assert user_of(state, 2) == "ann"


def test_a_worker_that_requires_users_lets_nobody_in():
    state = WorkerState("bob", users={"ann": TOKEN}, require_user=True)
    assert "users only" in open_session(state, 1).message
    assert isinstance(open_session(state, 2, TOKEN), m.Welcome)
    assert isinstance(open_session(state, 3, channel=Channel(user="carol")), m.Welcome)
    assert set(state._parts.sessions) == {2, 3}


@pytest.mark.parametrize("users", [{"ann": ""}, {"": TOKEN}, {"ann": TOKEN, "ben": TOKEN}])
def test_users_without_tokens_of_their_own(users):
    with pytest.raises(OptionError, match="token of its own"):
        WorkerState("bob", users=users)


def test_long_proofs_are_no_messages():
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"type": "prove", "proof": "x" * 1001}, m.Prove)


def test_a_channel_is_told_once():
    state = WorkerState("bob")
    assert state.handle(Connected(1, Channel("10.0.0.1"))) == []
    state.handle(Disconnected(1))
    assert not state._parts.handshakes._channels


# ------------------------------------------------------------------------------------------------- guessing


class Clock:
    def __init__(self):
        self.time = 100.0
        self.slept = []

    def now(self):
        return self.time

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds


def guesses_of(clock):
    return Guesses(now=clock.now, sleep=clock.sleep)


def test_wrong_proofs_wait_longer_and_longer_up_to_a_bound():
    clock = Clock()
    guesses = guesses_of(clock)

    async def main():
        for _ in range(20):
            async with guesses.turn("10.0.0.1"):
                guesses.wrong("10.0.0.1")

    asyncio.run(main())
    assert clock.slept[0] > 0
    assert clock.slept == sorted(clock.slept)
    assert clock.slept[-1] == LONGEST_WAIT
    assert len(clock.slept) == 20 - FREE - 1  # a wait stands before the next proof


def test_others_do_not_wait_and_what_is_long_ago_is_forgotten():
    clock = Clock()
    guesses = guesses_of(clock)

    async def tries(host, times, wrong=True):
        for _ in range(times):
            async with guesses.turn(host):
                if wrong:
                    guesses.wrong(host)

    asyncio.run(tries("10.0.0.1", 6))
    clock.slept.clear()
    asyncio.run(tries("10.0.0.2", 1))
    assert not clock.slept
    asyncio.run(tries("2001:db8::1", 6))
    clock.slept.clear()
    asyncio.run(tries("2001:db8::2", 1))  # of the same network of 64 bits
    assert clock.slept
    clock.time += 3600
    clock.slept.clear()
    asyncio.run(tries("10.0.0.1", 1))
    assert not clock.slept


@pytest.mark.parametrize("wrong", [0, FREE, FREE + 1])
def test_proofs_from_one_address_take_turns_and_only_some_wait_after_wrong_ones(wrong):
    guesses = Guesses(sleep=lambda seconds: asyncio.sleep(0))
    inside = []

    async def one():
        async with guesses.turn("10.0.0.1"):
            inside.append(1)
            assert len(inside) == 1
            await asyncio.sleep(0)
            inside.pop()

    async def main():
        for _ in range(wrong):
            guesses.wrong("10.0.0.1")
        return await asyncio.gather(*[one() for _ in range(MOST_WAITING + 3)], return_exceptions=True)

    outcomes = asyncio.run(main())
    refused = [one for one in outcomes if one is not None]
    assert len(refused) == (3 if wrong > FREE else 0)
    assert all(isinstance(one, HandshakeError) for one in refused)
    assert bool(guesses._addresses) == bool(wrong)  # of those that were never wrong nothing is kept


def test_clients_that_start_together_are_let_in_while_the_worker_computes():
    """Their proofs wait for the compute thread, more of them than may wait from where wrong ones came."""
    names = [f"user {number}" for number in range(2 * MOST_WAITING)]
    server = WebsocketServerWorker("bob", threads=1, users={name: f"the token of {name}" for name in names})
    with server.running() as uri, contextlib.ExitStack() as stack, ThreadPoolExecutor(len(names)) as threads:

        def connect(name):
            return WebsocketClientWorker("bob", uri=uri, token=f"the token of {name}", auto_add=False)

        first = stack.enter_context(connect(names[0]))
        x = torch.eye(1500).send(first)
        for _ in range(8):
            x = x @ x
        clients = [stack.enter_context(one) for one in threads.map(connect, names)]
        assert [(torch.ones(1).send(one) + 1).get().item() for one in clients] == [2] * len(names)


def test_the_id_of_a_token_is_not_the_token():
    assert re.fullmatch("[0-9a-f]{32}", token_id(TOKEN))
    assert token_id(TOKEN) != token_id(TOKEN + " ")
