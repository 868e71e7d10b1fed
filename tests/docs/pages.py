"""The pages of documentation as programs: their fenced blocks, in order, with what is said before each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*(ROOT / f"{name}.md" for name in
       ("README", "MIGRATION", "ARCHITECTURE", "SECURITY", "CONTRIBUTING", "CHANGELOG")),
     *(ROOT / "docs").glob("*.md"), ROOT / "deploy" / "README.md",
     ROOT / "benchmarks" / "README.md", ROOT / "planrt" / "plans" / "ir" / "README.md"]
)  # fmt: skip
LANGUAGES = {"python", "sh", "console", "toml", "text"}
RUNNABLE = ("python", "sh", "console")
"""python and sh are run, console is run and compared, toml and text are shown, or are files if a line says so."""


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is the line number of its first line; `not_run` why it is not run, or ``""``."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str

    @property
    def runs(self) -> bool:
        """Whether it is run."""
        return self.language in RUNNABLE and not self.not_run

    @property
    def file(self) -> str:
        """The name of the file that this block is: its first line is ``# NAME``, or ``# NAME: ...``."""
        found = re.match(r"# ([\w./-]+\.\w+)\b", self.text)
        return found[1] if found and self.language in ("toml", "text") else ""


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").split("\n")
    place = 0
    while place < len(lines):
        fence = re.fullmatch(r"(\s*)```(\w*)", lines[place])
        if not fence:
            place += 1
            continue
        marker = re.fullmatch(r"<!-- not run: (.+) -->", lines[place - 1])
        first = place + 1
        end = first + lines[first:].index(f"{fence[1]}```")
        text = "\n".join(line.removeprefix(fence[1]) for line in lines[first:end])
        found.append(Block(page, first + 1, fence[2], text, marker[1] if marker else ""))
        place = end + 1
    return found


def programs(page: Path) -> list[list[Block]]:
    """The blocks of a page that run, one list for each program: who imports planrt begins a new one."""
    found: list[list[Block]] = [[]]
    for block in blocks(page):
        if block.language == "python" and re.search(r"(?m)^import planrt\b", block.text):
            found.append([])
        found[-1].append(block)
    return [one for one in found if any(block.runs for block in one)]


def commands(block: Block) -> list[str]:
    """The command lines of a block of shell, without comments; lines that end in a backslash are joined."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in (re.sub(r"(^|\s)# .*", "", line).strip() for line in lines) if line]
