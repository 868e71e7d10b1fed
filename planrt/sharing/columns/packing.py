"""Several fixed-point values in one plaintext, such that one product with a plain number gives several inner products.

A plaintext is a polynomial in ``2**slot``. Residuals of `rows` people stand at 0, 1, 2, ...; the values of a column
about the same people stand in the opposite order, and those of the next column `rows` slots further on::

    D(z)   = d0 + d1 z + ...                    one ciphertext for `rows` residuals
    X(z)   = sum over columns j of  z**(j * rows) * (x[rows-1, j] + ... + x[0, j] z**(rows-1))
    D * X  has  sum over t of d[t] * x[t, j]  at the place  j * rows + rows - 1

and what stands elsewhere is thrown away by whoever takes off the mask. So one ciphertext holds `rows` residuals, and
one decryption brings the gradients of `columns` columns.

**Precision.** Column values are rounded to multiples of 2**-value_bits, residuals to multiples of 2**-residual_bits;
everything after that is exact. **Range.** Over one batch the root mean square of a column is at most 4, that of a
party's part of the residuals at most 8 divided by the number of owners: `check_columns` and `check_residuals` say so
by name. By Cauchy and Schwarz no slot can overflow then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from planrt.errors import OptionError, ValueRangeError

COLUMN_RMS: Final = 4.0
RESIDUAL_RMS: Final = 8.0
SPARE_BITS: Final = 38
"""Bits at the top of a plaintext that no unmasked result reaches: the chance that a masked one looks like an unmasked
one is 2**-36 at most."""
DEFAULT_PRECISION: Final = 17


@dataclass(frozen=True, slots=True)
class Layout:
    """The packing of values: see the module. All parties work it out from the same terms."""

    slot: int
    """Bits of a slot."""
    rows: int
    columns: int
    value_bits: int
    residual_bits: int
    batch_size: int

    @property
    def places(self) -> int:
        """The number of slots that a product has."""
        return (self.columns + 1) * self.rows - 1

    def groups(self, columns: int) -> int:
        """Returns how many ciphertexts the gradients of so many columns take."""
        return -(-columns // self.columns)

    def chunks(self, rows: int) -> int:
        """Returns how many ciphertexts the residuals of so many rows take."""
        return -(-rows // self.rows)


def layout_for(key_bits: int, batch_size: int, precision: int = DEFAULT_PRECISION) -> Layout:
    """Returns the packing that needs the fewest operations for such keys and batches.

    Raises:
        OptionError: the precision leaves no room for a value in such a key.
    """
    if type(precision) is not int or not 8 <= precision <= 40:
        raise OptionError(f"precision must be a whole number of bits from 8 to 40, got {precision!r}")
    value_bits, residual_bits = precision, precision + 1
    # A sign, one bit for two columns that overlap in a slot that is thrown away, one for rounding.
    range_bits = math.ceil(math.log2(max(batch_size, 2) * COLUMN_RMS * RESIDUAL_RMS))
    slot = value_bits + residual_bits + range_bits + 3
    places = (key_bits - SPARE_BITS) // slot
    best = max(
        (
            (min(rows, columns), rows * columns, rows, columns)
            for columns in range(1, places + 1)
            if (rows := (places + 1) // (columns + 1)) >= 1
        ),
        default=None,
    )
    if best is None:
        raise OptionError(f"a key of {key_bits} bits has no room for values of {precision} fractional bits")
    return Layout(slot, best[2], best[3], value_bits, residual_bits, batch_size)


def check_values(values: np.ndarray[Any, Any], names: Sequence[str], layout: Layout, *, whose: str) -> None:
    """Raises ValueRangeError if a value is so large that no batch with it is in range; names party and column."""
    for name, size in zip(names, np.abs(values).max(0).tolist(), strict=True):
        if not size <= COLUMN_RMS * math.sqrt(layout.batch_size):  # nor if it is no number
            raise ValueRangeError(_out_of_range(whose, name))


def check_columns(values: np.ndarray[Any, Any], names: Sequence[str], layout: Layout, *, whose: str) -> None:
    """Raises ValueRangeError if a batch of a column is out of the range that its slots hold; names party and column."""
    most = COLUMN_RMS * math.sqrt(layout.batch_size)
    norms = np.sqrt((values**2).sum(0))
    for name, norm in zip(names, norms.tolist(), strict=True):
        if not norm <= most:
            raise ValueRangeError(_out_of_range(whose, name))


def _out_of_range(whose: str, column: str) -> str:
    return (
        f"{whose}: column {column!r} is out of the range of encrypted values, whose root mean square over a batch is "
        f"at most {COLUMN_RMS:g}: standardise it, or clip what is far out"
    )


def check_residuals(values: np.ndarray[Any, Any], owners: int, layout: Layout, *, whose: str) -> None:
    """Raises ValueRangeError if a party's part of the residuals is out of the range that their slots hold."""
    norm = math.sqrt(float((values**2).sum()))
    if not norm <= RESIDUAL_RMS / owners * math.sqrt(layout.batch_size):  # nor if it is no number
        raise ValueRangeError(
            f"{whose}: predictions or labels are out of the range of encrypted values, whose root mean square over a "
            f"batch is at most {RESIDUAL_RMS / owners:g}: standardise the label, or take a smaller learning rate"
        )


