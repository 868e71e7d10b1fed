"""How objects look when they are printed and in notebooks: short, true, and safe whatever others call themselves."""

from __future__ import annotations

import html
import re
import sys
from html.parser import HTMLParser

import jupyter_client
import pytest
import torch
from torch.nn import functional as F

import planrt
from planrt.cards import MOST, card
from planrt.fl import ModelEvaluator, RoundScheduler, TrainConfig
from planrt.fl.rounds import RoundResult, WorkerRound
from planrt.plans.training import EvaluationResult
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker
from planrt.workers.results import FitResult

HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e&\"'"
HOOK = planrt.TorchHook(torch)
ALLOWED = {"div", "b", "table", "tr", "td", "th", "pre"}


class Tags(HTMLParser):
    """Collects elements, and what is shown."""

    def __init__(self):
        super().__init__()
        self.elements, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        assert all(name in ("style", "colspan") for name, _ in attrs)
        self.elements.append(tag)

    def handle_endtag(self, tag):
        self.elements.append(f"/{tag}")

    def handle_data(self, data):
        self.texts.append(data)


def shown_safely(made: str) -> str:
    """What a reader sees of `made`, which is well formed, and where nothing but our own elements are."""
    parser = Tags()
    parser.feed(made)
    parser.close()
    open_elements = []
    for name in parser.elements:
        if name.startswith("/"):
            assert open_elements.pop() == name[1:]
        else:
            assert name in ALLOWED
            open_elements.append(name)
    assert not open_elements
    text = " ".join(parser.texts)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    return text


