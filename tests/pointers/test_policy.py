"""A worker with a policy: what its owner has not approved or allowed does not run, on either transport."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.errors import (
    GetNotPermittedError,
    NotApprovedError,
    OptionError,
    PolicyRefusedError,
    RemoteError,
)
from planrt.fl import TrainConfig
from planrt.plans import Graph, Op
from planrt.plans.policy.approvals import Approvals
from planrt.plans.policy.rules import Policy, ReleaseRule
from planrt.types import Ref, TensorSpec
from planrt.workers import BaseDataset, VirtualWorker
from tests.pointers.conftest import OWNER

PATIENTS = ReleaseRule("#patients", min_rows=20)


def put_patients(connect, rows=100, tag="#patients"):
    """Rows of three numbers, which only the owner may read; a client of the owner, to be kept."""
    torch.manual_seed(0)
    owner = connect(OWNER)
    values = torch.randn(rows, 3)
    values.clone().tag(tag).send(owner, allowed_users=["owner"])
    owner.objects_count()
    return values, owner


@planrt.func2plan(args_shape=[(-1, 3)])
def mean_of(x):
    return x.mean(0)


@planrt.func2plan(args_shape=[(-1, 3)])
def doubled(x):
    return x * 2


OPEN = Policy(approval="open", release=(PATIENTS,))

# ------------------------------------------------------------------------------------------------ approval


def test_a_plan_waits_until_its_owner_has_said_yes(hospital, tmp_path):
    connect = hospital(Policy(approval="ask"), approvals=tmp_path)
    worker = connect()
    assert worker.approval(mean_of).status == "unknown"
    there, x = mean_of.send(worker), torch.ones(4, 3).send(worker)
    with pytest.raises(NotApprovedError, match=rf"plan 'mean_of' \({mean_of.hash}\) waits for the owner's"):
        there(x).get()
    assert worker.approval(mean_of) == ("pending", "")
    record = Approvals(tmp_path)
    (waiting,) = record.pending()
    assert waiting.plan == mean_of.hash
    record.approve(mean_of.hash, by="dr. no")
    assert worker.approval(mean_of).status == "approved"
    assert there(x).get().tolist() == [1.0, 1.0, 1.0]  # the worker noticed


def test_a_plan_that_was_denied_says_why(hospital, tmp_path):
    connect = hospital(Policy(approval="ask"), approvals=tmp_path)
    worker = connect()
    there = mean_of.send(worker)
    worker.objects_count()
    Approvals(tmp_path).deny(mean_of.hash, why="means of what?", by="dr. no")
    assert worker.approval(mean_of) == ("denied", "means of what?")
    with pytest.raises(NotApprovedError, match="was not approved: means of what"):
        there(torch.ones(4, 3).send(worker)).get()
    with pytest.raises(NotApprovedError, match="was not approved"):
        worker.run(mean_of, torch.ones(4, 3))


def test_waiting_for_approval(hospital, tmp_path):
    connect = hospital(Policy(approval="ask"), approvals=tmp_path)
    worker = connect()
    assert worker.wait_for_approval(mean_of, timeout=0.05, every=0.02).status == "pending"
    Approvals(tmp_path).approve(mean_of.hash, by="dr. no")
    assert worker.wait_for_approval(mean_of, every=0.02).status == "approved"


def test_a_record_that_was_changed_is_told_to_the_owner_once(hospital, tmp_path, caplog):
    """Clients are told that the owner must look; the owner's log says where, and does not grow as they ask again."""
    worker = hospital(Policy(approval="ask"), approvals=tmp_path)()
    record = Approvals(tmp_path)
    record.deny(mean_of.hash, why="first")
    record.approve(mean_of.hash)
    decisions = tmp_path / "decisions.jsonl"
    decisions.write_text(decisions.read_text().replace("first", "other"))
    with caplog.at_level(logging.ERROR, logger="planrt.worker"):
        for _ in range(3):
            with pytest.raises(NotApprovedError, match="the owner must look there") as caught:
                mean_of.send(worker)(torch.ones(2, 3).send(worker)).get()
    assert str(tmp_path) not in str(caught.value)
    (told,) = [one for one in caplog.records if one.getMessage() == "decisions_not_read"]
    assert "line 2: the chain is broken" in told.error


