"""Sums, products and quotients of secrets against plain integers, for two, three and four parties."""

import pytest
import torch
from torch.nn import functional, grad

from planrt.errors import OptionError, SharingError
from planrt.sharing import bilinear, ring
from planrt.sharing.additive import add_public, reconstruct, share, subtract_from_public
from planrt.sharing.bilinear import bilinear_sum, bilinear_value
from planrt.sharing.comparisons import negative
from planrt.sharing.gates import chunked
from planrt.sharing.masked import mask, open_together
from planrt.sharing.products import bit_times_bit, multiply, product, square
from planrt.sharing.quotients import divide, truncate, truncate_alone
from planrt.sharing.randomness import Stream, new_seed
from planrt.sharing.rounds import Transcript, new_parties, run_together, together


def in_limbs(*pairs):
    return ring.bilinear(
        lambda a, b, total: a @ b if total is None else total.add_(a @ b),
        pairs,
        len(pairs) * pairs[0][0].shape[-1],
    )


@pytest.mark.parametrize("terms", [1, 3, 300, 512, 513, 2048, 2049])
def test_float_limbs_are_exact(terms, anything):
    left, right = anything(5, terms), anything(terms, 7)
    assert torch.equal(in_limbs((left, right)), left @ right)
    other = anything(5, terms), anything(terms, 7)
    assert torch.equal(in_limbs((left, right), other), left @ right + other[0] @ other[1])


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (64, 64), (300, 50)])
@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "transposed"])
def test_sums_differences_and_choices_are_those_of_the_ring(rows, columns, turned, anything):
    x, y, z = (anything(rows, columns) for _ in range(3))
    if turned:
        x, y = x.T, y.T
    flags = (z.T if turned else z) >> 63
    for other in (y, y.contiguous(), y[:1].expand_as(y)):
        assert torch.equal(ring.plus(x, other), x + other)
        assert torch.equal(ring.minus(x, other), x - other)
        assert torch.equal(ring.chosen(flags, x, other), torch.where(flags < 0, x, other))
    assert torch.equal(ring.plus(x, y[0]), x + y[0])


