"""Programs of people who have not read the code, on a worker with users, a policy and isolation, over a websocket.

The honest ones compute what plain PyTorch computes. The others try what they should not.
"""

from __future__ import annotations

import asyncio
import copy
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

import planrt
from planrt.cli import main
from planrt.errors import MixedLocationsError, OptionError, PlanrtError, PolicyRefusedError
from planrt.loop import background_loop
from planrt.plans.policy.approvals import Approvals
from planrt.serde.frames import Limits
from planrt.workers.client.connection import Connection
from planrt.workers.serving import users_file
from planrt.workers.transport.addresses import DialOptions, dial
from planrt.workers.wire import messages as m
from tests.workers.test_isolation import USERS, Server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is for Linux")


@pytest.fixture(scope="module", autouse=True)
def hook():
    return planrt.TorchHook(torch)


@pytest.fixture(scope="module")
def server():
    started = Server(users=USERS, isolation=True, policy={"approval": "open"})
    yield started
    started.end()


# ----------------------------------------------------------------------------------------- honest ones


def trained(server, make, data, loss_of, optimizer, steps=3):
    """Trains a model with pointers to private data, and a copy of it here; both end alike."""
    torch.manual_seed(0)
    plain = make()
    there = copy.deepcopy(plain)
    own = optimizer(plain.parameters())
    for _ in range(steps):
        own.zero_grad()
        expected = loss_of(plain, *data)
        expected.backward()
        own.step()
    with server.connect("ann") as ann:
        model = there.send(ann)
        private = [one.send(ann, allowed_users=["ann"]) for one in data]
        remote = optimizer(model.parameters())
        for _ in range(steps):
            remote.zero_grad()
            loss = loss_of(model, *private)
            loss.backward()
            remote.step()
        assert torch.allclose(loss.get(), expected, atol=1e-6)
        same_parameters(model.get(), plain)


def same_parameters(model, plain):
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 17, 16) * 0.02)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.body(x)[:, 0])


def test_a_vision_transformer(server):
    torch.manual_seed(1)
    data = torch.randn(6, 1, 16, 16), torch.randint(0, 5, (6,))
    trained(server, VisionTransformer, data, lambda net, x, y: F.cross_entropy(net(x), y),
            lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))  # fmt: skip


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(3, 8, 2, batch_first=True), nn.Linear(8, 1)

    def forward(self, x, lengths):
        out, last = self.rnn(pack_padded_sequence(x, lengths, batch_first=True))
        padded, _ = pad_packed_sequence(out, batch_first=True, total_length=7)
        return self.out(last[-1]).squeeze(1) + padded.sum((1, 2)) * 0.01


@pytest.mark.filterwarnings("ignore::planrt.errors.PlanWarning")  # it has its weights in it
def test_a_recurrent_network_over_packed_sequences(server):
    """As a plan, where the owner limits nothing that depends on how long the sequences are; else it is said why not."""
    torch.manual_seed(2)
    x, lengths, plain = torch.randn(4, 7, 3), torch.tensor([7, 5, 3, 1]), Packed()

    @planrt.func2plan()
    def run(x):
        return plain(x, lengths)

    run.build(x)
    unlimited = ("max_memory", "max_flops", "max_output_bytes", "max_session_flops")
    other = Server(users=USERS, isolation=True, policy={"approval": "open", **dict.fromkeys(unlimited)})
    try:
        with other.connect("ann") as ann:
            there = run.send(ann)
            assert torch.allclose(
                there(x.send(ann, allowed_users=["ann"])).get(), plain(x, lengths), atol=1e-6
            )
    finally:
        other.end()
    with server.connect("ann") as ann:
        there = run.send(ann)
        with pytest.raises(PolicyRefusedError, match="its size depends on values, so nobody can say"):
            there(x.send(ann)).get()
        with pytest.raises(MixedLocationsError, match="record a plan of the whole"):
            pack_padded_sequence(x.send(ann), [7, 3, 5, 1], batch_first=True, enforce_sorted=False)


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.users = nn.EmbeddingBag(50, 8, mode="mean"), nn.Embedding(20, 8, padding_idx=0)
        self.out = nn.Linear(16, 2)

    def forward(self, words, offsets, users):
        return self.out(torch.cat([self.bag(words, offsets), self.users(users)], 1))


def test_bags_of_words(server):
    torch.manual_seed(3)
    data = (
        torch.randint(0, 50, (12,)), torch.tensor([0, 3, 4, 9]), torch.tensor([0, 5, 19, 5]), torch.tensor([0, 1, 1, 0])
    )  # fmt: skip
    trained(server, Bags, data, lambda net, *given: F.cross_entropy(net(*given[:3]), given[3]),
            lambda parameters: torch.optim.Adam(parameters, lr=0.01))  # fmt: skip


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 3)
        self.outer.register_forward_hook(lambda module, given, result: result * 0.5)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


def focal(net, x, y):
    logs = F.log_softmax(net(x), 1).gather(1, y.unsqueeze(1)).squeeze(1)
    penalty = sum((one**2).sum() for one in net.parameters())
    return (-((1 - logs.exp()) ** 2) * logs).mean() + 0.001 * penalty


