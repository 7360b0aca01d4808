"""Which entries and blocks the blockwise code visits, and in which order.

Entries run one after the other on a CPU, where a block should stay in the cache, and
together under vmap elsewhere. Blocks that `_mask.key_blocks` excludes are not visited.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash2 import _mask
from jax_flash2._entries import ENTRY_AXES, Sizes, block
from jax_flash2._spec import AttentionSpec, Operands

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

        def step(sums: dict[str, jax.Array], m: dict[str, jax.Array]) -> Any:
            result = f(shared | m)
            sums = {name: total + result.pop(name) for name, total in sums.items()}
            return sums, result

        zeros = {}
        if summed:
            first = {name: a[0] for name, a in mapped.items()}
            shapes = jax.eval_shape(lambda m: f(shared | m), first)
            for name in summed:
                zeros[name] = jnp.zeros(shapes[name].shape, shapes[name].dtype)
        sums, stacked = scan(step, zeros, mapped, size)
        return stacked | {name: total[None] for name, total in sums.items()}

    def summed(axis: int, size: int) -> set[str]:
        return {name for name in wrt if arrays[name].shape[axis] != size}

    over_heads = summed(1, sizes.kv_heads)
    over_batch = summed(0, sizes.batch)

    def batch_entry(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return each(entry, arrays, sizes.kv_heads, over_heads)

    return each(batch_entry, arrays, sizes.batch, over_batch)


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


def scan(
    step: Callable[[Any, Any], Any], state: Any, each: Any, length: Any
) -> tuple[Any, Any]:
    """`lax.scan`, whose length may be a symbol of `jax.export`, for which JAX has none."""
    if isinstance(length, int):
        return lax.scan(step, state, each, length=length)

    def one(arrays: Any, i: jax.Array) -> Any:
        return jax.tree.map(lambda a: a[i], arrays)

    first = jnp.zeros((), jnp.int32)
    _, shapes = jax.eval_shape(lambda state, i: step(state, one(each, i)), state, first)
    stacked = jax.tree.map(lambda y: jnp.zeros((length, *y.shape), y.dtype), shapes)

    def body(i: jax.Array, carry: Any) -> Any:
        state, stacked = carry
        state, result = step(state, one(each, i))
        return state, jax.tree.map(lambda all_, y: all_.at[i].set(y), stacked, result)

    end = lax.convert_element_type(length, jnp.int32)
    return lax.fori_loop(first, end, body, (state, stacked))


def scan_blocks(
    step: Callable[[Any, jax.Array], Any], state: Any, count: Any
) -> tuple[Any, Any]:
    """`scan` over the indices of ``count`` blocks."""
    return scan(step, state, jnp.arange(count, dtype=jnp.int32), count)


def map_blocks(f: Callable[[jax.Array], Any], count: Any) -> Any:
    """The results of ``f`` for the index of each of ``count`` blocks, stacked."""
    return scan_blocks(lambda state, i: (state, f(i)), (), count)[1]


def join_blocks(x: jax.Array, axis: int) -> jax.Array:
    """``(blocks, ..., block, ...)`` to ``(..., blocks * block, ...)``."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
