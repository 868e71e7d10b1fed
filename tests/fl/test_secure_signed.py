"""Secure rounds in which workers sign: what a server that swaps keys, or tells two lists, gets to hear."""

import asyncio
import contextlib
from functools import partial

import pytest
import torch.nn.functional as F

from planrt.cli import main
from planrt.errors import OptionError, QuorumError, RemoteError, SignatureRefusedError
from planrt.fl import SecureAggregation, TrainConfig
from planrt.fl.runs.children import ChildOptions, WorkerProcesses
from planrt.sharing.secure_sum.keys import KeyPair
from planrt.sharing.secure_sum.member import Member
from planrt.sharing.secure_sum.signing import Identity
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.serving.sum_keys import identity_of, read_key, read_peers, write_key
from planrt.workers.wire import messages as m
from tests.fl.served import IDS
from tests.fl.test_secure import (
    ASKED,
    asking,
    assert_is_average,
    data_of,
    exact_average,
    lost,
    run,
    same,
    scheduler_of,
)
from tests.models import seeded_classifier


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """(folder of keys, name -> public key) of the three workers and of eve."""
    folder = tmp_path_factory.mktemp("sum-keys")
    return folder, {name: write_key(folder / f"{name}.pem") for name in [*IDS, "eve"]}


@pytest.fixture
def owners(transport, keys):
    """``owners(bob={})`` -> the three workers, who sign and check each other, but for bob, who has other options."""
    folder, public = keys
    with contextlib.ExitStack() as stack:

        def make(**signs):
            workers = []
            for id in IDS:
                all_of_it = {
                    "sum_key": folder / f"{id}.pem",
                    "sum_peers": {name: public[name] for name in IDS},
                }
                options = signs.get(id, all_of_it)
                if transport == "memory":
                    worker = VirtualWorker(id, datasets={"d": data_of(id)}, auto_add=False, **options)
                else:
                    server = WebsocketServerWorker(id, threads=1, **options)
                    server.add_dataset(data_of(id), "d")
                    uri = stack.enter_context(server.running())
                    worker = WebsocketClientWorker(id, uri=uri, auto_add=False)
                workers.append(stack.enter_context(worker))
            return workers

        yield make


def signs_only(id, keys):
    return {"sum_key": keys[0] / f"{id}.pem"}


def job_of():
    return TrainConfig(
        seeded_classifier(), F.nll_loss, batch_size=8, max_nr_batches=2, optimizer_args={"lr": 0.1}
    )


@contextlib.contextmanager
def lying(worker, change):
    """What the server asks `worker` is what `change` makes of it."""
    ask = worker.ask

    async def asked(expected, body, *args, **options):
        return await ask(expected, change(body), *args, **options)

    worker.ask = asked
    try:
        yield
    finally:
        del worker.ask


def asked_of(workers):
    """The kinds of messages that the first worker is asked, in order."""
    told = []

    def note(body):
        told.append(type(body).__name__)
        return body

    return told, lying(workers[0], note)


# --------------------------------------------------------------------------------------------------- rounds


def test_signed_rounds_make_the_same_average(owners):
    workers, job = owners(), job_of()
    plain = run(scheduler_of(workers, job, secure=False), 1, job.state, keep_worker_states=True)
    scheduler = scheduler_of(workers, job)
    told, noting = asked_of(workers)
    with noting:
        result = run(scheduler, 1, job.state)
    assert told == ["JoinSum", "ShareSecrets", "FitMasked", "SignSurvivors", "RevealShares"]
    assert_is_average(result.state, exact_average(plain, IDS))
    assert same(run(scheduler, 1, job.state).state, result.state)


@pytest.mark.parametrize("step", [*ASKED, "signing"])
def test_a_worker_that_drops_out_of_a_signed_round(owners, step):
    workers, job = owners(), job_of()
    counting = IDS if step in ("uncovering", "signing") else ["alice", "charlie"]
    plain = run(scheduler_of(workers, job, secure=False), 1, job.state, keep_worker_states=True)
    scheduler = scheduler_of(workers, job, min_workers=2)
    with lost(workers[1], {**ASKED, "signing": m.SignSurvivors}[step], before=True):
        result = run(scheduler, 1, job.state)
    assert_is_average(result.state, exact_average(plain, counting))


