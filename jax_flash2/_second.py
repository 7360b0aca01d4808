"""The backward's derivative along a direction, one block at a time.

The backward maps cotangents dO and dL of output and logsumexp to (per tile; see
`_tangents` for the letters, Algorithm 2 for the rest)

  dP = m dO V^T        D = rowsum(dO O) - dL       E = dP - D        dS = P E
  dV = (m P)^T dO      dB = dS                     dY = f'(Y) dS     dC = dY scale
  dQ = dC K            dK = dC^T Q                 dscale = sum dY R

with R = Q K^T, Y = scale R, and f the soft cap. Along t, while the cotangents change by
dO_u and dL_u (zero, or a direction of their own), each line by the product rule:

  dP_t = m (dO V_t^T + dO_u V^T)
  D_t  = rowsum(dO O_t + dO_u O) - dL_u
  dS_t = P ((s_t - L_t) E + dP_t - D_t)
  dY_t = f'(Y) dS_t + f''(Y) Y_t dS                dC_t = scale dY_t + scale_t dY
  dV_t = (m P (s_t - L_t))^T dO + (m P)^T dO_u     dB_t = dS_t
  dQ_t = dC_t K + dC K_t                           dK_t = dC_t^T Q + dC^T Q_t
  dscale_t = sum (dY_t R + dY R_t)

O_t and L_t are the forward's tangent along t. Second derivatives are symmetric, so this
is also the gradient, at fixed t, of <dO, O_t> + <dL, L_t>: what the reverse derivative
of a tangent needs.
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
    add_tile,
    bend,
    direction,
    dot,
    scale,
    scores,
    scores_along,
    slope,
    sum_to,
    survivors,
    tile,
)

_ROWS = ("dout", "u_dout", "lse", "t_lse", "delta", "t_delta")


def second(
    spec: AttentionSpec,
    x: Operands,
    rows: Rows,
    wrt: tuple[str, ...],
    *,
    sequential: bool,
) -> dict[str, jax.Array]:
    """The derivatives of `_blockwise.backward`'s results along a direction.

    Args:
      x: operands with exactly one batch axis, of size B or 1.
      rows: ``dout``, zero past the query's length, and its change ``u_dout`` if it has
        one, ``(B, l, h, e)``; ``lse`` and its tangent ``t_lse``, ``delta`` and its change
        ``t_delta`` (D and D_t above), ``(B, h, l)``; tangents ``t_query`` and so on of
        the operands that have one.
      wrt: which of scale, bias and alibi_slopes.
      sequential: entries one after the other, or together.

    Returns:
      As `_blockwise.backward`.
    """
    names = [n for n in rows if n in _ROWS or n[2:] in Operands._fields]
    sizes, entries = _entries.prepare(spec, x, {name: rows[name] for name in names})

    def entry(x: Operands, rows: Rows, first: jax.Array, end: jax.Array) -> Any:
        return _entry(spec, sizes, x, rows, first, end, wrt)

    grads = _loops.run(spec, sizes, entries, entry, sequential=sequential, wrt=wrt)
    return _entries.gradients(sizes, x, grads, wrt)


def _entry(
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
    t = direction(x, rows, "t")

    def key_block(state: Any, j: jax.Array) -> Any:
        def query_block(i: jax.Array, state: Any) -> Any:
            dk, dv, grads = state
            here, along = tile(sizes, x, i, j), tile(sizes, t, i, j).x
            mine = {n: block(rows[n], 1, i, q_block) for n in _ROWS if n in rows}
            part = _tile_part(spec, here, along, mine, wrt)
            dk, dv = dk + part["key"], dv + part["value"]
            grads = dict(grads)
            dq = grads["query"]
            dq_i = part["query"] + block(dq, 1, i, q_block)
            grads["query"] = lax.dynamic_update_slice_in_dim(dq, dq_i, i * q_block, 1)
            for name in wrt:
                g = sum_to(part[name], getattr(here.x, name).shape)
                if name == "bias":
                    grads[name] = add_tile(grads[name], g, sizes, i, j)
                else:
                    grads[name] += g
            return dk, dv, grads

        begin, stop = _loops.seeing(sizes, first, end, j)
        # Transposed, as in `_blockwise.backward`.
        dk = jnp.zeros((x.key.shape[-1], sizes.kv_block), dtype)
        dv = jnp.zeros((x.value.shape[-1], sizes.kv_block), dtype)
        step = skipping(sizes, x, lambda i: (i, j), query_block)
        dk, dv, state = lax.fori_loop(begin, stop, step, (dk, dv, state))
        return state, (dk.T.astype(x.key.dtype), dv.T.astype(x.value.dtype))

    state = {name: jnp.zeros(getattr(x, name).shape, dtype) for name in ("query", *wrt)}
    grads, (dk, dv) = _loops.scan_blocks(key_block, state, sizes.kv_blocks)
    grads["query"] = grads["query"].astype(x.query.dtype)
    return grads | {"key": join_blocks(dk, 0), "value": join_blocks(dv, 0)}


def _tile_part(
    spec: AttentionSpec, here: Tile, t: Operands, rows: Rows, wrt: tuple[str, ...]
) -> dict[str, jax.Array]:
    """One tile's part of every result, by operand name."""
    x, do, do_u = here.x, rows["dout"], rows.get("u_dout")
    lse, t_lse, delta, t_delta = (
        rows[name][..., None] for name in ("lse", "t_lse", "delta", "t_delta")
    )
    at = scores(spec, here)
    dtype, narrow = at.s.dtype, x.query.dtype
    along = scores_along(spec, here, at, t)
    p = jnp.exp(at.s - lse)
    centred = along.s - t_lse
    kept = survivors(spec, here, p)  # m P

    # P dP and P dP_t, in which dropout's factor m stands at P.
    dp = dot("gle,se->gls", do, x.value)
    ds = kept * dp - p * delta
    dp_t = jnp.zeros((), dtype)
    pairs = [(do, t.value), (do_u, x.value)]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    if pairs:
        a, b = (jnp.concatenate(factor, -1) for factor in zip(*pairs, strict=True))
        dp_t = dot("gle,se->gls", a, b)
    ds_t = centred * ds + kept * dp_t - p * t_delta

    dv = dot("gle,gls->es", do, (kept * centred).astype(narrow))
    if do_u is not None:
        dv = dv + dot("gle,gls->es", do_u, kept.astype(narrow))
    result = {"value": dv}
    if "bias" in wrt:
        result["bias"] = ds_t
    if "alibi_slopes" in wrt:
        result["alibi_slopes"] = -(ds_t * here.distance.astype(dtype)).sum((1, 2))

    dy, dy_t = slope(spec, at) * ds, slope(spec, at) * ds_t
    if spec.soft_cap is not None:
        dy_t = dy_t + bend(spec, at) * along.scaled * ds
    if "scale" in wrt:
        # Masked elements have P = 0, but their products may be anything.
        g = jnp.where(p == 0, 0, dy_t * at.product + dy * along.product)
        result["scale"] = g.sum()
    dc_t = scale(spec, x, dtype) * dy_t
    if t.scale is not None:
        dc_t = dc_t + t.scale.astype(dtype) * dy
    dc_t = dc_t.astype(narrow)
    dq = dot("gls,sd->gld", dc_t, x.key)
    dk = dot("gld,gls->ds", x.query, dc_t)
    if t.key is not None or t.query is not None:
        dc = (scale(spec, x, dtype) * dy).astype(narrow)
        dq = dq if t.key is None else dq + dot("gls,sd->gld", dc, t.key)
        dk = dk if t.query is None else dk + dot("gld,gls->ds", t.query, dc)
    return result | {"query": dq, "key": dk}