def test_plans_on_a_list(hospital):
    worker = hospital(Policy(approval="list", approved=(mean_of.hash,)))()
    x = torch.ones(4, 3).send(worker)
    assert mean_of.send(worker)(x).get().tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(NotApprovedError, match="it is not on the owner's list"):
        doubled.send(worker)(x).get()
    assert worker.approval(mean_of).status == "approved"
    assert worker.approval(doubled).status == "denied"


def test_where_plans_are_approved_no_single_operation_runs(hospital):
    worker = hospital(Policy(approval="list", approved=(mean_of.hash,)))()
    x = torch.ones(4, 3, requires_grad=True).send(worker)
    with pytest.raises(
        NotApprovedError, match="runs plans that its owner approved, and no single operations"
    ):
        (x + 1).get()
    with pytest.raises(NotApprovedError):
        x[x > 0]
    assert x.get().tolist() == torch.ones(4, 3).tolist()  # what a client sent is its own to take back


def test_asking_needs_a_place_to_wait_in():
    with pytest.raises(OptionError, match='approval = "ask" needs a folder'):
        VirtualWorker("hospital", policy=Policy(approval="ask"))


def test_a_worker_without_a_policy_approves_everything(bob):
    assert bob.approval(mean_of).status == "approved"


# --------------------------------------------------------------------------------------------------- rules


def test_an_op_that_is_not_allowed_is_named_with_its_line(hospital):
    worker = hospital(Policy(approval="open", deny=("Tensor.mul",)))()
    x = torch.ones(4, 3).send(worker)
    with pytest.raises(PolicyRefusedError, match="the policy does not allow Tensor.mul") as raised:
        doubled.send(worker)(x).get()
    assert (raised.value.op, raised.value.index, raised.value.line) == ("Tensor.mul", 0, "_1 = _0.mul(2)")
    with pytest.raises(PolicyRefusedError, match="does not allow Tensor.mul"):
        (x * 2).get()
    assert (x + 1).get().sum().item() == 24.0
    with pytest.raises(PolicyRefusedError):
        worker.run(doubled, torch.ones(4, 3))


def test_sizes_and_memory_have_limits(hospital):
    worker = hospital(Policy(approval="open", max_memory=10_000, max_ops=3, max_output_bytes=2_000))()
    there = doubled.send(worker)
    assert there(torch.ones(4, 3).send(worker)).get() is not None
    with pytest.raises(PolicyRefusedError, match=r"\[max_memory\]"):
        there(torch.ones(1000, 3).send(worker)).get()
    with pytest.raises(PolicyRefusedError, match=r"\[max_output_bytes\]"):
        there(torch.ones(200, 3).send(worker)).get()

    @planrt.func2plan(args_shape=[(-1, 3)])
    def long(x):
        return x + 1 + 1 + 1 + 1

    with pytest.raises(PolicyRefusedError, match="4 ops are more than the 3 that are allowed"):
        long.send(worker)(torch.ones(4, 3).send(worker)).get()


def test_a_run_that_takes_too_long_is_ended_between_ops(hospital):
    @planrt.func2plan(args_shape=[(-1,)])  # recorded with a few numbers, and called with millions
    def slow(x):
        for _ in range(400):
            x = x.sin()
        return x

    worker = hospital(Policy(approval="open", max_seconds=0.5))()
    with pytest.raises(RemoteError, match="the time that the plan may take is over") as raised:
        slow.send(worker)(torch.ones(4_000_000).send(worker)).get()
    assert raised.value.index > 0
    assert doubled.send(worker)(torch.ones(1, 3).send(worker)).get() is not None  # the worker goes on


