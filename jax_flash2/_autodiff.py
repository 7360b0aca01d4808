"""Derivatives of the call: the `jax.custom_vjp`, its residuals and their names.

The forward keeps the operands, the output and the logsumexp, as the paper does; the
backward recomputes the rest. Output and logsumexp carry the checkpoint names
``flash2_out`` and ``flash2_lse``: a remat policy that saves both (either alone is not
enough) runs the forward once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_flash2 import _compat, _primitives
from jax_flash2._spec import SIDE_OPERANDS, AttentionSpec, Operands

Results = tuple[jax.Array, jax.Array, jax.Array | None]


def attend(spec: AttentionSpec, x: Operands, forward_mode: bool) -> Results:
    """Output, logsumexp ``(batch..., h, l)`` and largest logits, differentiable."""
    if forward_mode:
        raise NotImplementedError(
            "flash_attention: forward_mode=True is implemented only with "
            f"implementation='reference'; got implementation={spec.implementation!r}"
        )
    # Outside the custom_vjp, so that the casts' own transposes sum gradients of operands
    # that vary over fewer mesh axes than others.
    names = [name for name, a in x._asdict().items() if a is not None]
    aligned = _compat.align_varying([getattr(x, name) for name in names])
    return _attend(spec, Operands(**dict(zip(names, aligned, strict=True))))


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
    if isinstance(dlse, SymbolicZero):
        dlse = None
    if x.query_seq_lengths is not None:
        # What arrives past a length may be anything: replace it before it is multiplied.
        row = jnp.arange(x.query.shape[-3], dtype=jnp.int32)
        lengths = x.query_seq_lengths
        within = row.reshape((1,) * lengths.ndim + row.shape) < lengths[..., None]
        dout = jnp.where(within[..., None, None], dout, 0)
        if dlse is not None:
            dlse = jnp.where(within[..., None, :], dlse, 0)
    side = tuple(name for name in wanted.names if name != "sinks")
    grads = _primitives.backward(spec, x, out, lse, dout, dlse, side)
    if "sinks" in wanted.names:
        grads["sinks"] = _sinks_gradient(x.sinks, out, lse, dout, dlse)
    return (Operands(**grads),)


def _sinks_gradient(
    sinks: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
) -> jax.Array:
    """A sink takes the probability exp(sink - L) and gives nothing: dP is 0 there, so
    its dS is -P * D. It needs no block of scores."""
    delta = _primitives.row_delta(out, dout, dlse)
    logit = sinks.astype(lse.dtype)[..., None]
    # An empty row has L = sink; with a sink of -inf both are -inf, and P is 0.
    probability = jnp.where(lse == -jnp.inf, 0, jnp.exp(logit - lse))
    g = -(probability * delta).sum(-1)
    axes = tuple(a for a, n in enumerate(sinks.shape) if n != g.shape[a])
    g = g.sum(axes, keepdims=True).astype(sinks.dtype)
    return _compat.with_type_of(g, sinks)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
