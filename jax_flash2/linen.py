"""`Flash2Attention` for flax.linen: flax's attention with `flash_attention` inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_flash2 import _attention_fn, _modules
from jax_flash2._attention_fn import attention_fn
from jax_flash2._cache import KeyValueCache
from jax_flash2._context import ContextParallel

__all__ = ["Flash2Attention", "attention_fn"]


class Flash2Attention(nn.MultiHeadDotProductAttention):
    """Multi-head attention with the parameters of `linen.MultiHeadDotProductAttention`.

    A drop-in for it: the same parameter tree (query, key, value, out, and with
    normalize_qk query_ln and key_ln), initialisation, outputs and gradients. Inside a
    compact parent linen names a submodule after its class, so there give both the same
    ``name``. It differs in rows that see no key (0 before the output projection, where
    flax takes a mean), in the bits of a dropout mask, and in the cache, which knows the
    length of each batch entry and takes any number of tokens at a time.

    Attributes, besides flax's, of which attention_fn and the einsum classes must be
    left alone, and broadcast_dropout must be False where dropout_rate is not 0:
      num_kv_heads: heads of key and value, a divisor of num_heads; None is num_heads.
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
      forward_mode, deterministic_backward, implementation: as in `flash_attention`;
        forward_mode is what `jax.jvp` needs.
      context_parallel: a `jax_flash2.ContextParallel`: the sequence on several devices.

    With ``decode=True``, `init` makes an empty cache as long as its inputs (so does a
    call that finds no "cache" collection, as in flax); every call with a cache appends.

    Example:
      >>> import jax
      >>> from jax_flash2.linen import Flash2Attention
      >>> x = jax.numpy.ones((2, 128, 64))
      >>> layer = Flash2Attention(8, num_kv_heads=2, rotary=True, is_causal=True)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(variables, x).shape
      (2, 128, 64)
    """

    broadcast_dropout: bool = False
    attention_fn: Callable[..., Any] = attention_fn
    num_kv_heads: int | None = None
    is_causal: bool = False
    window: _modules.Window = None
    logits_soft_cap: float | None = None
    sinks: bool = False
    sinks_init: Callable[..., Any] = nn.initializers.zeros
    alibi: bool | Sequence[float] = False
    rotary: bool | float = False
    forward_mode: bool = False
    deterministic_backward: bool = False
    implementation: str | None = None
    context_parallel: ContextParallel | None = None

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        inputs_kv: jax.Array | None = None,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
        sow_weights: bool = False,
        is_causal: bool | None = None,
        input_positions: jax.Array | None = None,
        key_value_positions: jax.Array | None = None,
        query_seq_lengths: jax.Array | None = None,
        key_value_seq_lengths: jax.Array | None = None,
        query_segment_ids: jax.Array | None = None,
        key_value_segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Applies attention; without inputs_k and inputs_v, self-attention.

        Args:
          inputs_q: `(batch..., query length, features)`.
          inputs_k: `(batch..., key length, features)`; None is inputs_q.
          inputs_v: likewise; None is inputs_k.
          inputs_kv: flax's older name for inputs_k and inputs_v together.
          mask: broadcasts to `(batch..., num_heads, query length, key length)`, visible
            where not 0. When decoding, the key length is the cache's.
          deterministic: True turns dropout off; None is the attribute.
          dropout_rng: None is ``make_rng("dropout")``.
          sow_weights: must be False.
          is_causal: None is the attribute; when decoding, True. With decode, False lets
            tokens of one call see each other.
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
          ValueError: the module or the call breaks a rule, or the cache is too short.
          NotImplementedError: sow_weights, einsum classes, a precision that is an
            algorithm.
        """
        _modules.check_inputs(inputs_q=inputs_q)
        options = self._options(inputs_q.shape[-1])
        _attention_fn.refuse_weights("sow_weights", sow_weights)
        if inputs_kv is not None:
            if inputs_k is not None or inputs_v is not None:
                raise ValueError(
                    "inputs_kv must be None where inputs_k or inputs_v is given; got "
                    f"an array of shape {inputs_kv.shape}"
                )
            inputs_k = inputs_kv
        keys_of, values_of = _modules.keys_and_values(inputs_q, inputs_k, inputs_v)
        _modules.check_inputs(inputs_k=keys_of, inputs_v=values_of)

        dense = functools.partial(
            nn.DenseGeneral,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        project = functools.partial(
            dense,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dot_general=self.qkv_dot_general,
            dot_general_cls=self.qkv_dot_general_cls,
        )
        kv_heads = self.num_kv_heads or self.num_heads
        query = project((self.num_heads, options.head_dim), name="query")(inputs_q)
        key = project((kv_heads, options.head_dim), name="key")(keys_of)
        value = project((kv_heads, options.head_dim), name="value")(values_of)
        if self.normalize_qk:
            norm = functools.partial(
                nn.LayerNorm,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )
            # flax's LayerNorm itself mixes bfloat16 with float32.
            with jax.numpy_dtype_promotion("standard"):
                query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        query, key, value = _attention_fn.common_dtype(self.dtype, query, key, value)
        sinks = None
        if self.sinks:
            shape = (self.num_heads,)
            sinks = self.param("sinks", self.sinks_init, shape, self.param_dtype)

        variables, cache = None, None
        if self.decode:
            variables, cache = self._cache(key, value)
        if is_causal is None:
            is_causal = self.decode or self.is_causal
        dropout_rate = 0.0
        if self.dropout_rate and not nn.merge_param(
            "deterministic", self.deterministic, deterministic
        ):
            dropout_rate = self.dropout_rate
            if dropout_rng is None:
                dropout_rng = self.make_rng("dropout")
        out, cache = options.attend(
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
            sinks=sinks,
            dropout_rate=dropout_rate,
            dropout_key=dropout_rng if dropout_rate else None,
        )
        if variables is not None and cache is not None:
            for variable, array in zip(variables, cache, strict=True):
                variable.value = array
        return dense(
            self.out_features or inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            dot_general=self.out_dot_general,
            dot_general_cls=self.out_dot_general_cls,
            name="out",
        )(out)

    def _options(self, features: int) -> _modules.AttentionOptions:
        """The options, after judging the attributes that are flax's."""
        _modules.refuse_attention_fn(self.attention_fn)
        _modules.check_flags(is_causal=self.is_causal, sinks=self.sinks)
        _attention_fn.refuse_overrides(
            qk_attn_weights_einsum_cls=self.qk_attn_weights_einsum_cls,
            attn_weights_value_einsum_cls=self.attn_weights_value_einsum_cls,
        )
        _attention_fn.check_precision(self.precision)
        _attention_fn.check_dropout(self.broadcast_dropout, self.dropout_rate)
        return _modules.AttentionOptions(
            num_heads=self.num_heads,
            head_dim=_modules.head_dim(
                self.num_heads,
                self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
                self.qkv_features or features,
            ),
            window=self.window,
            logits_soft_cap=self.logits_soft_cap,
            alibi=self.alibi,
            rotary=self.rotary,
            forward_mode=self.forward_mode,
            deterministic_backward=self.deterministic_backward,
            implementation=self.implementation,
            context_parallel=self.context_parallel,
        )

    def _cache(
        self, key: jax.Array, value: jax.Array
    ) -> tuple[tuple[Any, ...], KeyValueCache | None]:
        """The cache's variables, and what they hold if they were there before."""
        there = self.has_variable("cache", "cached_key")
        variables = (
            self.variable("cache", "cached_key", jnp.zeros_like, key),
            self.variable("cache", "cached_value", jnp.zeros_like, value),
            self.variable("cache", "cache_index", jnp.zeros, key.shape[:-3], jnp.int32),
        )
        return variables, KeyValueCache(
            *(v.value for v in variables)
        ) if there else None
