"""Heads for length: the all-to-alls of `ring_attention`, to and fro.

Before them a device has a part of the tokens with all their heads, after them all tokens
with a part of the heads. JAX differentiates both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash2._spec import Operands, axes_of

Axes = tuple[str, ...]


def to_heads(x: Operands, axes: Axes, ways: int) -> Operands:
    """The operands of a call with all tokens and ``1 / ways`` of the query heads."""
    heads, kv_heads = x.query.shape[-2], x.key.shape[-2]
    mine = heads // ways

    def move(name: str, a: jax.Array) -> jax.Array:
        letters = axes_of(name)

        def axis(letter: str) -> int:
            return a.ndim - len(letters) + letters.index(letter)

        if "h" in letters and "l" not in letters:
            return _own(a, axis("h"), axes, mine)
        if "n" in letters and kv_heads % ways:
            a = jnp.take(a, copies(ways, mine, heads // kv_heads), axis=axis("n"))
        length = next((letter for letter in "ls" if letter in letters), None)
        if length is None:
            return a
        head = next((letter for letter in "hn" if letter in letters), None)
        if a.shape[axis(length)] == 1 and "s" in letters and "h" in letters:
            return _own(a, axis("h"), axes, mine)  # dense, the same for all rows
        if head is None or a.shape[axis(head)] == 1:
            return lax.all_gather(a, axes, axis=axis(length), tiled=True)
        return lax.all_to_all(a, axes, axis(head), axis(length), tiled=True)

    return Operands(**{n: move(n, a) for n, a in x._asdict().items() if a is not None})


def to_length(
    out: jax.Array, lse: jax.Array, largest: jax.Array | None, axes: Axes
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The results of such a call for this device's tokens, with all heads."""
    length, head = out.ndim - 3, out.ndim - 2
    out = lax.all_to_all(out, axes, length, head, tiled=True)
    lse = lax.all_to_all(lse, axes, lse.ndim - 1, lse.ndim - 2, tiled=True)
    if largest is not None:
        largest = lax.all_gather(largest, axes, axis=largest.ndim - 1, tiled=True)
    return out, lse, largest


def _own(a: jax.Array, axis: int, axes: Axes, mine: int) -> jax.Array:
    """This device's heads of an array that has all."""
    if a.shape[axis] == 1:
        return a
    return lax.dynamic_slice_in_dim(a, lax.axis_index(axes) * mine, mine, axis)


def copies(ways: int, mine: int, group: int) -> Any:
    """The key heads of each device's query heads, one device after the other."""
    if mine % group == 0:
        heads = range(0, mine, group)
    elif group % mine == 0:
        heads = range(1)
    else:  # groups straddle devices: each query head gets a copy of its key head
        heads = range(mine)
    index = [(device * mine + h) // group for device in range(ways) for h in heads]
    return jnp.array(index, jnp.int32)
