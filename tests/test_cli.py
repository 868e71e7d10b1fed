"""The command `planrt`, as a data owner uses it."""

import json
import subprocess
import sys

import pytest
import torch

import planrt
from planrt.cli import main
from planrt.plans import trace
from planrt.plans.ir.record import PlanRecord
from planrt.plans.ir.signature import Parameter, Signature
from planrt.plans.policy.approvals import MAX_ASKINGS, Approvals, Asking
from planrt.plans.policy.rules import Policy
from planrt.types import Ref

pytestmark = pytest.mark.filterwarnings(
    "ignore::planrt.errors.PlanWarning"
)  # they capture tensors on purpose


@pytest.fixture
def graph():
    return trace(
        lambda x, y: (x.mean(0), x.sort(0).values, (x * y).sum()),
        [torch.rand(6, 4), torch.rand(6, 4)],
        free_dims=[(0,), (0,)],
        input_names=("x", "y"),
    )


@pytest.fixture
def plan(tmp_path, graph):
    path = tmp_path / "plan.plan"
    path.write_bytes(graph.to_bytes())
    return str(path)


@pytest.fixture
def folder(tmp_path, graph):
    Approvals(tmp_path / "approvals").submit(graph.hash, graph.to_bytes())
    return str(tmp_path / "approvals")


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('deny = ["*.sort"]\n[[release]]\ntag = "#patients"\nmin_rows = 5\n')
    return str(path)


SIZES = ("--input", "0=6x4", "--input", "1=6x4")


def test_inspect_prints_the_page(plan, graph, capsys):
    assert main(["inspect", plan, *SIZES]) == 0
    page = capsys.readouterr().out
    assert graph.hash in page
    assert "argument 0: aggregated over 6 rows (mean)" in page
    assert "raw (its rows cannot be followed through sort in op 1)" in page
    assert "FLOP" in page


def test_inspect_holds_it_against_a_policy(plan, policy, capsys):
    assert main(["inspect", plan, *SIZES, "--policy", policy, "--tag", "0=#patients"]) == 1
    page = capsys.readouterr().out
    assert "release: of #patients only aggregates over at least 5 rows" in page
    assert "2 violations" in page
    assert "! [ops] op 1" in page
    assert "! [release] op 1" in page
    assert main(["inspect", plan, *SIZES, "--tag", "0=#patients"]) == 0


def test_inspect_for_training(tmp_path, capsys):
    weight = torch.nn.Parameter(torch.ones(4))
    made = trace(lambda x: ((x * weight).sum(), x), [torch.rand(6, 4)], free_dims=[()])
    path = tmp_path / "loss.plan"
    path.write_bytes(made.to_bytes())
    assert main(["inspect", str(path), "--training"]) == 0
    assert "gradient of state 0: float32[4]" in capsys.readouterr().out