def test_everything_is_escaped_on_workers(make_worker, transport):
    data = planrt.BaseDataset(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
    bob = make_worker("bob", {HOSTILE: data})
    x = torch.ones(2, 3).tag(HOSTILE).describe(f"{HOSTILE}\nmore").send(bob)
    (found,) = bob.search(HOSTILE)
    for pointer in (x, found):
        text = shown_safely(pointer._repr_html_())
        assert "PointerTensor" in text
        assert f"bob:{pointer.id_at_location}" in text
        assert "[2, 3]" in text
        assert "<script>alert(1)</script>" in text
        assert r"\x1b[2J\u202e" in text
        assert "more" not in text
        assert "\x1b" not in repr(pointer)
        assert "\u202e" not in repr(pointer)
        assert r"\x1b[2J\u202e" in repr(pointer)
    worker = shown_safely(bob._repr_html_())
    assert f"{type(bob).__name__} bob" in worker
    assert bob.address in worker
    assert "<script>" in worker  # the key of its data set, as text
    plan = planrt.Plan(lambda x: x + 1, name=HOSTILE).tag(HOSTILE).describe(HOSTILE)
    assert "no: call" in shown_safely(plan._repr_html_())
    plan.build(torch.ones(2))
    text = shown_safely(plan._repr_html_())
    assert plan.hash in text
    assert "_0.add(1)" in text or "torch.add" in text or "__add__" in text
    there = plan.send(bob)
    assert plan.hash in shown_safely(there._repr_html_())
    assert "\x1b" not in repr(there)
    (other,) = [one for one in bob.search(HOSTILE) if type(one).__name__ == "PointerPlan"]
    shown_safely(other._repr_html_())  # asks the worker for nothing
    shown_safely(plan.check(None, [torch.ones(2)])._repr_html_())
    chained = planrt.Protocol([("one", plan)], name="chained").tag(HOSTILE).send(bob)
    shown_safely(chained._repr_html_())


def test_everything_is_escaped_in_results():
    part = WorkerRound(1, 1, 10, 20, 0.5, 30)
    results = [
        RoundResult(3, 1.5, {"weight": torch.ones(1)}, 0.25, {HOSTILE: part, "bob": part}),
        FitResult(HOSTILE, 0.25, 30, 3, {"weight": torch.ones(1)}, {}),
        EvaluationResult(0.25, 30, 15, [10, 20], [15, 15]),
        EvaluationResult(0.25, 30),
    ]
    for result in results:
        assert "0.2500" in shown_safely(result._repr_html_())
        assert "\x1b" not in repr(result)
        assert len(repr(result)) < 300
    assert "50.00% (15 of 30)" in shown_safely(results[2]._repr_html_())
    assert "accuracy" not in shown_safely(results[3]._repr_html_())
    assert "bytes received" in shown_safely(results[0]._repr_html_())


def test_long_tables_and_texts_are_cut_and_counted():
    rows = [(number, "x" * 1000) for number in range(MOST + 5)]
    text = "\n".join(f"line {number}" for number in range(MOST + 7))
    made = card(
        "a" * 1000, [("left out", None), ("empty", "")], columns=("number", "x"), rows=rows, text=text
    )
    seen = shown_safely(made)
    assert "... 5 more" in seen
    assert "... 7 more lines" in seen
    assert "left out" not in seen
    assert "empty" not in seen
    assert len(made) < 100_000
    assert html.unescape(card("<")) == "<div><b><</b></div>"


def test_a_worker_that_is_gone_looks_gone(transport):
    if transport == "memory":
        bob = VirtualWorker("bob")
        x = torch.ones(2).send(bob)
        bob.close()
        assert repr(bob) == "<VirtualWorker id:bob #objects:1, gone: closed by this side>"
    else:
        server = WebsocketServerWorker("bob", threads=1)
        with server.running() as uri:
            bob = WebsocketClientWorker("bob", uri=uri)
            x = torch.ones(2).send(bob)
            assert repr(bob) == f"<WebsocketClientWorker bob at {uri}>"
        with pytest.raises(planrt.errors.WorkerLostError):
            x.get()
        assert repr(bob).startswith(f"<WebsocketClientWorker bob at {uri}, gone: ")
        bob.close()
    assert "gone" in shown_safely(bob._repr_html_())
    assert re.fullmatch(r"\(Wrapper\)>\[PointerTensor \| me:\d+ -> bob:\d+\] \(gone: [^\n]+\)", repr(x))
    assert "gone" in shown_safely(x._repr_html_())


def test_a_pointer_that_was_used_up_says_so(bob):
    x = torch.ones(2).send(bob)
    assert "gone" not in x._repr_html_()
    x.get()
    assert repr(x).endswith(" (used up)")
    assert "used up" in shown_safely(x._repr_html_())


def test_a_pointer_to_several_workers_has_a_row_for_each(alice, bob):
    both = torch.ones(2).send(alice, bob)
    text = shown_safely(both._repr_html_())
    assert "alice" in text
    assert "bob" in text


def test_what_trains_is_short(bob):
    config = TrainConfig(
        torch.nn.Linear(100, 100),
        F.cross_entropy,
        example=(torch.ones(4, 100), torch.zeros(4, dtype=torch.int64)),
    )
    scheduler = RoundScheduler([bob], config, dataset_key="points", seed=1)
    evaluator = ModelEvaluator(bob, config, dataset_key="points", batch_size=4)
    for one, names in (
        (config, ("TrainConfig", "Linear", "cross_entropy")),
        (scheduler, ("RoundScheduler", "Linear", "bob", "points")),
        (evaluator, ("ModelEvaluator", "Linear", "bob", "points")),
        (config.plans, ("ModelPlans", "Linear", "2 state entries")),
        (planrt.local_workers("alice", "bob"), ("local_workers alice, bob", "not started")),
    ):
        assert all(name in repr(one) for name in names), repr(one)
        assert len(repr(one)) < 400
        assert "0x" not in repr(one)


def test_a_report_is_a_line_and_prints_as_a_page():
    plan = planrt.func2plan(args_shape=[(-1, 3)])(lambda x: x.mean(0))
    report = plan.check(None, [torch.ones(4, 3)])
    assert re.fullmatch(r"<Report of plan \W?lambda\W?: 1 op; print\(\) shows the page>", repr(report))
    assert "Gives back" in str(report)
    policy = planrt.plans.policy.rules.Policy(approval="open", deny=("*.mean",))
    broken = plan.check(policy, [torch.ones(4, 3)])
    assert ": 1 op, breaks policy" in repr(broken)
    assert "1 violation" in repr(broken)
    assert ", keeps policy" in repr(
        plan.check(planrt.plans.policy.rules.Policy(approval="open"), [torch.ones(4, 3)])
    )


CELLS = [
    "import torch, planrt as sy; hook = sy.TorchHook(torch); bob = sy.VirtualWorker(hook, id='bob')",
    "torch.ones(2).tag('<script>alert(1)</script>').send(bob)",
    "sy.func2plan(args_shape=[(2,)])(lambda x: x + 1)",
    "bob",
    "bob.close(); bob",
]


@pytest.mark.filterwarnings("default")
def test_a_notebook_shows_the_html():
    manager = jupyter_client.KernelManager()
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    seen, problems = [], []

    def collect(message):
        if message["msg_type"] == "execute_result":
            seen.append(message["content"]["data"])
        elif message["msg_type"] in ("error", "stream"):
            problems.append(message["content"])

    try:
        client.wait_for_ready(timeout=60)
        for cell in CELLS:
            client.execute_interactive(cell, timeout=60, output_hook=collect)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert not problems
    pointer, plan, worker, closed = (shown_safely(data["text/html"]) for data in seen)
    assert "<script>alert(1)</script>" in pointer
    assert "Plan" in plan
    assert "VirtualWorker bob" in worker
    assert "closed by this side" in closed
    assert all(data["text/plain"] for data in seen)