def test_a_loss_by_hand_and_a_module_with_a_hook(server):
    torch.manual_seed(4)
    data = torch.randn(10, 4), torch.randint(0, 3, (10,))
    trained(server, Hooked, data, focal, lambda parameters: torch.optim.SGD(parameters, lr=0.1))


def test_a_loader_over_private_pointers(server):
    torch.manual_seed(5)
    x, y = torch.randn(20, 4), torch.randn(20, 1)
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))

    def epochs(net, x, y):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            for a, b in DataLoader(TensorDataset(x, y), batch_size=8):
                optimizer.zero_grad()
                F.mse_loss(net(a), b).backward()
                optimizer.step()

    with server.connect("ann") as ann:
        model = copy.deepcopy(plain).send(ann)
        epochs(model, *(one.send(ann, allowed_users=["ann"]) for one in (x, y)))
        epochs(plain, x, y)
        same_parameters(model.get(), plain)


# ------------------------------------------------------------------------------------ attackers, and the clumsy


def said(worker, body, kind=m.Message):
    """What a worker says to a message, in words without numbers of objects."""

    async def asking():
        return await worker.workplace.ask(kind, body)

    try:
        asyncio.run_coroutine_threadsafe(asking(), background_loop()).result()
    except PlanrtError as error:
        return re.sub(r"\d{4,}", "N", f"{type(error).__name__}: {error}")
    return "done"


def test_who_guesses_ids_hears_the_same_of_those_that_are_and_those_that_are_not(server):
    """In another user's process, in another of nobody's, and in another session of the same user."""
    with server.connect("ann") as ann, server.connect("ann") as again:
        secret = torch.tensor([41.5, 2.0]).send(ann, allowed_users=["ann"])
        ann.objects_count()
        there, absent = secret.id_at_location, secret.id_at_location ^ 1
        with server.connect("ben") as ben, server.connect("") as nobody:
            for other in (ben, nobody, again):
                for ask in (
                    lambda one: m.Fetch(one, False),
                    lambda one: m.Fetch(one, True),
                    lambda one: m.Move(one, m.PeerAddress("x", "ws://127.0.0.1:9"), 5, "a token"),
                    lambda one: m.Claim([one], "a guessed token of a stranger"),
                ):
                    answers = {said(other, ask(one)) for one in (there, absent)}
                    assert len(answers) == 1
                    assert "done" not in answers
                    assert "41" not in answers.pop()
        assert secret.get().tolist() == [41.5, 2.0]


def test_a_handshake_that_was_overheard_opens_nothing(server):
    """Its bytes, sent again over another connection."""
    sent = []

    async def go():
        pipe = await dial(server.uri, DialOptions(10, Limits()))
        send = pipe.send

        async def listening(frame, **options):
            sent.append(b"".join(bytes(one) for one in frame.pieces))
            return await send(frame, **options)

        pipe.send = listening
        connection = await Connection.open(pipe, "bob", timeout=10, limits=Limits(), token=USERS["ann"])
        await connection.close(forget=True)
        assert len(sent) >= 2
        again = await dial(server.uri, DialOptions(10, Limits()))

        class Raw:
            def __init__(self, data):
                self.data, self.nbytes, self.pieces = data, len(data), [data]

            def split(self, size=1 << 20):
                yield [self.data]

        answers = []
        try:
            for data in sent[:2]:
                await again.send(Raw(data))
                received = await again.receive()
                answers.append(type(received.message.body) if received is not None else None)
        finally:
            await again.close()
        return answers

    answers = asyncio.run_coroutine_threadsafe(go(), background_loop()).result(60)
    assert m.Welcome not in answers
    assert answers[-1] in (m.Failure, None)


def test_an_owner_who_takes_a_user_out_through_a_link_has_taken_it_out(tmp_path, capsys, monkeypatch):
    """The worker reads the file by its own name."""
    monkeypatch.chdir(tmp_path)
    for name in ("ann", "ben"):
        assert main(["users", "add", name, "--users", "users.txt", "--out", f"{name}.token"]) == 0
    Path("link.txt").symlink_to("users.txt")
    assert main(["users", "remove", "ben", "--users", "link.txt"]) == 0
    assert Path("link.txt").is_symlink()
    assert set(users_file.read("users.txt").users) == {"ann"}
    os.chmod("users.txt", 0o644)
    with pytest.raises(OptionError, match="others may read link.txt"):
        users_file.read("link.txt")
    Path("round.txt").symlink_to("round.txt")
    with pytest.raises(OptionError, match="round.txt cannot be read: Too many levels"):
        users_file.read("round.txt")


def test_a_record_whose_last_line_was_cut_off_says_the_way_out(tmp_path, capsys):
    folder = tmp_path / "approvals"
    record = Approvals(folder)
    record.submit("a" * 64, b"x")
    record.deny("a" * 64, by="the owner", why="no")
    file = folder / "decisions.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:57])
    for command in (["pending"], ["decisions"], ["deny", "a" * 64, "--why", "no"]):
        assert main([*command, "--approvals", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "line 2: it is not complete" in line
        assert "remove this line" in line
    file.write_text(whole)
    assert main(["decisions", "--approvals", str(folder)]) == 0
