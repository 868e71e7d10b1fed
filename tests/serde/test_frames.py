"""Frames: what goes in comes out, in pieces of any size, and nothing malformed gets through."""

import struct

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planrt.errors import LocalError, MessageTooLargeError, TransportError, WireError
from planrt.serde.dtypes import DTYPES
from planrt.serde.frames import FrameAssembler, Limits, MemoryStore, SpoolStore, encode


def receive(data: bytes, *, step: int | None = None, **options):
    assembler = FrameAssembler(lambda header: header, **options)
    step = step or max(1, len(data))
    for start in range(0, len(data), step):
        assembler.feed(data[start : start + step])
    return assembler.finish()


def to_bytes(message, tensors=()) -> bytes:
    return b"".join(encode(message, tensors).fragments())


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.rand(shape, dtype=torch.float64) * 3 - 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int16])
@pytest.mark.parametrize(
    "view",
    [
        lambda one: one.t(),
        lambda one: one[:, :1].expand(3, 4),
        lambda one: one[::2, 1::2],
        lambda one: one[1],
        lambda one: one[2, 3],
        torch._neg_view,
        lambda one: torch._efficientzerotensor((3, 4), dtype=one.dtype),
    ],
)
def test_views_of_whole_numbers_survive(dtype, view):
    tensor = view(torch.arange(12).reshape(3, 4).to(dtype))
    (received,) = receive(to_bytes({}, [tensor])).tensors
    assert (received.dtype, received.tolist()) == (tensor.dtype, tensor.clone().tolist())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_every_dtype_and_shape_survives(dtype, shape):
    tensor = sample(dtype, shape)
    received = receive(to_bytes({"a": 1}, [tensor, tensor + tensor if dtype != torch.bool else ~tensor]))
    assert received.message == {"a": 1}
    assert received.tensors[0].dtype == dtype
    assert received.tensors[0].shape == tensor.shape
    assert torch.equal(received.tensors[0], tensor)
    assert not torch.equal(received.tensors[1], tensor) or tensor.numel() == 0 or not tensor.any()


def test_views_conjugates_and_expanded_tensors_arrive_as_plain_values():
    base = torch.arange(24.0).reshape(4, 6)
    odd = [base.T, base[:, ::2], base[1:2].expand(3, 6), torch.view_as_complex(base.view(4, 3, 2)).conj()]
    for sent, got in zip(odd, receive(to_bytes(None, odd)).tensors, strict=True):
        assert torch.equal(sent.resolve_conj(), got)
        assert got.is_contiguous()


def test_received_tensors_are_writable_aligned_and_apart():
    one, two = receive(to_bytes(None, [torch.ones(3), torch.ones(5)])).tensors
    one += 1
    assert torch.equal(two, torch.ones(5))
    assert (two.data_ptr() - one.data_ptr()) % 64 == 0


def test_tensors_of_one_message_are_tensors_of_their_own():
    sent = [torch.randn(3, 2), torch.zeros((), dtype=torch.int64), torch.ones(2, 2).T, torch.tensor([True])]
    received = receive(to_bytes(None, sent)).tensors
    before = [tensor._version for tensor in received]
    received[1].add_(1)
    changes = [tensor._version - version for tensor, version in zip(received, before, strict=True)]
    assert changes == [0, 1, 0, 0]
    assert not any(tensor._is_view() for tensor in received)
    weight = received[0].requires_grad_()
    loss = (weight * weight).sum()
    received[3].logical_not_()
    loss.backward()  # a change of one tensor is no change of another that a gradient needs
    assert torch.equal(weight.grad, 2 * sent[0])


@settings(max_examples=60, deadline=None)
@given(
    step=st.integers(1, 300),
    sizes=st.lists(st.integers(0, 200), max_size=5),
    fragment=st.integers(16, 4096),
)
def test_pieces_of_any_size_give_the_same_frame(step, sizes, fragment):
    tensors = [torch.arange(size, dtype=torch.int32) for size in sizes]
    frame = encode(["message", 7], tensors)
    data = b"".join(frame.fragments(fragment))
    assert all(len(piece) <= fragment for piece in frame.fragments(fragment))
    assert len(data) == frame.nbytes
    parts = [b"".join(pieces) for pieces in frame.split(fragment)]
    assert b"".join(parts) == data
    assert all(len(part) == fragment for part in parts[:-1])
    assert 0 < len(parts[-1]) <= fragment
    received = receive(data, step=step)
    assert received.message == ["message", 7]
    assert received.nbytes == len(data)
    assert all(torch.equal(a, b) for a, b in zip(received.tensors, tensors, strict=True))


def test_overhead_stays_under_one_percent_for_a_small_network():
    tensors = [torch.zeros(20, 1, 5, 5), torch.zeros(20), torch.zeros(50, 20, 5, 5), torch.zeros(50)]
    tensors += [torch.zeros(500, 800), torch.zeros(500), torch.zeros(10, 500), torch.zeros(10)]
    assert encode({}, tensors).nbytes <= 1.01 * sum(tensor.nbytes for tensor in tensors)


