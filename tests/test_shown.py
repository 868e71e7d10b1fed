"""Text from others, as it is shown."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planrt.shown import shown


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a study of ages, größer", "a study of ages, größer"),
        ("ok\x1b[2J", r"ok\x1b[2J"),
        ("two\nlines\r", r"two\x0alines\x0d"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("a\u200bb\ufeff\u2060", r"a\u200bb\ufeff\u2060"),
        ("\u3164\u2800\ufe0f", r"\u3164\u2800\ufe0f"),
        ("\U000e0041", r"\U000e0041"),
        ("\ud800", r"\ud800"),
        (r"\x1b", r"\\x1b"),
    ],
)
def test_what_cannot_be_seen_is_escaped(text, safe):
    assert shown(text) == safe


@given(st.text(st.characters()))
def test_every_character_shown_is_one_that_is_seen(text):
    made = shown(text)
    assert all(unicodedata.category(char)[0] != "C" for char in made)
    assert "\n" not in made
    assert (shown(text) == shown(text + "\u200b")) is False


def test_long_text_is_cut():
    assert shown("x" * 50, 10) == "xxxxxxx..."
