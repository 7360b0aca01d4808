"""Every rule that the arguments of a call must obey: here all but the optional operands'.

Those are in `_operand_checks`. Arguments are judged in these two files alone; each message
names the argument, the rule and the value. Below them everything may rely on the rules.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

IMPLEMENTATIONS = (None, "cuda", "cuda_sm80", "blockwise", "reference")
KERNEL_DTYPES = ("float16", "bfloat16", "float32")
INT32_MAX = 2**31 - 1


def require(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise ValueError(f"flash_attention: {message}")


def describe(x: Any) -> str:
    return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"


def is_static_int(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def check_arrays(query: Any, key: Any, value: Any, implementation: str | None) -> None:
    """The rules of query, key and value."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        require(
            hasattr(x, "shape") and hasattr(x, "dtype"),
            f"{name} must be an array; got {type(x).__name__}",
        )
        require(
            len(x.shape) >= 3,
            f"{name} must have shape (batch..., length, heads, head_dim); "
            f"got {describe(x)}",
        )
        require(
            all(isinstance(n, int) for n in x.shape[-2:]),
            f"{name} must have heads and head_dim that are numbers (batch and length may "
            f"be symbolic); got {describe(x)}",
        )
    for name, x in (("key", key), ("value", value)):
        require(
            x.dtype == query.dtype,
            f"{name} must have query's dtype, {jnp.dtype(query.dtype).name}; "
            f"got {describe(x)}",
        )
        require(
            x.shape[:-3] == query.shape[:-3],
            f"{name} must have query's batch axes, {list(query.shape[:-3])}; "
            f"got {describe(x)}",
        )
    dtypes = KERNEL_DTYPES
    if implementation in ("blockwise", "reference"):
        dtypes = (*dtypes, "float64")
    name = jnp.dtype(query.dtype).name
    if name == "float64":
        require(
            "float64" in dtypes,
            "query may be float64 only with implementation='blockwise' or "
            f"'reference'; got {describe(query)} with {implementation=}",
        )
    require(
        name != "float64" or jax.dtypes.canonicalize_dtype(query.dtype) == query.dtype,
        "query may be float64 only where jax_enable_x64 is True, else it becomes "
        f"float32; got {describe(query)}",
    )
    require(
        name in dtypes,
        f"query must be one of {', '.join(dtypes)}; got {describe(query)}",
    )
    require(
        key.shape[-1] == query.shape[-1],
        f"key must have query's head_dim, {query.shape[-1]}; got {describe(key)}",
    )
    require(
        min(query.shape[-1], value.shape[-1]) > 0,
        f"head_dim must be positive; got query {describe(query)} and value "
        f"{describe(value)}",
    )
    require(
        value.shape[-3:-1] == key.shape[-3:-1],
        f"value must have key's length and heads, {list(key.shape[-3:-1])}; "
        f"got {describe(value)}",
    )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    require(
        heads > 0 and kv_heads > 0 and heads % kv_heads == 0,
        f"key's heads must divide query's heads, {heads}; got {kv_heads}",
    )


def check_scale(scale: Any, head_dim: int) -> tuple[float | None, Any]:
    """The static scale, or None and the traced one."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim), None
    if isinstance(scale, (int, float, np.floating, np.integer)):
        require(
            not isinstance(scale, bool) and math.isfinite(scale),
            f"scale must be finite; got {scale!r}",
        )
        return float(scale), None
    require(
        hasattr(scale, "shape") and jnp.issubdtype(scale.dtype, jnp.floating),
        "scale must be a float or a floating scalar; got "
        f"{describe(scale) if hasattr(scale, 'dtype') else repr(scale)}",
    )
    require(scale.shape == (), f"scale must be a scalar; got {describe(scale)}")
    return None, scale


def check_window(window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    sides = (window, window) if is_static_int(window) else window
    rule = "local_window_size must be an int or a pair (left, right) of ints or None"
    require(
        isinstance(sides, (tuple, list)) and len(sides) == 2, f"{rule}; got {window!r}"
    )
    for side in sides:
        require(side is None or is_static_int(side), f"{rule}; got {window!r}")
        require(
            side is None or 0 <= side <= INT32_MAX,
            f"local_window_size must lie in [0, {INT32_MAX}]; got {window!r}",
        )
    left, right = (None if side is None else int(side) for side in sides)
    return left, right


def check_static(
    *,
    is_causal: Any,
    chunk_size: Any,
    logits_soft_cap: Any,
    dropout_rate: Any,
    dropout_key: Any,
    prefix_lengths: Any,
    implementation: Any,
    flags: dict[str, Any],
) -> None:
    """The rules of everything that is decided before tracing."""
    require(
        implementation in IMPLEMENTATIONS,
        "implementation must be one of "
        f"{', '.join(map(repr, IMPLEMENTATIONS))}; got {implementation!r}",
    )
    for name, flag in {"is_causal": is_causal, **flags}.items():
        require(
            isinstance(flag, (bool, np.bool_)), f"{name} must be a bool; got {flag!r}"
        )
    require(
        chunk_size is None
        or (is_static_int(chunk_size) and 0 < chunk_size <= INT32_MAX),
        f"chunk_size must be an int in [1, {INT32_MAX}]; got {chunk_size!r}",
    )
    number = (int, float, np.floating, np.integer)
    require(
        logits_soft_cap is None
        or (
            isinstance(logits_soft_cap, number)
            and not isinstance(logits_soft_cap, bool)
            and 0 < logits_soft_cap < math.inf
        ),
        "logits_soft_cap must be a positive finite Python float; "
        f"got {logits_soft_cap!r}",
    )
    require(
        isinstance(dropout_rate, number)
        and not isinstance(dropout_rate, bool)
        and 0 <= dropout_rate < 1,
        f"dropout_rate must be a Python float in [0, 1); got {dropout_rate!r}",
    )
    require(
        dropout_rate == 0 or dropout_key is not None,
        f"dropout_key must be given where dropout_rate is not 0; got {dropout_rate=}",
    )
    require(
        prefix_lengths is None or bool(is_causal),
        "prefix_lengths needs is_causal=True (keys before the prefix's end are visible "
        f"beside the causal ones); got {is_causal=}",
    )


def check_key(dropout_key: Any) -> None:
    legacy = getattr(dropout_key, "dtype", None) == jnp.uint32
    typed = hasattr(dropout_key, "dtype") and jnp.issubdtype(
        dropout_key.dtype, jax.dtypes.prng_key
    )
    one = typed and dropout_key.shape == ()
    if legacy and dropout_key.ndim == 1:
        try:
            one = jax.random.wrap_key_data(dropout_key).shape == ()
        except TypeError:  # not as many words as keys of the default kind have
            one = False
    got = f"{dropout_key.dtype}{list(dropout_key.shape)}" if legacy or typed else None
    require(
        one,
        "dropout_key must be one key of jax.random.key or jax.random.PRNGKey; got "
        f"{got or repr(dropout_key)}",
    )
