"""Entries: how a call is cut into the pieces that the blockwise code runs one by one.

An *entry* is one batch entry and one key head with the G query heads that share it
(grouped-query attention): Q is ``(G, l, d)``, K and V are ``(s, d)``. Entries run one
after the other on a CPU, where a block should stay in the cache, and together under vmap
elsewhere. Blocks that `_mask.key_blocks` excludes are not visited.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash2 import _dropout, _mask
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


def join_blocks(x: jax.Array, axis: int) -> jax.Array:
    """``(blocks, ..., block, ...)`` to ``(..., blocks * block, ...)``."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _blocks(
    spec: AttentionSpec, sizes: Sizes, x: Operands, batch_axes: int
) -> tuple[jax.Array, jax.Array]:
    lengths, blocks = sizes[3:5], sizes[5:7]
    return _mask.key_blocks(spec, x, batch_axes, lengths, blocks)


def _shared_blocks(
    spec: AttentionSpec, sizes: Sizes, entries: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The key blocks that any entry's query block sees: one loop serves all entries."""
    facts = {n: a[:, 0] for n, a in entries.items() if ENTRY_AXES.get(n) in ("", "r")}
    first, end = _blocks(spec, sizes, Operands(**facts), 1)
    first = jnp.where(first < end, first, sizes.kv_blocks).min(0)
    end = end.max(0)
    return jnp.minimum(first, end), end


def skipping(
    sizes: Sizes,
    x: Operands,
    blocks: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    step: Callable[[jax.Array, Any], Any],
) -> Callable[[jax.Array, Any], Any]:
    """``step``, but for blocks whose segment ids cannot meet, which change nothing."""
    if x.query_segment_ids is None:
        return step

    def visit(index: jax.Array, state: Any) -> Any:
        i, j = blocks(index)
        query_ids, key_ids = x.query_segment_ids, x.key_value_segment_ids
        if query_ids.shape[0] != 1:
            query_ids = block(query_ids, 0, i, sizes.q_block)
        if key_ids.shape[0] != 1:
            key_ids = block(key_ids, 0, j, sizes.kv_block)
        meet = _mask.blocks_meet(query_ids, key_ids)
        return lax.cond(meet, lambda s: step(index, s), lambda s: s, state)

    return visit


def seeing(
    sizes: Sizes, first: jax.Array, end: jax.Array, j: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """First and one past the last query block that sees key block ``j``.

    A range, as the ranges that query blocks see are monotonic; with per-entry facts that
    are not, a range around them.
    """
    sees = (first <= j) & (j < end)
    begin = lax.argmax(sees, 0, jnp.int32)
    stop = sizes.q_blocks - lax.argmax(sees[::-1], 0, jnp.int32)
    return begin, jnp.where(sees.any(), stop, 0)


def scan(step: Callable[[Any, jax.Array], Any], state: Any, count: Any) -> Any:
    """`lax.scan` over the indices below ``count``.

    Which may be a symbol of `jax.export`: `lax.scan` knows only numbers.
    """
    if isinstance(count, int):
        return lax.scan(step, state, jnp.arange(count, dtype=jnp.int32))
    index = jnp.zeros((), jnp.int32)
    _, shapes = jax.eval_shape(step, state, index)
    stacked = jax.tree.map(lambda y: jnp.zeros((count, *y.shape), y.dtype), shapes)

    def body(i: jax.Array, carry: Any) -> Any:
        state, stacked = carry
        state, result = step(state, i)
        stacked = jax.tree.map(
            lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, i, 0),
            stacked,
            result,
        )
        return state, stacked

    end = lax.convert_element_type(count, jnp.int32)
    return lax.fori_loop(index, end, body, (state, stacked))


def stack(f: Callable[[jax.Array], Any], count: Any) -> Any:
    """The results of ``f`` for each index below ``count``, one after the other."""
    return scan(lambda state, i: (state, f(i)), (), count)[1]


Rows = dict[str, jax.Array]


def run(
    spec: AttentionSpec,
    sizes: Sizes,
    entries: dict[str, jax.Array],
    entry: Callable[[Operands, Rows, jax.Array, jax.Array], dict[str, jax.Array]],
    *,
    sequential: bool,
    wrt: tuple[str, ...] = (),
) -> dict[str, jax.Array]:
    """Runs ``entry`` on every entry; results get the leading axes ``(B, kv heads)``.

    Args:
      entry: takes an entry's operands, its other arrays by name, and the first and one
        past the last key block that each query block visits.
      sequential: entries one after the other, or together.
      wrt: results that keep the leading axes of the operand of that name: entries that
        share the operand are summed as they come, never stacked.
    """
    shared = None if sequential else _shared_blocks(spec, sizes, entries)

    def one(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x = Operands(**{n: a for n, a in arrays.items() if n in ENTRY_AXES})
        others = {n: a for n, a in arrays.items() if n not in ENTRY_AXES}
        first, end = shared or _blocks(spec, sizes, x, 0)
        return entry(x, others, first, end)

    return _for_each_entry(one, sizes, entries, sequential, wrt)


def _for_each_entry(
    entry: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    sizes: Sizes,
    arrays: dict[str, jax.Array],
    sequential: bool,
    wrt: tuple[str, ...] = (),
) -> dict[str, jax.Array]:
    def each(f: Any, arrays: dict[str, jax.Array], size: int, summed: set[str]) -> Any:
        shared = {name: a[0] for name, a in arrays.items() if a.shape[0] != size}
        mapped = {name: a for name, a in arrays.items() if a.shape[0] == size}
        if not sequential and not summed:
            return jax.vmap(lambda m: f(shared | m))(mapped)

        def step(sums: dict[str, jax.Array], i: jax.Array) -> Any:
            mine = {
                name: lax.dynamic_index_in_dim(a, i, keepdims=False)
                for name, a in mapped.items()
            }
            result = f(shared | mine)
            sums = {name: total + result.pop(name) for name, total in sums.items()}
            return sums, result

        shapes = jax.eval_shape(
            lambda m: f(shared | m), {n: a[0] for n, a in mapped.items()}
        )
        zeros = {
            name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in summed
        }
        sums, stacked = scan(step, zeros, size)
        return stacked | {name: total[None] for name, total in sums.items()}

    def summed(axis: int, size: int) -> set[str]:
        return {name for name in wrt if arrays[name].shape[axis] != size}

    over_heads = summed(1, sizes.kv_heads)
    over_batch = summed(0, sizes.batch)

    def batch_entry(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return each(entry, arrays, sizes.kv_heads, over_heads)

    return each(batch_entry, arrays, sizes.batch, over_batch)
