"""What the README shows of federated rounds runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_federated_rounds_of_the_readme_run_as_pasted(tmp_path):
    section = README.read_text().partition("## Federated rounds")[2]
    found = re.search("```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    program = tmp_path / "rounds.py"
    program.write_text(found[1])
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0, done.stderr
    told = re.fullmatch(r"loss (\d\.\d{3})\n", done.stdout)
    assert told is not None, done.stdout
    assert float(told[1]) < 0.6