def test_a_plan_that_takes_long_to_look_at_is_refused(hospital):
    worker = hospital(Policy(approval="open", max_check_seconds=0.2))()
    ops = tuple(Op("torch.matrix_power", (Ref(i), 10**6 + i), {}, Ref(i + 1)) for i in range(3000))
    endless = Graph((TensorSpec((3, 3), torch.float32),), (), ops, Ref(len(ops)))
    with pytest.raises(
        PolicyRefusedError, match=r"\[max_check_seconds\] looking at the plan takes more than"
    ):
        worker.run(endless, torch.eye(3))
    assert worker.run(doubled, torch.ones(4, 3)).sum() == 24.0


# ------------------------------------------------------------------------------------------------- release


def test_an_aggregate_over_enough_rows_is_released(hospital):
    connect = hospital(OPEN)
    values, _owner = put_patients(connect)
    researcher = connect()
    (x,) = researcher.search("#patients")
    with pytest.raises(GetNotPermittedError):
        x.get()
    assert torch.equal(mean_of.send(researcher)(x).get(), values.mean(0))


def test_a_plan_that_shows_rows_is_refused_with_op_line_and_rule(hospital):
    connect = hospital(OPEN)
    _values, _owner = put_patients(connect)
    researcher = connect()
    (x,) = researcher.search("#patients")
    with pytest.raises(
        PolicyRefusedError, match=r"\[release\].*without an aggregate over at least 20"
    ) as raised:
        doubled.send(researcher)(x).get()
    assert (raised.value.index, raised.value.line) == (0, "_1 = _0.mul(2)")

    @planrt.func2plan(args_shape=[(-1, 3)])
    def few(x):
        return x[:5].mean(0)

    with pytest.raises(PolicyRefusedError, match="aggregate over 5 rows; at least 20 are asked for"):
        few.send(researcher)(x).get()


def test_too_few_rows(hospital):
    connect = hospital(OPEN)
    _values, _owner = put_patients(connect, rows=19)
    researcher = connect()
    (x,) = researcher.search("#patients")
    with pytest.raises(PolicyRefusedError, match="over 19 rows; at least 20"):
        mean_of.send(researcher)(x).get()


def test_data_without_a_rule_stays_private(hospital):
    connect = hospital(OPEN)
    _values, _owner = put_patients(connect, tag="#staff")
    researcher = connect()
    (x,) = researcher.search("#staff")
    with pytest.raises(GetNotPermittedError):
        mean_of.send(researcher)(x).get()


def smuggled(x, worker):
    """Ways to make a row look like an aggregate over many, by what clients can do beforehand."""
    yield "repeated row", lambda: x[:1].expand(100, 3)
    yield "view of some rows", lambda: x[:1]
    yield "copy of a row", lambda: x[:1].repeat(100, 1)
    yield "multiplied", lambda: x * 1

    def zeroed():
        x[1:] = 0
        return x

    def data():
        y = torch.zeros(100, 3).send(worker)
        y.data = x[:1].expand(100, 3)
        return y

    def retagged():
        y = x[:1].expand(100, 3).clone()
        y.tag("#patients", "#mine")
        return worker.search("#mine")[0]

    yield "written to", zeroed
    yield "other memory", data
    yield "tagged anew", retagged


@pytest.mark.parametrize("name", [name for name, _ in smuggled(None, None)])
def test_only_the_owners_data_itself_is_released(hospital, name):
    connect = hospital(OPEN)
    _values, _owner = put_patients(connect)
    researcher = connect()
    (x,) = researcher.search("#patients")
    prepared = dict(smuggled(x, researcher))[name]()
    with pytest.raises(GetNotPermittedError):
        mean_of.send(researcher)(prepared).get()


def test_a_tag_of_ones_own_makes_no_other_rule_apply(hospital):
    connect = hospital(Policy(approval="open", release=(PATIENTS, ReleaseRule("#demo", min_rows=1))))
    _values, _owner = put_patients(connect)
    researcher = connect()
    (x,) = researcher.search("#patients")
    x.tag("#demo")
    with pytest.raises(PolicyRefusedError, match="release"):
        doubled.send(researcher)(x).get()


