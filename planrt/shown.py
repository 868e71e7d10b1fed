"""Text from somebody else, as it is safe to show: names, reasons and descriptions may come from anyone.

On a terminal, control characters move the cursor and change what is there already, bidirectional ones turn
words round, and some take no room at all: two names that look alike need not be. So they are written as
escapes.
"""

from __future__ import annotations

_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Characters that count as printable and show nothing."""


def hidden(char: str) -> bool:
    """Returns whether a character shows nothing, moves the cursor, or turns words round."""
    return not char.isprintable() or char in _BLANK or "\ufe00" <= char <= "\ufe0f"


def shown(text: str, longest: int | None = None) -> str:
    """`text` on one line, with what cannot be seen written as escapes, and backslashes twice; cut after
    `longest` characters, where that is given.
    """
    made = "".join(_escaped(char) for char in text)
    if longest is not None and len(made) > longest:
        return f"{made[: longest - 3]}..."
    return made


def _escaped(char: str) -> str:
    if char == "\\":
        return "\\\\"
    if not hidden(char):
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
