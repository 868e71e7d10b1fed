"""What goes wrong when tensors are shared, line by line: each is told at once, typed, and with what to write instead.

A party or a client that is gone is in test_vanished.py, owners and plans that wait in test_shared_plans.py.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import planrt as sy
from planrt.errors import (
    GetNotPermittedError,
    LocalError,
    MixedLocationsError,
    OptionError,
    PointerError,
    SharingError,
    UnknownObjectError,
    ValueRangeError,
)
from planrt.sharing.programs import asking
from planrt.sharing.tensors import refusals
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.wire import messages as m

sy.TorchHook(torch)
X = torch.ones(2, 3)
NAMES = ("bob", "alice", "bill", "james")


@sy.func2plan(args_shape=[(2, 3), (2, 3)])
def product(x, y):
    return x * y


@pytest.fixture(scope="module", params=["memory", "websocket"])
def all_of(request):
    """The workers of all lines here, on one transport: they have to live through each of them."""
    with contextlib.ExitStack() as stack:
        made = {}
        for name in NAMES:
            if request.param == "memory":
                made[name] = stack.enter_context(VirtualWorker(name, auto_add=False))
            else:
                uri = stack.enter_context(WebsocketServerWorker(name, threads=1).running())
                made[name] = stack.enter_context(WebsocketClientWorker(name, uri=uri, auto_add=False))
        yield SimpleNamespace(**made)


def shared(w, values=X, *workers, provider=None, **precision):
    return values.fix_precision(**precision).share(
        *(workers or (w.bob, w.alice)), crypto_provider=provider or w.james
    )


def put_at_bob(x, scale, shape):
    """`x`, of which bob has another part, of that scale and shape."""
    place = x.session._places[0].connection
    place.post(m.Remove([x.handle.place]))
    part = torch.zeros(shape, dtype=torch.int64)
    place.post(m.PutShare(x.handle.place, x.session.group, scale, list(shape)), [part])
    return x


def without_a_part(w):
    x = shared(w)
    assert torch.equal(x.get(), X)
    x.session._places[1].connection.post(m.Remove([x.handle.place]))
    return x


def whole(w, value):
    return torch.tensor([value]).share(w.bob, w.alice, crypto_provider=w.james)


LINES = {
    # mixing shares of different parties, precisions or providers
    "parties": (
        lambda w: shared(w) + shared(w, X, w.bob, w.bill),
        SharingError,
        r"\['bob', 'alice'\] and .*'bill'",
    ),
    "precisions": (
        lambda w: shared(w) + shared(w, precision_fractional=4),
        SharingError,
        "scales 1000 and 10000: write fix_precision",
    ),
    "precisions here": (
        lambda w: X.fix_precision() + X.fix_precision(precision_fractional=5),
        SharingError,
        "write fix_precision",
    ),
    "providers": (
        lambda w: shared(w) @ shared(w, provider=w.bill).T,
        SharingError,
        "providers james and bill",
    ),
    "parties in a list": (
        lambda w: torch.cat([shared(w), shared(w, X, w.bob, w.bill)]),
        SharingError,
        "different parties",
    ),
    "parties in a plan": (
        lambda w: product(shared(w), shared(w, X, w.bob, w.bill)),
        LocalError,
        "different parties",
    ),
    "a pointer": (
        lambda w: shared(w) + X.send(w.bob),
        MixedLocationsError,
        "fix_precision().share(...).get()",
    ),
    "a pointer in a plan": (
        lambda w: product(X.send(w.bob), shared(w)),
        MixedLocationsError,
        "argument y in shares: write pointer.fix_precision().share(...).get()",
    ),
    "a sent plan": (
        lambda w: product.send(w.bob)(shared(w), shared(w)),
        MixedLocationsError,
        "on shares call the plan that is here",
    ),
    # one share missing, or of another shape
    "a part missing": (lambda w: without_a_part(w).get(), UnknownObjectError, "worker 'alice': no object"),
    "computing on a part missing": (
        lambda w: (without_a_part(w) * 2).get(),
        UnknownObjectError,
        "worker 'alice': no object",
    ),
    "a part of another shape": (
        lambda w: put_at_bob(shared(w), 1000, (3,)).get(),
        SharingError,
        "party 'bob' .*[3].*party 'alice' .*[2, 3].*nothing was opened",
    ),
    "a part of another scale": (
        lambda w: put_at_bob(shared(w), 7, (2, 3)).get(),
        SharingError,
        "different secrets.*'bob' (7",
    ),
    "computing on a part of another shape": (
        lambda w: (lambda x: (x * x).get())(put_at_bob(shared(w), 1000, (3,))),
        SharingError,
        "party 'alice' opened int64[2, 3] where this one opens int64[3]",
    ),
    # get on something not shared
    "get of what is here": (lambda w: X.clone().get(), PointerError, "send() it first"),
    "get of what is not shared yet": (lambda w: X.fix_precision().get(), PointerError, "send() it first"),
    "get of a module": (lambda w: nn.Linear(2, 2).get(), LocalError, "send() it first"),
    "float_precision before get": (
        lambda w: shared(w).float_precision(),
        SharingError,
        "x.get().float_precision()",
    ),
    # sharing with one party, or twice the same
    "no parties": (lambda w: X.fix_precision().share(), SharingError, "not 0: write share(bob, alice)"),
    "one party": (lambda w: shared(w, X, w.bob), SharingError, "not 1: write share(bob, alice)"),
    "a party twice": (lambda w: shared(w, X, w.bob, w.bob), SharingError, "'bob' is given twice"),
    "the provider a party": (lambda w: shared(w, provider=w.bob), SharingError, "whoever is both could see"),
    "a name": (
        lambda w: X.fix_precision().share("bob", w.alice),
        OptionError,
        "not str: write share(bob, alice)",
    ),
    "a list": (lambda w: X.fix_precision().share([w.bob, w.alice]), OptionError, "not list: write share(bob"),
    "twice": (lambda w: shared(w).share(w.bob, w.alice), SharingError, "get() opens it, refresh()"),
    "no time": (
        lambda w: X.fix_precision().share(w.bob, w.alice, crypto_provider=w.james, timeout=0),
        OptionError,
        "timeout is a number of seconds above 0",
    ),
    # floating-point tensors without precision
    "fractions": (
        lambda w: X.share(w.bob, w.alice, crypto_provider=w.james),
        SharingError,
        "x.fix_precision().share",
    ),
    "fractions there": (
        lambda w: X.send(w.bob).share(w.bob, w.alice),
        SharingError,
        "x.fix_precision().share",
    ),
    "a module of fractions": (lambda w: nn.Linear(2, 2).share(w.bob, w.alice), SharingError, "fix_precision"),
    "precision after sharing": (lambda w: shared(w).fix_precision(), SharingError, "comes before share()"),
    # values outside the range
    "a whole number": (lambda w: whole(w, 2**62 + 1), ValueRangeError, "values lie between"),
    "a whole number there": (
        lambda w: torch.tensor([-(2**63)]).send(w.bob).share(w.bob, w.alice, crypto_provider=w.james),
        ValueRangeError,
        "worker 'bob'.*values lie between",
    ),
    "a fraction": (lambda w: shared(w, torch.tensor([1e20])), ValueRangeError, "values lie between"),
    "no number": (
        lambda w: shared(w, torch.tensor([float("nan")])),
        ValueRangeError,
        "infinite or not numbers",
    ),
    "infinity there": (
        lambda w: shared(w, torch.tensor([float("inf")]).send(w.bob)),
        ValueRangeError,
        "worker 'bob'.*infinite or not numbers",
    ),
    "a whole number of 64 bits without a sign": (
        lambda w: torch.tensor([2**64 - 1, 1], dtype=torch.uint64).share(w.bob, w.alice),
        ValueRangeError,
        "values lie between",
    ),
    "such a number at a precision": (
        lambda w: shared(w, torch.tensor([2**64 - 1], dtype=torch.uint64)),
        ValueRangeError,
        "values lie between",
    ),
    "whole numbers of 32 bits at the finest precision": (
        lambda w: shared(w, torch.tensor([2**32 - 1], dtype=torch.uint32), base=2, precision_fractional=30),
        ValueRangeError,
        "values lie between",
    ),
    "complex numbers": (lambda w: shared(w, torch.ones(2) * 1j), ValueRangeError, "real and imaginary parts"),
    "a precision too fine": (lambda w: shared(w, precision_fractional=12), OptionError, "too fine"),
    # tensors that have no parts
    "a sparse tensor": (lambda w: shared(w, torch.eye(2).to_sparse()), SharingError, "with to_dense()"),
    "a meta tensor": (lambda w: shared(w, torch.ones(2, device="meta")), SharingError, "with to_empty()"),
    "a nested tensor": (
        lambda w: shared(w, torch.nested.nested_tensor([torch.ones(2)], layout=torch.strided)),
        SharingError,
        "with to_padded_tensor()",
    ),
    "a tensor on several workers": (
        lambda w: shared(w, X.send(w.bob, w.alice)),
        PointerError,
        "share each one, pointer.child",
    ),
    "gradients of whole numbers": (
        lambda w: torch.tensor([1]).share(w.bob, w.alice, crypto_provider=w.james, requires_grad=True),
        SharingError,
        "fix_precision() before",
    ),
    # a private tensor
    "a private tensor": (
        lambda w: shared(w, X.send(w.bob, private=True)),
        GetNotPermittedError,
        "nobody may share it",
    ),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("line", LINES)
def test_each_line_is_told_and_the_next_one_works(all_of, line):
    call, kind, says = LINES[line]
    pattern = says.replace("(", r"\(").replace(")", r"\)") if "\\" not in says else says
    pattern = pattern if "\\[" in pattern else pattern.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(kind, match=pattern):
        call(all_of)
    assert torch.equal((shared(all_of) * 2).get(), X * 2)


def test_a_provider_that_is_asked_for_too_much_says_the_limit(all_of, monkeypatch):
    x = shared(all_of, torch.ones(40, 40))
    assert x.get().sum() == 1600
    monkeypatch.setattr(asking, "MAX_BYTES", 10_000)
    with pytest.raises(
        SharingError, match="asked for .* bytes .* over the limit of 10,000: compute with fewer elements"
    ):
        (x * x).relu().get()
    monkeypatch.undo()
    assert torch.equal((shared(all_of) * 2).get(), X * 2)


@pytest.mark.parametrize("how", ["whole", "fractions", "a model", "there"])
def test_what_is_too_large_for_shares_is_refused_before_anything_is_sent(all_of, monkeypatch, how):
    x = shared(all_of)
    monkeypatch.setattr(refusals, "MOST_ENTRIES", 100)
    larger = torch.zeros(11, 10)
    share = {
        "whole": lambda: larger.long().share(all_of.bob, all_of.alice, crypto_provider=all_of.james),
        "fractions": lambda: shared(all_of, larger),
        "a model": lambda: shared(all_of, nn.Linear(10, 11)),
        "there": lambda: shared(all_of, larger.send(all_of.bob)),
    }[how]
    with pytest.raises(
        SharingError, match=r"110 entries, of shape \[11, 10\].*100 at most: share it in pieces"
    ):
        share()
    assert torch.equal((x * 2).get(), X * 2)  # what was there before goes on


@pytest.mark.parametrize("step", ["fix_precision", "share"])
def test_a_model_whose_graph_is_alive_changes_in_no_parameter(all_of, step):
    """The first parameter is in no graph, and could change."""
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.BatchNorm1d(3), nn.LSTM(3, 2)).eval()
    want = model[:2](X).detach()
    if step == "share":
        model.fix_precision(precision_fractional=4)
    kinds = [type(one) for one in model.state_dict().values()]
    alive = model[2](X)
    with pytest.raises(SharingError, match=r"results computed from it are there, .* torch.no_grad\(\)"):
        shared(all_of, model) if step == "fix_precision" else model.share(
            all_of.bob, all_of.alice, crypto_provider=all_of.james
        )
    assert [type(one) for one in model.state_dict().values()] == kinds
    del alive
    shared(all_of, model, precision_fractional=4)
    first = model[1](model[0](shared(all_of, precision_fractional=4))).get()
    assert (first - want).abs().max() < 0.01
    assert not model[0].weight.requires_grad


def test_a_private_tensor_of_another_user():
    users = {"ann": "pTq7-Lm2x_VzR9sK", "ben": "hW4k+Jd8y/NcB3fG"}
    with (
        VirtualWorker("clinic", users=users, token=users["ann"], auto_add=False) as ann,
        ann.connect_as(users["ben"]) as ben,
        VirtualWorker("bob", auto_add=False) as bob,
        VirtualWorker("james", auto_add=False) as james,
    ):
        X.clone().tag("#scores").send(ann, allowed_users=["ann"])
        ann.objects_count()
        (found,) = ben.search("#scores")
        with pytest.raises(GetNotPermittedError, match="private.*ann may share it"):
            found.fix_precision().share(bob, ben, crypto_provider=james)
        (own,) = ann.search("#scores")
        kept = own.fix_precision().share(bob, ann, crypto_provider=james).get()
        with pytest.raises(GetNotPermittedError, match="private"):  # bob's part keeps the label
            (kept + 1).get()
