"""Entries: how a call is cut into the pieces that the blockwise code runs one by one.

An *entry* is one batch entry and one key head with the G query heads that share it
(grouped-query attention): Q is ``(G, l, d)``, K and V are ``(s, d)``. `_loops` runs them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash2 import _dropout
from jax_flash2._spec import AttentionSpec, Operands, base_name, joint

BLOCK = 256
# Blocks of a pass over query blocks: wide ones rescale the output half as often, narrow
# ones reach less far beyond the band where only a band of keys is visible.
WIDE_BLOCK, NARROW_BLOCK = 512, 128

# Axes of one entry's operands; g, l and s of size 1 broadcast.
ENTRY_AXES = Operands(
    query="gld",
    key="sd",
    value="se",
    scale="",
    bias="gls",
    mask="gls",
    query_seq_lengths="",
    key_value_seq_lengths="",
    query_offset="",
    prefix_lengths="",
    query_segment_ids="l",
    key_value_segment_ids="s",
    alibi_slopes="g",
    sinks="g",
    dropout_streams="gr",
    origin="r",
)._asdict()
# And of arrays with one element or vector for each query row.
_ROW_AXES = {"out": "gle", "dout": "gle", "lse": "gl", "dlse": "gl", "delta": "gl"}


class Sizes(NamedTuple):
    batch: int
    kv_heads: int
    group: int
    q_length: int
    kv_length: int
    q_block: int
    kv_block: int

    @property
    def q_blocks(self) -> int:
        return -(-self.q_length // self.q_block)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_length // self.kv_block)


def _is_narrow(spec: AttentionSpec) -> bool:
    left, right = spec.window
    if right is None and spec.is_causal:
        right = 0
    band = None if left is None or right is None else left + right
    sizes = [n for n in (band, spec.chunk_size) if n is not None]
    return min(sizes, default=4 * WIDE_BLOCK) < 4 * WIDE_BLOCK


def _shorter(block: int, length: Any) -> int:
    """A block no longer than the length, where that is a number and not a symbol."""
    return min(block, length) if isinstance(length, int) else block


def prepare(
    spec: AttentionSpec,
    x: Operands,
    rows: dict[str, jax.Array] | None = None,
    *,
    by_rows: bool = False,
) -> tuple[Sizes, dict[str, jax.Array]]:
    """Sizes, and all arrays by name as ``(B or 1, kv heads or 1, axes of an entry...)``.

    Lengths are padded to whole blocks; padded keys lie past ``key_value_seq_lengths``.

    Args:
      x: operands with exactly one batch axis, of size B or 1.
      rows: other arrays with that axis, named after an operand, a result or a result's
        cotangent, or a tangent of one (`_spec.base_name`). An ``lse`` is made infinite
        where its row sees nothing or is past its length, so that P = exp(S - lse) is 0.
      by_rows: whether the pass goes over query blocks, and may choose its blocks.
    """
    rows = dict(rows or {})
    _, q_length, heads, _ = x.query.shape
    kv_length, kv_heads = x.key.shape[1:3]
    size = (NARROW_BLOCK if _is_narrow(spec) else WIDE_BLOCK) if by_rows else BLOCK
    kv_block = _shorter(size, kv_length)
    if spec.dropout_rate:  # a block starts at a whole group of columns
        kv_block = -(-kv_block // _dropout.GROUP) * _dropout.GROUP
    group, q_block = heads // kv_heads, _shorter(size, q_length)
    named = {name: a for name, a in x._asdict().items() if a is not None}
    batch = joint(a.shape[0] for a in (*named.values(), *rows.values()))
    sizes = Sizes(batch, kv_heads, group, q_length, kv_length, q_block, kv_block)

    if kv_length % kv_block != 0:
        lengths = x.key_value_seq_lengths
        if lengths is None:
            lengths = jnp.full((1,), kv_length, jnp.int32)
        named["key_value_seq_lengths"] = jnp.minimum(lengths, kv_length)
    if "lse" in rows:
        lse = rows["lse"]
        blind = lse == -jnp.inf
        if x.query_seq_lengths is not None:
            row = jnp.arange(q_length, dtype=jnp.int32)[None, None]
            blind |= row >= x.query_seq_lengths[:, None, None]
        rows["lse"] = jnp.where(blind, jnp.inf, lse)
    return sizes, {n: _lay_out(sizes, n, a) for n, a in (named | rows).items()}


def _lay_out(sizes: Sizes, name: str, array: jax.Array) -> jax.Array:
    base = base_name(name)
    axes = _ROW_AXES[base] if base in _ROW_AXES else ENTRY_AXES[base]
    if base in ("query", "key", "value", "out", "dout"):
        array = jnp.swapaxes(array, 1, 2)  # heads before length
    if "g" in axes:
        array = _split_heads(array, sizes)
    elif base not in ("key", "value"):
        array = array[:, None]
    for letter, size in (("l", sizes.q_block), ("s", sizes.kv_block)):
        axis = axes.find(letter) + 2
        whole = axes[-1:] in ("d", "e") or base in _ROW_AXES
        if letter in axes and (array.shape[axis] != 1 or whole):
            # Padded rows have L = inf, so P = 0; padded segment ids are the last one.
            value = jnp.inf if name == "lse" else None if axes in ("l", "s") else 0
            array = _pad(array, axis, size, value)
    return array


def gradients(
    sizes: Sizes, x: Operands, grads: dict[str, jax.Array], wrt: tuple[str, ...]
) -> dict[str, jax.Array]:
    """From entries to the layout of operands: of query, key and value with B batch
    entries, of those in ``wrt`` in their operand's shape; each in its operand's dtype."""
    grads = dict(grads)
    for name, length in (
        ("query", sizes.q_length),
        ("key", sizes.kv_length),
        ("value", sizes.kv_length),
    ):
        g = grads[name].reshape(sizes.batch, -1, *grads[name].shape[-2:])
        grads[name] = jnp.swapaxes(g[:, :, :length], 1, 2)
    if "bias" in wrt:
        g = grads["bias"].reshape(*x.bias.shape[:2], *grads["bias"].shape[-2:])
        grads["bias"] = g[:, :, : sizes.q_length, : sizes.kv_length]
    for name in wrt:
        like = getattr(x, name)
        grads[name] = grads[name].reshape(like.shape).astype(like.dtype)
    return grads


def rows(sizes: Sizes, x: jax.Array) -> jax.Array:
    """Results of entries, ``(B, n, g, l, ...)``, as ``(B, h, l, ...)`` without padding."""
    x = x.reshape(sizes.batch, sizes.kv_heads * sizes.group, *x.shape[3:])
    return x[:, :, : sizes.q_length]


def block(x: jax.Array, axis: int, index: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _split_heads(x: jax.Array, sizes: Sizes) -> jax.Array:
    """``(B, h or 1, ...)`` to ``(B, n or 1, g or 1, ...)``."""
    heads = (1, 1) if x.shape[1] == 1 else (sizes.kv_heads, sizes.group)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _pad(x: jax.Array, axis: int, block: int, value: Any = 0) -> jax.Array:
    """Pads an axis to whole blocks, with ``value`` or, if None, with the last element."""
    widths = [(0, 0)] * x.ndim
    n = x.shape[axis]
    widths[axis] = (0, -(-n // block) * block - n)  # so that a symbolic sum has a bound
    if widths[axis][1] == 0:
        return x
    if value is None:
        return jnp.pad(x, widths, mode="edge")
    return jnp.pad(x, widths, constant_values=value)