def test_workers_that_check_nobody_take_part_with_all(owners, keys):
    job = job_of()
    workers = owners(alice=signs_only("alice", keys), bob={}, charlie=signs_only("charlie", keys))
    told, noting = asked_of(workers)
    with noting:
        result = run(scheduler_of(workers, job), 1, job.state)
    assert "SignSurvivors" not in told
    assert result.missing == {}


def test_a_worker_that_checks_takes_part_with_those_who_only_sign(owners, keys):
    job = job_of()
    assert run(scheduler_of(owners(bob=signs_only("bob", keys)), job), 1, job.state).missing == {}


def test_who_does_not_sign_is_named(owners):
    job = job_of()
    workers = owners(bob={})
    with pytest.raises(
        SignatureRefusedError, match=r"'(alice|charlie)': the keys of worker 'bob' are not signed.*--sum-key"
    ):
        run(scheduler_of(workers, job), 1, job.state)
    with pytest.raises(QuorumError) as caught:  # those who check do not go on with it
        run(scheduler_of(workers, job, min_workers=2), 1, job.state)
    assert "'bob' are not signed" in caught.value.missing["alice"]


def test_who_is_no_peer_is_named(owners, keys):
    folder, public = keys
    only = {"sum_key": folder / "alice.pem", "sum_peers": {"charlie": public["charlie"]}}
    job = job_of()
    with pytest.raises(SignatureRefusedError, match="'alice' was given no key of worker 'bob'.*--sum-peers"):
        run(scheduler_of(owners(alice=only), job), 1, job.state)


def test_a_worker_with_another_key_than_its_peers_were_given_is_named(owners, keys):
    folder, public = keys
    other = {
        "sum_key": folder / "eve.pem",
        "sum_peers": {name: public[name] for name in ("alice", "charlie")},
    }
    job = job_of()
    with pytest.raises(
        SignatureRefusedError, match="passed on as those of worker 'bob' are not signed by it.*an old key"
    ):
        run(scheduler_of(owners(bob=other), job), 1, job.state)


# ------------------------------------------------------------------------------- a server that does otherwise


def own_keys(sum, name, least, signs):
    """Keys that a server makes in a worker's name, and its signature of them, of whatever key it has."""
    made = Member(name, least=least, identity=signs)
    keys = made.join(sum)
    return (keys.seal, keys.mask, keys.least), keys.signature


@pytest.mark.parametrize("how", ["the old signature", "a signature of its own", "another worker's", "none"])
def test_a_server_that_puts_in_keys_of_its_own(owners, keys, how):
    """The attack of which the paper warns in section 6: with bob's and charlie's keys it would know alice's model."""
    folder, _ = keys
    workers, job = owners(), job_of()

    def change(body):
        if not isinstance(body, m.ShareSecrets):
            return body
        server = Identity("bob", read_key(folder / "eve.pem"))
        mine, signature = own_keys(body.sum, "bob", body.keys["bob"][2], server)
        signatures = dict(body.signatures)
        if how == "a signature of its own":
            signatures["bob"] = signature
        elif how == "another worker's":
            signatures["bob"] = signatures["charlie"]
        elif how == "none":
            del signatures["bob"]
        return m.ShareSecrets(body.sum, body.threshold, {**body.keys, "bob": mine}, signatures)

    with (
        lying(workers[0], change),
        pytest.raises(SignatureRefusedError, match="worker 'alice'.*'bob' are not signed"),
    ):
        run(scheduler_of(workers, job), 1, job.state)


@pytest.mark.parametrize("part", ["the sum", "the least", "the seal", "the mask"])
def test_every_part_of_the_keys_is_signed(owners, part):
    workers = owners()
    keys = {}
    signatures = {}
    for worker in workers:
        answer, _ = asking(worker, m.SumKeys, m.JoinSum("one"))
        keys[worker.id], signatures[worker.id] = (answer.seal, answer.mask, answer.least), answer.signature
    seal, mask, least = keys["bob"]
    fresh = KeyPair.fresh().public
    if part == "the sum":  # keys of another sum, signed well
        answer, _ = asking(workers[1], m.SumKeys, m.JoinSum("before"))
        keys["bob"], signatures["bob"] = (answer.seal, answer.mask, answer.least), answer.signature
    else:
        keys["bob"] = {
            "the least": (seal, mask, least - 1),
            "the seal": (fresh, mask, least),
            "the mask": (seal, fresh, least),
        }[part]
    with pytest.raises(SignatureRefusedError, match="as those of worker 'bob' are not signed by it"):
        asking(workers[0], m.SecretsShared, m.ShareSecrets("one", 2, keys, signatures))
    with pytest.raises(RemoteError, match="in order"):  # and there is no second try
        asking(workers[0], m.SecretsShared, m.ShareSecrets("one", 2, keys, signatures))


