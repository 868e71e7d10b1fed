"""Nested values to bytes and back: exact kinds, canonical bytes, strict decoding."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planrt.errors import PlanFormatError
from planrt.serde.values import DEVICE, decode, encode, pack, unpack
from planrt.types import Ref


def round_trip(value):
    return decode(unpack(pack(encode(value))))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5)
    | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False) | st.integers(0, 2**31 - 1).map(Ref)
    | st.sampled_from([..., torch.float32, torch.bool, torch.channels_last, torch.strided, DEVICE])
    | st.slices(10),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_values_round_trip_with_their_types(value):
    again = round_trip(value)
    assert repr(again) == repr(value)  # tells 1 from True from 1.0, (1,) from [1], -0.0 from 0.0
    assert pack(encode(again)) == pack(encode(value))


@pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308])
def test_floats_keep_their_bits(value):
    assert struct.pack("d", round_trip(value)) == struct.pack("d", value)


def test_every_nan_has_the_same_bytes():
    other = struct.unpack("d", struct.pack("Q", 0xFFF8000000000001))[0]
    assert math.isnan(other)
    assert pack(encode(other)) == pack(encode(math.nan))
    assert math.isnan(round_trip(math.nan))


def test_devices_become_the_device_of_the_plan():
    assert round_trip([torch.device("cpu"), torch.device("cuda:3")]) == [DEVICE, DEVICE]


def test_kinds_that_torch_uses():
    assert round_trip(torch.Size([1, 2])) == (1, 2)
    assert round_trip(slice(Ref(3), None, 2)) == slice(Ref(3), None, 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**63, "64-bit"),
        ({1: 2}, "keys in a plan are strings"),
        (object(), "type object cannot stand"),
        (torch.ones(1), "type Tensor cannot stand"),
        (np.ones(1), "type ndarray cannot stand"),
        (torch.sparse_coo, "cannot stand"),
        (torch.float8_e4m3fn, "cannot stand"),
        (print, "type builtin_function_or_method cannot stand"),
        ({1, 2}, "type set cannot stand"),
        (b"x", "type bytes cannot stand"),
        (range(3), "type range cannot stand"),
    ],
)
def test_values_that_plans_cannot_hold(value, message):
    with pytest.raises(PlanFormatError, match=message):
        encode([value])


def test_nesting_is_capped_both_ways():
    value, encoded = [], ["l"]
    for _ in range(40):
        value, encoded = [value], ["l", encoded]
    with pytest.raises(PlanFormatError, match="16 levels"):
        encode(value)
    with pytest.raises(PlanFormatError, match="16 levels"):
        decode(encoded)


def test_the_number_of_items_is_capped(monkeypatch):
    monkeypatch.setattr("planrt.serde.values.MAX_ITEMS", 3)
    assert decode(["l", 1, 2]) == [1, 2]
    with pytest.raises(PlanFormatError, match="more than 3 items"):
        decode(["l", 1, 2, 3])


def test_lone_surrogates_have_no_byte_form():
    with pytest.raises(PlanFormatError, match="no byte form"):
        pack(encode("\ud800"))


@pytest.mark.parametrize(
    "encoded",
    [
        [], [1], ["z"], ["r"], ["r", True], ["r", 2**63], ["r", 1.0], ["r", 1, 2], ["s", 1, 2], ["e", 1],
        ["v", "cuda:0"], ["c", 1, 2], ["c", 1.0], ["y", "float31"], ["y", 3], ["m", "strided"], ["o", "x"],
        ["d", "a"], ["d", 1, 2], ["d", "a", 1, "a", 2], 2**63, b"x", {"a": 1}, ["t", [None]],
    ],
)  # fmt: skip
def test_malformed_values_are_refused(encoded):
    with pytest.raises(PlanFormatError):
        decode(encoded)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40))
def test_random_bytes_only_ever_give_plan_format_errors(data):
    try:
        value = decode(unpack(data))
    except PlanFormatError:
        return
    encode(value)
