"""What a party holds of a value while it computes: its part, the scale, and what is known of the value besides.

A `Share` knows its scale, so that a product is brought back to the session's scale only where something needs that,
which relu does for nothing. It keeps its `Masked` once it was opened: a weight that a forward pass multiplies by is not
opened again in the backward pass. A view reads from what it is a view of, and writes there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from planrt.errors import SharingError
from planrt.serde.tensors import raw_bytes
from planrt.sharing.fixed_point import encode
from planrt.sharing.masked import Bit, Masked, mask
from planrt.sharing.quotients import divide
from planrt.sharing.requests import Known
from planrt.sharing.rounds import Party, Protocol

Value: TypeAlias = Any
"""A `Share`, or what all parties know: a torch.Tensor or a number."""
Public: TypeAlias = Any
"""What all parties know: no `Share`. `table` refuses calls by these annotations."""


class Step(NamedTuple):
    """A change of shape, of a tensor: what makes a view."""

    name: str
    args: tuple[Any, ...] = ()

    def of(self, value: Any) -> Any:
        """Returns the view of a tensor; also of what was opened, where `of_masked`."""
        special = _STEPS.get(self.name)
        return getattr(value, self.name)(*self.args) if special is None else special(value, *self.args)

    @property
    def of_masked(self) -> bool:
        """Returns whether `Masked` and `Bit` have this change."""
        return self.name in ("transpose", "permute", "reshape", "expand")


def at_slice(value: torch.Tensor, dim: int, start: int | None, end: int | None, step: int) -> torch.Tensor:
    """Returns what torch calls slice: of one dimension."""
    places: list[slice] = [slice(None)] * value.dim()
    places[dim] = slice(start, end, step)
    return value[tuple(places)]


_STEPS: dict[str, Callable[..., Any]] = {
    "slice": at_slice,
    "strided": lambda value, size, stride, offset: value.contiguous().as_strided(size, stride, offset),
    "same": lambda value: value,
}


class Share:
    """One party's part of a secret that stands for integers divided by `scale`; the scale of whole numbers is 1."""

    __slots__ = ("along", "bit", "fine", "known", "masked", "part", "positive", "precise", "scale", "stamp",
                 "winners")  # fmt: skip

    def __init__(
        self,
        part: torch.Tensor,
        scale: int,
        masked: Masked | None = None,
        *,
        positive: Bit | None = None,
        bit: Bit | None = None,
        known: torch.Tensor | None = None,
        winners: Bit | None = None,
    ) -> None:
        self.part = part
        """This party's part, int64."""
        self.scale = scale
        """The public scale."""
        self.masked = masked
        """The same value as it was opened under a mask, if it was."""
        self.positive = positive
        """The result of relu keeps where it is positive."""
        self.bit = bit
        """Set where the value is a secret bit, 0 or 1 at the scale 1: a product with it opens less."""
        self.known = known
        """Set where all parties know the value, as float64: a product with it opens nothing."""
        self.precise: torch.Tensor | None = None
        """Set where all parties know the value more exactly than its parts have it, as float64: a number that was added
        to what all know. What rounds there are may depend on whether it is set, and not on what it is.
        """
        self.winners = winners
        """Indices of the largest of windows keep which it was: bits of shape (places, windows)."""
        self.along: int | None = None
        """Indices of entries in order keep along which dimension they are all different."""
        self.fine = False
        """Set where the value is kept finer than the session's scale on purpose: means of squares."""
        self.stamp = 0
        """How often the value was changed."""

    def view(self, name: str, *args: Any) -> View:
        """Returns a view by a `Step`: what changes here changes there, and the other way."""
        return View(self, Step(name, tuple(tuple(one) if isinstance(one, list) else one for one in args)))

    @property
    def origin(self) -> Share:
        """Returns what it is a view of, in the end; itself if it is none."""
        return self

    @property
    def whole(self) -> Share:
        """Returns what is opened in place of this value: what it is a view of, where it has all of it. Other views of
        that, such as a weight's in the backward pass or in the next step, are masked then, too.
        """
        return self

    @property
    def shape(self) -> torch.Size:
        """The shape of the value."""
        return self.part.shape

    def rescaled(self, part: torch.Tensor, scale: int) -> None:
        """Holds the same value at another scale."""
        self.part, self.scale, self.masked, self.fine = part, scale, None, False

    def become(self, other: Share) -> None:
        """Takes the value of `other`, at a scale that divides or is divided by this one's: an operation in place."""
        self.part, self.scale, self.masked = other.part, other.scale, other.masked
        self.positive, self.bit, self.known, self.fine = None, other.bit, other.known, other.fine
        self.precise = other.precise
        self.stamp += 1

    def copied(self) -> Share:
        """Returns the same value, which changes alone."""
        made = Share(self.part.clone(), self.scale, self.masked, bit=self.bit, known=self.known)
        made.fine, made.precise = self.fine, self.precise
        return made

    def randomness(self) -> Iterator[Known]:
        """Yields the masks and coins that are kept with it and with what it is a view of."""
        if self.masked is not None:
            yield self.masked.mask
        for bit in (self.positive, self.bit, self.winners):
            if bit is not None:
                yield bit.coin

    def looks(self, named: Callable[[Known], Known]) -> tuple[Any, ...]:
        """Returns all that protocols depend on, secrets apart, with masks and coins as `named` names them."""
        masked, positive, bit, winners = self.masked, self.positive, self.bit, self.winners
        return (
            self.part.shape,
            self.scale,
            self.fine,
            self.along,
            None if masked is None else named(masked.mask),
            None if positive is None else named(positive.coin),
            None if bit is None else named(bit.coin),
            None if winners is None else named(winners.coin),
            None if self.known is None else digest(self.known),
            self.precise is not None,
        )

    def twin(self, named: Callable[[Known], Known], made: dict[int, Share]) -> Share:
        """Returns a share of zeros with the same looks; views of one thing among `made` are views of one twin."""
        found = made.get(id(self))
        if found is None:
            found = made[id(self)] = self._twin(named, made)
            found.fine, found.along = self.fine, self.along
            found.known, found.precise = self.known, self.precise
            if self.masked is not None:
                zeros = _zeros(self.masked.opened)
                found.masked = Masked(zeros, zeros, named(self.masked.mask))
            for name in ("positive", "bit", "winners"):
                bit = getattr(self, name)
                if bit is not None:
                    setattr(found, name, Bit(_zeros(bit.opened), _zeros(bit.part), named(bit.coin)))
        return found

    def _twin(self, named: Callable[[Known], Known], made: dict[int, Share]) -> Share:
        return Share(_zeros(self.part), self.scale)


