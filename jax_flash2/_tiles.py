"""One tile: a block of queries and a block of keys, its scores and their derivatives.

Everything that the blockwise passes share about S_ij: the order in which a score is made
(scale, soft cap, bias, ALiBi, visibility), its derivatives along a direction, and the
dropout mask. Arrays are one entry's (see `_entries`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash2 import _dropout, _mask
from jax_flash2._entries import ENTRY_AXES, Sizes, block
from jax_flash2._spec import AttentionSpec, Operands, accumulator


class Tile(NamedTuple):
    x: Operands  # the operands' part of one block of queries and one of keys
    row: jax.Array  # (q_block,) indices in the whole arrays
    column: jax.Array  # (kv_block,)

    @property
    def distance(self) -> jax.Array:
        return _mask.distance(self.row, self.column, self.x, 0)[None]


class Scores(NamedTuple):
    s: jax.Array  # (g, q_block, kv_block), -inf where masked
    product: jax.Array  # q.k, before the scale
    capped: jax.Array  # after the soft cap, before bias and masks


class Along(NamedTuple):
    """First derivatives along a direction; a zero may be a scalar."""

    product: jax.Array  # of q.k
    scaled: jax.Array  # of scale * q.k
    s: jax.Array  # of S_ij; 0 where masked


def tile(sizes: Sizes, x: Operands, i: jax.Array, j: jax.Array) -> Tile:
    parts = {}
    for name, axes in ENTRY_AXES.items():
        part = getattr(x, name)
        if part is None:
            continue
        for letter, index, size in (("l", i, sizes.q_block), ("s", j, sizes.kv_block)):
            axis = axes.find(letter)
            if axis >= 0 and part.shape[axis] != 1:
                part = block(part, axis, index, size)
        parts[name] = part
    row = i * sizes.q_block + jnp.arange(sizes.q_block, dtype=jnp.int32)
    column = j * sizes.kv_block + jnp.arange(sizes.kv_block, dtype=jnp.int32)
    # What stands past a length may be anything: replace it before it is multiplied.
    for names, index, length in (
        (("query",), row, x.query_seq_lengths),
        (("key", "value"), column, x.key_value_seq_lengths),
    ):
        for name in names:
            if name in parts and length is not None:
                within = (index < length).reshape(*[1] * (parts[name].ndim - 2), -1, 1)
                parts[name] = jnp.where(within, parts[name], 0)
    return Tile(Operands(**parts), row, column)


def direction(x: Operands, tangents: dict[str, jax.Array], letter: str) -> Operands:
    """The tangents of one direction (``t`` or ``u``), to be cut by `tile` like ``x``."""
    named = {n[2:]: a for n, a in tangents.items() if n.startswith(f"{letter}_")}
    named = {n: a for n, a in named.items() if n in ENTRY_AXES}
    return Operands(
        **named,
        query_seq_lengths=x.query_seq_lengths,
        key_value_seq_lengths=x.key_value_seq_lengths,
    )


def scores(spec: AttentionSpec, tile: Tile) -> Scores:
    """S_ij, in the order of the call: scale, soft cap, bias, ALiBi, visibility."""
    x = tile.x
    product = dot("gld,sd->gls", x.query, x.key)
    dtype = product.dtype
    s = product * scale(spec, x, dtype)
    if spec.soft_cap is not None:
        cap = jnp.asarray(spec.soft_cap, dtype)
        s = cap * jnp.tanh(s / cap)
    capped = s
    if x.bias is not None:
        s = s + x.bias.astype(dtype)
    if x.alibi_slopes is not None:
        s = s - x.alibi_slopes.astype(dtype)[:, None, None] * tile.distance.astype(
            dtype
        )
    seen = _mask.visible(spec, tile.row, tile.column, x, 0)
    if seen is not None:
        s = jnp.where(seen[None], s, -jnp.inf)
    if x.mask is not None:
        s = jnp.where(x.mask, s, -jnp.inf)
    return Scores(s, product, capped)


def scores_along(spec: AttentionSpec, tile: Tile, at: Scores, t: Operands) -> Along:
    """The scores' derivatives along ``t``: the tile's part of a direction."""
    x, dtype = tile.x, at.s.dtype
    product = products(x.query, x.key, t.query, t.key, dtype)
    scaled = scale(spec, x, dtype) * product
    if t.scale is not None:
        scaled = scaled + t.scale.astype(dtype) * at.product
    s = slope(spec, at) * scaled
    if t.bias is not None:
        s = s + t.bias.astype(dtype)
    if t.alibi_slopes is not None:
        s = s - t.alibi_slopes.astype(dtype)[:, None, None] * tile.distance.astype(
            dtype
        )
    if s.ndim:
        s = jnp.where(at.s == -jnp.inf, 0, s)
    return Along(product, scaled, s)


def scores_along_both(
    spec: AttentionSpec, tile: Tile, at: Scores, t: Operands, u: Operands
) -> tuple[Along, Along, jax.Array]:
    """The scores' derivatives along ``t``, along ``u``, and S_ij's along both."""
    along_t = scores_along(spec, tile, at, t)
    along_u = scores_along(spec, tile, at, u)
    dtype = at.s.dtype
    product = products(t.query, t.key, u.query, u.key, dtype)
    scaled = scale(spec, tile.x, dtype) * product
    if t.scale is not None:
        scaled = scaled + t.scale.astype(dtype) * along_u.product
    if u.scale is not None:
        scaled = scaled + u.scale.astype(dtype) * along_t.product
    s = slope(spec, at) * scaled + bend(spec, at) * along_t.scaled * along_u.scaled
    if s.ndim:
        s = jnp.where(at.s == -jnp.inf, 0, s)
    return along_t, along_u, s


def slope(spec: AttentionSpec, at: Scores) -> jax.Array:
    """The soft cap's first derivative: of ``c tanh(y / c)``, ``1 - tanh^2``."""
    if spec.soft_cap is None:
        return jnp.ones((), at.s.dtype)
    return 1 - (at.capped / spec.soft_cap) ** 2


