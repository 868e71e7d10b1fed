"""Half a minute of rounds and pointers while processes are killed and stopped, and links cut, slowed and lied to."""

import json

import pytest

from benchmarks import soak


def test_nothing_is_lost_or_doubled_while_everything_fails(capsys, tmp_path):
    options = ["--minutes", "0.5", "--faults", "9", "--seed", "454", "--json", str(tmp_path / "figures.json")]
    assert soak.main(options) == 0
    said = capsys.readouterr().out
    assert "wrong:     0" in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["faults"].keys() == set(soak.FAULTS)  # among this seed's first nine
    assert min(figures["rounds"], figures["looks"], figures["lost_sessions"]) > 0


def test_what_does_not_hold_is_told():
    found = soak.Found(wrong=["round 3 is not the average of bob"], samples={"x": [(0.0, 1.0), (1.0, 3.0)]})
    assert "wrong:     1\n  round 3 is not the average of bob" in soak.report(found)
    assert "x: 3 -> 3" in soak.report(found)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "1e9"])
def test_times_that_are_none(minutes, capsys):
    with pytest.raises(SystemExit):
        soak.main(["--minutes", minutes])
    assert "--minutes must be above 0" in capsys.readouterr().err
