"""Reverse mode, by default: the `jax.custom_vjp`, its residuals and their names.

The forward keeps the operands, the output and the logsumexp, as the paper does; the
backward recomputes the rest. Output and logsumexp carry the checkpoint names
``flash2_out`` and ``flash2_lse``: a remat policy that saves both (either alone is not
enough) runs the forward once.

With ``forward_mode`` the primitives' own rules (`_rules`) serve every mode instead. They
also differentiate the passes that the `custom_vjp` is made of, hence second order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_flash2 import _compat, _maps, _primitives
from jax_flash2 import _rules as _rules  # registers the rules
from jax_flash2._spec import SIDE_OPERANDS, AttentionSpec, Operands

Results = tuple[jax.Array, jax.Array, jax.Array | None]


def attend(spec: AttentionSpec, x: Operands, forward_mode: bool) -> Results:
    """Output, logsumexp ``(batch..., h, l)`` and largest logits, differentiable."""
    # Outside the custom_vjp, so that the casts' own transposes sum gradients of operands
    # that vary over fewer mesh axes than others.
    names = [name for name, a in x._asdict().items() if a is not None]
    axes = () if spec.ring is None else spec.ring.axes
    aligned = _compat.align_varying([getattr(x, name) for name in names], axes)
    x = Operands(**dict(zip(names, aligned, strict=True)))
    return _primitives.forward(spec, x) if forward_mode else _attend(spec, x)


def _attend_primal(spec: AttentionSpec, x: Operands) -> Results:
    return _primitives.forward(spec, x)


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(0,))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """The operands beside query, key and value whose gradients are asked for."""

    names: tuple[str, ...]


def _attend_forward(spec: AttentionSpec, x: Any) -> Any:
    wanted = tuple(
        name
        for name in SIDE_OPERANDS
        if getattr(x, name) is not None and getattr(x, name).perturbed
    )
    x = Operands(*(None if a is None else a.value for a in x))
    out, lse, largest = _primitives.forward(spec, x)
    out = checkpoint_name(out, "flash2_out")
    lse = checkpoint_name(lse, "flash2_lse")
    return (out, lse, largest), (x, out, lse, _Wanted(wanted))


def _attend_backward(spec: AttentionSpec, residuals: Any, cotangents: Any) -> Any:
    x, out, lse, wanted = residuals
    dout, dlse, _ = cotangents
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros_like(out)
    # What arrives past a length may be anything: replace it before it is multiplied.
    dout = _maps.zero_past_rows(spec, dout, x.query_seq_lengths, -3)
    zero = isinstance(dlse, SymbolicZero)
    lengths = x.query_seq_lengths
    dlse = None if zero else _maps.zero_past_rows(spec, dlse, lengths, -1)
    side = tuple(name for name in wanted.names if name != "sinks")
    grads = _primitives.backward(spec, x, out, lse, dout, dlse, side)
    if "sinks" in wanted.names:
        g = _maps.sinks_gradient(x.sinks, out, lse, dout, dlse)
        grads["sinks"] = _maps.like(g, x.sinks)
    return (Operands(**grads),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
