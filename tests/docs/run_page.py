"""Runs one program of a page here: ``python -m tests.docs.run_page PAGE NUMBER``; used by test_snippets.py.

Python blocks share one namespace, as cells of a notebook do. A comment behind a ``print`` that looks like a value is
held against what was printed. Prints one JSON line at the end: how many blocks ran and how much was compared.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.docs.pages import Block, commands, programs

VALUE = re.compile(r"tensor\(|torch\.|\(|\[|<|\d|\.\.\. |pending|approved")
"""How a comment begins that says what is printed."""


class Program:
    """A program of a page, being run. `ran` counts blocks, `compared` what was held against the page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.ran = self.compared = 0

    def run(self, blocks: list[Block]) -> None:
        """Runs these blocks, in order."""
        run = {"python": self._python, "sh": self._shell, "console": self._console}
        for block in blocks:
            if block.file:
                Path(block.file).write_text(f"{block.text}\n")
            if block.runs:
                run[block.language](block)
                self.ran += 1

    def _python(self, block: Block) -> None:
        lines = block.text.splitlines()

        def show(*args: Any, **kwargs: Any) -> None:
            print(*args, **kwargs)
            caller = sys._getframe(1)
            if caller.f_code.co_filename == str(self.path):
                claim = lines[caller.f_lineno - block.line].partition("  # ")[2]
                if VALUE.match(claim):
                    self._hold(" ".join(map(str, args)), [claim, claim.rpartition(": ")[0]], caller.f_lineno)

        self.names["print"] = show
        # Blank lines in front, so that line numbers, and what is quoted of the page, are right.
        exec(compile("\n" * (block.line - 1) + block.text, str(self.path), "exec"), self.names)

    def _shell(self, block: Block) -> None:
        for command in commands(block):
            self._done(command, block)

    def _console(self, block: Block) -> None:
        for part in re.split(r"(?m)^\$ ", block.text)[1:]:
            command, _, claim = part.partition("\n")
            self._hold(self._done(command, block), [claim], block.line)

    def _done(self, command: str, block: Block) -> str:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        if done.returncode or done.stderr:
            raise AssertionError(
                f"{self.path.name}:{block.line}: {command}: {done.returncode}, {done.stderr}"
            )
        return done.stdout

    def _hold(self, printed: str, claims: list[str], line: int) -> None:
        """One of `claims` is what was printed; ``...`` on a line of its own stands for lines, else for characters."""
        for claim in filter(None, claims):
            pattern = "".join(
                r"(.*\n)*" if one == "..." else f"{'.*'.join(map(re.escape, one.split('...')))}\n"
                for one in claim.rstrip().splitlines()
            )
            if re.fullmatch(pattern, f"{printed.rstrip()}\n"):
                self.compared += 1
                return
        raise AssertionError(
            f"{self.path.name}:{line} says {claims[0]!r}, and what is printed is {printed!r}"
        )


def shims(folder: Path) -> None:
    """`planrt` and `python` as a reader's shell finds them."""
    folder.mkdir()
    for name, arguments in (("planrt", "-m planrt"), ("python", "")):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        path.chmod(0o755)
    os.environ["PATH"] = f"{folder.resolve()}{os.pathsep}{os.environ['PATH']}"


def main() -> None:
    """Runs the program that the command line names."""
    shims(Path("bin"))
    path = Path(sys.argv[1])
    program = Program(path)
    program.run(programs(path)[int(sys.argv[2])])
    print(json.dumps({"ran": program.ran, "compared": program.compared}))


if __name__ == "__main__":
    main()
