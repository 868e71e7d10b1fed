"""Headers and masking of websocket frames, held against those of the `websockets` package."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets import frames as theirs
from websockets.streams import StreamReader

from planrt.errors import WireError
from planrt.workers.transport.websocket_frames import (
    BINARY,
    CONTINUATION,
    header_bytes,
    mask,
    masked_frame,
    read_header,
    turned,
)

SIZES = st.one_of(st.integers(0, 300), st.sampled_from([125, 126, 65_535, 65_536, 200_001]))
KEYS = st.one_of(st.just(b""), st.binary(min_size=4, max_size=4))


def masked(data: bytes, key: bytes) -> bytes:
    target = bytearray(data)
    mask(memoryview(target), key)
    return bytes(target)


def parsed(data: bytes, *, masks: bool) -> theirs.Frame:
    """The one frame in `data`, as `websockets` reads it."""
    reader = StreamReader()
    reader.feed_data(data)
    parse = theirs.Frame.parse(reader.read_exact, mask=masks)
    with pytest.raises(StopIteration) as done:
        next(parse)
    assert not reader.buffer
    return done.value.value


@settings(max_examples=60, deadline=None)
@given(nbytes=SIZES, key=KEYS, final=st.booleans(), opcode=st.sampled_from([CONTINUATION, BINARY]))
def test_they_read_what_we_write(nbytes, key, final, opcode):
    payload = bytes(range(256)) * (nbytes // 256 + 1)
    payload = payload[:nbytes]
    header = header_bytes(opcode, nbytes, final=final, key=key)
    frame = parsed(header + (masked(payload, key) if key else payload), masks=bool(key))
    assert (frame.opcode, frame.fin, bytes(frame.data)) == (opcode, final, payload)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, max_size=4), final=st.booleans())
def test_they_read_the_frames_that_we_mask_whatever_pieces_these_have(sizes, final):
    pieces = [bytes([number + 1]) * nbytes for number, nbytes in enumerate(sizes)]
    data = bytes(masked_frame(BINARY, pieces, sum(sizes), final=final))
    frame = parsed(data, masks=True)
    assert (frame.opcode, frame.fin, bytes(frame.data)) == (BINARY, final, b"".join(pieces))
    if sum(sizes) > 300:
        assert data != bytes(
            masked_frame(BINARY, pieces, sum(sizes), final=final)
        )  # each has a key of its own


@settings(max_examples=60, deadline=None)
@given(
    nbytes=SIZES,
    masks=st.booleans(),
    final=st.booleans(),
    opcode=st.sampled_from([theirs.Opcode.CONT, theirs.Opcode.TEXT, theirs.Opcode.BINARY]),
)
def test_we_read_what_they_write(nbytes, masks, final, opcode):
    payload = bytes(nbytes)
    data = theirs.Frame(opcode, payload, final).serialize(mask=masks)
    header = read_header(memoryview(data))
    assert (header.opcode, header.final, header.nbytes) == (opcode, final, nbytes)
    assert header.size + nbytes == len(data)
    assert bool(header.key) == masks
    assert not header.control
    assert masked(data[header.size :], header.key) == payload if masks else data[header.size :] == payload
    assert all(read_header(memoryview(data)[:length]) is None for length in range(header.size))


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=70),
    repeats=st.sampled_from([1, 2000]),
    key=st.binary(min_size=4, max_size=4),
    cut=st.integers(0, 70),
    at=st.integers(0, 7),
)
def test_a_payload_is_unmasked_in_any_two_pieces_wherever_it_lies(data, repeats, key, cut, at):
    whole = bytearray(at) + masked(data * repeats, key) + bytes(3)
    view = memoryview(whole)[at : len(whole) - 3]
    cut = min(cut, len(view))
    mask(view[:cut], key)
    mask(view[cut:], turned(key, cut))
    assert bytes(whole) == bytes(at) + data * repeats + bytes(3)


@pytest.mark.parametrize("opcode", [theirs.Opcode.CLOSE, theirs.Opcode.PING, theirs.Opcode.PONG])
def test_control_frames_are_told_apart(opcode):
    header = read_header(memoryview(theirs.Frame(opcode, b"x" * 125).serialize(mask=True)))
    assert header.control
    assert header.size + header.nbytes == 2 + 4 + 125


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xc2\x80", "reserved bits"),
        (b"\x92\x80", "reserved bits"),
        (b"\x83\x80", "unknown opcode 3"),
        (b"\x8b\x80", "unknown opcode 11"),
        (b"\x89\xfe", "long or in pieces"),
        (b"\x09\x80", "long or in pieces"),
    ],
)
def test_malformed_headers(data, says):
    with pytest.raises(WireError, match=says) as caught:
        read_header(memoryview(data), address="client 1")
    assert caught.value.address == "client 1"