def test_a_server_that_tells_two_lists_of_survivors(owners):
    """It would have alice give shares of bob's seed, and charlie of bob's key; neither does."""
    workers, job = owners(), job_of()

    def without_bob(body):
        if isinstance(body, m.SignSurvivors):
            return m.SignSurvivors(body.sum, ["alice", "charlie"])
        if isinstance(body, m.RevealShares):
            return m.RevealShares(body.sum, ["alice", "charlie"], body.signatures)
        return body

    with lying(workers[2], without_bob), pytest.raises(QuorumError) as caught:
        run(scheduler_of(workers, job, min_workers=2), 1, job.state)
    missing = caught.value.missing
    assert "'charlie' did not sign this list of survivors (alice, bob, charlie)" in missing["alice"]
    assert "'alice' did not sign this list of survivors (alice, charlie)" in missing["charlie"]


LISTS = {
    "no signatures": (
        SignatureRefusedError,
        "1 workers signed the list.*reveals its shares when 3 have: without bob, cha",
    ),
    "too few": (SignatureRefusedError, "2 workers signed the list.*without charlie"),
    "another worker's": (SignatureRefusedError, "'bob' did not sign this list of survivors"),
    "another list": (RemoteError, "for the survivors that it signed, and these are others"),
    "twice": (RemoteError, "its next step is to reveal: each is done once"),
}


@pytest.mark.parametrize("how", LISTS)
def test_shares_are_revealed_for_the_list_that_enough_have_signed(owners, how):
    workers, job = owners(), job_of()
    kind, says = LISTS[how]
    heard, told = [], asyncio.Event()
    ask = workers[0].ask

    async def asked(expected, body, *args, **options):
        if isinstance(body, m.RevealShares):
            signed = body.signatures
            changed = {
                "no signatures": {},
                "too few": {"alice": signed["alice"], "bob": signed["bob"]},
                "another worker's": {**signed, "bob": signed["charlie"]},
            }
            survivors = ["alice", "charlie"] if how == "another list" else body.survivors
            body = m.RevealShares(body.sum, survivors, changed.get(how, signed))
            if how == "twice":
                body, expected = m.SignSurvivors(body.sum, ["alice", "charlie"]), m.SurvivorsSigned
        try:
            return await ask(expected, body, *args, **options)
        except RemoteError as error:
            heard.append(error)
            told.set()
            raise

    async def after(ask, expected, body, *args, **options):
        if isinstance(body, m.RevealShares):  # or the round may be done before alice has said anything
            await told.wait()
        return await ask(expected, body, *args, **options)

    workers[0].ask = asked
    for other in workers[1:]:
        other.ask = partial(after, other.ask)
    scheduler = scheduler_of(
        workers, job, secure=SecureAggregation(threshold=2 if how == "another list" else 3)
    )
    if how == "another list":  # the others are enough for the sum; alice has revealed nothing all the same
        run(scheduler, 1, job.state)
    else:
        with pytest.raises(QuorumError):
            run(scheduler, 1, job.state)
    for worker in workers:
        del worker.ask
    assert len(heard) == 1
    with pytest.raises(kind, match=says):
        raise heard[0]


def test_a_server_that_does_not_ask_for_signatures_gets_no_shares(owners):
    workers, job = owners(), job_of()
    with contextlib.ExitStack() as stack:
        for worker in workers:
            ask = worker.ask

            async def asked(expected, body, *args, ask=ask, **options):
                if isinstance(body, m.SignSurvivors):
                    return m.SurvivorsSigned(bytes(64)), []
                return await ask(expected, body, *args, **options)

            worker.ask = asked
            stack.callback(worker.__dict__.pop, "ask")
        with pytest.raises(QuorumError) as caught:
            run(scheduler_of(workers, job), 1, job.state)
    assert caught.value.missing.keys() == set(IDS)
    assert all("where its next step is to sign" in why for why in caught.value.missing.values())


