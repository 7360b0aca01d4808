"""`Flash2Attention` for flax.nnx: flax's attention with `flash_attention` inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jax_flash2 import _attention_fn, _modules
from jax_flash2._attention_fn import attention_fn
from jax_flash2._context import ContextParallel
from jax_flash2._nnx_cache import CachingAttention

__all__ = ["Flash2Attention", "attention_fn"]


class Flash2Attention(CachingAttention):
    """Multi-head attention with the parameters of `nnx.MultiHeadAttention`.

    A drop-in for it: the same parameter tree (query, key, value, out, and with
    normalize_qk query_ln and key_ln), initialisation, outputs and gradients; also
    linen's parameters load, ``nnx.update(module, variables["params"])``. It differs in
    rows that see no key (0 before the output projection, where flax takes a mean), in
    the bits of a dropout mask, and in the cache, which knows the length of each batch
    entry and takes any number of tokens at a time.

    Attributes:
      num_heads, in_features, qkv_features, out_features, num_kv_heads, in_kv_features:
        as in flax.
      is_causal: the default of the call's argument.
      window: keys visible to the left and right: ``(left, right)``, None for no bound,
        one int for both.
      logits_soft_cap: c in ``c * tanh(score / c)``.
      sinks: whether to learn one logit per head that joins the softmax without a value:
        the parameter ``sinks``, ``(num_heads,)``, in param_dtype.
      sinks_init: its initialiser.
      alibi: whether to add ALiBi's ``-slope * |i - j|`` with the standard slopes, or
        ``num_heads`` slopes. They are constants.
      rotary: whether to rotate query and key by their positions (in halves, base 10000,
        after normalize_qk), or the base.
      broadcast_dropout: must be False where dropout_rate is not 0.
      forward_mode, deterministic_backward, implementation: as in `flash_attention`;
        forward_mode is what `jax.jvp` needs.
      context_parallel: a `jax_flash2.ContextParallel`: the sequence on several devices.
      flax: every other keyword of `nnx.MultiHeadAttention` but attention_fn: dtype,
        param_dtype, dropout_rate, deterministic, precision, kernel_init, use_bias,
        decode (None is False), normalize_qk, kernel_metadata, keep_rngs, ....

    Raises:
      ValueError: an argument breaks a rule; the message names both, and the value.
      NotImplementedError: a precision that is an algorithm.
      TypeError: a keyword that flax's class does not know.

    Example:
      >>> from flax import nnx
      >>> import jax, jax_flash2
      >>> layer = jax_flash2.Flash2Attention(
      ...     num_heads=8, in_features=64, num_kv_heads=2, rotary=True, is_causal=True,
      ...     rngs=nnx.Rngs(0))
      >>> layer(jax.numpy.ones((2, 128, 64))).shape
      (2, 128, 64)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        is_causal: bool = False,
        window: _modules.Window = None,
        logits_soft_cap: float | None = None,
        sinks: bool = False,
        sinks_init: Callable[..., Any] = nnx.initializers.zeros,
        alibi: bool | Sequence[float] = False,
        rotary: bool | float = False,
        broadcast_dropout: bool = False,
        forward_mode: bool = False,
        deterministic_backward: bool = False,
        implementation: str | None = None,
        context_parallel: ContextParallel | None = None,
        rngs: nnx.Rngs,
        **flax: Any,
    ):
        _modules.refuse_attention_fn(flax.pop("attention_fn", attention_fn))
        _modules.check_flags(is_causal=is_causal, sinks=sinks)
        _attention_fn.check_precision(flax.get("precision"))
        _attention_fn.check_dropout(broadcast_dropout, flax.get("dropout_rate", 0.0))
        self.options = _modules.AttentionOptions(
            num_heads=num_heads,
            head_dim=_modules.head_dim(
                num_heads,
                num_heads if num_kv_heads is None else num_kv_heads,
                in_features if qkv_features is None else qkv_features,
            ),
            window=window,
            logits_soft_cap=logits_soft_cap,
            alibi=alibi,
            rotary=rotary,
            forward_mode=forward_mode,
            deterministic_backward=deterministic_backward,
            implementation=implementation,
            context_parallel=context_parallel,
        )
        super().__init__(
            num_heads,
            in_features,
            qkv_features,
            out_features,
            num_kv_heads,
            in_kv_features,
            broadcast_dropout=broadcast_dropout,
            attention_fn=attention_fn,
            rngs=rngs,
            **flax,
        )
        self.is_causal = is_causal
        self.sinks: nnx.Param[jax.Array] | None = nnx.data(None)
        if sinks:
            self.sinks = nnx.Param(
                sinks_init(rngs.params(), (num_heads,), self.param_dtype)
            )

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool | None = None,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: jax.Array | None = None,
        key_value_positions: jax.Array | None = None,
        query_seq_lengths: jax.Array | None = None,
        key_value_seq_lengths: jax.Array | None = None,
        query_segment_ids: jax.Array | None = None,
        key_value_segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Applies attention; without inputs_k and inputs_v, self-attention.

        Args:
          inputs_q: `(batch..., query length, in_features)`.
          inputs_k: `(batch..., key length, in_kv_features)`; None is inputs_q.
          inputs_v: likewise; None is inputs_k.
          mask: broadcasts to `(batch..., num_heads, query length, key length)`, visible
            where not 0. When decoding, the key length is the cache's.
          deterministic: True turns dropout off; None is the constructor's.
          rngs: for dropout; None is the constructor's.
          sow_weights: must be False.
          decode: append the tokens to the cache and let them attend to all of it; None
            is the constructor's.
          is_causal: None is the constructor's; when decoding, True. With decode, False
            lets tokens of one call see each other.
          out_sharding, qkv_sharding: as in flax, of the projections.
          input_positions: integers `(batch..., query length)` for rotary; by default
            from 0, or from the number of tokens in the cache. In self-attention they
            are the key's as well.
          key_value_positions: `(batch..., key length)`, the key's.
          query_seq_lengths: int32 `(batch...)`: rows from there on are padding. In
            self-attention, the default of key_value_seq_lengths. When decoding, the
            number of tokens that enter the cache.
          key_value_seq_lengths: int32 `(batch...)`: keys from there on are not seen.
          query_segment_ids, key_value_segment_ids: integers `(batch..., length)`; only
            equal ones see each other. The key's default to the query's.

        Returns:
          `(batch..., query length, out_features)`. When decoding inside jit, rows whose
          token found no room in the cache are NaN (outside, that is a ValueError).

        Raises:
          ValueError: the call breaks a rule, or the cache is missing or too short.
          NotImplementedError: sow_weights.
        """
        _attention_fn.refuse_weights("sow_weights", sow_weights)
        keys_of, values_of = _modules.keys_and_values(inputs_q, inputs_k, inputs_v)
        _modules.check_inputs(inputs_q=inputs_q, inputs_k=keys_of, inputs_v=values_of)
        for name, inputs, projection in (
            ("inputs_q", inputs_q, self.query),
            ("inputs_k", keys_of, self.key),
            ("inputs_v", values_of, self.value),
        ):
            if inputs.shape[-1:] != projection.in_features:
                raise ValueError(
                    f"{name} must have {projection.in_features[0]} features; got shape "
                    f"{inputs.shape}"
                )
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(keys_of, out_sharding=qkv_sharding)
        value = self.value(values_of, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            # flax's LayerNorm itself mixes bfloat16 with float32.
            with jax.numpy_dtype_promotion("standard"):
                query, key = self.query_ln(query), self.key_ln(key)
        query, key, value = _attention_fn.common_dtype(self.dtype, query, key, value)

        decode = bool(self.decode if decode is None else decode)
        if is_causal is None:
            is_causal = decode or self.is_causal
        cache = self._read_cache() if decode else None
        dropout_key = self._dropout_key(deterministic, rngs)
        out, cache = self.options.attend(
            query,
            key,
            value,
            cache,
            is_causal=is_causal,
            shares_inputs=inputs_k is None,
            mask=mask,
            query_positions=input_positions,
            key_positions=key_value_positions,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            query_segment_ids=query_segment_ids,
            key_value_segment_ids=key_value_segment_ids,
            sinks=None if self.sinks is None else self.sinks[...],
            dropout_rate=0.0 if dropout_key is None else self.dropout_rate,
            dropout_key=dropout_key,
        )
        if cache is not None:
            self._write_cache(cache)
        return self.out(out, out_sharding=out_sharding)

    def _dropout_key(self, deterministic: bool | None, rngs: Any) -> jax.Array | None:
        """The key of this call's dropout, or None where there is none."""
        if not self.dropout_rate:
            return None
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic is None:
            raise ValueError(
                "deterministic must be given, to the call or the constructor, where "
                f"dropout_rate is not 0; got None and {self.dropout_rate}"
            )
        if deterministic:
            return None
        rngs = self.rngs if rngs is None else rngs
        if rngs is None:
            raise ValueError(
                "rngs must be given, to the call or kept by the constructor, where "
                f"dropout_rate is not 0; got None and {self.dropout_rate}"
            )
        return rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs()
