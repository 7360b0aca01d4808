"""Tangents of the forward, along one direction and along two, one block at a time.

For a query i, with scores s_j, logsumexp L, probabilities P_j = exp(s_j - L), dropout
factors m_j (0 or 1 / (1 - rate)) and output O = sum_j m_j P_j V_j, let a letter after a
name be its derivative along that direction (s_t, V_t, ...). All of s's other factors are
`_tiles`'. From sum_j P_j = 1 follow

  L_t  = sum_j P_j s_t                                   P_t = P (s_t - L_t)
  O_t  = sum_j m P (s_t V + V_t) - L_t O

in which only the sums need the blocks: with O and L known from the forward, one loop
over the key blocks does, without a running maximum. Along t and then u, with the
centred c_t = s_t - L_t and c_u = s_u - L_u,

  L_tu = sum_j P_j n                                     n = s_tu + c_t c_u
  O_tu = sum_j m P (n V + c_t V_u + c_u V_t) - L_tu O

since P_tu = P (n - L_tu). So the second loop needs L_t and L_u, and neither O_t nor O_u.

A sink is one more column, with a score of its own (whose derivative is the sink's) and
no value: it joins the sums for L_t and L_tu. A row that sees nothing has P = 0
throughout, hence derivatives of 0.
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
from jax_flash2._tiles import (
    Tile,
    direction,
    dot,
    scores,
    scores_along,
    scores_along_both,
    survivors,
    tile,
)


def tangent(
    spec: AttentionSpec, x: Operands, rows: Rows, *, sequential: bool
) -> list[jax.Array]:
    """Output's tangent ``(B, l, h, e)`` and logsumexp's ``(B, h, l)``.

    Args:
      x: operands with exactly one batch axis, of size B or 1.
      rows: ``out`` and ``lse`` from the forward; tangents ``t_query`` and so on of the
        operands that have one.
      sequential: entries one after the other, or together.
    """
    return _over_entries(spec, x, rows, _tangent_tile, sequential)


def tangent2(
    spec: AttentionSpec, x: Operands, rows: Rows, *, sequential: bool
) -> list[jax.Array]:
    """The tangent of `tangent`'s results along a second direction.

    Args:
      x: as in `tangent`.
      rows: as in `tangent`, with tangents ``u_query`` and so on, and the logsumexp's
        first ones, ``t_lse`` and ``u_lse``.
      sequential: as in `tangent`.
    """
    return _over_entries(spec, x, rows, _tangent2_tile, sequential)


def _over_entries(
    spec: AttentionSpec, x: Operands, rows: Rows, part: Any, sequential: bool
) -> list[jax.Array]:
    sizes, entries = _entries.prepare(spec, x, rows, by_rows=True)

    def entry(x: Operands, rows: Rows, first: jax.Array, end: jax.Array) -> Any:
        return _entry(spec, sizes, x, rows, first, end, part)

    results = _loops.run(spec, sizes, entries, entry, sequential=sequential)
    out, lse = (_entries.rows(sizes, results[name]) for name in ("out", "lse"))
    return [jnp.swapaxes(out, 1, 2), lse]


def _entry(
    spec: AttentionSpec,
    sizes: Sizes,
    x: Operands,
    rows: Rows,
    first: jax.Array,
    end: jax.Array,
    part: Any,
) -> dict[str, jax.Array]:
    """Sums ``part`` over the key blocks of each query block.

    Both tangents are sums over columns, one to which values contribute and one for the
    logsumexp, and the output's tangent is the first less the second times O.
    """
    dtype = accumulator(x.query.dtype)
    t, u = direction(x, rows, "t"), direction(x, rows, "u")

    def query_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine = {
            name: block(rows[name], 1, i, sizes.q_block)
            for name in ("lse", "t_lse", "u_lse")
            if name in rows
        }

        def key_block(j: jax.Array, state: Any) -> Any:
            values, logits = state
            here = tile(sizes, x, i, j)
            t_here, u_here = (tile(sizes, d, i, j).x for d in (t, u))
            value_part, logit_part = part(spec, here, t_here, u_here, mine)
            return values + value_part, logits + logit_part

        shape = (sizes.group, sizes.q_block)
        state = (jnp.zeros((*shape, x.value.shape[-1]), dtype), jnp.zeros(shape, dtype))
        step = skipping(sizes, x, lambda j: (i, j), key_block)
        values, logits = lax.fori_loop(first[i], end[i], step, state)
        if x.sinks is not None:
            logits = logits + _sink_part(x, t, u, mine)
        out = block(rows["out"], 1, i, sizes.q_block).astype(dtype)
        values = values - logits[..., None] * out
        return values.astype(x.query.dtype), logits

    out, lse = _loops.map_blocks(query_block, sizes.q_blocks)
    return {"out": join_blocks(out, 1), "lse": join_blocks(lse, 1)}


def _tangent_tile(
    spec: AttentionSpec, here: Tile, t: Operands, u: Operands, rows: Rows
) -> tuple[jax.Array, jax.Array]:
    """sum m P (s_t V + V_t) and sum P s_t over the columns of a tile."""
    del u
    at = scores(spec, here)
    s_t = scores_along(spec, here, at, t).s
    p = jnp.exp(at.s - rows["lse"][..., None])
    kept = survivors(spec, here, p)
    return _times_values([(kept * s_t, here.x.value), (kept, t.value)]), (p * s_t).sum(
        -1
    )


def _tangent2_tile(
    spec: AttentionSpec, here: Tile, t: Operands, u: Operands, rows: Rows
) -> tuple[jax.Array, jax.Array]:
    """sum m P (n V + c_t V_u + c_u V_t) and sum P n over the columns of a tile."""
    at = scores(spec, here)
    along_t, along_u, s_tu = scores_along_both(spec, here, at, t, u)
    c_t = along_t.s - rows["t_lse"][..., None]
    c_u = along_u.s - rows["u_lse"][..., None]
    p = jnp.exp(at.s - rows["lse"][..., None])
    n = s_tu + c_t * c_u
    kept = survivors(spec, here, p)
    pairs = [(kept * n, here.x.value), (kept * c_t, u.value), (kept * c_u, t.value)]
    return _times_values(pairs), (p * n).sum(-1)


def _times_values(pairs: list[tuple[jax.Array, jax.Array | None]]) -> jax.Array:
    """The sum of products of weights and values, the first of which is not None."""
    parts = [
        dot("gls,se->gle", weights.astype(value.dtype), value)
        for weights, value in pairs
        if value is not None
    ]
    return sum(parts[1:], parts[0])


def _sink_part(x: Operands, t: Operands, u: Operands, rows: Rows) -> jax.Array:
    """The sink's column in the sums for the logsumexp's tangents."""
    dtype = rows["lse"].dtype
    p = jnp.exp(x.sinks.astype(dtype)[:, None] - rows["lse"])

    def centred(d: Operands, name: str) -> jax.Array:
        sink = (
            jnp.zeros((), dtype) if d.sinks is None else d.sinks.astype(dtype)[:, None]
        )
        return sink - rows[name] if name in rows else sink

    if "u_lse" not in rows:
        return p * centred(t, "t_lse")
    return p * centred(t, "t_lse") * centred(u, "u_lse")