def test_two_names_for_one_input_are_no_way_around(hospital):
    @planrt.func2plan(args_shape=[(-1, 3), (-1, 3)])
    def sneaky(x, y):
        y[1:] = 0
        return x.mean(0)

    connect = hospital(OPEN)
    _values, _owner = put_patients(connect)
    researcher = connect()
    (x,) = researcher.search("#patients")
    with pytest.raises(PolicyRefusedError, match="two of its inputs share memory or one is not contiguous"):
        sneaky.send(researcher)(x, x).get()


def test_what_a_released_plan_writes_to_its_input_is_no_data_of_the_owner(hospital):
    @planrt.func2plan(args_shape=[(-1, 3)])
    def emptied(x):
        total = x.sum(0)
        x[1:] = 0
        return total

    connect = hospital(OPEN)
    values, _owner = put_patients(connect)
    researcher = connect()
    (x,) = researcher.search("#patients")
    assert torch.allclose(emptied.send(researcher)(x).get(), values.sum(0))
    with pytest.raises(GetNotPermittedError):
        mean_of.send(researcher)(x).get()
    (again,) = researcher.search("#patients")
    assert torch.equal(mean_of.send(researcher)(again).get(), values.mean(0))  # the owner's data is as it was


class Regression(planrt.Plan):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x, y):
        loss = F.mse_loss(self.fc(x), y)
        loss.backward()
        with torch.no_grad():
            for parameter in self.fc.parameters():
                parameter -= 0.1 * parameter.grad
        return loss


def test_training_on_private_data_releases_what_was_learnt(hospital):
    connect = hospital(OPEN)
    values, owner = put_patients(connect)
    target = values.sum(1, keepdim=True)
    target.clone().tag("#patients", "#target").send(owner, allowed_users=["owner"])
    owner.objects_count()
    researcher = connect()
    (y,) = researcher.search("#target")
    x = next(one for one in researcher.search("#patients") if one.shape == (100, 3))
    torch.manual_seed(1)
    plan = Regression().build(torch.zeros(4, 3), torch.zeros(4, 1))
    there = plan.send(researcher)
    losses = [there(x, y).get().item() for _ in range(10)]
    here = plan.copy()
    assert losses == [here(values, target).item() for _ in range(10)]
    assert losses[-1] < losses[0] / 2
    assert torch.equal(there.get().fc.weight, here.fc.weight)


def test_a_released_result_has_no_gradients_to_ask_for(hospital):
    @planrt.func2plan(args_shape=[(-1, 3), (-1, 3)])
    def weighted(x, w):
        return (x * w).sum()

    connect = hospital(OPEN)
    values, _owner = put_patients(connect)
    researcher = connect()
    (x,) = researcher.search("#patients")
    w = torch.ones(100, 3, requires_grad=True).send(researcher)
    there = weighted.send(researcher)
    assert torch.allclose(there(x, w).get(), values.sum())
    there(x, w).backward()  # would leave the rows themselves in w.grad
    with pytest.raises(RemoteError, match="does not require grad"):
        _ = w.grad
    assert w.grad is None


def test_gradients_of_single_rows_are_not_released(hospital):
    @planrt.func2plan()
    def leak(x, w):
        (x.sum(1) * w).sum().backward()
        return w.grad

    leak.build(torch.zeros(100, 3), torch.zeros(100, requires_grad=True))
    connect = hospital(OPEN)
    _values, _owner = put_patients(connect)
    researcher = connect()
    (x,) = researcher.search("#patients")
    with pytest.raises(PolicyRefusedError, match="release"):
        leak.send(researcher)(x, torch.zeros(100).send(researcher)).get()


def test_data_held_from_the_start_is_private_under_a_rule():
    values = torch.randn(30, 3).tag("#patients")
    with VirtualWorker(None, "hospital", data=(values,), policy=OPEN) as worker:
        (x,) = worker.search("#patients")
        with pytest.raises(GetNotPermittedError):
            x.get()
        assert torch.equal(mean_of.send(worker)(x).get(), values.mean(0))


# ------------------------------------------------------------------------------------------- rounds


def regression(rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 3)
    return BaseDataset(x, x.sum(1, keepdim=True))


