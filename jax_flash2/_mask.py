"""Who sees whom: visibility of a key to a query, and the blocks worth visiting.

`visible` is the one definition of the structured masks, element by element;
`key_blocks` and `blocks_meet` say the same of whole blocks, so that the blockwise code
never touches a block that `visible` would mask entirely. The dense boolean `mask`
argument is no structure and joins where the scores are made.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_flash2._spec import AttentionSpec, Operands


def _lead(index: jax.Array, axes: int) -> jax.Array:
    """``index`` with leading axes of size 1, so that ranks are equal, not promoted."""
    return index.reshape((1,) * axes + index.shape)


def _positions(row: jax.Array, x: Operands, batch_axes: int) -> jax.Array:
    """Positions of query rows on the key axis: int32 ``(batch..., rows)``."""
    row = _lead(row, batch_axes)
    return row if x.query_offset is None else row + x.query_offset[..., None]


def _key_origin(x: Operands) -> jax.Array:
    """Where key 0 lies in its sequence: int32 ``(batch...)``, or a scalar 0."""
    return jnp.int32(0) if x.origin is None else x.origin[..., 1]


def distance(
    row: jax.Array, column: jax.Array, x: Operands, batch_axes: int
) -> jax.Array:
    """``|i - j|`` for ALiBi: int32 ``(batch..., rows, columns)``."""
    i = _positions(row, x, batch_axes)[..., :, None]
    return jnp.abs(i - _lead(column, batch_axes + 1))


def visible(
    spec: AttentionSpec,
    row: jax.Array,
    column: jax.Array,
    x: Operands,
    batch_axes: int,
) -> jax.Array | None:
    """True where query ``row`` sees key ``column``; None where everything is seen.

    Args:
      row, column: int32 ``(rows,)`` and ``(columns,)``, indices in the whole arrays.
      x: lengths, offsets and prefixes ``(batch...,)``; segment ids of just these rows
        and columns, ``(batch..., rows)`` and ``(batch..., columns)``.
      batch_axes: how many axes ``batch...`` stands for.

    Returns:
      bool, broadcastable to ``(batch..., rows, columns)``, of that rank.
    """
    i = _positions(row, x, batch_axes)[..., :, None]
    j = _lead(column, batch_axes + 1)
    terms = []
    if spec.is_causal:
        causal = j <= i
        if x.prefix_lengths is not None:
            causal |= j < x.prefix_lengths[..., None, None]
        terms.append(causal)
    left, right = spec.window
    # Keys begin at 0. A side may be any int32, as an offset may: nothing overflows.
    if left is not None:
        terms.append(j >= jnp.maximum(i, 0) - left)
    if right is not None:
        terms.append(j - right <= i)
    if spec.chunk_size is not None:
        origin = _key_origin(x)
        origin = origin if x.origin is None else origin[..., None, None]
        size = spec.chunk_size
        terms.append((i + origin) // size == (j + origin) // size)
    if x.key_value_seq_lengths is not None:
        terms.append(j < x.key_value_seq_lengths[..., None, None])
    if x.query_seq_lengths is not None:
        rows = _lead(row, batch_axes)[..., :, None]
        terms.append(rows < x.query_seq_lengths[..., None, None])
    if x.query_segment_ids is not None:
        query_ids = x.query_segment_ids[..., :, None]
        terms.append(query_ids == x.key_value_segment_ids[..., None, :])
    result = None
    for term in terms:
        result = term if result is None else result & term
    return result


def key_blocks(
    spec: AttentionSpec,
    x: Operands,
    batch_axes: int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
    """First and one past the last key block that each query block can see.

    A bound, computed from the ends of each block; segment ids are left to
    `blocks_meet`. Nothing of size ``q_length * kv_length`` is made.

    Args:
      x: lengths, offsets and prefixes ``(batch...,)``.
      lengths: query length and key length.
      blocks: rows of a query block and of a key block.

    Returns:
      Two int32 ``(batch..., q_blocks)``; where a block sees nothing they are equal.
    """
    (q_length, kv_length), (q_block, kv_block) = lengths, blocks
    q_blocks, kv_blocks = -(-q_length // q_block), -(-kv_length // kv_block)
    first_row = jnp.arange(q_blocks, dtype=jnp.int32) * q_block
    last_row = jnp.minimum(first_row + q_block, q_length) - 1
    first = _positions(first_row, x, batch_axes)
    last = _positions(last_row, x, batch_axes)
    begin = jnp.zeros_like(first)  # columns [begin, end) may be visible
    end = jnp.full_like(first, kv_length)
    if spec.is_causal:
        causal_end = last + 1
        if x.prefix_lengths is not None:
            causal_end = jnp.maximum(causal_end, x.prefix_lengths[..., None])
        end = jnp.minimum(end, causal_end)
    left, right = spec.window
    if left is not None:
        begin = jnp.maximum(begin, jnp.maximum(first, 0) - left)
    if right is not None:
        end = jnp.minimum(end, jnp.minimum(last, kv_length - 1 - right) + right + 1)
    if spec.chunk_size is not None:
        size = spec.chunk_size
        origin = _key_origin(x)
        origin = origin if x.origin is None else origin[..., None]
        begin = jnp.maximum(begin, (first + origin) // size * size - origin)
        end = jnp.minimum(end, ((last + origin) // size + 1) * size - origin)
    if x.key_value_seq_lengths is not None:
        end = jnp.minimum(end, x.key_value_seq_lengths[..., None])
    if x.query_seq_lengths is not None:
        within = _lead(first_row, batch_axes) < x.query_seq_lengths[..., None]
        end = jnp.where(within, end, 0)
    empty = end <= begin
    begin_block = jnp.clip(begin // kv_block, 0, kv_blocks)
    end_block = jnp.clip(-(-end // kv_block), 0, kv_blocks)
    return jnp.where(empty, 0, begin_block), jnp.where(empty, 0, end_block)


def blocks_meet(query_ids: jax.Array, key_ids: jax.Array) -> jax.Array:
    """Whether two blocks' segment ids can be equal anywhere: a scalar, for int32 ids.

    Compares ranges, which is exact for packed (sorted) ids and a bound for others.
    """
    return (query_ids.min() <= key_ids.max()) & (key_ids.min() <= query_ids.max())