def test_inspect_as_json(plan, policy, graph, capsys):
    assert main(["inspect", plan, *SIZES, "--policy", policy, "--tag", "0=#patients", "--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out).values()
    assert report["plan"]["hash"] == graph.hash
    assert [one["rule"] for one in report["violations"]] == ["ops", "release"]
    assert report["inputs"][0]["tags"] == ["#patients"]


def test_pending_inspect_approve_decisions(folder, graph, capsys):
    assert main(["pending", "--folder", folder]) == 0
    assert graph.hash in capsys.readouterr().out
    assert main(["inspect", graph.hash[:8], "--folder", folder, *SIZES]) == 0
    assert graph.hash in capsys.readouterr().out
    assert main(["approve", graph.hash[:10], "--folder", folder, "--by", "Ann", "--why", "fine"]) == 0
    assert capsys.readouterr().out.startswith(f"approved {graph.hash} by Ann, ")
    assert Approvals(folder).status(graph.hash) == ("approved", "fine")
    assert main(["pending", "--folder", folder]) == 0
    assert capsys.readouterr().out == "no plan waits\n"
    assert main(["inspect", graph.hash, "--folder", folder, *SIZES]) == 0
    capsys.readouterr()
    assert main(["deny", graph.hash[:8], "--folder", folder, "--why", "on second thoughts"]) == 0
    assert capsys.readouterr().out.endswith(": on second thoughts\n")
    assert main(["decisions", "--folder", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "approved" in lines[0]
    assert "by Ann" in lines[0]
    assert "denied" in lines[1]
    assert lines[2] == f"2 decisions, the record's hash is {Approvals(folder).head}"


def test_lists_as_json_and_the_policys_version(folder, graph, policy, capsys):
    assert main(["pending", "--folder", folder, "--json"]) == 0
    (waiting,) = json.loads(capsys.readouterr().out)
    assert waiting["plan"] == graph.hash
    assert main(["approve", graph.hash, "--folder", folder, "--policy", policy]) == 0
    capsys.readouterr()
    assert main(["decisions", "--folder", folder, "--json"]) == 0
    (decision,) = json.loads(capsys.readouterr().out)["decisions"]
    assert decision["decision"] == "approved"
    assert len(decision["policy"]) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["inspekt"], "invalid choice"),
        (["inspect"], "required: FILE"),
        (["inspect", "nothing.plan"], "nothing.plan: No such file"),
        (["inspect", "{folder}"], "Is a directory"),
        (["inspect", "{policy}"], "policy.toml: "),
        (["inspect", "{plan}"], "is float32[*, 4]: say its sizes, for example --input 0=32x4"),
        (
            ["inspect", "{plan}", "--input", "z=3x4"],
            "does not name an input: write NAME=..., where NAME is one of",
        ),
        (["inspect", "{plan}", "--input", "3x4"], "does not name an input"),
        (["inspect", "{plan}", "--input", "0=3by4"], "sizes are written as 32x1x28x28"),
        (
            ["inspect", "{plan}", "--input", "0=3x5", "--input", "1=3x5"],
            "wanted float32[*, 4], got float32[3, 5]",
        ),
        (["inspect", "{plan}", *SIZES[:3], "1=5x4"], "op 2 of plan"),
        (["inspect", "{plan}", *SIZES, "--tag", "0=patients"], "a tag is written as #patients"),
        (["inspect", "{plan}", *SIZES, "--policy", "none.toml"], "policy none.toml: No such file"),
        (["inspect", "{plan}", *SIZES, "--policy", "{plan}"], "not TOML"),
        (["inspect", "{plan}", "--graph", "other"], "--graph: the file holds plan, not 'other'"),
        (["inspect", "0" * 64, "--folder", "{folder}"], "is not in"),
        (["inspect", "{plan}", "--inp", "0=3x4"], "unrecognized arguments"),
        (["approve", "abc", "--folder", "{folder}"], "the first 8 digits or more"),
        (["approve", "00000000", "--folder", "{folder}"], "no plan that begins with 00000000"),
        (["approve", "0" * 64, "--folder", "missing"], "there is no folder missing"),
        (["approve", "0" * 64, "--folder", "{plan}"], "there is no folder"),
        (["approve", "0" * 64, "--folder", "{folder}", "--by", ""], "say who decides"),
        (["deny", "0" * 64, "--folder", "{folder}"], "required: --why"),
        (["deny", "0" * 64, "--folder", "{folder}", "--why", ""], "say why"),
        (["pending"], "there is no folder approvals"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    arguments, message, plan, folder, policy, tmp_path, capsys, monkeypatch
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    arguments = [one.format(plan=plan, folder=folder, policy=policy) for one in arguments]
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("planrt")
    assert message in captured.err


def test_a_broken_record_is_named(folder, graph, capsys):
    Approvals(folder).approve(graph.hash)
    with open(f"{folder}/decisions.jsonl", "a", encoding="utf-8") as file:
        file.write("more\n")
    assert main(["decisions", "--folder", folder]) == 2
    assert "decisions.jsonl, line 2: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[:20] + b"\x00" + data[21:], lambda _: b""]
)
def test_damaged_files(change, tmp_path, graph, capsys):
    path = tmp_path / "damaged.plan"
    path.write_bytes(change(graph.to_bytes()))
    assert main(["inspect", str(path), *SIZES]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_as_a_module(plan):
    done = subprocess.run(
        [sys.executable, "-m", "planrt", "inspect", plan, *SIZES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "aggregated over 6 rows" in done.stdout
    helped = subprocess.run(
        [sys.executable, "-m", "planrt", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("inspect", "approve", "deny", "pending", "decisions"):
        assert command in helped.stdout


# Who asks, and starting fast


def test_pending_says_who_asks_for_what_safely(tmp_path, graph, capsys):
    record = Approvals(tmp_path / "approvals")
    record.submit(graph.hash, graph.to_bytes())
    record.asked(graph.hash, Asking("mean\x1b[2J", ("x", "y\u202e"), "ann", (), "ages\nPlan approved"))
    record.asked(graph.hash, Asking("mean\x1b[2J", ("x", "y\u202e"), "", ("scans",)))
    assert main(["pending", "--folder", str(record.folder)]) == 0
    page = capsys.readouterr().out
    assert r"called mean\x1b[2J(x, y\u202e)" in page
    assert r"asked for by user ann, for: ages\x0aPlan approved" in page
    assert "asked for by somebody without a token, on scans" in page
    assert "what the askers say" in page
    assert main(["pending", "--json", "--folder", str(record.folder)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert [one["user"] for one in row["asked"]] == ["ann", ""]


def test_askings_are_bounded_and_noted_once(tmp_path, graph):
    record = Approvals(tmp_path / "approvals")
    record.asked(graph.hash, Asking("early"))
    assert record.askings(graph.hash) == []  # nothing waits yet
    record.submit(graph.hash, graph.to_bytes())
    for number in range(3 * MAX_ASKINGS):
        for _ in range(2):
            record.asked(
                graph.hash, Asking("x" * 10_000, ("i" * 1000,) * 100, f"user {number}", purpose="p" * 5000)
            )
    found = record.askings(graph.hash)
    assert len(found) == MAX_ASKINGS
    assert len({one.user for one in found}) == MAX_ASKINGS
    assert (record.folder / "asked" / f"{graph.hash}.jsonl").stat().st_size < 500_000
    assert len(Approvals(record.folder).pending()) == 1
    record.approve(graph.hash)
    record.asked(graph.hash, Asking("late"))
    assert record.askings(graph.hash) == found


def test_what_somebody_wrote_into_the_askings_is_left_out(tmp_path, graph, capsys):
    record = Approvals(tmp_path / "approvals")
    record.submit(graph.hash, graph.to_bytes())
    lines = [
        "{",
        "[1]",
        '{"name": 3}',
        '{"name": "a", "inputs": [4], "data": []}',
        '{"inputs": [], "data": [], "z": 1}',
    ]
    (record.folder / "asked" / f"{graph.hash}.jsonl").write_text("\n".join(lines))
    assert record.askings(graph.hash) == []
    assert main(["pending", "--folder", str(record.folder)]) == 0


def test_inspect_shows_names_safely(tmp_path, capsys):
    made = trace(lambda x: x.sum(), [torch.rand(3)], name="sum\u202e\x1b[2J")
    path = tmp_path / "sum.plan"
    signature = Signature((Parameter("x", "positional", False),), {"x": Ref(0)})
    path.write_bytes(PlanRecord(made.name, made.doc, signature, made, made).to_bytes())
    assert main(["inspect", str(path)]) == 0
    page = capsys.readouterr().out
    assert r"Plan sum\u202e" in page
    assert "author's" in page
    assert "\x1b" not in page


def test_inspect_takes_sizes_by_name(tmp_path, capsys):
    plan = planrt.func2plan(args_shape=[(-1, 30)])(lambda data: data.mean(0))
    path = tmp_path / "mean.plan"
    plan.save(path)
    assert main(["inspect", str(path), "--input", "data=32x30", "--tag", "data=#patients"]) == 0
    assert "data: aggregated over 32 rows" in capsys.readouterr().out


COMMANDS = [
    ["--version"],
    ["pending"],
    ["approve", "HASH", "--why", "fine"],
    ["approve", "HASH", "--policy", "POLICY"],
    ["deny", "HASH", "--why", "on second thoughts", "--policy", "POLICY"],
    ["decisions"],
]


def test_what_needs_no_torch_starts_without_it(folder, graph, tmp_path):
    policy = tmp_path / "rows.toml"
    policy.write_text(
        'approval = "ask"\nmax_memory = "1 GiB"\n[[release]]\ntag = "#patients"\nmin_rows = 5\n'
    )
    for words in COMMANDS:
        given = [{"HASH": graph.hash, "POLICY": str(policy)}.get(word, word) for word in words]
        given += ["--folder", folder] if words != ["--version"] else []
        code = (
            "import sys, planrt.cli\n"
            "try:\n    code = planrt.cli.main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
            "assert not code\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)
    last = Approvals(folder).decisions()[-1]
    assert last.policy == Policy.from_file(policy).version


def test_version_serve_and_run_are_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"planrt {planrt.__version__}\n"
    for words, message in (
        (["serve", "--id", "a", "--port", "x"], "planrt serve: error: argument --port"),
        (["run", "--rounds", "0"], "planrt run: error: argument --rounds"),
        (["serve"], "planrt serve: error: the following arguments are required: --id"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert main(["serve", "--id", "bob", "--empty", "--testing"]) == 2
    assert "worker bob: error: --empty serves no data set" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    assert "serve one worker" in listed
    assert "pending" in listed