@pytest.mark.parametrize("bits", [1, 4, 37, 54, 62, 63, 64])
def test_chunks_of_numbers(bits, anything):
    value = anything(2, 100)
    chunks = -(-bits // 4) + (bits < 60)
    found = chunked(value, bits, chunks).astype(object)
    whole = [
        [
            sum(int(part) << 4 * (chunks - 1 - place) for place, part in enumerate(found[:, row, at]))
            for at in range(100)
        ]
        for row in range(2)
    ]
    assert whole == [[one % 2**bits for one in row] for row in value.tolist()]


EDGES = (
    -(2**21),
    2**21 - 1,
    -(2**63),
    2**63 - 1,
    -(2**43) - 2**21,
    -(2**43) + 2**21,
    2**43 - 2**21 - 1,
    -1,
    0,
)


@pytest.mark.parametrize("terms", [512, 2048])
def test_float_limbs_are_exact_at_their_worst(terms):
    for value in EDGES:
        for other in EDGES:
            left, right = torch.full((2, terms), value), torch.full((terms, 2), other)
            assert torch.equal(in_limbs((left, right)), left @ right)
            left[:, 1::2] = other
            assert torch.equal(in_limbs((left, right)), left @ right)
            half = left[:, : terms // 2], right[: terms // 2]
            assert torch.equal(in_limbs(half, half), 2 * (half[0] @ half[1]))


@pytest.mark.parametrize("width", [16, 22])
def test_limbs_are_balanced_and_make_up_the_value(width, anything):
    values = torch.cat([anything(1000), torch.tensor(EDGES)])
    limbs = ring._limbs(values, width)
    assert all(one.ge(-(2 ** (width - 1))).all() and one.lt(2 ** (width - 1)).all() for one in limbs)
    assert torch.equal(sum(one.to(torch.int64) << (width * place) for place, one in enumerate(limbs)), values)


@pytest.fixture(params=["in limbs", "in int64"])
def both_ways(request, monkeypatch):
    """Products as processors without AVX-512 and with it compute them."""
    monkeypatch.setattr(bilinear, "FAST_INTEGERS", request.param == "in int64")


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("length", [255, 256, 257, 512, 513, 1568])
@pytest.mark.parametrize(
    "change", [lambda one: one, lambda one: one.mT.contiguous().mT, lambda one: one[:, :1].expand(one.shape)]
)
def test_long_products_of_matrices_are_summed_up_in_pieces(length, change, anything):
    left, right = change(anything(40, length)), change(anything(length, 30))
    assert torch.equal(bilinear_value("matmul", left, right), left @ right)
    assert torch.equal(bilinear_sum("matmul", [(left, right), (left, right)]), 2 * (left @ right))
    batch = anything(3, 20, length)
    assert torch.equal(bilinear_value("matmul", batch, right), batch @ right)
    assert torch.equal(bilinear_sum("matmul", [(left, batch.mT)] * 2), 2 * (left @ batch.mT))


@pytest.mark.parametrize(
    ("rows", "terms", "columns", "other_way"),
    [(50, 784, 500, True), (64, 784, 300, True), (50, 500, 10, True), (8, 784, 500, False), (3, 4, 5, False)],
)
def test_products_with_a_transposed_factor(rows, terms, columns, other_way, anything, monkeypatch):
    """Where it is worth it, the transposed product is computed; for the same result, as it lies in memory too."""
    monkeypatch.setattr(bilinear, "FAST_INTEGERS", True)
    left, right = anything(rows, terms), anything(columns, terms).t()
    expected = left @ right
    shapes, matmul = [], torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: (shapes.append((a.shape, b.shape)), matmul(a, b))[1])
    found = bilinear_sum("matmul", [(left, right), (-left, right)])
    assert not found.any()
    found = bilinear_value("matmul", left, right)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert all((one[0] == columns) == other_way for one, _ in shapes)
    assert torch.equal(bilinear_value("matmul", left, right.contiguous()), expected)
    assert shapes[-1] == (left.shape, right.shape)


@pytest.mark.parametrize("divisor", [1, 2, 3, 10, 1000, 2**16, 2**16 + 1, 2**40, 2**61, 2**62 - 1])
def test_divisions_round_down(divisor, anything):
    values = torch.cat(
        [anything(100), torch.tensor([-(2**63), 2**63 - 1, -1, 0, 1, divisor, -divisor, divisor - 1])]
    )
    for signed in (True, False):
        found = ring.floor_divided(values, divisor, signed=signed).tolist()
        for one, quotient in zip(values.tolist(), found, strict=True):
            whole = one if signed else one % 2**64
            assert (whole // divisor - quotient) % 2**64 == 0


def test_packed_bits_come_back():
    flags = torch.randint(0, 2, (3, 77)).numpy().astype("uint8")
    assert (ring.unpacked(ring.packed(flags), 77) == flags).all()


def test_what_is_local(parties, anything):
    x, y = anything(4, 5), anything(4, 5)
    everyone = new_parties(parties)
    stream = Stream(new_seed())
    a, b = share(x, parties, stream), share(y, parties, stream)
    assert torch.equal(reconstruct(a), x)
    assert torch.equal(reconstruct([p + q for p, q in zip(a, b, strict=True)]), x + y)
    assert torch.equal(reconstruct([p - q for p, q in zip(a, b, strict=True)]), x - y)
    assert torch.equal(reconstruct([-p * 3 for p in a]), -x * 3)
    row = anything(5)
    assert torch.equal(
        reconstruct([add_public(p, q, row) for p, q in zip(everyone, a, strict=True)]), x + row
    )
    assert torch.equal(
        reconstruct([add_public(p, q[0], y) for p, q in zip(everyone, a, strict=True)]), x[0] + y
    )
    found = [subtract_from_public(p, 7, q) for p, q in zip(everyone, a, strict=True)]
    assert torch.equal(reconstruct(found), 7 - x)


CASES = {
    "mul": ("mul", (3, 4), (3, 4), {}),
    "mul, broadcast": ("mul", (3, 1, 4), (5, 1), {}),
    "mul, nothing": ("mul", (0, 4), (4,), {}),
    "matmul": ("matmul", (17, 30), (30, 20), {}),
    "matmul, small": ("matmul", (2, 3), (3, 2), {}),
    "matmul of vectors": ("matmul", (30,), (30,), {}),
    "matmul, matrix and vector": ("matmul", (90, 64), (64,), {}),
    "bmm": ("matmul", (4, 9, 12), (4, 12, 11), {}),
    "matmul, broadcast": ("matmul", (2, 4, 9, 12), (12, 11), {}),
    "conv1d": ("conv1d", (3, 4, 20), (6, 4, 5), {"stride": 2, "padding": 1}),
    "conv2d": ("conv2d", (2, 3, 10, 9), (4, 3, 3, 3), {"stride": (2, 1), "padding": (1, 0)}),
    "conv2d, groups": ("conv2d", (2, 4, 8, 8), (6, 2, 3, 3), {"groups": 2, "dilation": 2}),
}


def plain(name, x, y, options):
    if name == "mul":
        return x * y
    if name == "matmul":
        return torch.matmul(x, y)
    if name == "conv1d":
        return functional.conv1d(x, y, **options)
    return functional.conv2d(x, y, **options)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("case", CASES)
def test_products(run, case, anything, parties):
    name, left, right, options = CASES[case]
    x, y = anything(*left), anything(*right)
    transcript = Transcript(parties)
    found = run(lambda party, a, b: multiply(party, name, a, b, **options), x, y, transcript=transcript)
    assert torch.equal(found, plain(name, x, y, options))
    assert transcript.rounds == 1
    assert transcript.sent[0] == 8 * (x.numel() + y.numel()) * (parties - 1)


def test_squares(run, anything):
    x = anything(40)
    assert torch.equal(run(square, x), x * x)


CONVOLUTIONS = {
    "1d": ((4, 2, 11), (6, 2, 3), {}),
    "1d, all options": ((3, 4, 12), (6, 2, 3), {"stride": 3, "padding": 2, "dilation": 2, "groups": 2}),
    "2d, one option for both": ((3, 2, 9, 8), (5, 2, 3, 2), {"stride": 2, "padding": (1,), "dilation": 1}),
    "2d, what the stride leaves out": ((2, 3, 10, 11), (4, 3, 3, 2), {"stride": (3, 2), "padding": (0, 1)}),
    "2d, all options": (
        (2, 6, 9, 12), (3, 2, 2, 3), {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1), "groups": 3}
    ),
    "1d of no rows": ((0, 2, 11), (6, 2, 3), {}),
    "2d of no rows": ((0, 3, 9, 8), (5, 3, 3, 2), {"stride": 2}),
    "1d of no channels": ((3, 0, 11), (6, 0, 3), {}),
    "2d of no channels": ((2, 0, 4, 4), (2, 0, 2, 2), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_gradients_of_convolutions_do_not_depend_on_the_processor(case, anything, monkeypatch):
    shape, size, options = CONVOLUTIONS[case]
    x, weight = anything(*shape), anything(*size)
    chosen, found = tuple(options.items()), []
    g = anything(*plain("conv1d" if x.dim() == 3 else "conv2d", x, weight, options).shape)
    for fast in (True, False):
        monkeypatch.setattr(bilinear, "FAST_INTEGERS", fast)
        to_x = bilinear_value("conv_input", g, weight, (*chosen, ("size", shape)))
        to_weight = bilinear_value("conv_weight", x, g, (*chosen, ("size", size)))
        found.append((to_x, to_weight))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.usefixtures("both_ways")
def test_gradients_of_convolutions(run, anything):
    x, weight = anything(2, 3, 9, 8), anything(4, 3, 3, 3)
    g = anything(2, 4, 5, 4)
    options = {"stride": 2, "padding": 1}

    def both(party, x, weight, g):
        x, weight, g = yield from mask(party, x, weight, g)
        to_x = product(party, "conv_input", g, weight, size=tuple(x.shape), **options)
        return to_x, product(party, "conv_weight", x, g, size=tuple(weight.shape), **options)

    to_x, to_weight = run(both, x, weight, g)
    # In float64 with small values, where plain torch is exact; the ring's wrapping is tested above.
    small = [value % 1000 for value in (x, weight, g)]
    to_x, to_weight = run(both, *small)
    doubles = [value.double() for value in small]
    assert torch.equal(to_x.double(), grad.conv2d_input(x.shape, doubles[1], doubles[2], **options))
    assert torch.equal(
        to_weight.double(), grad.conv2d_weight(doubles[0], weight.shape, doubles[2], **options)
    )


def test_one_opening_serves_forward_and_backward(run, anything, parties):
    x, w, g = anything(6, 5), anything(5, 4), anything(6, 4)

    def layer(party, x, w, g):
        x, w = yield from mask(party, x, w)
        forward = product(party, "matmul", x, w)
        (g,) = yield from mask(party, g)
        to_x = product(party, "matmul", g, w.transpose(0, 1))
        return forward, to_x, product(party, "matmul", x.transpose(0, 1), g)

    transcript = Transcript(parties)
    forward, to_x, to_w = run(layer, x, w, g, transcript=transcript)
    assert torch.equal(forward, x @ w)
    assert torch.equal(to_x, g @ w.t())
    assert torch.equal(to_w, x.t() @ g)
    assert transcript.rounds == 2
    assert transcript.sent[0] == 8 * (x.numel() + w.numel() + g.numel()) * (parties - 1)


VIEWS = {
    "transpose": lambda v: v.transpose(0, 1),
    "permute": lambda v: v.permute((2, 0, 1)),
    "reshape": lambda v: v.reshape((4, 30)),
    "narrow": lambda v: v.narrow(1, 1, 2),
    "flip": lambda v: v.flip((0, 2)),
    "expand": lambda v: v.reshape((1, 120)).expand((3, 120)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_masked_values(run, anything, view):
    x = anything(4, 6, 5)

    def squared(party, x):
        (x,) = yield from mask(party, x)
        seen = VIEWS[view](x).plus(3).times(-2)
        return product(party, "mul", seen, seen), seen.share(party)

    expected = (VIEWS[view](x) + 3) * -2
    found, kept = run(squared, x)
    assert torch.equal(found, expected * expected)
    assert torch.equal(kept, expected)


def test_products_of_bits(run, anything):
    x, y = anything(50), anything(50)

    def both(party, x, y):
        x, y = yield from mask(party, x, y)
        first, second = yield from together(negative(party, x), negative(party, y))
        return bit_times_bit(party, first, second.negated()), first.share(party)

    found, first = run(both, x, y)
    assert torch.equal(found, ((x < 0) & (y >= 0)).long())
    assert torch.equal(first, (x < 0).long())


DIVISORS = [1, 2, 3, 16, 1000, 65536, 2**17, 2**40, 2**62 - 1]


@pytest.mark.parametrize("divisor", DIVISORS)
def test_quotients_are_less_than_one_unit_off(run, anything, divisor, parties):
    x = anything(500, bits=63).clamp(min=-(2**62) + divisor)
    few = min(3 * divisor, 2**62 - 1)
    x[10:200] = torch.randint(-few, few, (190,)).clamp(min=-(2**62) + divisor)
    transcript = Transcript(parties)
    found = run(lambda party, a: truncate(party, a, divisor), x, transcript=transcript)
    below = torch.div(x, divisor, rounding_mode="floor")
    assert transcript.rounds == 1
    off = found - below
    assert ((off == 0) | (off == 1)).all() or divisor not in (1, 2, 16, 65536, 2**17, 2**40)
    assert ((found * divisor - x).abs() < divisor).all()


def test_quotients_round_up_as_often_as_they_should(run):
    x = torch.full((20_000,), 3 * 65536 + 16384)  # 3.25
    found = run(lambda party, a: truncate(party, a, 65536), x).double()
    assert abs(found.mean().item() - 3.25) < 6 * (0.25 * 0.75 / 20_000) ** 0.5


def test_quotients_of_one_opening(run, anything):
    x = anything(100, bits=60)

    def two(party, a):
        (a,) = yield from mask(party, a)
        return divide(party, a, 1000), divide(party, a, 65536)

    for found, divisor in zip(run(two, x), (1000, 65536), strict=True):
        assert ((found * divisor - x).abs() < divisor).all()


@pytest.mark.parametrize("divisor", [0, -1, 2**62])
def test_divisors_that_are_refused(divisor):
    party = new_parties(2)[0]
    with pytest.raises(OptionError, match="public divisor"):
        truncate_alone(party, torch.zeros(2, dtype=torch.int64), divisor)
    with pytest.raises(OptionError, match="public divisor"):
        run_together([truncate(one, torch.zeros(2, dtype=torch.int64), divisor) for one in new_parties(2)])


def test_local_truncation_of_small_values():
    x = torch.randint(-(2**30), 2**30, (1000,))
    everyone = new_parties(2)
    parts = share(x, 2, Stream(bytes(16)))  # a fixed stream: it fails once in 2**33 elements
    found = reconstruct([truncate_alone(p, q, 65536) for p, q in zip(everyone, parts, strict=True)])
    assert ((found * 65536 - x).abs() <= 65536).all()
    with pytest.raises(SharingError, match="two parties, not 3"):
        truncate_alone(new_parties(3)[0], x, 65536)


def test_independent_protocols_share_rounds(run, anything, parties):
    x, y = anything(30, bits=60), anything(30, bits=60)

    def both(party, x, y):
        return (yield from together(square(party, x), truncate(party, y, 8), open_together(x)))[:2]

    transcript = Transcript(parties)
    found, quotient = run(both, x, y, transcript=transcript)
    assert torch.equal(found, x * x)
    assert ((quotient * 8 - y).abs() < 8).all()
    assert transcript.rounds == 1


def test_products_that_make_no_sense():
    party, x = new_parties(2)[0], torch.arange(3)
    with pytest.raises(SharingError, match="parts of secrets are int64"):
        next(multiply(party, "mul", torch.rand(3), torch.rand(3)))
    with pytest.raises(SharingError, match="no product of shares"):
        run_together([multiply(one, "system", x, x) for one in new_parties(2)])
    with pytest.raises(OptionError, match="whole number"):
        run_together([truncate(one, x, 2.5) for one in new_parties(2)])
