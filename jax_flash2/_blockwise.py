"""FlashAttention-2 in JAX: Algorithms 1 and 2 of the paper (arXiv 2307.08691, section 3.1).

The implementation that runs everywhere. Names are the paper's: Q_i, K_j, V_j are blocks
of ``q_block`` queries and ``kv_block`` keys, S_ij the scores, m the running row maximum,
l the running row sum, L the logsumexp, D (here ``delta``) the row sum of dO * O.

Entries (see `_entries`) are one batch entry and one key head with its query heads: Q is
``(G, l, d)``, K and V are ``(s, d)``. Memory is linear in the lengths but for what a
dense bias or mask brings along.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash2 import _entries, _loops
from jax_flash2._entries import Sizes, block
from jax_flash2._loops import Rows, join_blocks, skipping
from jax_flash2._spec import AttentionSpec, Operands, accumulator
from jax_flash2._tiles import add_tile, dot, kept, scale, scores, slope, sum_to, tile

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
    sizes, entries = _entries.prepare(spec, x, by_rows=True)

    def entry(x: Operands, _: Rows, first: jax.Array, end: jax.Array) -> Any:
        return _forward_entry(spec, sizes, x, first, end)

    result = _loops.run(spec, sizes, entries, entry, sequential=sequential)
    out = jnp.swapaxes(_entries.rows(sizes, result["out"]), 1, 2)
    lse = _entries.rows(sizes, result["lse"])
    return out, lse, result["largest"].reshape(sizes.batch, -1)


def _forward_entry(
    spec: AttentionSpec, sizes: Sizes, x: Operands, first: jax.Array, end: jax.Array
) -> dict[str, jax.Array]:
    dtype = accumulator(x.query.dtype)
    rows = (sizes.group, sizes.q_block)

    def query_block(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def key_block(j: jax.Array, state: Any) -> Any:
            o, m, l = state
            here = tile(sizes, x, i, j)
            s = scores(spec, here).s
            m_new = jnp.maximum(m, s.max(-1))
            # An empty row's maximum is -inf: subtract 0 there, so that exp gives 0.
            shift = jnp.where(m_new == -jnp.inf, 0, m_new)
            p = jnp.exp(s - shift[..., None])
            rescale = jnp.exp(m - shift)
            l = rescale * l + p.sum(-1)
            if spec.dropout_rate:
                p = jnp.where(kept(spec, here), p, 0)
            pv = dot("gls,se->gle", p.astype(x.value.dtype), here.x.value)
            return rescale[..., None] * o + pv, m_new, l

        o = jnp.zeros((*rows, x.value.shape[-1]), dtype)
        m, l = jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype)
        step = skipping(sizes, x, lambda j: (i, j), key_block)
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

    out, lse, largest = _loops.map_blocks(query_block, sizes.q_blocks)
    return {
        "out": join_blocks(out, 1),
        "lse": join_blocks(lse, 1),
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
    rows = {"dout": dout, "lse": lse, "delta": delta}
    sizes, entries = _entries.prepare(spec, x, rows)

    def entry(x: Operands, rows: Rows, first: jax.Array, end: jax.Array) -> Any:
        return _backward_entry(spec, sizes, x, rows, first, end, wrt)

    grads = _loops.run(spec, sizes, entries, entry, sequential=sequential, wrt=wrt)
    return _entries.gradients(sizes, x, grads, wrt)


def _backward_entry(
    spec: AttentionSpec,
    sizes: Sizes,
    x: Operands,
    rows: Rows,
    first: jax.Array,
    end: jax.Array,
    wrt: tuple[str, ...],
) -> dict[str, jax.Array]:
    dtype = accumulator(x.query.dtype)
    q_block = sizes.q_block
    survivors = 1 / jnp.asarray(1 - spec.dropout_rate, dtype)

    def key_block(state: Any, j: jax.Array) -> Any:
        def query_block(i: jax.Array, state: Any) -> Any:
            dk, dv, grads = state
            here = tile(sizes, x, i, j)
            do_i = block(rows["dout"], 1, i, q_block)
            lse_i = block(rows["lse"], 1, i, q_block)[..., None]
            delta_i = block(rows["delta"], 1, i, q_block)[..., None]
            at = scores(spec, here)
            p = jnp.exp(at.s - lse_i)
            dp = dot("gle,se->gls", do_i, here.x.value)
            p_kept = p
            if spec.dropout_rate:
                keep = kept(spec, here)
                p_kept = jnp.where(keep, p * survivors, 0)
                dp = jnp.where(keep, dp * survivors, 0)
            dv = dv + dot("gle,gls->es", do_i, p_kept.astype(do_i.dtype))
            ds = p * (dp - delta_i)
            grads = dict(grads)
            if "bias" in wrt:
                g = sum_to(ds, here.x.bias.shape)
                grads["bias"] = add_tile(grads["bias"], g, sizes, i, j)
            if "alibi_slopes" in wrt:
                g = -(ds * here.distance.astype(dtype)).sum((1, 2))
                grads["alibi_slopes"] += sum_to(g, x.alibi_slopes.shape)
            if spec.soft_cap is not None:
                ds = ds * slope(spec, at)
            if "scale" in wrt:
                # Masked elements have ds = 0, but their product may be anything.
                grads["scale"] += jnp.where(ds == 0, 0, ds * at.product).sum()
            ds = (ds * scale(spec, x, dtype)).astype(x.query.dtype)
            dk = dk + dot("gld,gls->ds", here.x.query, ds)
            dq_i = dot("gls,sd->gld", ds, here.x.key)
            dq = grads["query"]
            dq_i = dq_i + block(dq, 1, i, q_block)
            grads["query"] = lax.dynamic_update_slice_in_dim(dq, dq_i, i * q_block, 1)
            return dk, dv, grads

        begin, stop = _loops.seeing(sizes, first, end, j)
        # Transposed, because XLA's CPU products are twice as fast that way round.
        dk = jnp.zeros((x.key.shape[-1], sizes.kv_block), dtype)
        dv = jnp.zeros((x.value.shape[-1], sizes.kv_block), dtype)
        step = skipping(sizes, x, lambda i: (i, j), query_block)
        dk, dv, state = lax.fori_loop(begin, stop, step, (dk, dv, state))
        return state, (dk.T.astype(x.key.dtype), dv.T.astype(x.value.dtype))

    state = {name: jnp.zeros(getattr(x, name).shape, dtype) for name in ("query", *wrt)}
    grads, (dk, dv) = _loops.scan_blocks(key_block, state, sizes.kv_blocks)
    grads["query"] = grads["query"].astype(x.query.dtype)
    return grads | {"key": join_blocks(dk, 0), "value": join_blocks(dv, 0)}
