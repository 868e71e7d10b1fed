"""Programs that a warm Python runs see what a real start would show them."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHOWS = (
    "import sys\n"
    "names = {name: globals().get(name, 'not there') for name in ('__name__', '__file__', '__spec__', '__package__')}\n"
    "print(names, sys.argv, sys.path[0])\n"
)


def said(python: str, *words: str, folder) -> str:
    return subprocess.run([python, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("words", [["-c", SHOWS, "a", "-b"], ["program.py", "a", "-b"]], ids=["text", "file"])
def test_a_program_is_called_as_by_a_real_start(warm_python, tmp_path, words):
    (tmp_path / "program.py").write_text(SHOWS)
    assert said(warm_python, *words, folder=tmp_path) == said(sys.executable, *words, folder=tmp_path)


def test_what_torch_looks_up_in_the_main_module_is_there_for_a_text_too(warm_python, tmp_path):
    linear = (
        "import torch; print(torch.nn.Linear(2, 3, device='meta')(torch.ones(1, 2, device='meta')).shape)"
    )
    assert said(warm_python, "-c", linear, folder=tmp_path) == "torch.Size([1, 3])\n"
