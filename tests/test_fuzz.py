"""The fuzzers in small: they find nothing in a few seconds, and would find what they look for."""

from dataclasses import replace

import pytest

from fuzz.calls import CRASH, HANG, UNINITIALISED
from fuzz.ops import Pair, main
from fuzz.rows import Summary, check, names
from fuzz.rows import main as rows_main
from planrt.plans.analysis.analysing import analyse

SEED = 11


@pytest.fixture(scope="module")
def found():
    """What is found of each of the ops that no table has."""
    kinds = {}
    for probe in (UNINITIALISED, CRASH, HANG):
        pair = Pair(SEED, pattern=probe, plain=True, seconds=2.0 if probe == HANG else 60.0)
        try:
            (finding,) = pair.run(range(3, 4)).findings
        finally:
            pair.close()
        kinds[probe] = (finding.index, finding.kind, finding.alone)
    return kinds


def test_it_would_find_what_it_looks_for(found):
    assert found[UNINITIALISED] == (3, "differs", True)
    assert found[CRASH] == (3, "ends its process", True)
    assert found[HANG] == (3, "hangs", True)


def test_some_calls_find_nothing():
    pair = Pair(SEED, plain=True, seconds=60.0)
    try:
        summary = pair.run(range(250))
    finally:
        pair.close()
    assert summary.findings == []
    assert summary.calls == 250
    assert summary.made > 60
    assert summary.ops > 150


@pytest.mark.parametrize(
    "arguments", [["--calls", "0"], ["--first", "-1"], ["--seconds", "0"], ["--memory", "7"]]
)
def test_options_that_cannot_be(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "must be above 0" in capsys.readouterr().err


# Rows


@pytest.mark.filterwarnings("ignore")
def test_claims_about_rows_of_some_plans_hold():
    summary, known = Summary(), names()
    for number in range(30):
        check(f"{SEED}/{number}", known, summary)
    assert summary.findings == ()
    assert summary.plans > 20
    assert summary.aggregates > 8


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_claim_would_be_found(monkeypatch):
    """Every kernel is taken for one that aggregates all rows."""
    import fuzz.rows
    from planrt.plans.analysis.report import Dependence

    def analysed(graph):
        report = analyse(graph)
        claim = [Dependence(source, "input", "x", "aggregated", 6, ("sum",)) for source in range(2)]
        outputs = tuple(replace(one, depends=tuple(claim)) for one in report.outputs)
        return replace(report, outputs=outputs)

    monkeypatch.setattr(fuzz.rows, "analyse", analysed)
    summary = Summary()
    for number in range(3):
        check(f"{SEED}/{number}", names(), summary)
    assert len(summary.findings) > 1


def test_rows_options(capsys):
    with pytest.raises(SystemExit) as ended:
        rows_main(["--plans", "0"])
    assert ended.value.code == 2
