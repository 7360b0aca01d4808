"""Reverse mode, by default: the `jax.custom_vjp`, its residuals and their names.

The forward keeps the operands, the output and the logsumexp, as the paper does; the
backward recomputes the rest. Output and logsumexp carry the checkpoint names
``flash2_out`` and ``flash2_lse``: a remat policy that saves both (either alone is not
enough) runs the forward once.

With ``forward_mode`` the primitives' own rules (`_rules`) serve every mode instead. They
also differentiate the passes that the `custom_vjp` is made of, hence second order.

With a ring the arrays are one device's part of a sequence, inside a `jax.shard_map`, and
each pass is one over blocks (`_ring`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_flash2 import _compat, _maps, _primitives, _ring
from jax_flash2 import _rules as _rules  # registers the rules
from jax_flash2._passes import BACKWARD, FORWARD, Named, zero_past
from jax_flash2._sequence import Ring
from jax_flash2._spec import SIDE_OPERANDS, AttentionSpec, Operands

Results = tuple[jax.Array, jax.Array, jax.Array | None]


def attend(
    spec: AttentionSpec, x: Operands, forward_mode: bool, ring: Ring | None = None
) -> Results:
    """Output, logsumexp ``(batch..., h, l)`` and largest logits, differentiable."""
    # Outside the custom_vjp, so that the casts' own transposes sum gradients of operands
    # that vary over fewer mesh axes than others.
    names = [name for name, a in x._asdict().items() if a is not None]
    axes = () if ring is None else ring.axes
    aligned = _compat.align_varying([getattr(x, name) for name in names], axes)
    x = Operands(**dict(zip(names, aligned, strict=True)))
    return (_attend_primal if forward_mode else _attend)(spec, ring, x)


def _attend_primal(spec: AttentionSpec, ring: Ring | None, x: Operands) -> Results:
    if ring is None:
        return _primitives.forward(spec, x)

    def block(spec: AttentionSpec, arrays: Named) -> Named:
        return _primitives.bind(_primitives.forward_p, arrays, spec=spec)

    arrays = {name: a for name, a in x._asdict().items() if a is not None}
    results = _ring.run(FORWARD, block, spec, arrays, ring)
    return results["out"], results["lse"], results.get("largest")


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0, 1))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """The operands beside query, key and value whose gradients are asked for."""

    names: tuple[str, ...]


def _attend_forward(spec: AttentionSpec, ring: Ring | None, x: Any) -> Any:
    wanted = tuple(
        name
        for name in SIDE_OPERANDS
        if getattr(x, name) is not None and getattr(x, name).perturbed
    )
    x = Operands(*(None if a is None else a.value for a in x))
    out, lse, largest = _attend_primal(spec, ring, x)
    out = checkpoint_name(out, "flash2_out")
    lse = checkpoint_name(lse, "flash2_lse")
    return (out, lse, largest), (x, out, lse, _Wanted(wanted))


def _attend_backward(
    spec: AttentionSpec, ring: Ring | None, residuals: Any, cotangents: Any
) -> Any:
    x, out, lse, wanted = residuals
    dout, dlse, _ = cotangents
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros_like(out)
    # What arrives past a length may be anything: replace it before it is multiplied.
    lengths, row = x.query_seq_lengths, None
    if ring is not None and lengths is not None:
        row = _ring.tokens(ring)
    dout = zero_past(dout, lengths, -3, row)
    zero = isinstance(dlse, SymbolicZero)
    dlse = None if zero else zero_past(dlse, lengths, -1, row)
    side = tuple(name for name in wanted.names if name != "sinks")
    arrays = x._asdict() | {"out": out, "lse": lse, "dout": dout, "dlse": dlse}

    def block(spec: AttentionSpec, arrays: Named) -> Named:
        return _primitives.bind(_primitives.backward_p, arrays, spec=spec, wrt=side)

    if ring is None:
        grads = block(spec, arrays)
    else:
        arrays = {name: a for name, a in arrays.items() if a is not None}
        grads = _ring.run(BACKWARD, block, spec, arrays, ring)
    if "sinks" in wanted.names:
        g = _maps.sinks_gradient(x.sinks, out, lse, dout, dlse)
        grads["sinks"] = _maps.like(g, x.sinks)
    return (Operands(**grads),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
