"""Where the nnx module keeps its cache: flax's variables, for each batch entry's length."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jax_flash2._cache import KeyValueCache


class CachingAttention(nnx.MultiHeadAttention):
    """`nnx.MultiHeadAttention` with a cache that counts the tokens of each batch entry.

    The variables are flax's: cached_key, cached_value, cache_index.
    """

    def init_cache(
        self, input_shape: Sequence[int], dtype: Any = None, out_sharding: Any = None
    ) -> None:
        """Makes an empty cache, which decoding needs; also empties one.

        Args:
          input_shape: `(batch..., max_length, features)`, as in flax.
          dtype: of keys and values; None is the module's dtype, or param_dtype.
          out_sharding: of keys and values; explicit meshes need that of the keys.

        Sets cached_key and cached_value, `(batch..., max_length, num_kv_heads,
        head_dim)`, and cache_index, int32 `(batch...)`: the tokens held by each entry.
        """
        dtype = dtype or self.dtype or self.param_dtype
        shape = (*input_shape[:-1], self.num_kv_heads, self.head_dim)
        zeros = functools.partial(jnp.zeros, shape, dtype, out_sharding=out_sharding)
        self.cached_key, self.cached_value = nnx.Cache(zeros()), nnx.Cache(zeros())
        self.cache_index = nnx.Cache(jnp.zeros(input_shape[:-2], jnp.int32))

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | Sequence[int] | None = None,
        max_length: int | None = None,
    ) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: if True, dropout is off.
          decode: if True, calls append to the cache.
          batch_size: of a new cache, with max_length.
          max_length: of a new cache, with batch_size.
        """
        super().set_view(deterministic=deterministic, decode=decode)
        if (batch_size is None) != (max_length is None):
            raise ValueError(
                "batch_size and max_length must be given together; got "
                f"{batch_size=} and {max_length=}"
            )
        if batch_size is not None and max_length is not None:
            batch = (batch_size,) if isinstance(batch_size, int) else batch_size
            self.init_cache((*batch, max_length, self.in_features))

    def _read_cache(self) -> KeyValueCache:
        variables = self._cache_variables()
        return KeyValueCache(*(variable[...] for variable in variables))

    def _write_cache(self, cache: KeyValueCache) -> None:
        for variable, array in zip(self._cache_variables(), cache, strict=True):
            variable[...] = array

    def _cache_variables(self) -> tuple[Any, ...]:
        variables = (self.cached_key, self.cached_value, self.cache_index)
        if any(variable is None for variable in variables):
            raise ValueError(
                "decode needs a cache; got none. Call init_cache((batch..., "
                "max_length, features)) first."
            )
        return variables
