"""FlashAttention-2 in JAX: Algorithms 1 and 2 of the paper (arXiv 2307.08691, section 3.1).

The implementation that runs everywhere. Names are the paper's: Q_i, K_j, V_j are blocks
of ``q_block`` queries and ``kv_block`` keys, S_ij the scores, m the running row maximum,
l the running row sum, L the logsumexp, D (here ``delta``) the row sum of dO * O.

An *entry* is one batch entry and one key head with the G query heads that share it
(grouped-query attention): Q is ``(G, l, d)``, K and V are ``(s, d)``. Entries run one
after the other on a CPU, where a block should stay in the cache, and together under vmap
elsewhere. Blocks that `_mask.key_blocks` excludes are not visited; memory is linear in
the lengths but for what a dense bias or mask brings along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash2 import _dropout, _mask
from jax_flash2._spec import AttentionSpec, Operands, accumulator

BLOCK = 256

# Axes of the operands of one entry; g, l and s of size 1 broadcast.
_ENTRY_AXES = Operands(
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
)


# ------------------------------------------------------------------ Algorithm 1: forward


def forward(
    spec: AttentionSpec, x: Operands, *, sequential: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, logsumexp and largest logits.

    Args:
      x: operands with exactly one batch axis, of size B or 1.
      sequential: entries one after the other, or together.

    Returns:
      ``(B, l, h, e)`` in query's dtype, ``(B, h, l)`` and ``(B, h)`` in the accumulator's.
    """
    sizes, entries = _prepare(spec, x)
    blocks = None if sequential else _shared_blocks(spec, sizes, entries)

    def entry(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x = Operands(**arrays)
        visited = blocks or _blocks(spec, sizes, x, 0)
        return _forward_entry(spec, sizes, x, *visited)

    result = _for_each_entry(entry, sizes, entries, sequential)
    batch, heads = sizes.batch, sizes.kv_heads * sizes.group
    out = result["out"].reshape(batch, heads, -1, x.value.shape[-1])
    out = jnp.swapaxes(out[:, :, : sizes.q_length], 1, 2)
    lse = result["lse"].reshape(batch, heads, -1)[:, :, : sizes.q_length]
    return out, lse, result["largest"].reshape(batch, heads)


def _forward_entry(
    spec: AttentionSpec, sizes: _Sizes, x: Operands, first: jax.Array, end: jax.Array
) -> dict[str, jax.Array]:
    dtype = accumulator(x.query.dtype)
    rows = (sizes.group, sizes.q_block)

    def query_block(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def key_block(j: jax.Array, state: Any) -> Any:
            o, m, l = state
            tile = _tile(sizes, x, i, j)
            s = _scores(spec, tile).s
            m_new = jnp.maximum(m, s.max(-1))
            # An empty row's maximum is -inf: subtract 0 there, so that exp gives 0.
            shift = jnp.where(m_new == -jnp.inf, 0, m_new)
            p = jnp.exp(s - shift[..., None])
            rescale = jnp.exp(m - shift)
            l = rescale * l + p.sum(-1)
            if spec.dropout_rate:
                p = jnp.where(_kept(spec, tile), p, 0)
            pv = _dot("gls,se->gle", p.astype(x.value.dtype), tile.x.value)
            return rescale[..., None] * o + pv, m_new, l

        o = jnp.zeros((*rows, x.value.shape[-1]), dtype)
        m, l = jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype)
        step = _skipping(sizes, x, lambda j: (i, j), key_block)
        o, m, l = lax.fori_loop(first[i], end[i], step, (o, m, l))

        # Only now is the output scaled. A sink joins the denominator.
        largest = m
        if x.sinks is not None:
            sink = x.sinks.astype(dtype)[:, None]
            m = jnp.maximum(m, sink)
        shift = jnp.where(m == -jnp.inf, 0, m)
        rescale = jnp.exp(largest - shift)
        o, l = rescale[..., None] * o, rescale * l
        if x.sinks is not None:
            l = l + jnp.exp(sink - shift)
        divisor = jnp.where(l == 0, 1, l)
        lse = jnp.where(l == 0, -jnp.inf, shift + jnp.log(divisor))
        out = o / (divisor * jnp.asarray(1 - spec.dropout_rate, dtype))[..., None]
        return out.astype(x.query.dtype), lse, largest

    out, lse, largest = lax.map(
        query_block, jnp.arange(sizes.q_blocks, dtype=jnp.int32)
    )
    return {
        "out": _join_blocks(out, 1),
        "lse": _join_blocks(lse, 1),
        "largest": largest.max((0, 2)),
    }


# ----------------------------------------------------------------- Algorithm 2: backward


def backward(
    spec: AttentionSpec,
    x: Operands,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    wrt: tuple[str, ...],
    *,
    sequential: bool,
) -> dict[str, jax.Array]:
    """Gradients of query, key, value and of the operands in ``wrt``.

    Args:
      x: operands with exactly one batch axis, of size B or 1.
      dout: ``(B, l, h, e)``, zero past the query's length.
      lse: ``(B, h, l)``, from the forward.
      delta: ``(B, h, l)``, row sums of dO * O less the logsumexp's cotangent.
      wrt: which of scale, bias and alibi_slopes.

    Returns:
      By operand name: gradients of query, key and value with B batch entries, of the
      others in their operand's shape; each in its operand's dtype.
    """
    sizes, entries = _prepare(spec, x)
    blocks = None if sequential else _shared_blocks(spec, sizes, entries)
    # Rows that see nothing, and padding, get P = exp(S - inf) = 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    rows = {
        "dout": _pad(_split_heads(jnp.swapaxes(dout, 1, 2), sizes), 3, sizes.q_block),
        "lse": _pad(_split_heads(lse, sizes), 3, sizes.q_block, jnp.inf),
        "delta": _pad(_split_heads(delta, sizes), 3, sizes.q_block),
    }

    def entry(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rows = {name: arrays.pop(name) for name in ("dout", "lse", "delta")}
        x = Operands(**arrays)
        visited = blocks or _blocks(spec, sizes, x, 0)
        return _backward_entry(spec, sizes, x, *visited, **rows, wrt=wrt)

    grads = _for_each_entry(entry, sizes, entries | rows, sequential, wrt)
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


def _backward_entry(
    spec: AttentionSpec,
    sizes: _Sizes,
    x: Operands,
    first: jax.Array,
    end: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    wrt: tuple[str, ...],
) -> dict[str, jax.Array]:
    dtype = accumulator(x.query.dtype)
    q_block = sizes.q_block
    survivors = 1 / jnp.asarray(1 - spec.dropout_rate, dtype)

    def key_block(state: Any, j: jax.Array) -> Any:
        def query_block(i: jax.Array, state: Any) -> Any:
            dk, dv, grads = state
            tile = _tile(sizes, x, i, j)
            do_i = _block(dout, 1, i, q_block)
            lse_i = _block(lse, 1, i, q_block)[..., None]
            delta_i = _block(delta, 1, i, q_block)[..., None]
            s, product, capped = _scores(spec, tile)
            p = jnp.exp(s - lse_i)
            dp = _dot("gle,se->gls", do_i, tile.x.value)
            p_kept = p
            if spec.dropout_rate:
                kept = _kept(spec, tile)
                p_kept = jnp.where(kept, p * survivors, 0)
                dp = jnp.where(kept, dp * survivors, 0)
            dv = dv + _dot("gls,gle->se", p_kept.astype(dout.dtype), do_i)
            ds = p * (dp - delta_i)
            grads = dict(grads)
            if "bias" in wrt:
                g = _sum_to(ds, tile.x.bias.shape)
                grads["bias"] = _add_tile(grads["bias"], g, sizes, i, j)
            if "alibi_slopes" in wrt:
                g = -(ds * tile.distance.astype(dtype)).sum((1, 2))
                grads["alibi_slopes"] += _sum_to(g, x.alibi_slopes.shape)
            if spec.soft_cap is not None:
                ds = ds * (1 - (capped / spec.soft_cap) ** 2)
            if "scale" in wrt:
                # Masked elements have ds = 0, but their product may be anything.
                grads["scale"] += jnp.where(ds == 0, 0, ds * product).sum()
            ds = (ds * _scale(spec, x, dtype)).astype(x.query.dtype)
            dk = dk + _dot("gls,gld->sd", ds, tile.x.query)
            dq_i = _dot("gls,sd->gld", ds, tile.x.key)
            dq = grads["query"]
            dq_i = dq_i + _block(dq, 1, i, q_block)
            grads["query"] = lax.dynamic_update_slice_in_dim(dq, dq_i, i * q_block, 1)
            return dk, dv, grads

        # The query blocks that see this key block: a range, as the ranges they see are
        # monotonic; with per-entry facts that are not, a range around them.
        sees = (first <= j) & (j < end)
        begin = lax.argmax(sees, 0, jnp.int32)
        stop = sizes.q_blocks - lax.argmax(sees[::-1], 0, jnp.int32)
        stop = jnp.where(sees.any(), stop, 0)
        dk = jnp.zeros((sizes.kv_block, x.key.shape[-1]), dtype)
        dv = jnp.zeros((sizes.kv_block, x.value.shape[-1]), dtype)
        step = _skipping(sizes, x, lambda i: (i, j), query_block)
        dk, dv, state = lax.fori_loop(begin, stop, step, (dk, dv, state))
        return state, (dk.astype(x.key.dtype), dv.astype(x.value.dtype))

    state = {name: jnp.zeros(getattr(x, name).shape, dtype) for name in ("query", *wrt)}
    grads, (dk, dv) = lax.scan(
        key_block, state, jnp.arange(sizes.kv_blocks, dtype=jnp.int32)
    )
    grads["query"] = grads["query"].astype(x.query.dtype)
    return grads | {"key": _join_blocks(dk, 0), "value": _join_blocks(dv, 0)}


# --------------------------------------------------------------------------- one block


class _Tile(NamedTuple):
    x: Operands  # the operands' part of one block of queries and one of keys
    row: jax.Array  # (q_block,) indices in the whole arrays
    column: jax.Array  # (kv_block,)

    @property
    def distance(self) -> jax.Array:
        return _mask.distance(self.row, self.column, self.x, 0)[None]


class _Scores(NamedTuple):
    s: jax.Array  # (g, q_block, kv_block), -inf where masked
    product: jax.Array  # q.k, before the scale
    capped: jax.Array  # after the soft cap, before bias and masks


def _tile(sizes: _Sizes, x: Operands, i: jax.Array, j: jax.Array) -> _Tile:
    parts = {}
    for name, axes in _ENTRY_AXES._asdict().items():
        part = getattr(x, name)
        if part is None:
            continue
        for letter, index, size in (("l", i, sizes.q_block), ("s", j, sizes.kv_block)):
            axis = axes.find(letter)
            if axis >= 0 and part.shape[axis] != 1:
                part = _block(part, axis, index, size)
        parts[name] = part
    row = i * sizes.q_block + jnp.arange(sizes.q_block, dtype=jnp.int32)
    column = j * sizes.kv_block + jnp.arange(sizes.kv_block, dtype=jnp.int32)
    x = Operands(**parts)
    # What stands past a length may be anything: replace it before it is multiplied.
    if x.query_seq_lengths is not None:
        within = (row < x.query_seq_lengths)[None, :, None]
        x = x._replace(query=jnp.where(within, x.query, 0))
    if x.key_value_seq_lengths is not None:
        within = (column < x.key_value_seq_lengths)[:, None]
        key, value = jnp.where(within, x.key, 0), jnp.where(within, x.value, 0)
        x = x._replace(key=key, value=value)
    return _Tile(x, row, column)


def _scores(spec: AttentionSpec, tile: _Tile) -> _Scores:
    """S_ij, in the order of the call: scale, soft cap, bias, ALiBi, visibility."""
    x = tile.x
    product = _dot("gld,sd->gls", x.query, x.key)
    dtype = product.dtype
    s = product * _scale(spec, x, dtype)
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
    return _Scores(s, product, capped)


def _scale(spec: AttentionSpec, x: Operands, dtype: Any) -> jax.Array:
    return jnp.asarray(spec.scale, dtype) if x.scale is None else x.scale.astype(dtype)


def _kept(spec: AttentionSpec, tile: _Tile) -> jax.Array:
    stream, columns = tile.x.dropout_streams, tile.column.shape[0]
    return _dropout.keep(stream, tile.row, tile.column[0], columns, spec.dropout_rate)


def _dot(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A block product, accumulated in float32 at the highest precision."""
    return jnp.einsum(
        axes, a, b, precision="highest", preferred_element_type=accumulator(a.dtype)
    )


def _block(x: jax.Array, axis: int, index: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _add_tile(
    total: jax.Array, part: jax.Array, sizes: _Sizes, i: jax.Array, j: jax.Array
) -> jax.Array:
    """Adds a tile of ``(g, l, s)`` to the array it is a part of; size 1 broadcasts."""
    zero = jnp.zeros((), i.dtype)
    row = zero if total.shape[1] == 1 else i * sizes.q_block
    column = zero if total.shape[2] == 1 else j * sizes.kv_block
    start = (zero, row, column)
    part = part + lax.dynamic_slice(total, start, part.shape)
    return lax.dynamic_update_slice(total, part, start)


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of broadcasting ``shape`` to x's."""
    axes = [a for a, n in enumerate(shape) if n == 1 and x.shape[a] != 1]
    return x.sum(axes, keepdims=True) if axes else x


# --------------------------------------------------------------- entries, ranges, layout


class _Sizes(NamedTuple):
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


def _prepare(spec: AttentionSpec, x: Operands) -> tuple[_Sizes, dict[str, jax.Array]]:
    """Sizes, and the operands as ``(B or 1, kv heads or 1, axes of an entry...)``.

    Lengths are padded to whole blocks; padded keys lie past ``key_value_seq_lengths``.
    """
    batch, q_length, heads, _ = x.query.shape
    kv_length, kv_heads = x.key.shape[1:3]
    kv_block = min(BLOCK, kv_length)
    if spec.dropout_rate:  # a block starts at a whole group of columns
        kv_block = -(-kv_block // _dropout.GROUP) * _dropout.GROUP
    group, q_block = heads // kv_heads, min(BLOCK, q_length)
    batch = max(a.shape[0] for a in x if a is not None)
    sizes = _Sizes(batch, kv_heads, group, q_length, kv_length, q_block, kv_block)

    if kv_length % kv_block:
        lengths = x.key_value_seq_lengths
        if lengths is None:
            lengths = jnp.full((1,), kv_length, jnp.int32)
        lengths = jnp.minimum(lengths, kv_length)
        x = x._replace(key_value_seq_lengths=lengths)
    entries = {}
    for name, axes in _ENTRY_AXES._asdict().items():
        array = getattr(x, name)
        if array is None:
            continue
        if name in ("query", "key", "value"):
            array = jnp.swapaxes(array, 1, 2)  # heads before length
        if "g" in axes:
            array = _split_heads(array, sizes)
        elif name not in ("key", "value"):
            array = array[:, None]
        for letter, size in (("l", q_block), ("s", kv_block)):
            axis = axes.find(letter) + 2
            if letter in axes and (array.shape[axis] != 1 or axes[-1] in "de"):
                mode = None if axes == "l" or axes == "s" else 0
                array = _pad(array, axis, size, mode)
        entries[name] = array
    return sizes, entries


def _split_heads(x: jax.Array, sizes: _Sizes) -> jax.Array:
    """``(B, h or 1, ...)`` to ``(B, n or 1, g or 1, ...)``."""
    heads = (1, 1) if x.shape[1] == 1 else (sizes.kv_heads, sizes.group)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _pad(x: jax.Array, axis: int, block: int, value: Any = 0) -> jax.Array:
    """Pads an axis to whole blocks, with ``value`` or, if None, with the last element."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    if not widths[axis][1]:
        return x
    if value is None:
        return jnp.pad(x, widths, mode="edge")
    return jnp.pad(x, widths, constant_values=value)


def _join_blocks(x: jax.Array, axis: int) -> jax.Array:
    """``(blocks, ..., block, ...)`` to ``(..., blocks * block, ...)``."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _blocks(
    spec: AttentionSpec, sizes: _Sizes, x: Operands, batch_axes: int
) -> tuple[jax.Array, jax.Array]:
    lengths, blocks = sizes[3:5], sizes[5:7]
    return _mask.key_blocks(spec, x, batch_axes, lengths, blocks)


def _shared_blocks(
    spec: AttentionSpec, sizes: _Sizes, entries: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The key blocks that any entry's query block sees: one loop serves all entries."""
    facts = {n: entries[n][:, 0] for n in entries if _ENTRY_AXES._asdict()[n] == ""}
    first, end = _blocks(spec, sizes, Operands(**facts), 1)
    first = jnp.where(first < end, first, sizes.kv_blocks).min(0)
    end = end.max(0)
    return jnp.minimum(first, end), end


def _skipping(
    sizes: _Sizes,
    x: Operands,
    block: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    step: Callable[[jax.Array, Any], Any],
) -> Callable[[jax.Array, Any], Any]:
    """``step``, but for blocks whose segment ids cannot meet, which change nothing."""
    if x.query_segment_ids is None:
        return step

    def visit(index: jax.Array, state: Any) -> Any:
        i, j = block(index)
        query_ids, key_ids = x.query_segment_ids, x.key_value_segment_ids
        if query_ids.shape[0] != 1:
            query_ids = _block(query_ids, 0, i, sizes.q_block)
        if key_ids.shape[0] != 1:
            key_ids = _block(key_ids, 0, j, sizes.kv_block)
        meet = _mask.blocks_meet(query_ids, key_ids)
        return lax.cond(meet, lambda s: step(index, s), lambda s: s, state)

    return visit


def _for_each_entry(
    entry: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    sizes: _Sizes,
    arrays: dict[str, jax.Array],
    sequential: bool,
    wrt: tuple[str, ...] = (),
) -> dict[str, jax.Array]:
    """Runs every entry; results get the leading axes ``(B, kv heads)``.

    Results named in ``wrt`` keep the leading axes of the operand of that name: entries
    that share the operand are summed as they come, never stacked.
    """

    def each(f: Any, arrays: dict[str, jax.Array], size: int, summed: set[str]) -> Any:
        shared = {name: a[0] for name, a in arrays.items() if a.shape[0] != size}
        mapped = {name: a for name, a in arrays.items() if a.shape[0] == size}
        if not sequential and not summed:
            return jax.vmap(lambda m: f(shared | m))(mapped)

        def step(sums: dict[str, jax.Array], m: dict[str, jax.Array]) -> Any:
            result = f(shared | m)
            sums = {name: total + result.pop(name) for name, total in sums.items()}
            return sums, result

        shapes = jax.eval_shape(
            lambda m: f(shared | m), {n: a[0] for n, a in mapped.items()}
        )
        zeros = {
            name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in summed
        }
        sums, stacked = lax.scan(step, zeros, mapped, length=size)
        return stacked | {name: total[None] for name, total in sums.items()}

    def summed(axis: int, size: int) -> set[str]:
        return {name for name in wrt if arrays[name].shape[axis] != size}

    over_heads = summed(1, sizes.kv_heads)
    over_batch = summed(0, sizes.batch)

    def batch_entry(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return each(entry, arrays, sizes.kv_heads, over_heads)

    return each(batch_entry, arrays, sizes.batch, over_batch)
