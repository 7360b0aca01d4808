"""From arguments to a call: defaults, normal forms, and back to what the user gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash2 import _checks, _dropout, _operand_checks
from jax_flash2._spec import AttentionSpec, Operands


def settle(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: Any = None,
    is_causal: Any = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Any = None,
    implementation: str | None = None,
    logits_soft_cap: Any = None,
    query_offset: Any = None,
    query_segment_ids: Any = None,
    key_value_segment_ids: Any = None,
    prefix_lengths: Any = None,
    chunk_size: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_rate: Any = 0.0,
    dropout_key: Any = None,
    deterministic_backward: Any = False,
    return_max_logit: Any = False,
    flags: Mapping[str, Any],
    devices: int = 1,
) -> tuple[AttentionSpec, Operands]:
    """The checked call of `flash_attention`'s arguments.

    Args:
      flags: arguments that have to be bools, beside those here.
      devices: on how many a sequence lies, of which the arrays are one's part. Lengths
        and prefixes count the tokens of all, and dense arrays have all keys.
    """
    _checks.check_static(
        is_causal=is_causal,
        chunk_size=chunk_size,
        logits_soft_cap=logits_soft_cap,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        prefix_lengths=prefix_lengths,
        implementation=implementation,
        flags={
            **flags,
            "deterministic_backward": deterministic_backward,
            "return_max_logit": return_max_logit,
        },
    )
    _checks.check_arrays(query, key, value, implementation)
    query, key, value = map(jnp.asarray, (query, key, value))
    *batch, q_length, heads, head_dim = query.shape
    batch, kv_length = tuple(batch), key.shape[-3]
    static_scale, scale = _checks.check_scale(scale, head_dim)
    if dropout_rate:
        _checks.check_key(dropout_key)

    def integers(name: str, x: Any, bounds: tuple[int, int] | None = None) -> Any:
        return _operand_checks.check_integers(name, x, batch, "(batch...)", bounds)

    def floats(name: str, x: Any) -> Any:
        shape, meaning = (*batch, heads), "(batch..., heads)"
        return _operand_checks.check_floats(name, x, query, shape, meaning)

    q_tokens, kv_tokens = q_length * devices, kv_length * devices
    scores = (*batch, heads, q_length, kv_tokens)
    meaning = "(batch..., heads, query length, key length)"
    if _checks.is_static_int(query_offset) and query_offset == 0:
        query_offset = None
    query_ids, key_ids = _operand_checks.check_segments(
        query_segment_ids, key_value_segment_ids, batch, q_length, kv_length
    )
    operands = Operands(
        query=query,
        key=key,
        value=value,
        scale=None if scale is None else jnp.reshape(scale, (1,) * len(batch)),
        bias=_operand_checks.check_floats("bias", bias, query, scores, meaning),
        mask=_operand_checks.check_mask(mask, scores),
        query_seq_lengths=integers(
            "query_seq_lengths", query_seq_lengths, (0, q_tokens)
        ),
        key_value_seq_lengths=integers(
            "key_value_seq_lengths", key_value_seq_lengths, (0, kv_tokens)
        ),
        # The last row's position is an int32, too, and so is the one after it.
        query_offset=integers(
            "query_offset",
            query_offset,
            (-_checks.INT32_MAX - 1, _checks.INT32_MAX - q_tokens),
        ),
        prefix_lengths=integers("prefix_lengths", prefix_lengths, (0, kv_tokens)),
        query_segment_ids=query_ids,
        key_value_segment_ids=key_ids,
        alibi_slopes=floats("alibi_slopes", alibi_slopes),
        sinks=floats("sinks", sinks),
        dropout_streams=_dropout.streams(dropout_key, batch, heads)
        if dropout_rate
        else None,
    )
    spec = AttentionSpec(
        scale=static_scale,
        is_causal=bool(is_causal),
        window=_checks.check_window(local_window_size),
        chunk_size=None if chunk_size is None else int(chunk_size),
        soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        dropout_rate=float(dropout_rate),
        deterministic_backward=bool(deterministic_backward),
        return_max_logit=bool(return_max_logit),
        implementation=implementation,
    )
    return spec, operands


def results(out: jax.Array, lse: jax.Array | None, max_logit: jax.Array | None) -> Any:
    """What the user gets: the output alone, or a tuple with what was asked for."""
    found = [out]
    if lse is not None:
        found.append(jnp.swapaxes(lse, -1, -2))
    if max_logit is not None:
        found.append(jax.lax.stop_gradient(max_logit))
    return found[0] if len(found) == 1 else tuple(found)