def train(worker, batch_size, **options):
    config = TrainConfig(nn.Linear(3, 1), F.mse_loss, batch_size=batch_size, **options)
    config.send(worker)
    return worker.fit("patients")


def test_rounds_on_served_data_keep_the_rules(hospital):
    connect = hospital(OPEN, datasets={"patients": regression(100)}, tags=["#patients"])
    worker = connect()
    assert train(worker, 50).samples == 100
    assert worker.evaluate("patients").samples == 100
    with pytest.raises(PolicyRefusedError, match="aggregate over 10 rows; at least 20"):
        train(worker, 10)
    with pytest.raises(PolicyRefusedError, match="over 10 rows; at least 20"):
        train(worker, 30)  # the last batch has 10
    assert train(worker, 30, max_nr_batches=3).samples == 90
    with pytest.raises(PolicyRefusedError, match="the smallest batch has 10 rows"):
        worker.evaluate("patients")


@pytest.mark.parametrize(
    ("tags", "rule", "told"),
    [
        ([], "#patients", "none"),
        (["patients"], "#patients", "patients"),  # without the #
        (["#Patients", "#2026"], "#patients", "#Patients, #2026"),
        (["#patients"], "#patients", None),
        ([], "*", None),
        ([], None, None),
    ],
)
def test_data_that_no_release_rule_is_about_is_told_to_its_owner(hospital, caplog, tags, rule, told):
    """Tags are easily mistyped, and without a rule every row may leave."""
    rules = () if rule is None else (ReleaseRule(rule, min_rows=20),)
    policy = Policy(approval="open", release=rules)
    with caplog.at_level(logging.WARNING, logger="planrt.worker"):
        hospital(policy, datasets={"scans": BaseDataset(torch.randn(4, 2), torch.zeros(4))}, tags=tags)
        VirtualWorker("clinic", policy=policy, data=[torch.ones(3).tag(*tags)])
    records = [one for one in caplog.records if one.getMessage() == "no_release_rule"]
    assert [one.tags for one in records] == ([] if told is None else [told, told])


class Words(nn.Module):
    """An embedding and an LSTM, as people train them on texts."""

    def __init__(self, frozen):
        super().__init__()
        self.table = nn.Embedding(50, 4)
        self.table.weight.requires_grad_(not frozen)
        self.lstm = nn.LSTM(4, 3, batch_first=True, bidirectional=True)
        self.out = nn.Linear(6, 2)

    def forward(self, words):
        return self.out(self.lstm(self.table(words))[0][:, -1])


def test_an_embedding_is_trained_with_its_table_frozen(hospital):
    """A row of the table is touched by those alone who have that word, so its gradient is no aggregate."""
    torch.manual_seed(0)
    words = torch.randint(0, 50, (40, 6))
    data = BaseDataset(words, words[:, 0] % 2)
    worker = hospital(OPEN, datasets={"texts": data}, tags=["#patients"])()
    options = {"batch_size": 20, "optimizer": "AdamW", "optimizer_args": {"lr": 0.01}, "shuffle": False}
    TrainConfig(Words(frozen=False), F.cross_entropy, **options).send(worker)
    with pytest.raises(PolicyRefusedError, match=r"gradient of table.weight depends on data"):
        worker.fit("texts")
    model = Words(frozen=True)
    config = TrainConfig(copy.deepcopy(model), F.cross_entropy, **options)
    config.send(worker)
    worker.fit("texts")
    trained = config.model_ptr.get().obj.state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for place in (0, 20):
        optimizer.zero_grad()
        F.cross_entropy(model(words[place : place + 20]), words[place : place + 20, 0] % 2).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value)


def test_rounds_wait_for_approval_too(hospital, tmp_path):
    connect = hospital(Policy(approval="ask"), approvals=tmp_path, datasets={"patients": regression(40)})
    worker = connect()
    with pytest.raises(NotApprovedError, match="waits for the owner's approval"):
        train(worker, 20)
    (waiting,) = Approvals(tmp_path).pending()
    Approvals(tmp_path).approve(waiting.plan, by="dr. no")
    assert train(worker, 20).samples == 40