def fixed(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Returns values as whole multiples of 2**-bits, int64."""
    whole: np.ndarray[Any, Any] = np.rint(np.ldexp(values, bits)).astype(np.int64)
    return whole


def packed_residuals(values: np.ndarray[Any, Any], layout: Layout) -> list[int]:
    """Returns residuals (whole numbers, [rows]) as plaintexts."""
    return [
        _polynomial(values[at : at + layout.rows].tolist(), layout.slot)
        for at in range(0, len(values), layout.rows)
    ]


def packed_columns(values: np.ndarray[Any, Any], layout: Layout) -> list[list[int]]:
    """Returns column values (whole numbers, [rows, columns]) as factors: for each group of columns one for each
    chunk of rows."""
    groups = []
    for first in range(0, values.shape[1], layout.columns):
        part = values[:, first : first + layout.columns]
        factors = []
        for at in range(0, len(part), layout.rows):
            chunk = part[at : at + layout.rows]
            slots = [0] * (layout.rows * part.shape[1])
            for row, entries in enumerate(chunk.tolist()):
                for column, entry in enumerate(entries):
                    slots[column * layout.rows + layout.rows - 1 - row] = entry
            factors.append(_polynomial(slots, layout.slot))
        groups.append(factors)
    return groups


def _polynomial(slots: Sequence[int], width: int) -> int:
    total = 0
    for value in reversed(slots):
        total = (total << width) + value
    return total


def unpacked(value: int, count: int, layout: Layout) -> list[int]:
    """Returns the inner products of `count` columns in the plaintext of a product, a whole number of any sign."""
    half, mask = 1 << (layout.slot - 1), (1 << layout.slot) - 1
    shifted = value + sum(half << (layout.slot * place) for place in range(layout.places))
    places = [column * layout.rows + layout.rows - 1 for column in range(count)]
    return [((shifted >> (layout.slot * place)) & mask) - half for place in places]


def centred(value: int, modulus: int) -> int:
    """Returns `value` modulo `modulus`, between minus and plus half of it."""
    value %= modulus
    return value - modulus if value > modulus // 2 else value


def looks_unmasked(value: int, modulus: int, layout: Layout) -> bool:
    """Returns whether a decrypted value is what a product is without a mask: far smaller than the modulus."""
    return _fits(centred(value, modulus), layout)


def is_product(
    value: int, sums: Sequence[int], columns: np.ndarray[Any, Any], owners: int, layout: Layout
) -> bool:
    """Returns whether `value`, without a mask and with the inner products `sums`, can be the product of residuals in
    range (of so many owners) and these columns (whole numbers, [rows, columns])."""
    rounding = owners * math.sqrt(len(columns)) / 2
    most = math.ldexp(RESIDUAL_RMS * math.sqrt(layout.batch_size), layout.residual_bits) + rounding
    lengths = np.sqrt((columns.astype(np.float64) ** 2).sum(0)).tolist()
    in_range = (abs(one) <= most * length * (1 + 2**-40) for one, length in zip(sums, lengths, strict=True))
    return _fits(value, layout) and all(in_range)


def _fits(value: int, layout: Layout) -> bool:
    return abs(value).bit_length() <= layout.slot * layout.places
