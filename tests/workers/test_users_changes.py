"""The file of a worker's users is read while the worker runs: who is taken out loses the sessions that are open."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch

import planrt
from planrt.errors import HandshakeError, PlanrtError, WorkerLostError
from planrt.workers import WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.serving import users_file

TOKENS = {name: f"the long token of {name}, no. 1" for name in ("ann", "ben", "eve")}


@pytest.fixture(scope="module", autouse=True)
def hook():
    planrt.TorchHook(torch)


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users"
    for name in ("ann", "ben"):
        users_file.add(path, name, TOKENS[name])
    return path


@pytest.fixture
def connect(users, monkeypatch):
    """``connect(name)`` -> a client of the worker whose users are in that file."""
    monkeypatch.setattr("planrt.workers.websocket_server.USERS_SECONDS", 0.02)
    server = WebsocketServerWorker("alice", threads=1, users=users, require_user=True)
    clients = []
    with server.running() as uri:

        def made(name, token=None):
            clients.append(WebsocketClientWorker("alice", uri=uri, token=token or TOKENS[name]))
            return clients[-1]

        yield made
        for client in clients:
            client.close()


def until(condition):
    """Waits for what happens soon; who waits for ever has found a fault."""
    for _ in range(2_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened")


def gone(worker):
    try:
        worker.objects_count()
    except PlanrtError:
        return True
    return False


def gets_in(connect, name, token=None):
    try:
        connect(name, token).objects_count()
    except HandshakeError:
        return False
    except WorkerLostError as error:  # the list changed just when it was in
        assert "counts no longer" in str(error)
        return False
    return True


def test_a_user_that_is_taken_out_loses_the_sessions_that_are_open(connect, users):
    ann, again, ben = connect("ann"), connect("ann"), connect("ben")
    x, y = torch.ones(2).send(ann), torch.ones(2).send(ben)
    users_file.remove(users, "ann")
    until(lambda: gone(ann) and gone(again))
    with pytest.raises(PlanrtError):
        x.get()
    assert not gets_in(connect, "ann")
    assert (y + 1).get().tolist() == [2, 2]  # others notice nothing


def test_a_new_user_gets_in_and_so_does_one_who_comes_back(connect, users):
    ben = connect("ben")
    assert not gets_in(connect, "eve")
    users_file.add(users, "eve", TOKENS["eve"])
    until(lambda: gets_in(connect, "eve"))
    users_file.remove(users, "eve")
    until(lambda: not gets_in(connect, "eve"))
    users_file.add(users, "eve", TOKENS["eve"])
    until(lambda: gets_in(connect, "eve"))
    assert not gone(ben)


def test_who_has_another_token_has_to_show_it(connect, users):
    ann, other = connect("ann"), "another long token of ann, no. 2"
    users_file.remove(users, "ann")
    users_file.add(users, "ann", other)
    until(lambda: gone(ann))
    assert not gets_in(connect, "ann")
    until(lambda: gets_in(connect, "ann", other))


def test_a_file_that_is_emptied_before_it_is_written_ends_nobody(users, monkeypatch):
    """As many editors do it. A look that falls between the two sees a file without anybody."""
    watched, whole = users_file.WatchedUsers(users), users.read_text()
    slept = []

    def write(seconds):
        """The editor goes on while the worker waits for the file to stay as it is."""
        slept.append(seconds)
        if len(slept) == 1:
            users.write_text(whole + "# a word of the owner\n")

    monkeypatch.setattr(users_file, "time", SimpleNamespace(sleep=write))
    users.write_text("")
    assert [watched.changed() for _ in range(3)] == [None, None, None]
    assert slept == [0.1, 0.1]  # it was seen empty, and seen whole
    assert sorted(watched.users) == ["ann", "ben"]
    users.write_text("")  # for good
    assert watched.changed() == {}


def broken(path):
    path.write_text("ann: no token of any strength\nben\n")


def readable(path):
    path.chmod(0o644)


def unreadable(path):
    path.write_bytes(b"\xff\xfe")


def missing(path):
    path.unlink()


def doubled(path):
    token = "one long token, of two users, no. 1"
    path.write_text(f"ann: {token}\nben: {token}\n")


@pytest.mark.parametrize("breaks", [broken, readable, unreadable, missing, doubled])
def test_a_file_that_is_broken_leaves_the_users_as_they_were(connect, users, caplog, breaks):
    ann, whole = connect("ann"), users.read_text()
    with caplog.at_level(logging.ERROR, logger="planrt.worker"):
        breaks(users)
        until(lambda: "users_not_read" in caplog.text)
    assert TOKENS["ann"] not in caplog.text
    assert not gone(ann)
    assert gets_in(connect, "ben")
    users.write_text(whole)
    users.chmod(0o600)
    users_file.remove(users, "ann")
    until(lambda: gone(ann))
    assert gets_in(connect, "ben")
