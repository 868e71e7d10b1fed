"""Programs on shares: calls that wait and share rounds give what calls one by one give, and need what was foreseen."""

import gc

import pytest
import torch
from torch import nn

from planrt.errors import PlanFormatError, RandomnessError, SharingError
from planrt.serde.values import pack, unpack
from planrt.sharing.correlated import Dealer, Stock, Supply
from planrt.sharing.kernels.arithmetic import Share
from planrt.sharing.programs import asking, calls, needs, running
from planrt.sharing.programs.calls import Call, Program, program_of
from planrt.sharing.programs.running import Failed, run_program
from planrt.sharing.randomness import new_seed
from planrt.sharing.requests import Base, Given, Known, Mask, Zero
from planrt.sharing.rounds import run_together
from planrt.sharing.tensors import in_process
from planrt.sharing.tensors.in_process import InProcessSession
from planrt.sharing.tensors.shared import share, share_module
from planrt.types import Ref


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))


def train(session, steps=3):
    model = share_module(session, network()) if session else network()
    x, y = random(12, 8, seed=1), random(12, 3, seed=2)
    if session:
        x, y = share(session, x), share(session, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if session:
            session.flush()
    if session:
        return [one.get() for one in model.parameters()]
    return [one.detach() for one in model.parameters()]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_calls_that_wait_share_rounds_and_change_no_result(count):
    apart, together = InProcessSession(count), InProcessSession(count, at_once=10_000)
    for one, other, plain in zip(train(apart), train(together), train(None), strict=True):
        assert (one - plain).abs().max() < 1e-3
        assert (other - plain).abs().max() < 1e-3
    assert together.transcript.rounds < apart.transcript.rounds
    assert sum(together.transcript.sent) <= sum(apart.transcript.sent)


def test_equal_seeds_give_equal_bits():
    def one():
        seeds = [bytes([n]) * 16 for n in range(2)]
        return train(InProcessSession(2, at_once=10_000, seeds=seeds, own_seed=bytes(16)))

    assert all(torch.equal(*pair) for pair in zip(one(), one(), strict=True))


def test_what_nobody_has_any_more_is_not_computed():
    session = InProcessSession(2, at_once=10_000)
    x = share(session, random(4, 5))
    (x @ x.t()).relu()
    gc.collect()
    doubled = x + x
    assert (doubled.get() - 2 * random(4, 5)).abs().max() < 1e-3
    assert session.transcript.rounds == 0


def test_in_place_in_a_program():
    session = InProcessSession(3, at_once=10_000)
    values = random(4, 5)
    x = share(session, values)
    y = x * x
    x.mul_(x).add_(1)
    z = x * y
    assert (y.get() - values**2).abs().max() < 1e-3
    assert (x.get() - values**2 - 1).abs().max() < 1e-3
    assert (z.get() - values**2 * (values**2 + 1)).abs().max() < 1e-2


def test_public_tensors_are_taken_as_they_are_at_the_call():
    session = InProcessSession(2, at_once=10_000)
    known = torch.ones(3)
    x = share(session, torch.ones(3)) + known
    known.zero_()
    assert x.get().tolist() == pytest.approx([2, 2, 2])


def test_a_call_that_fails_fails_what_depends_on_it_and_nothing_else():
    session = InProcessSession(2, at_once=10_000)
    x = share(session, random(4))
    bad = x**1.3
    worse, good = bad * 2, x * 2
    with pytest.raises(SharingError, match="powers of"):
        good.get()  # of the program that it stands in, in this process
    assert (good.get() - 2 * random(4)).abs().max() < 1e-3
    for one in (bad, worse):
        with pytest.raises(SharingError, match="powers of"):
            one.get()


def programs(session):
    """Steps of loops whose programs have views, changes in place, values opened before, and calls that fail."""
    found = train(session, steps=3)
    table, x = share(session, random(6, 4, seed=5)), share(session, random(4, 6, seed=6))
    for _ in range(3):
        table[1:3] += x.t()[:2]
        first, y = table.t(), x @ table
        table.mul_(0.5).relu_()
        good, bad = y.relu() @ first + first, (y**1.3 @ first) * 2
        with pytest.raises(SharingError, match="powers of"):
            bad.get()  # with which all that waits runs
        found.append(good.get())
        del good, bad, y, first
    return [*found, table.get()]


@pytest.mark.parametrize("count", [2, 3])
def test_runs_that_are_alike_begin_their_calls_as_the_first_one_did(count, monkeypatch):
    """Bit for bit, round for round, what they do when each finds that out by itself."""
    seeds = [bytes([number]) * 16 for number in range(count)]
    seen = []
    for known in (False, True):
        running._ORDERS.clear()
        monkeypatch.setattr(running, "_MOST", 256 if known else 0)
        monkeypatch.setattr(running, "MANY", 0)
        monkeypatch.setattr(in_process, "MANY", 0)
        session = InProcessSession(count, at_once=10_000, seeds=seeds, own_seed=bytes(16))
        session.transcript.keep_views = True
        seen.append((programs(session), session.transcript))
        assert bool(running._ORDERS) == known
    (one, its), (other, theirs) = seen
    assert its.rounds == theirs.rounds
    assert its.sent == theirs.sent
    for mine, yours in zip(its.views, theirs.views, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_steps_of_a_loop_are_one_program_and_other_arguments_another():
    kept = []
    session = InProcessSession(2, at_once=10_000)
    run = session._run_program
    session._run_program = lambda program, *rest: (kept.append(program), run(program, *rest))
    x = share(session, random(3))
    for factor in (2, 2, 2.0, 0.0, -0.0, True, 3):
        y = x * factor + [1, 2][0]
        assert (y.get() - (random(3) * factor + 1)).abs().max() < 1e-3
    assert kept[0] is kept[1]
    assert len({id(one) for one in kept}) == 6


@pytest.mark.parametrize("count", [2, 3])
def test_what_a_run_takes_is_what_was_foreseen(count, monkeypatch):
    """Step by step and number by number, for the last party of every program of a training loop."""
    programs = []
    make = in_process.run_program

    def watched(context, program, operands, key):
        if context.party.number == count - 1:
            start = context.party.supply._next
            program = program_of(program.text)
            foreseen = needs.needs_of(program, operands, party=count - 1, count=count, scale=context.scale)
            wanted = foreseen.numbered(start, needs.masks_of(operands))
            record = context.party.supply.record = []
            programs.append((foreseen, wanted, record, start))
            assert [number for number, _ in asking.from_data(asking.as_data(wanted))] == [
                number for number, _ in wanted
            ]
            assert asking.from_data(asking.as_data(wanted)) == wanted
            base = Base(start, needs.masks_of(operands))
            data = telling.data([(piece, base) for piece in foreseen.pieces])
            sent.append(data)
            heard = told.read(unpack(pack(data)))
            assert [
                (b.number(n), b.request(one)) for piece, b in heard for n, one in piece.requests
            ] == wanted
            assert all(b.means(one, b.request(one)) for piece, b in heard for _, one in piece.requests)
        return (yield from make(context, program, operands, key))

    monkeypatch.setattr(in_process, "run_program", watched)
    needs._KEPT.clear()
    telling, told, sent = asking.Telling(), asking.Told(), []
    session = InProcessSession(count, at_once=10_000)
    train(session, steps=5)
    for foreseen, wanted, record, start in programs:
        assert len(record) == len(foreseen.requests) == foreseen.taken[-1]
        assert wanted == [(n, one) for n, one in enumerate(record, start) if one.fixed]
    assert sum(sum(foreseen.sent) for foreseen, *_ in programs) * (count - 1) == session.transcript.sent[0]
    assert sum(len(foreseen.sent) for foreseen, *_ in programs) == session.transcript.rounds
    assert len(needs._KEPT) < len(programs)  # steps that are alike are foreseen once
    assert type(sent[0][0][2]) is list
    assert all(type(piece) is int for _, _, piece in sent[-1])  # and told once


ZERO = [[0, "Zero", ["t", 3]]]
GIVEN = [[0, "Given", [-2, ["Mask", ["t", 3]], ["t", 3], ["t"]]]]


@pytest.mark.parametrize(
    "data",
    [
        7, [7], [[0, []]], [[0, [], 0]], [[0, [], -1]], [[0, [], "x"]], [["0", [], ZERO]], [[-1, [], ZERO]],
        [[True, [], ZERO]], [[5, 1, ZERO]], [[5, [5], ZERO]], [[5, [-1], ZERO]], [[5, [1.0], ZERO]], [[5, [1], GIVEN]],
        [[5, [0, 1], GIVEN], [6, [1], 0]], [[5, [], ZERO], [9, [], 1]],
        [[0, [], [[0, "Zero", ["t", 1 << 26]]]], [1, [], 0], [2, [], 0]],
    ],
)  # fmt: skip
def test_what_is_asked_by_a_place_is_checked(data):
    with pytest.raises(RandomnessError):
        asking.Told().read(data)


def test_pieces_are_kept_up_to_a_bound_that_both_know(monkeypatch):
    monkeypatch.setattr(asking, "MOST_PIECES", 2)
    telling, told = asking.Telling(), asking.Told()
    pieces = [needs.Piece(((0, Zero((size,))),), 8 * size) for size in range(1, 5)]
    for turn in range(2):
        data = [telling.data([(piece, Base(turn))]) for piece in pieces]
        assert [type(one[0][2]) is int for one in data] == [turn > 0, turn > 0, False, False]
        for one, piece in zip(data, pieces, strict=True):
            ((heard, base),) = told.read(unpack(pack(one)))
            assert (heard.requests, base.start) == (piece.requests, turn)
    monkeypatch.setattr(asking, "MOST_PACKED", 8)
    telling = asking.Telling()
    assert telling.data([(pieces[0], Base())]) == telling.data([(pieces[0], Base())])


def test_a_correction_is_for_the_request_that_its_base_makes_of_it():
    """What was asked for by numbers from where a run begins is taken under the numbers that these stand for."""
    mask = Mask((3,))
    told = Given(Known(-1, mask, (3,)))
    seeds = [new_seed(), new_seed()]
    for right in (True, False):
        dealer, stock = Dealer(seeds), Stock()
        supply = Supply(seeds[1], stock)
        masks = [supply.take(mask).number for _ in range(2)]
        base = Base(2, [masks[1]])
        made = dealer.correction(2, told, base)
        assert torch.equal(made[0], Dealer(seeds).correction(2, base.request(told))[0])
        stock.put(2, told, made, base)
        wanted = Given(Known(masks[right], mask, (3,)))
        assert base.means(told, wanted) is (base.request(told) == wanted) is right
        if right:
            assert torch.equal(supply.take(wanted).fixed[0], made[0])
        else:
            with pytest.raises(RandomnessError, match="another operation"):
                supply.take(wanted)


def test_programs_as_text():
    program = Program.of(
        2,
        [
            Call("mm", (Ref(0), Ref(1)), {}, Ref(2)),
            Call("add", (Ref(2), 1.5), {"alpha": 2}, Ref(3)),
            Call("add", (Ref(3), Ref(0)), {}, None, True),
        ],
    )
    again = program_of(program.text)
    assert (again.operands, again.calls, again.values) == (2, program.calls, 4)
    assert program_of(program.text) is again


@pytest.mark.parametrize(
    "call",
    [
        Call("system", (Ref(0),), {}, Ref(1)),
        Call("add", (Ref(0), Ref(1)), {}, Ref(1)),
        Call("add", (Ref(0), 1), {}, Ref(7)),
        Call("add", (1, Ref(0)), {}, None, True),
        Call("add", (Ref(0), 1), {}, Ref(1), True),
    ],
)
def test_programs_that_are_none_are_refused(call):
    with pytest.raises(SharingError):
        Program.of(1, [call])


@pytest.mark.parametrize("text", ["", "é", "zz", "VPjK", Program.of(0, []).text[:-1]])
def test_text_that_is_no_program_is_refused(text):
    with pytest.raises((PlanFormatError, SharingError)):
        program_of(text)


def test_too_many_calls():
    many = [Call("neg", (Ref(0),), {}, Ref(1 + n)) for n in range(calls.MAX_CALLS + 1)]
    with pytest.raises(SharingError, match="at most"):
        Program.of(1, many)


@pytest.mark.parametrize(
    "data",
    [
        7, [7], [[0]], [["0", "Mask", ["t", 3]]], [[0, "Seed", ["t", 3]]], [[0, "Mask", ["t", -3]]],
        [[0, "Mask", ["t", 3], 1]], [[0, "Zero", ["t", 1 << 38]]], [[0, "Zero", ["t", 1 << 41]]],
        [[0, "Given", [0, ["Mask", ["t", 3]], ["t", 3], ["t"]]]],
        [[1, "Given", [0, ["Mask", ["t", 3]], ["t", 3], ["t", ["t", "system"]]]]],
        [[1, "Given", [0, ["Zero", ["t", 3]], ["t", 3], ["t"]]]],
        [[1, "Product", "conv9d", [0, ["Mask", ["t", 3]], ["t", 3], ["t"]], None, ["t"]]],
        [[1, "Conjunction", 0, ["t", 1, 1]]], [[1, "Conjunction", 2, ["t", 1]]],
        [[1, "Tables", [0, ["Mask", ["t", 3]], ["t", 3], ["t"]], 63, 1, False]],
    ],
)  # fmt: skip
def test_requests_that_are_none_are_refused(data):
    with pytest.raises((RandomnessError, PlanFormatError)):
        asking.from_data(data)


def test_every_kind_of_request_travels():
    from planrt.sharing import gates, requests

    kinds = {
        name
        for module in (gates, requests)
        for name, one in vars(module).items()
        if isinstance(one, type) and hasattr(one, "free") and hasattr(one, "targets") and name != "Request"
    }
    assert kinds == set(asking.REQUESTS)


def test_failed_operands():
    context = InProcessSession(2).contexts[0]
    program = Program.of(2, [Call("add", (Ref(0), Ref(1)), {}, Ref(2)), Call("neg", (Ref(1),), {}, Ref(3))])
    failed = Failed(SharingError("gone"))
    share_of_one = Share(torch.ones(2, dtype=torch.int64), 1)
    (values,) = run_together([run_program(context, program, [failed, share_of_one])])
    assert values[2].error is failed.error
    assert values[3].part.tolist() == [-1, -1]


def test_supplies_go_on_after_a_dry_run():
    """A dry run takes nothing from anybody."""
    supply = Supply(new_seed())
    program = Program.of(1, [Call("relu", (Ref(0),), {}, Ref(1))])
    operand = Share(torch.zeros(5, dtype=torch.int64), 2**16)
    found = needs.needs_of(program, [operand], party=1, count=2, scale=2**16)
    assert len(found.sent) == 4
    assert operand.masked is None
    assert supply._next == 0
