"""The rules of a call's optional operands: what they broadcast to, dtypes, values.

Values are judged only where that needs no device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash2._checks import INT32_MAX, describe, is_static_int, require


def _broadcastable(name: str, x: Any, shape: tuple[int, ...], meaning: str) -> Any:
    """``x`` with axes of size 1 before its own, so that its rank is that of ``shape``."""
    missing = len(shape) - len(x.shape)
    fits = missing >= 0 and all(
        a in (1, b) for a, b in zip(x.shape, shape[missing:], strict=True)
    )
    require(
        fits, f"{name} must broadcast to {meaning} = {list(shape)}; got {describe(x)}"
    )
    return jnp.expand_dims(x, tuple(range(missing)))


def _array_of(numbers: Any) -> Any:
    """As an array, or what was given where that is ragged or traced."""
    try:
        x = np.asarray(numbers)
    except (TypeError, ValueError):
        return numbers
    return x if x.size else x.astype(np.int32)


def check_integers(
    name: str,
    x: Any,
    shape: tuple[int, ...],
    meaning: str,
    bounds: tuple[int, int] | None = None,
) -> jax.Array | None:
    """An int32 array that broadcasts to ``shape``, from an int or an integer array.

    Values are judged only where that needs no device: Python and NumPy ones.
    """
    if x is None:
        return None
    if is_static_int(x) or isinstance(x, (list, tuple)):
        x = _array_of(x)
    require(
        hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.integer),
        f"{name} must be an int or an integer array; got "
        f"{describe(x) if hasattr(x, 'dtype') else repr(x)}",
    )
    if isinstance(x, np.ndarray | np.integer):
        low, high = bounds or (-INT32_MAX - 1, INT32_MAX)
        if not isinstance(high, int):  # a symbol of jax.export, known when it runs
            high = INT32_MAX
        flat = np.atleast_1d(x)
        bad = flat[(flat < low) | (flat > high)]
        require(
            bad.size == 0,
            f"{name} must lie in [{low}, {high}]; got {bad[:1].tolist()}",
        )
        x = jnp.asarray(x.astype(np.int32))
    else:
        narrow = jnp.iinfo(x.dtype).bits < 32 or x.dtype == jnp.int32
        require(narrow, f"{name} must be int32 or narrower; got {describe(x)}")
        x = x.astype(jnp.int32)
    return _broadcastable(name, x, shape, meaning)


def check_floats(
    name: str, x: Any, query: Any, shape: tuple[int, ...], meaning: str
) -> jax.Array | None:
    """A float array of query's dtype or float32 that broadcasts to ``shape``."""
    if x is None:
        return None
    require(
        hasattr(x, "shape") and hasattr(x, "dtype"),
        f"{name} must be an array; got {type(x).__name__}",
    )
    require(
        x.dtype in (query.dtype, jnp.float32),
        f"{name} must be float32 or query's {jnp.dtype(query.dtype).name}; "
        f"got {describe(x)}",
    )
    return _broadcastable(name, jnp.asarray(x), shape, meaning)


def check_mask(mask: Any, shape: tuple[int, ...]) -> Any:
    if mask is None:
        return None
    require(
        hasattr(mask, "dtype") and mask.dtype == jnp.bool_,
        "mask must be a boolean array, True where a key is visible (an additive one "
        f"is a bias); got {describe(mask) if hasattr(mask, 'dtype') else repr(mask)}",
    )
    meaning = "(batch..., heads, query length, key length)"
    return _broadcastable("mask", jnp.asarray(mask), shape, meaning)


def check_segments(
    query_ids: Any, key_ids: Any, batch: tuple[int, ...], q_length: int, kv_length: int
) -> tuple[Any, Any]:
    if query_ids is None and key_ids is None:
        return None, None
    if key_ids is None:
        require(
            q_length == kv_length,
            "key_value_segment_ids must be given where query's length is not key's; "
            f"got lengths {q_length} and {kv_length}",
        )
        key_ids = query_ids
    require(
        query_ids is not None,
        "query_segment_ids must be given with key_value_segment_ids; got None",
    )
    shape, meaning = (*batch, q_length), "(batch..., query length)"
    query_ids = check_integers("query_segment_ids", query_ids, shape, meaning)
    shape, meaning = (*batch, kv_length), "(batch..., key length)"
    key_ids = check_integers("key_value_segment_ids", key_ids, shape, meaning)
    # One id for a whole sequence may come as length 1; the code below wants each row's.
    query_ids = jnp.broadcast_to(query_ids, (*query_ids.shape[:-1], q_length))
    key_ids = jnp.broadcast_to(key_ids, (*key_ids.shape[:-1], kv_length))
    return query_ids, key_ids
