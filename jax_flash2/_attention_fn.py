"""`attention_fn`, and what flax's interface can ask for that this library refuses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash2.attention import flash_attention


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    broadcast_dropout: bool = False,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: Callable[..., Any] | None = None,
    attn_weights_value_einsum: Callable[..., Any] | None = None,
    input_positions: jax.Array | None = None,
    **options: Any,
) -> Any:
    """`flash_attention` behind the signature of flax's attention functions.

    For those who keep `nnx.MultiHeadAttention` or `linen.MultiHeadDotProductAttention`.
    Both say `broadcast_dropout=True` by default; with a dropout rate, give them False.

    Args:
      query: `(batch..., query length, heads, head_dim)`.
      key, value: `(batch..., key length, kv heads, head_dim)`.
      bias, mask: broadcast to `(batch..., heads, query length, key length)`. A mask of
        numbers, as flax makes them, is visible where it is not 0.
      deterministic: True turns dropout off.
      dtype: query, key and value are converted to it; None is their common dtype.
      force_fp32_for_softmax: either value: the softmax is always in float32.
      options: any other argument of `flash_attention`; bind them by functools.partial.

    Returns:
      `(batch..., query length, heads, head_dim)`. A row that sees no key is 0; flax's
      is the mean of the values.

    Raises:
      ValueError: broadcast_dropout with dropout, dropout without dropout_rng, or
        input_positions (use `Flash2Attention(rotary=True)`).
      NotImplementedError: module (weights to be sown), einsums of one's own, or a
        precision that is an algorithm.

    Example:
      >>> import functools, jax
      >>> from flax import nnx
      >>> from jax_flash2.nnx import attention_fn
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=4, in_features=16, decode=False, rngs=nnx.Rngs(0),
      ...     attention_fn=functools.partial(attention_fn, logits_soft_cap=30.0))
      >>> layer(jax.numpy.ones((2, 8, 16)), is_causal=True).shape
      (2, 8, 16)
    """
    del force_fp32_for_softmax
    refuse_weights("module", module)
    refuse_overrides(
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    check_precision(precision)
    if input_positions is not None:
        raise ValueError(
            "input_positions must be None, since attention_fn has no rotary embedding; "
            "got an array. Use jax_flash2.Flash2Attention(rotary=True)."
        )
    rate = 0.0 if deterministic else dropout_rate
    check_dropout(broadcast_dropout, rate)
    if rate and dropout_rng is None:
        raise ValueError(
            f"dropout_rng must be a key where dropout_rate is not 0; got None, {rate}"
        )
    query, key, value = common_dtype(dtype, query, key, value)
    return flash_attention(
        query,
        key,
        value,
        bias,
        boolean_mask(mask),
        is_causal=is_causal,
        dropout_rate=rate,
        dropout_key=dropout_rng if rate else None,
        **options,
    )


def boolean_mask(mask: Any) -> jax.Array | None:
    """True where a mask, of bools or of numbers as flax makes them, is not 0."""
    if mask is None:
        return None
    if not hasattr(mask, "astype"):
        raise ValueError(f"mask must be an array; got {type(mask).__name__}")
    return mask.astype(bool)


def common_dtype(dtype: Any, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays in dtype, or where it is None in the dtype they promote to."""
    dtype = jnp.result_type(*arrays) if dtype is None else dtype
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def check_dropout(broadcast_dropout: bool, dropout_rate: float) -> None:
    if broadcast_dropout and dropout_rate:
        raise ValueError(
            "broadcast_dropout must be False where dropout_rate is not 0, since heads "
            f"and batch entries never share a dropout mask; got {broadcast_dropout=} "
            f"and {dropout_rate=}"
        )


def check_precision(precision: Any) -> None:
    """Accepts every jax.lax.Precision: the attention is at least as exact as any."""
    for one in precision if isinstance(precision, tuple) else (precision,):
        try:
            jax.lax.Precision(one)
        except ValueError:
            raise NotImplementedError(
                "precision must be None or a jax.lax.Precision (or its name), since "
                "the attention has one algorithm, which accumulates in float32; got "
                f"{precision!r}"
            ) from None


def refuse_overrides(**arguments: Any) -> None:
    for name, argument in arguments.items():
        if argument is not None:
            raise NotImplementedError(
                f"{name} must be None, since jax_flash2.flash_attention computes the "
                f"attention; got {argument!r}. Use flax's own module for it."
            )


def refuse_weights(name: str, argument: Any) -> None:
    if argument:
        raise NotImplementedError(
            f"{name} must be False or None, since attention weights are never in "
            f"memory as a whole and cannot be sown; got {argument!r}. Use flax's own "
            "module to look at them."
        )


def refuse_when_decoding(**arguments: Any) -> None:
    for name, argument in arguments.items():
        if argument is not None:
            raise ValueError(
                f"{name} must be None when decoding, since each batch entry of the "
                "cache is one sequence whose length the cache knows; got an array of "
                f"shape {jnp.shape(argument)}. Where tokens are padding, give "
                "query_seq_lengths."
            )