def test_a_spooled_payload_is_the_same_and_writable():
    tensor = torch.arange(500_000, dtype=torch.float32)
    received = receive(
        to_bytes(None, [tensor]), step=70_000, allocate=lambda message, nbytes: SpoolStore(nbytes)
    )
    assert torch.equal(received.tensors[0], tensor)
    received.tensors[0].add_(1)
    assert received.tensors[0][0] == 1


def test_the_header_is_read_before_memory_is_taken():
    asked = []

    def allocate(message, nbytes):
        asked.append((message, nbytes))
        return MemoryStore(nbytes)

    data = to_bytes("hello", [torch.zeros(1000)])
    assembler = FrameAssembler(lambda header: header, allocate=allocate)
    assembler.feed(data[:6])
    assert asked == []
    assembler.feed(data[6:60])
    assert asked == [("hello", 4000)]


def header(value: object) -> bytes:
    packed = msgpack.packb(value)
    return struct.pack("<4sI", b"PRT1", len(packed)) + packed


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GET / HTTP/1.1\r\n", "not a planrt frame"),
        (b"PR", "ended early"),
        (struct.pack("<4sI", b"PRT1", 50), "ended early"),
        (struct.pack("<4sI", b"PRT1", 3) + b"\xc1\xc1\xc1", "malformed header"),
        (header([1]), "not a message and its tensors"),
        (header([1, [["float32", [-1]]]]), "bad tensor shape"),
        (header([1, [["float32", [2.0]]]]), "bad tensor shape"),
        (header([1, [["float32", [True]]]]), "bad tensor shape"),
        (header([1, [["object", [2]]]]), "bad tensor entry"),
        (header([1, [["float32", [1 << 40, 1 << 40]]]]), "elements"),
        (header([1, "no list"]), "not a list"),
        (header([1, [["float32", [2]]]]) + bytes(7), "ended early"),
        (header([1, [["float32", [2]]]]) + bytes(9), "longer than its header"),
        (header([1, [["bool", [2]]]]) + b"\x01\x07", "bool tensor"),
    ],
)
def test_malformed_frames_are_wire_errors(data, says):
    with pytest.raises(WireError, match=says):
        receive(data)


@pytest.mark.parametrize("sizes", [[1.0], [True], [1, 1.0], [[1]], [{}], ["1"], [None]])
def test_what_equals_a_known_size_or_is_none_at_all_is_refused(sizes):
    receive(header([1, [["float32", [1]]]]) + bytes(4))
    receive(header([1, [["float32", [1, 1]]]]) + bytes(4))
    with pytest.raises(WireError, match="bad tensor"):
        receive(header([1, [["float32", sizes]]]) + bytes(4))


@pytest.mark.parametrize("name", [[], {}, None, 1, "int65"])
def test_names_of_no_dtype_are_refused(name):
    with pytest.raises(WireError, match="bad tensor entry"):
        receive(header([1, [[name, [1]]]]) + bytes(8))


def test_announcements_over_the_limits_are_refused_before_they_arrive():
    limits = Limits(message=1000, header=100)
    with pytest.raises(MessageTooLargeError, match="1,004"):
        receive(header([1, [["float32", [251]]]]), limits=limits)
    with pytest.raises(MessageTooLargeError, match="header"):
        receive(struct.pack("<4sI", b"PRT1", 101), limits=limits)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_frames_never_raise_anything_but_transport_errors(data):
    whole = bytearray(to_bytes({"type": "fit", "n": [1, 2]}, [torch.ones(3), torch.tensor([True, False])]))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        receive(bytes(whole[: data.draw(st.integers(0, len(whole)))]), limits=Limits(message=1 << 20))
    except TransportError as error:
        assert str(error)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.uint16)],
    ids=["sparse", "meta", "dtype"],
)
def test_tensors_that_cannot_travel_say_what_to_do(tensor):
    with pytest.raises(LocalError, match="travel"):
        encode(None, [tensor])


def test_a_header_over_the_limit_is_refused_on_the_way_out():
    with pytest.raises(LocalError, match="header takes"):
        encode("x" * 200, max_header=100)


def test_large_payloads_in_use_are_left_alone_by_those_that_follow():
    """Blocks of large payloads are used again, but only when nothing looks at them any more."""
    elements = 9_000_000  # 36 MB
    kept = receive(to_bytes(None, [torch.full((elements,), 1.0)])).tensors[0][-10:]
    for value in (2.0, 3.0, 4.0):
        tensor = receive(to_bytes(None, [torch.full((elements,), value)])).tensors[0]
        assert torch.equal(tensor, torch.full((elements,), value))
    assert torch.equal(kept, torch.full((10,), 1.0))
