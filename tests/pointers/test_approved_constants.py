"""An approval is of a plan's constants too: with another mask it is another program. Every way a plan runs is held
to that, on either transport."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn

import planrt
from planrt.cli import main
from planrt.errors import NotApprovedError, OptionError, PlanArgumentError, RemoteError
from planrt.fl import TrainConfig
from planrt.plans.ir.constants import approval_hash, constants_of
from planrt.plans.plan import Plan
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.rules import Policy
from planrt.workers import BaseDataset, VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from tests.pointers.conftest import OWNER

pytestmark = pytest.mark.filterwarnings(
    "ignore::planrt.errors.PlanWarning"
)  # plans capture tensors on purpose

EVEN, ONE_HOT = torch.ones(3), torch.tensor([0.0, 1.0, 0.0])


def masked(mask, shape=(-1, 3)):
    @planrt.func2plan(args_shape=[shape])
    def mean_of_mask(x):
        return (x * mask).sum() / mask.sum()

    return mean_of_mask


def filed(plan):
    return approval_hash(plan.graph, constants_of(plan.graph, plan.state_tensors()))


def rows():
    return torch.arange(6.0).reshape(2, 3)


# Ways to run (x * mask).sum() / mask.sum() on a worker; each gives the number where it runs.


def call(worker, mask):
    return masked(mask).send(worker)(rows().send(worker)).get()


def call_of_a_copy(worker, mask):
    there = masked(mask).send(worker)
    return there.copy()(rows().send(worker)).get()


def run(worker, mask):
    return worker.run(masked(mask), rows())


def nested(worker, mask):
    inner = masked(mask)

    @planrt.func2plan(args_shape=[(-1, 3)])
    def outer(x):
        return inner(x) * 1

    return outer.send(worker)(rows().send(worker)).get()


def another_form(worker, mask):
    """Recorded for one size and called with another: the plan is recorded again, and that form sent."""
    return masked(mask, shape=(5, 3)).send(worker)(rows().send(worker)).get()


def protocol(worker, mask):
    made = planrt.Protocol([("hospital", masked(mask))])
    made.deploy(worker)
    return made.run(rows()).get()


def _config(mask):
    torch.manual_seed(0)

    def loss(pred, target):
        return ((pred.sum(1) - target) * mask.sum()).square().mean() + (mask * mask).sum()

    return TrainConfig(nn.Linear(3, 2), loss, batch_size=4)


def fit(worker, mask):
    _config(mask).send(worker)
    return worker.fit("scans")


def evaluate(worker, mask):
    _config(mask).send(worker)
    return worker.evaluate("scans")


WAYS = [call, call_of_a_copy, run, nested, another_form, protocol, fit, evaluate]


def approve_all(folder):
    record = Approvals(folder)
    for one in record.pending():
        record.approve(one.plan, by="dr. no")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run_a_plan_is_held_to_its_constants(hospital, tmp_path, way):
    data = BaseDataset(torch.randn(8, 3), torch.randn(8))
    worker = hospital(Policy(approval="ask"), approvals=tmp_path, datasets={"scans": data})()
    for _ in range(2):
        with pytest.raises(NotApprovedError, match="waits for the owner's approval"):
            way(worker, EVEN)
    approve_all(tmp_path)
    assert way(worker, EVEN) is not None
    with pytest.raises(NotApprovedError, match="waits for the owner's approval"):
        way(worker, ONE_HOT)
    assert way(worker, EVEN) is not None
    approve_all(tmp_path)
    assert way(worker, ONE_HOT) is not None


def test_the_values_are_what_is_asked_for(hospital, tmp_path):
    worker = hospital(Policy(approval="ask"), approvals=tmp_path)()
    honest, one_hot = masked(EVEN), masked(ONE_HOT)
    assert honest.hash == one_hot.hash
    assert worker.approval(honest).status == "unknown"
    assert worker.wait_for_approval(honest, timeout=0.05, every=0.02).status == "pending"
    (waiting,) = Approvals(tmp_path).pending()
    assert waiting.plan == filed(honest) != filed(one_hot)
    Approvals(tmp_path).approve(waiting.plan)
    assert worker.approval(honest).status == "approved"
    assert honest.send(worker)(rows().send(worker)).get().item() == 5.0
    assert worker.approval(one_hot).status == "unknown"
    with pytest.raises(NotApprovedError, match=filed(one_hot)):
        one_hot.send(worker)(rows().send(worker)).get()
    for almost in (torch.tensor([1.0, 1.0, -0.0]), torch.ones(3, dtype=torch.float64)):
        assert worker.approval(masked(almost)).status == "unknown"


def test_parameters_and_buffers_are_the_clients(hospital, tmp_path):
    """Training changes them: the page says that their values are no part of an approval."""
    worker = hospital(Policy(approval="ask"), approvals=tmp_path)()

    class Scaled(planrt.Plan):
        def __init__(self, by):
            super().__init__()
            self.by = nn.Parameter(torch.tensor(by))

        def forward(self, x):
            return (x * self.by).sum()

    first, second = Scaled(1.0), Scaled(2.0)
    for plan in (first, second):
        plan.build(torch.ones(2, 3))
    first.send(worker)
    worker.objects_count()
    approve_all(tmp_path)
    assert first.send(worker)(rows().send(worker)).get().item() == 15.0
    assert second.send(worker)(rows().send(worker)).get().item() == 30.0


def test_what_an_approved_plan_writes_to_its_constants_is_its_own_doing(hospital, tmp_path):
    """planrt calls what a function writes to a buffer; a plan that somebody put together need not."""
    worker = hospital(Policy(approval="ask"), approvals=tmp_path)()
    count = torch.zeros(1)

    @planrt.func2plan(args_shape=[(-1, 3)])
    def counting(x):
        count.add_(1)
        return x.sum() * 0 + count

    record = counting.record
    graphs = [
        graph and replace(graph, state=tuple(replace(one, kind="constant") for one in graph.state))
        for graph in (record.evaluation, record.training)
    ]
    made = Plan.from_record(replace(record, evaluation=graphs[0], training=graphs[1]), [count])
    there = made.send(worker)
    worker.objects_count()
    approve_all(tmp_path)
    x = rows().send(worker)
    assert [there(x).get().item() for _ in range(3)] == [1.0, 2.0, 3.0]
    assert there.copy()(x).get().item() == 4.0
    again = there.get().send(worker)  # with its count it is another plan
    with pytest.raises(NotApprovedError, match="waits for the owner's approval"):
        again(x).get()


def test_a_plan_that_comes_from_another_worker(transport, tmp_path):
    policy, approvals = Policy(approval="ask"), Approvals(tmp_path)
    with contextlib.ExitStack() as stack:
        if transport == "memory":
            alice = stack.enter_context(VirtualWorker("alice"))
            bob = stack.enter_context(VirtualWorker("bob", policy=policy, approvals=approvals))
        else:
            servers = [
                WebsocketServerWorker("alice", threads=1),
                WebsocketServerWorker("bob", threads=1, policy=policy, approvals=approvals),
            ]
            alice, bob = (
                stack.enter_context(WebsocketClientWorker(one.id, uri=stack.enter_context(one.running())))
                for one in servers
            )
        honest, one_hot = (masked(mask).send(alice).move(bob) for mask in (EVEN, ONE_HOT))
        (waiting,) = [one for one in approvals.pending() if one.plan == filed(masked(EVEN))]
        approvals.approve(waiting.plan)
        assert honest(rows().send(bob)).get().item() == 5.0
        with pytest.raises(NotApprovedError, match="waits for the owner's approval"):
            one_hot(rows().send(bob)).get()


# What the owner decided before, and lists


def test_a_decision_about_the_ops_alone_is_no_approval_of_constants(hospital, tmp_path):
    """As the record of an owner has it who approved before approvals were of constants."""
    worker = hospital(Policy(approval="ask"), approvals=tmp_path)()
    plan = masked(EVEN)
    Approvals(tmp_path).approve(plan.hash)
    with pytest.raises(
        NotApprovedError, match="its ops were approved, and an approval is of a plan's constants too"
    ):
        plan.send(worker)(rows().send(worker)).get()
    approve_all(tmp_path)
    assert plan.send(worker)(rows().send(worker)).get().item() == 5.0


def test_a_denial_of_the_ops_is_one_with_any_constants(hospital, tmp_path):
    worker = hospital(Policy(approval="ask"), approvals=tmp_path)()
    plan = masked(EVEN)
    there = plan.send(worker)
    worker.objects_count()
    approve_all(tmp_path)
    assert there(rows().send(worker)).get().item() == 5.0
    Approvals(tmp_path).deny(plan.hash, why="no masks here")
    assert worker.approval(plan) == ("denied", "no masks here")
    with pytest.raises(NotApprovedError, match="was not approved: no masks here"):
        there(rows().send(worker)).get()
    with pytest.raises(NotApprovedError, match="was not approved: no masks here"):
        worker.run(masked(ONE_HOT), rows())
    assert Approvals(tmp_path).pending() == []


def test_a_list_names_plans_with_their_constants(hospital):
    plan, one_hot = masked(EVEN), masked(ONE_HOT)
    worker = hospital(Policy(approval="list", approved=(filed(plan), one_hot.hash)))()
    assert plan.send(worker)(rows().send(worker)).get().item() == 5.0
    assert worker.approval(plan).status == "approved"
    with pytest.raises(NotApprovedError, match="not on the owner's list; its ops were approved"):
        one_hot.send(worker)(rows().send(worker)).get()


def test_an_author_is_told_beforehand(tmp_path):
    plan = masked(EVEN)
    listed = Policy(approval="list", approved=(filed(plan),))
    assert plan.check(listed, [rows()]).ok
    report = masked(ONE_HOT).check(listed, [rows()])
    assert [one.rule for one in report.violations] == ["approval"]
    assert filed(masked(ONE_HOT)) in str(report)


# The owner's page


def test_the_owner_sees_the_constants_and_who_sent_them(hospital, tmp_path, capsys):
    connect = hospital(Policy(approval="ask"), approvals=tmp_path)
    worker = connect(OWNER)
    many = torch.zeros(40)
    many[17] = 1.0
    plans = [masked(ONE_HOT), _summed(many), _summed(torch.ones(2**19))]
    for plan in plans:
        plan.send(worker, purpose="the mean \u202e age")
    worker.objects_count()
    pages = []
    for plan in plans:
        assert main(["inspect", filed(plan), "--folder", str(tmp_path), "--input", "x=2x3"]) == 0
        pages.append(capsys.readouterr().out)
        assert f"approve as {filed(plan)}: its ops, and the constants below" in pages[-1]
        assert "Asked for by user owner, for: the mean \\u202e age" in pages[-1]
    assert "constant float32[3]  sha256" in pages[0]
    assert "[0, 1, 0]" in pages[0]
    assert "40 numbers, from 0 to 1, 39 of them 0" in pages[1]
    assert "values not kept: ask for the plan's file" in pages[2]


def _summed(table):
    return planrt.func2plan(args_shape=[(-1, 3)])(lambda x: x.sum() * table[:3].sum())


def test_a_plans_file_says_what_it_is_filed_under(tmp_path, capsys):
    plan = masked(ONE_HOT)
    plan.save(tmp_path / "study.plan")
    assert main(["inspect", str(tmp_path / "study.plan"), "--input", "x=2x3"]) == 0
    assert f"approve as {filed(plan)}" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "study.plan"), "--input", "x=2x3", "--json"]) == 0
    assert '"values": [\n' in capsys.readouterr().out


# Bad input


def test_state_that_does_not_fit_is_refused(hospital, tmp_path):
    worker = hospital(Policy(approval="ask"), approvals=tmp_path)()
    with pytest.raises((PlanArgumentError, RemoteError)):
        worker.run(masked(EVEN).graph.with_state_values((torch.ones(4),)), rows())
    with pytest.raises(OptionError, match="came without their values"):
        worker.approval(masked(EVEN).graph.with_state_values(None))
    assert Approvals(tmp_path).pending() == []


def test_one_client_cannot_fill_the_queue(hospital, tmp_path, capsys):
    connect = hospital(Policy(approval="ask", max_pending=2), approvals=tmp_path)
    nobody, owner = connect(), connect(OWNER)
    plans = [masked(torch.full((3,), float(number))) for number in range(4)]
    for plan in plans[:2]:
        plan.send(nobody)
    nobody.objects_count()
    for client in (nobody, connect()):  # all without a token are one
        plans[2].send(client)
        with pytest.raises(NotApprovedError, match="cannot wait for the owner: 2 plans of one user wait"):
            client.objects_count()
    with pytest.raises(NotApprovedError, match="2 plans of one user wait"):
        nobody.run(plans[2], rows())
    plans[3].send(owner)
    plans[1].send(owner)  # which waits already
    owner.objects_count()
    folder = ["--folder", str(tmp_path)]
    assert main(["deny", "--all-of", "", "--why", "a flood", *folder]) == 0
    said = capsys.readouterr().out
    assert f"denied {filed(plans[0])}" in said
    assert f"not denied, as others asked for it too: {filed(plans[1])}" in said
    assert {one.plan for one in Approvals(tmp_path).pending()} == {filed(plans[1]), filed(plans[3])}
    assert nobody.approval(plans[0]) == ("denied", "a flood")
    assert main(["deny", "--all-of", "ann\x1b", "--why", "a flood", *folder]) == 0
    assert capsys.readouterr().out == "no plan waits that only user ann\\x1b asked for\n"


@pytest.mark.parametrize(
    "arguments", [["deny", "--why", "no"], ["deny", "abcdefgh", "--all-of", "x", "--why", "no"]]
)
def test_deny_names_one_plan_or_one_user(tmp_path, capsys, arguments):
    Approvals(tmp_path)
    assert main([*arguments, "--folder", str(tmp_path)]) == 2
    assert "name one plan by its hash, or a user with --all-of USER" in capsys.readouterr().err


def test_a_record_that_cannot_be_read_says_nothing_of_the_owners_files(hospital, tmp_path):
    worker = hospital(Policy(approval="ask"), approvals=tmp_path)()
    Approvals(tmp_path).approve("0" * 64)
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    for ask in (lambda: worker.approval(masked(EVEN)), lambda: worker.run(masked(EVEN), rows())):
        with pytest.raises(NotApprovedError, match="cannot be read") as raised:
            ask()
        assert str(tmp_path) not in f"{raised.value} {raised.value.remote_traceback}"
