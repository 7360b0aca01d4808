"""The maps that a call's derivatives are made of, by named arrays at a point.

`At` binds the passes' primitives at one x: T(x; t), W(x; t, u), B(x; g) and S(x; t, g, h)
as `_rules` defines them. Directions and gradients are dicts by operand name, cotangents
have ``dout`` and maybe ``dlse``; a direction may have F_t beside it, as ``out`` and
``lse``. Sinks need no pass: a sink's gradient follows from the residuals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jax_flash2 import _compat, _ring
from jax_flash2._passes import Named, row_delta, zero_past
from jax_flash2._primitives import backward_p, bind, second_p, tangent2_p, tangent_p
from jax_flash2._spec import DIFFERENTIABLE, SIDE_OPERANDS, AttentionSpec


def sinks_gradient(
    sinks: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
) -> jax.Array:
    """A sink takes the probability exp(sink - L) and gives nothing: dP is 0 there, so
    its dS is -P * D. It needs no block of scores. ``(batch..., h)``, not yet summed over
    the batch axes that ``sinks`` lacks."""
    delta = row_delta(out, dout, dlse)
    logit = sinks.astype(lse.dtype)[..., None]
    # An empty row has L = sink; with a sink of -inf both are -inf, and P is 0.
    finite = jnp.where(lse == -jnp.inf, 0, lse)
    probability = jnp.where(lse == -jnp.inf, 0, jnp.exp(logit - finite))
    return -(probability * delta).sum(-1)


def like(g: jax.Array, operand: Any) -> jax.Array:
    """A gradient as a cotangent of its operand: summed to its shape, of its type."""
    axes = tuple(a for a, n in enumerate(operand.shape) if n != g.shape[a])
    g = g.sum(axes, keepdims=True) if axes else g
    return _compat.with_type_of(g.astype(operand.dtype), operand)


def zero_past_rows(
    spec: AttentionSpec, x: jax.Array, lengths: jax.Array | None, axis: int
) -> jax.Array:
    """`zero_past` of query rows, which are those of a whole sequence or of a part."""
    if lengths is None or spec.ring is None:
        return zero_past(x, lengths, axis)
    return zero_past(x, lengths, axis, _ring.tokens(spec.ring))


class At(NamedTuple):
    """A point x with F(x), and what else the binds at it share."""

    arrays: Named  # operands, out and lse
    spec: AttentionSpec
    mapped: int

    def bind(self, primitive: Any, more: Named, wrt: tuple[str, ...] = ()) -> Named:
        arrays = self.arrays | more
        return bind(primitive, arrays, spec=self.spec, wrt=wrt, mapped=self.mapped)

    def tangent(self, t: Named) -> tuple[jax.Array, jax.Array]:
        """T(x; t), for ``t`` by operand name."""
        results = self.bind(tangent_p, prefixed("t", t))
        return results["t_out"], results["t_lse"]

    def tangent2(self, t: Named, u: Named) -> tuple[jax.Array, jax.Array]:
        """W(x; t, u), for ``t`` and ``u`` with their F_t and F_u as out and lse."""
        results = self.bind(tangent2_p, prefixed("t", t) | prefixed("u", u))
        return results["w_out"], results["w_lse"]

    def backward(self, g: Named, wanted: tuple[str, ...]) -> Named:
        """B(x; g), for ``g`` with dout and dlse."""
        side = tuple(n for n in wanted if n in SIDE_OPERANDS and n != "sinks")
        grads = self.bind(backward_p, g, side)
        if "sinks" in wanted:
            x = self.arrays
            grads["sinks"] = sinks_gradient(
                x["sinks"], x["out"], x["lse"], g["dout"], g.get("dlse")
            )
        return grads

    def second(self, t: Named, g: Named, h: Named, wanted: tuple[str, ...]) -> Named:
        """S(x; t, g, h), for ``t`` with F_t, and ``g`` and ``h`` with dout and dlse."""
        side = tuple(n for n in wanted if n in SIDE_OPERANDS and n != "sinks")
        grads = self.bind(second_p, g | prefixed("t", t) | prefixed("u", h), side)
        if "sinks" in wanted:
            x = self.arrays
            names = ("sinks", "out", "lse", "dout", "dlse")
            primals, tangents = _aligned((x | g).get, (t | h).get, names)
            _, grads["sinks"] = jax.jvp(sinks_gradient, primals, tangents)
        return grads

    def with_residuals(self, t: Named) -> Named:
        """A direction with F_t beside it, computed if it is not there."""
        if t.get("out") is not None and t.get("lse") is not None:
            return t
        x = {name: a for name, a in t.items() if name in DIFFERENTIABLE}
        out, lse = self.tangent(x)
        return x | {"out": out, "lse": lse}

    def cotangent(self, out: Any, lse: Any) -> Named:
        """g, by name, from cotangents of which one may be a symbolic zero."""
        lengths = self.arrays.get("query_seq_lengths")
        # What arrives past a length may be anything: replace it before it is multiplied.
        out = ad.instantiate_zeros(out)
        g = {"dout": zero_past_rows(self.spec, out, lengths, -3)}
        if type(lse) is not ad.Zero:
            g["dlse"] = zero_past_rows(self.spec, lse, lengths, -1)
        return g


def _aligned(primal: Any, change: Any, names: tuple[str, ...]) -> tuple[Any, Any]:
    """Primals and tangents of equal shapes; absent primals are None, tangents zero."""
    primals, tangents = [], []
    for name in names:
        a, da = primal(name), change(name)
        if a is not None and da is None:
            da = jnp.zeros_like(a)
        elif a is not None:
            a, da = jnp.broadcast_arrays(a, da)
        primals.append(a)
        tangents.append(da)
    return primals, tangents


def prefixed(letter: str, arrays: Named) -> Named:
    return {f"{letter}_{name}": a for name, a in arrays.items()}


def direction_of(letter: str, arrays: Named) -> Named:
    """The arrays of one direction, without its letter."""
    return {n[2:]: a for n, a in arrays.items() if n.startswith(f"{letter}_")}


def operands_of(arrays: Named) -> Named:
    return {name: a for name, a in arrays.items() if name in DIFFERENTIABLE}


def cotangents_of(arrays: Named) -> Named:
    return {name: a for name, a in arrays.items() if name in ("dout", "dlse")}
