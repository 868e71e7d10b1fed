"""Two tables about overlapping people, and the table that they are parts of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from planrt.errors import JointError, ValueRangeError
from planrt.sharing.columns.ids import keys_of, order_of
from planrt.sharing.columns.linear import Terms
from planrt.sharing.columns.steps import Send
from planrt.vertical import Party, Table

SHORT = {"key_bits": 1024, "allow_short_key": True}
"""Keys that are made in no time, and keep no secrets."""


def whole(rows=60, model="logistic"):
    """name -> column of everybody."""
    random = np.random.default_rng(3)
    columns = {name: random.normal(size=rows) for name in "abcde"}
    score = sum((number - 1.5) * column for number, column in enumerate(columns.values()))
    label = (score > 0).astype(float) if model == "logistic" else score + random.normal(size=rows)
    return {"id": [f"person {row}" for row in range(rows)], **columns, "y": label}


def some(table, names, rows):
    return {name: [table[name][row] for row in rows] for name in names}


def halves(table):
    """Alice's and bob's tables: each lacks ten people; bob's is in another order and spells ids differently."""
    rows = len(table["id"])
    left = some(table, ["id", "a", "b"], range(rows - 10))
    right = some(table, ["id", "c", "d", "e", "y"], list(range(10, rows))[::-1])
    right["who"] = [f" {id.upper()} " for id in right.pop("id")]
    return Table(left, "id"), Table(right, "who", label="y")


def parties(make_worker, table):
    left, right = halves(table)
    alice, bob = make_worker("alice", {"t": left}), make_worker("bob", {"t": right})
    return Party(alice, "t", "id", ["a", "b"]), Party(bob, "t", "who", ["c", "d", "e"], label="y")


def joined(table, *, seed=0, holdout=0.0, normalise="casefold", several=False):
    """What an owner of both tables has: columns [people, 5] and labels, in the order of joint runs; where ids are of
    `several` columns, each is a tuple."""
    common = range(10, len(table["id"]) - 10)
    ids = [table["id"][row] if several else (table["id"][row],) for row in common]
    columns = [(f"id {place}", list(map(str, column))) for place, column in enumerate(zip(*ids, strict=True))]
    keys = keys_of(columns, normalise, whose="everybody")
    rows = [common[place] for place in order_of(keys, seed)]
    rows = rows[: len(rows) - int(len(rows) * holdout)]
    values = np.stack([[table[name][row] for row in rows] for name in "abcde"], 1)
    return values, np.array([table["y"][row] for row in rows])


def trained(values, labels, model, *, epochs, batch_size, lr, l2=0.0, seed=0, exact=False):
    """Plain PyTorch on the joined table, over the same batches: (weights with the intercept last, losses)."""
    net = torch.nn.Linear(values.shape[1], 1, dtype=torch.float64)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    groups = [{"params": [net.weight], "weight_decay": l2}, {"params": [net.bias]}]
    optimizer = torch.optim.SGD(groups, lr=lr)
    data, target = torch.from_numpy(values), torch.from_numpy(labels)
    terms = Terms(model, ("a", "b", "c"), 1, len(data), batch_size, lr, l2, seed, 2048)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for rows in terms.batches(epoch):
            optimizer.zero_grad()
            score, truth = net(data[rows])[:, 0], target[rows]
            if model == "linear":
                loss = torch.nn.functional.mse_loss(score, truth)
            elif exact:
                loss = torch.nn.functional.binary_cross_entropy_with_logits(score, truth)
            else:
                sign = 2 * truth - 1
                loss = (np.log(2) - sign * score / 2 + score**2 / 8).mean()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(data))
    return torch.cat([net.weight.detach()[0], net.bias.detach()]).numpy(), losses


def ends_of_too_large_a_rate(run, told):
    """That fitting ends the run, with `told`."""
    with pytest.raises(ValueRangeError, match=told):
        run.fit()
    assert not run.is_open
    with pytest.raises(JointError, match="has ended"):
        run.weights()


def with_changed(role, kind, change):
    """A role of a joint run whose parcels of that kind are changed: `change` takes and returns their tensors."""
    got = None
    while True:
        try:
            step = role.send(got)
        except StopIteration as done:
            return done.value
        if isinstance(step, Send) and step.kind == kind:
            step = Send(step.to, kind, change(list(step.tensors)))
        got = yield step
