"""What one call is: its static facts, its arrays, and every rule they must obey.

`check` is the only place where arguments are judged; each message names the argument,
the rule and the value. Below it everything may rely on the rules.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jax_flash2._sequence import Ring

IMPLEMENTATIONS = (None, "cuda", "cuda_sm80", "blockwise", "reference")
KERNEL_DTYPES = ("float16", "bfloat16", "float32")
_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static facts of a call; hashable, a parameter of the primitives.

    Attributes:
      scale: factor of the scores, or None where it is an operand.
      window: keys visible to the left and right of a query, None where unbounded.
      soft_cap: c in ``c * tanh(x / c)``, or None.
      implementation: as in `flash_attention`.
      ring: where the arrays are one device's part of a sequence, inside a
        `jax.shard_map`, how that lies on the devices.
    """

    scale: float | None = None
    is_causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    chunk_size: int | None = None
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    deterministic_backward: bool = False
    return_max_logit: bool = False
    implementation: str | None = None
    ring: Ring | None = None


class Operands(NamedTuple):
    """The arrays of a call; absent ones are None. All share the number of batch axes.

    Batch axes have full size or 1. `AXES` gives the axes after them.
    """

    query: Any = None
    key: Any = None
    value: Any = None
    scale: Any = None
    bias: Any = None
    mask: Any = None
    query_seq_lengths: Any = None
    key_value_seq_lengths: Any = None
    query_offset: Any = None
    prefix_lengths: Any = None
    query_segment_ids: Any = None
    key_value_segment_ids: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    dropout_streams: Any = None
    origin: Any = None


# The axes after the batch axes: l query length, s key length, h query heads, n key
# heads, d head_dim, e value's head_dim, r the two words of a dropout stream or the first
# row and the first key of a block of a longer sequence. An axis of l, s or h may have
# size 1 in bias, mask, slopes, sinks and streams (broadcast).
AXES = Operands(
    query="lhd",
    key="snd",
    value="sne",
    scale="",
    bias="hls",
    mask="hls",
    query_seq_lengths="",
    key_value_seq_lengths="",
    query_offset="",
    prefix_lengths="",
    query_segment_ids="l",
    key_value_segment_ids="s",
    alibi_slopes="h",
    sinks="h",
    dropout_streams="hr",
    origin="r",
)
# Operands with gradients beside query, key and value.
SIDE_OPERANDS = ("scale", "bias", "alibi_slopes", "sinks")
DIFFERENTIABLE = ("query", "key", "value", *SIDE_OPERANDS)
# Axes after the batch axes of the forward's results and of what goes with them.
RESULT_AXES = {"out": "lhe", "lse": "hl", "dout": "lhe", "dlse": "hl", "largest": "h"}
# A tangent is named after its array, with one of these before it: t and u are the two
# directions of the derivatives, w marks what comes out along both.
_TANGENTS = ("t_", "u_", "w_")


def base_name(name: str) -> str:
    """``t_query`` is a tangent of ``query``."""
    return name[2:] if name.startswith(_TANGENTS) else name


def axes_of(name: str) -> str:
    """The axes after the batch axes of an operand, a result or a tangent of one."""
    base = base_name(name)
    return RESULT_AXES[base] if base in RESULT_AXES else getattr(AXES, base)


def joint(sizes: Iterable[Any]) -> Any:
    """The size of an axis along which some arrays broadcast: the one that is not 1, be it
    0 or a symbol of `jax.export`, which has no maximum with a number."""
    return next((n for n in sizes if n != 1), 1)


def accumulator(dtype: Any) -> Any:
    """The dtype of scores, sums and logsumexps: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def require(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise ValueError(f"flash_attention: {message}")


def describe(x: Any) -> str:
    return f"{jnp.dtype(x.dtype).name}{list(x.shape)}"


def _is_static_int(x: Any) -> bool:
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
    if _is_static_int(x) or isinstance(x, (list, tuple)):
        x = np.asarray(x)
    require(
        hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.integer),
        f"{name} must be an int or an integer array; got "
        f"{describe(x) if hasattr(x, 'dtype') else repr(x)}",
    )
    if isinstance(x, np.ndarray | np.integer):
        low, high = bounds or (-_INT32_MAX - 1, _INT32_MAX)
        if not isinstance(high, int):  # a symbol of jax.export, known when it runs
            high = _INT32_MAX
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
    sides = (window, window) if _is_static_int(window) else window
    rule = "local_window_size must be an int or a pair (left, right) of ints or None"
    require(
        isinstance(sides, (tuple, list)) and len(sides) == 2, f"{rule}; got {window!r}"
    )
    for side in sides:
        require(side is None or _is_static_int(side), f"{rule}; got {window!r}")
        require(
            side is None or 0 <= side <= _INT32_MAX,
            f"local_window_size must lie in [0, {_INT32_MAX}]; got {window!r}",
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
        chunk_size is None or (_is_static_int(chunk_size) and chunk_size > 0),
        f"chunk_size must be a positive int; got {chunk_size!r}",
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
    require(
        (typed and dropout_key.shape == ()) or (legacy and dropout_key.ndim == 1),
        "dropout_key must be one key of jax.random.key or jax.random.PRNGKey; got "
        f"{describe(dropout_key) if legacy else repr(dropout_key)}",
    )


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