class View(Share):
    """A share that shows another one by a `Step`: it reads from there what has changed, and writes there."""

    __slots__ = ("_apart", "_base", "_masked", "_part", "_scale", "_seen", "_step")

    def __init__(self, base: Share, step: Step) -> None:
        self._base, self._step = base, step
        self._seen = base.stamp
        self._apart = False
        """Set where it was brought to another scale alone."""
        super().__init__(step.of(base.part), base.scale)
        self._masked = self._masked_of_base()
        if base.known is not None:
            self.known = step.of(base.known)
        if base.bit is not None and step.of_masked:
            self.bit = step.of(base.bit)

    @property
    def origin(self) -> Share:
        """Returns what the base is a view of, or the base."""
        return self._base.origin

    @property
    def stamp(self) -> int:
        """Returns how often the base was changed."""
        return self._base.stamp

    @stamp.setter
    def stamp(self, stamp: int) -> None:
        """Nothing: it changes with what it is a view of."""

    @property
    def part(self) -> torch.Tensor:
        """This party's part, int64."""
        if self._seen != self._base.stamp:
            self._refresh()
        return self._part

    @part.setter
    def part(self, part: torch.Tensor) -> None:
        self._part = part

    @property
    def scale(self) -> int:
        """The public scale."""
        if self._seen != self._base.stamp:
            self._refresh()
        return self._scale

    @scale.setter
    def scale(self, scale: int) -> None:
        self._scale = scale

    @property
    def masked(self) -> Masked | None:
        """The same value as it was opened under a mask, if it was, or the base was."""
        if self._seen != self._base.stamp:
            self._refresh()
        if self._masked is None and self._shows:
            self._masked = self._masked_of_base()
        return self._masked

    @masked.setter
    def masked(self, opened: Masked | None) -> None:
        self._refresh()
        self._masked = opened

    @property
    def whole(self) -> Share:
        """The base, where it shows all of that as it is there."""
        if self._seen != self._base.stamp:
            self._refresh()
        return self._base.whole if self._shows else self

    @property
    def _shows(self) -> bool:
        """Whether what is opened of its base can be shown as this view is."""
        return self._step.of_masked and not self._apart and self._scale == self._base.scale

    def rescaled(self, part: torch.Tensor, scale: int) -> None:
        """Holds the same value at another scale, which the base does not."""
        self._refresh()
        super().rescaled(part, scale)
        self._apart = True

    def become(self, other: Share) -> None:
        """Takes the value of `other`, in the base."""
        base = self._base
        scale = max(base.scale, other.scale)
        whole = (base.part * (scale // base.scale)).contiguous()
        self._step.of(whole).copy_(other.part * (scale // other.scale))
        base.become(Share(whole, scale))
        self.positive = self.bit = self.known = None

    def randomness(self) -> Iterator[Known]:
        """Yields the masks and coins that are kept with it, and the base's."""
        yield from super().randomness()
        yield from self._base.randomness()

    def looks(self, named: Callable[[Known], Known]) -> tuple[Any, ...]:
        """Returns what those of a share have, and what it is a view of."""
        return (*super().looks(named), self._apart, self._step, self._base.looks(named))

    def _twin(self, named: Callable[[Known], Known], made: dict[int, Share]) -> Share:
        found = View(self._base.twin(named, made), self._step)
        found._part, found._scale, found._apart = _zeros(self.part), self.scale, self._apart
        found._masked = found.known = found.bit = None
        return found

    def _refresh(self) -> None:
        if self._seen != self._base.stamp:
            self._part, self._scale = self._step.of(self._base.part), self._base.scale
            self._masked, self._seen, self._apart = self._masked_of_base(), self._base.stamp, False
            self.positive = self.bit = self.known = None

    def _masked_of_base(self) -> Masked | None:
        opened = self._base.masked
        return None if opened is None or not self._step.of_masked else self._step.of(opened)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=torch.int64)


def digest(values: torch.Tensor) -> bytes:
    """Returns what tells tensors of one dtype and shape apart that all know."""
    return hashlib.blake2b(raw_bytes(values), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Context:
    """A party, and the scale that values are brought back to: 1 where there are whole numbers only."""

    party: Party
    scale: int
    noted: list[tuple[Share, int]] | None = None
    """Set for dry runs, it gathers what was brought back to the session's scale, and from which scale."""

    def public(self, value: Value, scale: int) -> torch.Tensor:
        """Returns what all know as integers at `scale`.

        Raises:
            ValueRangeError: it does not fit.
            SharingError: a fraction among shares of whole numbers.
        """
        values = torch.as_tensor(value)
        if scale == 1 and values.is_floating_point() and bool((values != values.round()).any()):
            raise SharingError(
                "shares of whole numbers know no fractions: share fix_precision() of them, or round the other operand"
            )
        return encode(values if not values.is_floating_point() else values.double(), scale)

    def share_of(self, value: Value, like: Share | None = None) -> Share:
        """Returns what all know as a share; a `Share` as it is."""
        if isinstance(value, Share):
            return value
        values = torch.as_tensor(value)
        scale = self.scale if values.is_floating_point() else 1
        exact = values.double()
        if not values.is_floating_point() and not torch.equal(exact.long(), values.long()):
            return Share(self.party.public(self.public(values, scale)), scale)  # beyond what float64 holds
        return Share(self.party.public(self.public(values, scale)), scale, known=exact)


def each_once(shares: list[Share]) -> list[Share]:
    """Both factors of a square are one share."""
    return list({id(share): share for share in shares}.values()) if len(shares) > 1 else shares


def reduced(context: Context, *shares: Share) -> Protocol[None]:
    """Brings shares that are finer than the session's scale back to it, all in one round; none if none is."""
    wide = each_once([share for share in shares if share.scale > context.scale])
    if wide:
        yield from _brought(context, [(share, context.scale) for share in wide])


def _brought(context: Context, wide: Sequence[tuple[Share, int]], *fresh: Share) -> Protocol[None]:
    """Brings shares to the coarser scales beside them, and opens `fresh` ones under masks, all in one round."""
    if context.noted is not None:
        context.noted.extend((share, share.scale) for share, _ in wide)
    parts = [share.part for share, _ in wide] + [share.part for share in fresh]
    opened = yield from mask(context.party, *parts)
    for (share, scale), one in zip(wide, opened, strict=False):
        share.rescaled(divide(context.party, one, share.scale // scale), scale)
    for share, one in zip(fresh, opened[len(wide) :], strict=True):
        share.masked = one


def fractional(context: Context, *shares: Share) -> Protocol[list[Share]]:
    """Returns shares at the session's scale: finer ones reduced in one round, whole numbers raised.

    Raises:
        SharingError: there are whole numbers only.
    """
    if context.scale == 1:
        raise SharingError("shares of whole numbers know no fractions: write x.fix_precision().share(...)")
    yield from reduced(context, *shares)
    return [
        share if share.scale == context.scale else Share(share.part * context.scale, context.scale)
        for share in shares
    ]


def masked(
    context: Context, *shares: Share, beside: tuple[Share, int] | None = None
) -> Protocol[list[Masked]]:
    """Returns shares, at the session's scale or whole, as they are, or now become, opened under masks, in one round or
    two. `beside` is brought to the coarser scale that is said in the first of these rounds, if there is one.
    """
    others = [] if beside is None else [beside]
    wide = each_once([share for share in shares if share.scale > context.scale])
    if wide:
        yield from _brought(context, [*[(share, context.scale) for share in wide], *others])
        others = []
    fresh = each_once([share.whole for share in shares if share.masked is None])
    if fresh:
        yield from _brought(context, others, *fresh)
    return [share.masked for share in shares if share.masked is not None]


def scale_of_squares(context: Context) -> int:
    """Returns what means of squares are kept at, for the optimizers that take their roots: gradients are small, their
    squares smaller, and the first one counts for a thousandth of that. At a scale of 2**16 that is 2**42; it holds
    means up to 2**14, of gradients up to 128.
    """
    return context.scale**2 << max(0, 43 - (context.scale**2).bit_length())


def aligned(context: Context, *shares: Share) -> Protocol[int]:
    """Makes sure that shares have scales of which the largest is a multiple of all, and returns it. What is kept fine
    stays so: an optimizer's means begin as zeros at the session's scale.
    """
    scales = [share.scale for share in shares]
    most, least = max(scales), min(scales)
    if most == least:
        return most
    kept = any(share.fine for share in shares) and most <= scale_of_squares(context)
    if any(most % scale for scale in scales) or (not kept and most // least > max(context.scale, 1) ** 2):
        yield from reduced(context, *shares)
    return max([share.scale for share in shares])


def at(share: Share, scale: int) -> torch.Tensor:
    """Returns the part at a multiple of its scale."""
    have = share.scale
    return share.part if have == scale else share.part * (scale // have)