# ------------------------------------------------------------------------------------- keys, and their files


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sum-keys", "make", "alice"]) == 0
    line, *about = capsys.readouterr().out.splitlines()
    assert line.startswith("alice: ")
    assert len(line) == len("alice: ") + 64
    assert all(one.startswith("# ") for one in about)  # all of it can be appended to a file of peers
    assert (tmp_path / "alice-sum-key.pem").stat().st_mode & 0o077 == 0
    assert main(["sum-keys", "show", "alice"]) == 0
    assert capsys.readouterr().out.strip() == line
    assert main(["sum-keys", "make", "alice"]) == 2  # a key is not written over
    assert "is there already" in capsys.readouterr().err
    peers = tmp_path / "peers.txt"
    peers.write_text(f"# the three\n\n{line}\n")
    peers.chmod(0o644)
    assert main(["sum-keys", "list", "peers.txt"]) == 0
    assert capsys.readouterr().out.strip() == line
    identity = identity_of("alice", tmp_path / "alice-sum-key.pem", peers)
    assert identity.checks
    assert repr(identity) == "<Identity 'alice', ['alice']>"
    for name in ("../x", "", " a", "#a"):
        assert main(["sum-keys", "make", name]) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alice", "line 1: write `name: key`"),
        ("# none\n", "names no workers"),
        ("alice: 12ab\n", "line 1: a key has 64 hex digits"),
        (f"alice: {'0' * 63}g\n", "line 1: a key has 64 hex digits"),
        (f"a: {'01' * 32}\na: {'01' * 32}\n", "line 2: write `name: key`, each name once"),
    ],
)
def test_files_of_peers_that_are_none(tmp_path, text, says):
    file = tmp_path / "peers.txt"
    file.write_text(text)
    file.chmod(0o644)
    with pytest.raises(OptionError, match=says):
        read_peers(file)


def test_files_that_others_could_change_are_refused(tmp_path):
    file = tmp_path / "peers.txt"
    file.write_text(f"alice: {'01' * 32}\n")
    file.chmod(0o666)
    with pytest.raises(OptionError, match="others may write to .*: chmod go-w"):
        read_peers(file)
    key = tmp_path / "key.pem"
    write_key(key)
    key.chmod(0o644)
    with pytest.raises(OptionError, match="others may read"):
        read_key(key)


def test_what_is_no_key(tmp_path, keys):
    folder, public = keys
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no key")
    wrong.chmod(0o600)
    with pytest.raises(OptionError, match="holds no private key of Ed25519.*planrt sum-keys make"):
        VirtualWorker("alice", sum_key=wrong, auto_add=False)
    with pytest.raises(OptionError, match="cannot be read"):
        VirtualWorker("alice", sum_key=tmp_path / "none.pem", auto_add=False)
    with pytest.raises(OptionError, match=r"sum_peers .* needs the worker's own key"):
        WebsocketServerWorker("alice", sum_peers={"bob": public["bob"]})
    with pytest.raises(OptionError, match=r"sum_peers\['bob'\]: a key has 64 hex digits"):
        WebsocketServerWorker("alice", sum_key=folder / "alice.pem", sum_peers={"bob": "ab"})
    with pytest.raises(OptionError, match="with isolation the processes .* have the key to sign with"):
        WebsocketServerWorker("alice", sum_key=folder / "alice.pem", isolation=True)
    with pytest.raises(OptionError, match="key of 'alice' among those of its peers is not the public part"):
        WebsocketServerWorker("alice", sum_key=folder / "alice.pem", sum_peers={"alice": public["bob"]})


def test_a_worker_of_the_command_line_signs(tmp_path, keys):
    """`planrt serve --sum-key --sum-peers` hands both on."""
    folder, public = keys
    peers = tmp_path / "peers.txt"
    peers.write_text("".join(f"{name}: {public[name]}\n" for name in IDS))
    peers.chmod(0o644)
    options = ("--empty", "--threads", "1", "--sum-key", str(folder / "alice.pem"), "--sum-peers", str(peers))
    with WorkerProcesses([ChildOptions("alice", 0, options)]) as running:
        uri = running.wait_ready()["alice"].uri
        with WebsocketClientWorker("alice", uri=uri, auto_add=False) as alice:
            answer, _ = asking(alice, m.SumKeys, m.JoinSum("one"))
            assert len(answer.signature) == 64
            given = {
                "alice": (answer.seal, answer.mask, answer.least),
                "bob": (KeyPair.fresh().public, KeyPair.fresh().public, 2),
            }
            with pytest.raises(SignatureRefusedError, match="keys of worker 'bob' are not signed"):
                asking(alice, m.SecretsShared, m.ShareSecrets("one", 2, given, {"alice": answer.signature}))