def test_a_full_queue_is_said_and_harms_nobody(hospital, tmp_path):
    connect = hospital(Policy(approval="ask"), approvals=Approvals(tmp_path, max_pending=1))
    worker = connect()
    mean_of.send(worker)
    worker.objects_count()
    doubled.send(worker)
    with pytest.raises(RemoteError, match="1 plans wait for the owner already"):
        worker.objects_count()
    assert worker.approval(mean_of).status == "pending"


def test_wrong_questions(hospital):
    worker = hospital(OPEN)()
    with pytest.raises(OptionError, match="'not a hash' is not a plan's hash"):
        worker.approval("not a hash")
    assert worker.approval("0" * 64).status == "approved"


def test_what_a_client_may_read_needs_no_release(hospital):
    connect = hospital(OPEN)
    values, owner = put_patients(connect)
    (x,) = owner.search("#patients")
    assert torch.equal(doubled.send(owner)(x).get(), values * 2)


def test_the_owner_reads_who_asks_on_which_data_and_what_for(hospital, tmp_path, capsys):
    from planrt.cli import main

    approvals = Approvals(tmp_path / "approvals")
    dataset = BaseDataset(torch.randn(40, 3), torch.arange(40) % 2)
    connect = hospital(Policy(approval="ask"), approvals=approvals, datasets={"scans": dataset})
    known, nobody = connect(OWNER), connect()

    plan = planrt.func2plan(args_shape=[(-1, 3)])(lambda table: table.mean(0))
    pointer = plan.send(known, purpose="mean age, for the annual report")
    assert known.approval(plan).status == "pending"
    config = TrainConfig(nn.Linear(3, 2), F.cross_entropy, purpose="who comes back?")
    config.send(nobody)
    with pytest.raises(NotApprovedError):
        nobody.fit("scans")

    assert main(["pending", "--folder", str(approvals.folder)]) == 0
    page = capsys.readouterr().out
    assert "(table)" in page
    assert "asked for by user owner, for: mean age, for the annual report" in page
    assert "asked for by somebody without a token, on scans, for: who comes back?" in page
    del pointer


@pytest.mark.parametrize("purpose", [3, "x" * 1001])
def test_a_purpose_that_does_not_travel_is_refused_here(hospital, tmp_path, purpose):
    plan = planrt.func2plan(args_shape=[(2,)])(lambda x: x + 1)
    worker = hospital(Policy(approval="open"))()
    for wrong in (
        lambda: plan.send(worker, purpose=purpose),
        lambda: TrainConfig(nn.Linear(3, 2), F.cross_entropy, purpose=purpose),
        lambda: worker.wait_for_approval(plan, purpose=purpose),
    ):
        with pytest.raises(OptionError, match="purpose"):
            wrong()
    assert plan.send(worker)(torch.ones(2).send(worker)).get().tolist() == [2.0, 2.0]


def test_only_who_sent_a_plan_is_told_how_its_approval_stands(hospital, tmp_path):
    """Others could guess at a plan and its constants, confirm the guess, and read the owner's words."""
    connect, approvals = hospital(Policy(approval="ask"), approvals=tmp_path), Approvals(tmp_path)
    sender, guesser, owner = connect(), connect(), connect(OWNER)
    kept = doubled.send(sender), mean_of.send(owner)
    assert sender.approval(doubled).status == owner.approval(mean_of).status == "pending"
    assert guesser.approval(doubled).status == owner.approval(doubled).status == "unknown"
    approvals.deny(doubled.hash, why="two of them?")
    approvals.approve(mean_of.hash)
    assert sender.approval(doubled) == ("denied", "two of them?")
    assert guesser.approval(doubled) == ("unknown", "")
    assert guesser.approval(mean_of) == sender.approval(mean_of) == ("unknown", "")
    assert connect(OWNER).approval(mean_of).status == "approved"  # another session of the same user
    with pytest.raises(NotApprovedError, match="two of them"):
        doubled.send(guesser)(torch.ones(2, 3).send(guesser)).get()
    assert guesser.approval(doubled) == ("denied", "two of them?")
    del kept
