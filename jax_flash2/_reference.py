"""The definition of right: the call in plain, dense jnp. Answers every question of meaning.

Everything is computed in float32 (float64 for float64 inputs); memory grows with the
product of the lengths. JAX's own rules differentiate it, in any mode and to any order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_flash2 import _dropout, _mask
from jax_flash2._spec import AttentionSpec, Operands, accumulator


def attention(
    spec: AttentionSpec, x: Operands
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, logsumexp ``(batch..., heads, l)`` and largest logit ``(batch..., heads)``."""
    *batch, q_length, heads, head_dim = x.query.shape
    kv_length, kv_heads = x.key.shape[-3:-1]
    dtype = accumulator(x.query.dtype)
    row = jnp.arange(q_length, dtype=jnp.int32)
    column = jnp.arange(kv_length, dtype=jnp.int32)

    # What stands past a length may be anything: replace it before it is multiplied.
    query = _zero_past(x.query.astype(dtype), row, x.query_seq_lengths)
    key = _zero_past(x.key.astype(dtype), column, x.key_value_seq_lengths)
    value = _zero_past(x.value.astype(dtype), column, x.key_value_seq_lengths)
    # Each key head serves a group of query heads.
    query = query.reshape(*query.shape[:-2], kv_heads, heads // kv_heads, head_dim)

    scores = jnp.einsum("...lngd,...snd->...ngls", query, key, precision="highest")
    scores = scores.reshape(*batch, heads, q_length, kv_length)
    if x.scale is not None:
        scores *= x.scale.astype(dtype)[..., None, None, None]
    else:
        scores *= jnp.asarray(spec.scale, dtype)
    if spec.soft_cap is not None:
        cap = jnp.asarray(spec.soft_cap, dtype)
        scores = cap * jnp.tanh(scores / cap)
    if x.bias is not None:
        scores += x.bias.astype(dtype)
    if x.alibi_slopes is not None:
        distance = _mask.distance(row, column, x, len(batch))[..., None, :, :]
        scores -= x.alibi_slopes.astype(dtype)[..., None, None] * distance.astype(dtype)
    seen = _mask.visible(spec, row, column, x, len(batch))
    if seen is not None:
        scores = jnp.where(seen[..., None, :, :], scores, -jnp.inf)
    if x.mask is not None:
        scores = jnp.where(x.mask, scores, -jnp.inf)

    sinks = None if x.sinks is None else x.sinks.astype(dtype)[..., None]
    largest = jnp.max(scores, axis=-1, initial=-jnp.inf)
    shift = largest if sinks is None else jnp.maximum(largest, sinks)
    # An empty row's largest score is -inf: subtract 0 there, so that exp gives 0.
    shift = jax.lax.stop_gradient(jnp.where(shift == -jnp.inf, 0, shift))
    weights = jnp.exp(scores - shift[..., None])
    total = weights.sum(-1)
    if sinks is not None:
        total += jnp.exp(sinks - shift)
    divisor = jnp.where(total == 0, 1, total)
    lse = jnp.where(total == 0, -jnp.inf, shift + jnp.log(divisor))
    if x.query_seq_lengths is not None:
        # A row past its length is an empty row, and its cotangent may be anything.
        within = _within(row, x.query_seq_lengths)[..., None, :]
        lse = jnp.where(within, lse, jax.lax.stop_gradient(lse))
    probabilities = weights / divisor[..., None]

    if spec.dropout_rate:
        kept = _dropout.keep(x.dropout_streams, row, 0, kv_length, spec.dropout_rate)
        survivors = probabilities / jnp.asarray(1 - spec.dropout_rate, dtype)
        probabilities = jnp.where(kept, survivors, 0)
    grouped = (*batch, kv_heads, heads // kv_heads, q_length, kv_length)
    probabilities = probabilities.reshape(grouped)
    out = jnp.einsum(
        "...ngls,...sne->...lnge", probabilities, value, precision="highest"
    )
    out = out.reshape(*batch, q_length, heads, x.value.shape[-1]).astype(x.query.dtype)
    out = _zero_past(out, row, x.query_seq_lengths)
    max_logit = jnp.max(largest, axis=-1, initial=-jnp.inf)
    return out, lse, max_logit


def _within(index: jax.Array, lengths: jax.Array) -> jax.Array:
    """bool ``(batch..., length)``: whether an index is before its entry's length."""
    return index.reshape((1,) * lengths.ndim + index.shape) < lengths[..., None]


def _zero_past(x: jax.Array, index: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """``x`` ``(batch..., length, heads, dim)`` with zeros at and past the lengths."""
    if lengths is None:
        return x
    return jnp.where(_within(index, lengths)[..., None, None], x, 0)
