"""The key and value cache of autoregressive decoding, independent of nnx and linen."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far, each batch entry with a number of its own.

    Attributes:
      key, value: `(batch..., max_length, num_kv_heads, head_dim)`.
      index: int32 `(batch...)`, how many tokens each batch entry holds. A scalar, as in
        flax's caches, means that all entries hold equally many and always will.
    """

    key: jax.Array
    value: jax.Array
    index: jax.Array

    @property
    def batch(self) -> tuple[int, ...]:
        return self.key.shape[:-3]

    @property
    def max_length(self) -> int:
        return self.key.shape[-3]

    @property
    def starts(self) -> jax.Array:
        """The slot of the next token, for each batch entry: int32 `(batch...)`."""
        return jnp.broadcast_to(self.index, self.batch)

    def check(
        self, query: jax.Array, key: jax.Array, lengths: jax.Array | None
    ) -> None:
        """Refuses tokens that do not fit, in so far as it is known before running."""
        new = query.shape[-3]
        expected = (*self.batch, new, *self.key.shape[-2:])
        if key.shape != expected:
            raise ValueError(
                f"when decoding, keys must have shape {expected}, for a cache of shape "
                f"{self.key.shape} and {new} query rows; got {key.shape}. Initialise "
                "the cache for this batch, and decode self-attention only."
            )
        if key.dtype != self.key.dtype:
            raise ValueError(
                f"the cache must have the dtype of the keys, {key.dtype}; got "
                f"{self.key.dtype}. Initialise the cache or the module with that dtype."
            )
        if self.index.shape not in ((), self.batch):
            raise ValueError(
                f"cache_index must have shape {self.batch} or (); got "
                f"{self.index.shape}"
            )
        if lengths is not None and self.index.shape != self.batch:
            raise ValueError(
                "query_seq_lengths needs a cache_index for each batch entry, of shape "
                f"{self.batch}; got a scalar one, as in flax's caches. Initialise the "
                "cache with this module."
            )
        used, taken = (
            _maximum(self.index),
            new if lengths is None else _maximum(lengths),
        )
        if used + taken > self.max_length:
            raise ValueError(
                f"the cache must hold all tokens, at most {self.max_length}; got up to "
                f"{taken} new ones where it holds up to {used}. Make a longer one."
            )

    def append(
        self, key: jax.Array, value: jax.Array, lengths: jax.Array | None
    ) -> "KeyValueCache":
        """The cache with each batch entry's next tokens, the first `lengths` of key.

        Tokens past max_length are dropped, while the index counts on: an overflow that
        happens inside jit stays visible, and `AttentionOptions.attend` makes it NaN.
        """
        new = key.shape[-3]
        rows = jax.lax.broadcasted_iota(jnp.int32, (*self.batch, new), len(self.batch))
        slots = self.starts[..., None] + rows
        if lengths is not None:
            slots = jnp.where(rows < lengths[..., None], slots, self.max_length)
        spec = jax.typeof(key).sharding.spec[:-2]
        if any(spec):  # With explicit sharding, vmap wants one for the whole batch.
            slots = jax.sharding.reshard(slots, jax.P(*spec))

        def write(cached, tokens, slots):
            return cached.at[slots].set(tokens, mode="drop")

        for _ in self.batch:
            write = jax.vmap(write)
        return KeyValueCache(
            key=write(self.key, key, slots),
            value=write(self.value, value, slots),
            index=self.index + (new if lengths is None else lengths),
        )


def _maximum(x: jax.Array) -> int:
    """The largest element; 0 where it is not known: inside jit, or on another host."""
    known = not isinstance(x, Tracer) and x.is_fully_addressable and x.size
    return int(x.max()) if known else 0
