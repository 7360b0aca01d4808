"""What the nnx and the linen module share: everything between their projections."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash2 import _checks, _operand_checks
from jax_flash2._attention_fn import attention_fn, boolean_mask, refuse_when_decoding
from jax_flash2._cache import KeyValueCache
from jax_flash2._context import ContextParallel
from jax_flash2._positions import alibi_slopes, rotate
from jax_flash2.attention import flash_attention

Window = int | tuple[int | None, int | None] | None


def keys_and_values(inputs_q: Any, inputs_k: Any, inputs_v: Any) -> tuple[Any, Any]:
    """What key and value are made of, as flax defaults them."""
    if inputs_k is None and inputs_v is not None:
        raise ValueError(
            "inputs_k must be given with inputs_v; got None. Where both are the same, "
            "give inputs_k alone."
        )
    inputs_k = inputs_q if inputs_k is None else inputs_k
    return inputs_k, inputs_k if inputs_v is None else inputs_v


def refuse_attention_fn(function: Any) -> None:
    if function is not attention_fn:
        raise ValueError(
            "attention_fn must be left alone, since Flash2Attention always calls "
            f"jax_flash2.flash_attention; got {function!r}. For another function, use "
            "flax's own module."
        )


def check_inputs(**inputs: Any) -> None:
    for name, x in inputs.items():
        if np.ndim(x) < 2:
            raise ValueError(
                f"{name} must have shape (batch..., length, features); got shape "
                f"{np.shape(x)}"
            )


def check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(f"{name} must be a bool; got {flag!r}")


def head_dim(num_heads: int, num_kv_heads: int, qkv_features: int) -> int:
    """The head_dim of a module, whose heads it judges."""
    for name, n in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if not _checks.is_static_int(n):
            raise ValueError(f"{name} must be an int; got {n!r}")
    if num_heads < 1 or qkv_features < 1 or qkv_features % num_heads:
        raise ValueError(
            "qkv_features must be a positive multiple of num_heads; got "
            f"qkv_features={qkv_features} and num_heads={num_heads}"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads; got "
            f"num_heads={num_heads} and num_kv_heads={num_kv_heads}"
        )
    return qkv_features // num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """The static facts of a module's attention: checked, hashable, comparable by jit.

    Attributes:
      window: as `flash_attention`'s local_window_size.
      alibi: whether, or the slopes; after checking, the slopes or False.
      rotary: whether, or the base; after checking, the base or False.
    """

    num_heads: int
    head_dim: int
    window: Window
    logits_soft_cap: float | None
    alibi: bool | Sequence[float]
    rotary: bool | float
    forward_mode: bool
    deterministic_backward: bool
    implementation: str | None
    context_parallel: ContextParallel | None

    def __post_init__(self) -> None:
        window = self.window
        if isinstance(window, list):
            window = tuple(window)
        sides = window if isinstance(window, tuple) else (window, window)
        if len(sides) != 2 or not all(side is None or _is_size(side) for side in sides):
            raise ValueError(
                f"window must be None, an int in [0, {_checks.INT32_MAX}], or a pair "
                f"(left, right) of such; got {window!r}"
            )
        object.__setattr__(self, "window", window)

        _checks.check_static(
            is_causal=False,
            chunk_size=None,
            logits_soft_cap=self.logits_soft_cap,
            dropout_rate=0.0,
            dropout_key=None,
            prefix_lengths=None,
            implementation=self.implementation,
            flags={
                "forward_mode": self.forward_mode,
                "deterministic_backward": self.deterministic_backward,
            },
        )
        if not isinstance(self.context_parallel, ContextParallel | None):
            raise ValueError(
                "context_parallel must be None or a jax_flash2.ContextParallel; got "
                f"{self.context_parallel!r}"
            )
        if self.alibi is True:
            object.__setattr__(self, "alibi", alibi_slopes(self.num_heads))
        elif self.alibi is not False:
            if np.shape(self.alibi) != (self.num_heads,):
                raise ValueError(
                    f"alibi must be a bool or one slope for each of {self.num_heads} "
                    f"heads; got {self.alibi!r}"
                )
            object.__setattr__(self, "alibi", tuple(float(s) for s in self.alibi))

        if self.rotary is not False:
            base = 10000.0 if self.rotary is True else _number(self.rotary)
            if not 1 < base < math.inf:
                raise ValueError(
                    f"rotary must be a bool or a base > 1; got {self.rotary!r}"
                )
            if self.head_dim % 2:
                raise ValueError(
                    "head_dim must be even where rotary is not False; got "
                    f"{self.head_dim}"
                )
            object.__setattr__(self, "rotary", base)

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache: KeyValueCache | None = None,
        *,
        is_causal: bool,
        shares_inputs: bool,
        mask: jax.Array | None,
        query_positions: jax.Array | None,
        key_positions: jax.Array | None,
        query_seq_lengths: jax.Array | None,
        key_value_seq_lengths: jax.Array | None,
        query_segment_ids: jax.Array | None,
        key_value_segment_ids: jax.Array | None,
        sinks: jax.Array | None,
        dropout_rate: float,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, KeyValueCache | None]:
        """Attention of projected arrays, `(batch..., length, heads, head_dim)`.

        With a cache, key and value are those of the new tokens, and the cache comes
        back with them. A row whose token found no room in the cache is NaN.

        Args:
          shares_inputs: whether row i of query and of key are the same token; lengths
            and positions of the key then default to those of the query.
        """
        batch, new = query.shape[:-3], query.shape[-3]
        parallel = self.context_parallel
        tokens = new if parallel is None else parallel.tokens(new)
        query_seq_lengths = _operand_checks.check_integers(
            "query_seq_lengths", query_seq_lengths, batch, "(batch...)", (0, tokens)
        )
        starts = fits = None
        if cache is not None:
            if parallel is not None:
                raise NotImplementedError(
                    "context_parallel must be None when decoding, since a cache is whole "
                    f"on every device; got {parallel}. A module without it has the same "
                    "parameters."
                )
            refuse_when_decoding(
                key_value_seq_lengths=key_value_seq_lengths,
                query_segment_ids=query_segment_ids,
                key_value_segment_ids=key_value_segment_ids,
            )
            if query_seq_lengths is not None:
                lengths = jnp.broadcast_to(query_seq_lengths, batch)
                query_seq_lengths = jnp.clip(lengths, 0, new)
            cache = KeyValueCache(
                *map(jnp.asarray, cache)
            )  # a checkpoint's are NumPy's
            cache.check(query, key, query_seq_lengths)
            starts = cache.starts
        elif shares_inputs and key_value_seq_lengths is None:
            key_value_seq_lengths = query_seq_lengths

        if shares_inputs and key_positions is None:
            key_positions = query_positions
        if self.rotary:
            name, given = "input_positions", query_positions
            query_at = self._positions(name, given, query, starts)
            name, given = "key_value_positions", key_positions
            key_at = self._positions(name, given, key, starts)
            query = rotate(query, query_at, self.rotary)
            key = rotate(key, key_at, self.rotary)
        elif query_positions is not None or key_positions is not None:
            raise ValueError(
                "input_positions and key_value_positions must be None where rotary is "
                "False, since masks, window and alibi go by the place in the array; "
                "got an array"
            )

        if cache is not None and starts is not None:
            cache = cache.append(key, value, query_seq_lengths)
            key, value = cache.key, cache.value
            key_value_seq_lengths = jnp.minimum(cache.starts, cache.max_length)
            rows = jax.lax.broadcasted_iota(jnp.int32, (*batch, new), len(batch))
            fits = rows + starts[..., None] < cache.max_length
            if query_seq_lengths is not None:
                fits |= rows >= query_seq_lengths[..., None]

        slopes = jnp.array(self.alibi, jnp.float32) if self.alibi else None
        if sinks is not None and sinks.dtype != query.dtype:
            sinks = sinks.astype(jnp.float32)
        attention = flash_attention if parallel is None else parallel.attention
        out: Any = attention(
            query,
            key,
            value,
            mask=boolean_mask(mask),
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=self.window,
            implementation=self.implementation,
            logits_soft_cap=self.logits_soft_cap,
            query_offset=starts,
            query_segment_ids=query_segment_ids,
            key_value_segment_ids=key_value_segment_ids,
            alibi_slopes=slopes,
            sinks=sinks,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            deterministic_backward=self.deterministic_backward,
            forward_mode=self.forward_mode,
        )
        if fits is not None:
            out = jnp.where(fits[..., None, None], out, jnp.array(jnp.nan, out.dtype))
        return out, cache

    def _positions(
        self, name: str, positions: Any, x: jax.Array, starts: Any
    ) -> jax.Array:
        """The positions of x's tokens: as given, or those in the whole sequence, or from
        the cache's length."""
        shape = x.shape[:-2]
        if positions is not None:
            positions = _operand_checks.check_integers(
                name, positions, shape, "(batch..., length)"
            )
            return jnp.broadcast_to(positions, shape)
        if self.context_parallel is not None:
            rows = self.context_parallel.positions(shape[-1])
            return jnp.broadcast_to(
                jnp.expand_dims(rows, tuple(range(len(shape) - 1))), shape
            )
        rows = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        return rows if starts is None else rows + starts[..., None]


def _number(x: Any) -> float:
    """NaN for what is none."""
    try:
        return math.nan if isinstance(x, str) else float(x)
    except (TypeError, ValueError):
        return math.nan


def _is_size(x: Any) -> bool:
    return _checks.is_static_int(x) and 0 <= x <= _checks.INT32_MAX