def bend(spec: AttentionSpec, at: Scores) -> jax.Array:
    """Its second: ``-2 tanh (1 - tanh^2) / c``."""
    if spec.soft_cap is None:
        return jnp.zeros((), at.s.dtype)
    return -2 / spec.soft_cap**2 * at.capped * slope(spec, at)


def products(
    query: jax.Array | None,
    key: jax.Array | None,
    t_query: jax.Array | None,
    t_key: jax.Array | None,
    dtype: Any,
) -> jax.Array:
    """``t_query.key + query.t_key``, a product that lacks a factor being zero."""
    pairs = [
        (a, b)
        for a, b in ((t_query, key), (query, t_key))
        if a is not None and b is not None
    ]
    if len(pairs) == 2:  # as one product of twice the length
        a, b = (jnp.concatenate(factor, -1) for factor in zip(*pairs, strict=True))
        pairs = [(a, b)]
    return dot("gld,sd->gls", *pairs[0]) if pairs else jnp.zeros((), dtype)


def scale(spec: AttentionSpec, x: Operands, dtype: Any) -> jax.Array:
    return jnp.asarray(spec.scale, dtype) if x.scale is None else x.scale.astype(dtype)


def survivors(spec: AttentionSpec, tile: Tile, p: jax.Array) -> jax.Array:
    """Dropout: ``p`` scaled by 1 / (1 - rate), or 0."""
    if not spec.dropout_rate:
        return p
    return jnp.where(
        kept(spec, tile), p / jnp.asarray(1 - spec.dropout_rate, p.dtype), 0
    )


def kept(spec: AttentionSpec, tile: Tile) -> jax.Array:
    stream, columns = tile.x.dropout_streams, tile.column.shape[0]
    row, column, origin = tile.row, tile.column[0], tile.x.origin
    if origin is None:
        return _dropout.keep(stream, row, column, columns, spec.dropout_rate)
    row, column = row + origin[0], column + origin[1]
    return _dropout.keep_anywhere(stream, row, column, columns, spec.dropout_rate)


def dot(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A block product, accumulated in float32 at the highest precision."""
    return jnp.einsum(
        axes, a, b, precision="highest", preferred_element_type=accumulator(a.dtype)
    )


def add_tile(
    total: jax.Array, part: jax.Array, sizes: Sizes, i: jax.Array, j: jax.Array
) -> jax.Array:
    """Adds a tile of ``(g, l, s)`` to the array it is a part of; size 1 broadcasts."""
    zero = jnp.zeros((), i.dtype)
    row = zero if total.shape[1] == 1 else i * sizes.q_block
    column = zero if total.shape[2] == 1 else j * sizes.kv_block
    start = (zero, row, column)
    part = part + lax.dynamic_slice(total, start, part.shape)
    return lax.dynamic_update_slice(total, part, start)


def sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of broadcasting ``shape`` to x's."""
    axes = [a for a, n in enumerate(shape) if n == 1 and x.shape[a] != 1]
    return x.sum(axes, keepdims=True) if axes else x
