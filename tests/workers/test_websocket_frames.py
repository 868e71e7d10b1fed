"""Headers and masking of websocket frames, held against those of the `websockets` package."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets import frames as theirs
from websockets.streams import StreamReader

from planrt.errors import WireError
from planrt.workers.transport.websocket_frames import BINARY, CONTINUATION, header_bytes, mask, read_header

SIZES = st.one_of(st.integers(0, 300), st.sampled_from([125, 126, 65_535, 65_536, 200_001]))
KEYS = st.one_of(st.just(b""), st.binary(min_size=4, max_size=4))


def masked(data: bytes, key: bytes, position: int = 0) -> bytes:
    target = bytearray(len(data))
    mask(data, key, memoryview(target), position=position)
    return bytes(target)


@settings(max_examples=60, deadline=None)
@given(nbytes=SIZES, key=KEYS, final=st.booleans(), opcode=st.sampled_from([CONTINUATION, BINARY]))
def test_they_read_what_we_write(nbytes, key, final, opcode):
    payload = bytes(range(256)) * (nbytes // 256 + 1)
    payload = payload[:nbytes]
    reader = StreamReader()
    reader.feed_data(
        header_bytes(opcode, nbytes, final=final, key=key) + (masked(payload, key) if key else payload)
    )
    parse = theirs.Frame.parse(reader.read_exact, mask=bool(key))
    with pytest.raises(StopIteration) as done:
        next(parse)
    frame = done.value.value
    assert (frame.opcode, frame.fin, bytes(frame.data)) == (opcode, final, payload)
    assert not reader.buffer


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
@given(data=st.binary(max_size=70), key=st.binary(min_size=4, max_size=4), cut=st.integers(0, 70))
def test_a_payload_is_unmasked_in_any_two_pieces_and_in_place(data, key, cut):
    whole = bytearray(masked(data * 2000, key))
    cut = min(cut, len(whole))
    view = memoryview(whole)
    mask(view[:cut], key, view[:cut])
    mask(view[cut:], key, view[cut:], position=cut)
    assert bytes(whole) == data * 2000


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
