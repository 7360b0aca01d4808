"""What "equal" means: the rule of accuracy, a bound, and bitwise.

The rule, for an output or a gradient in a narrow dtype: at most twice the error of the
*baseline* (dense attention in the same dtype, with float32 scores) against the float32
reference on the same inputs, plus 1e-5, plus one unit in the last place. Everywhere NaN
and infinities must stand in the same places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cases import Inputs, results

# Gradients of operands that many scores share.
SUMMED = ("dscale", "dbias", "dalibi_slopes", "dsinks")


def assert_follows_the_rule(
    inputs: Inputs, ours: Mapping[str, Any], note: str = ""
) -> None:
    """``ours``, results on narrow inputs, against the reference and the baseline."""
    assert_follow_the_rule(inputs, {note: ours})


def assert_follow_the_rule(
    inputs: Inputs,
    several: Mapping[str, Mapping[str, Any]],
    others: Sequence[Inputs] = (),
) -> None:
    """The same for results of several implementations, each with a note.

    ``others`` are more draws of the call. The baseline's error of a single sum is a single
    draw, which may be near nothing: then its largest in all of them counts.
    """
    draws = [
        (results(x.astype(jnp.float32), "reference"), results(x, function=dense))
        for x in (inputs, *others)
    ]
    wide, baseline = draws[0]
    dtype = inputs.wrt["query"].dtype
    for note, ours in several.items():
        for name, x in ours.items():
            of_sum = dtype if name in SUMMED else None
            what = f"{note} {name}".strip()
            least = 0.0
            if of_sum is not None and others:
                least = max(
                    np.abs(_wide(b[name]) - _wide(w[name])).max() for w, b in draws
                )
            assert_accurate(x, wide[name], baseline[name], what, of_sum, least)


def assert_accurate(
    ours: Any,
    reference: Any,
    baseline: Any,
    name: str = "",
    sum_of: Any = None,
    least: float = 0.0,
) -> None:
    """The rule of accuracy for one array; ``least`` is the least error of a baseline.

    Some gradients are a few numbers, even one, each a sum over very many scores: the
    baseline's error there is a single draw of what it could be. ``sum_of``, the dtype of
    the arrays that went in, gives them its last place, of the largest of them.
    """
    unit = _ulp(ours)
    if sum_of is not None:
        largest = np.full(unit.shape, np.nanmax(np.abs(_wide(reference)), initial=0.0))
        unit = np.maximum(unit, _ulp(largest, sum_of))
    ours, reference, baseline = map(_wide, (ours, reference, baseline))
    _same_places(ours, reference, name)
    finite = np.isfinite(reference)
    if not finite.any():
        return
    ours, reference, baseline, unit = (
        x[finite] for x in (ours, reference, baseline, unit)
    )
    bound = 2 * max(np.abs(baseline - reference).max(), least)
    bound += 1e-5 * max(1.0, np.abs(reference).max())
    error = np.abs(ours - reference)
    worst = int(np.argmax(error - unit))
    assert error[worst] <= bound + unit[worst], (
        f"{name}: {ours[worst]} should be {reference[worst]}; error {error[worst]:.3g}, "
        f"allowed {bound:.3g} and {unit[worst]:.3g} for the last place"
    )


def assert_close(
    ours: Any, reference: Any, bound: float, name: str = "", *, relative: bool = False
) -> None:
    """``max |ours - reference| <= bound``, times ``max(1, max |reference|)`` if relative."""
    ours, reference = _wide(ours), _wide(reference)
    _same_places(ours, reference, name)
    finite = np.isfinite(reference)
    if not finite.any():
        return
    if relative:
        bound *= max(1.0, np.abs(reference[finite]).max())
    error = np.abs(np.where(finite, ours, 0) - np.where(finite, reference, 0))
    at = np.unravel_index(np.argmax(error), error.shape)
    assert error[at] <= bound, (
        f"{name}[{', '.join(map(str, at))}]: {ours[at]} should be {reference[at]}; "
        f"error {error[at]:.3g}, allowed {bound:.3g}"
    )


def assert_all_close(
    ours: Mapping[str, Any],
    reference: Mapping[str, Any],
    out: float = 1e-5,
    gradients: float = 1e-4,
    *,
    relative: bool = False,
) -> None:
    """`assert_close` for results by name; gradients' names begin with d.

    Gradients that are sums over many scores are judged relative to their size.
    """
    assert ours.keys() == reference.keys()
    for name, x in ours.items():
        bound = gradients if name.startswith("d") else out
        scaled = relative or name in SUMMED
        assert_close(x, reference[name], bound, name, relative=scaled)


def assert_bitwise_equal(a: Any, b: Any, name: str = "") -> None:
    """Two trees of arrays with the same bytes; tells where they first differ."""
    a_leaves, a_tree = jax.tree.flatten_with_path(a)
    b_leaves, b_tree = jax.tree.flatten_with_path(b)
    assert a_tree == b_tree, f"{name}: {a_tree} and {b_tree} differ"
    for (path, x), (_, y) in zip(a_leaves, b_leaves, strict=True):
        where = name + jax.tree_util.keystr(path)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), (
            f"{where}: {x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
        )
        bits = np.dtype(f"u{x.dtype.itemsize}")
        differ = np.ascontiguousarray(x).view(bits) != np.ascontiguousarray(y).view(
            bits
        )
        if differ.any():
            at = tuple(map(int, np.argwhere(differ.reshape(x.shape))[0]))
            raise AssertionError(
                f"{where}: {int(differ.sum())} of {x.size} elements differ, the first at "
                f"{list(at)}: {x[at]} and {y[at]}"
            )


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _same_places(ours: np.ndarray, reference: np.ndarray, name: str) -> None:
    assert ours.shape == reference.shape, (
        f"{name} has shape {list(ours.shape)}; it should be {list(reference.shape)}"
    )
    for what, is_what in (
        ("NaN", np.isnan),
        ("inf", np.isposinf),
        ("-inf", np.isneginf),
    ):
        differ = is_what(ours) != is_what(reference)
        if differ.any():
            at = tuple(map(int, np.argwhere(differ)[0]))
            raise AssertionError(
                f"{name}: {what} in different places ({int(differ.sum())} of "
                f"{differ.size}), first at {list(at)}: {ours[at]} should be {reference[at]}"
            )


def _ulp(x: Any, dtype: Any = None) -> np.ndarray:
    """The distance from each element to the next of the dtype, as float64."""
    info = jnp.finfo(np.asarray(x).dtype if dtype is None else dtype)
    size = np.abs(np.nan_to_num(_wide(x), posinf=0.0, neginf=0.0))
    size = np.maximum(size, float(info.smallest_normal))
    return 2.0 ** np.floor(np.log2(size)) * float(info.eps)


# ----------------------------------------------------------------------------- baseline


@jax.custom_vjp
def _rounded_gradient(x: jax.Array, like: jax.Array) -> jax.Array:
    """``x``, whose cotangent is rounded to the dtype of ``like``."""
    del like
    return x


_rounded_gradient.defvjp(
    lambda x, like: (x, like),
    lambda like, g: (g.astype(like.dtype).astype(g.dtype), jnp.zeros_like(like)),
)


@jax.custom_vjp
def _weighted(
    s: jax.Array, lse: jax.Array, value: jax.Array, like: jax.Array
) -> jax.Array:
    """P @ V for P = exp(S - L), in the dtype of ``like``."""
    return _weighted_forward(s, lse, value, like)[0]


def _weighted_forward(
    s: jax.Array, lse: jax.Array, value: jax.Array, like: jax.Array
) -> Any:
    p = jnp.exp(s - lse)
    p_narrow = p.astype(like.dtype).astype(s.dtype)
    out = jnp.einsum("...hls,...she->...lhe", p_narrow, value, precision="highest")
    out = out.astype(like.dtype)
    return out, (p, p_narrow, value, out, like)


def _weighted_backward(residuals: Any, dout: jax.Array) -> Any:
    """What was stored narrow comes back narrow: P, and the output."""
    p, p_narrow, value, out, like = residuals
    dout, out = dout.astype(p.dtype), out.astype(p.dtype)
    dvalue = jnp.einsum("...hls,...lhe->...she", p_narrow, dout, precision="highest")
    dp = jnp.einsum("...lhe,...she->...hls", dout, value, precision="highest")
    dlse = -jnp.swapaxes((dout * out).sum(-1), -1, -2)[..., None]
    return p * dp, dlse, dvalue, jnp.zeros_like(like)


_weighted.defvjp(_weighted_forward, _weighted_backward)


def dense(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: Any = None,
    logits_soft_cap: float | None = None,
    query_offset: Any = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_max_logit: bool = False,
    return_residual: bool = True,
    implementation: str | None = None,
    deterministic_backward: bool = False,
    **masks: Any,
) -> tuple[jax.Array, ...]:
    """The baseline: what a careful dense attention in the inputs' dtype computes.

    Scores, softmax and sums in float32; the operands of every matrix product, so also
    the probabilities and the scores' gradient, rounded to the inputs' dtype, and the
    output as it is stored, also where the softmax's gradient takes it (the paper's D).
    """
    del return_residual, implementation, deterministic_backward
    dtype, wide = query.dtype, jnp.float32
    *batch, q_length, heads, head_dim = query.shape
    kv_length, kv_heads = key.shape[-3:-1]
    query, key, value = (x.astype(wide) for x in (query, key, value))
    key, value = (jnp.repeat(x, heads // kv_heads, -2) for x in (key, value))
    query = _zero_past(query, masks.get("query_seq_lengths"), batch)
    key = _zero_past(key, masks.get("key_value_seq_lengths"), batch)
    value = _zero_past(value, masks.get("key_value_seq_lengths"), batch)

    s = jnp.einsum("...lhd,...shd->...hls", query, key, precision="highest")
    s = _rounded_gradient(s, jnp.zeros((), dtype))
    s *= head_dim**-0.5 if scale is None else jnp.asarray(scale, wide)
    if logits_soft_cap is not None:
        s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    offset = jnp.zeros((), jnp.int32) if query_offset is None else query_offset
    offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), batch)
    row = jnp.arange(q_length, dtype=jnp.int32)
    i = offset[..., None, None, None] + _of_rank(row[:, None], len(batch) + 3)
    j = _of_rank(jnp.arange(kv_length, dtype=jnp.int32), len(batch) + 3)
    rank = len(batch) + 1
    if bias is not None:
        s += _of_rank(bias, s.ndim).astype(wide)
    if alibi_slopes is not None:
        slopes = _of_rank(alibi_slopes, rank).astype(wide)[..., None, None]
        s -= slopes * jnp.abs(i - j).astype(wide)
    s = jnp.where(_seen(i, j, row, batch, **masks), s, -jnp.inf)
    if mask is not None:
        s = jnp.where(_of_rank(mask, s.ndim), s, -jnp.inf)

    largest = s.max(-1, keepdims=True)
    logits = s
    if sinks is not None:
        sinks = _of_rank(sinks, rank).astype(wide)[..., None, None]
        logits = jnp.concatenate([s, jnp.broadcast_to(sinks, largest.shape)], -1)
    shift = logits.max(-1, keepdims=True)
    shift = jax.lax.stop_gradient(jnp.where(shift == -jnp.inf, 0, shift))
    total = jnp.exp(logits - shift).sum(-1, keepdims=True)
    empty = total == 0
    lse = jnp.where(empty, 0, shift + jnp.log(jnp.where(empty, 1, total)))
    out = _weighted(s, lse, value, jnp.zeros((), dtype))
    lse = jnp.where(empty, -jnp.inf, lse)
    out = _zero_past(out, masks.get("query_seq_lengths"), batch)
    results = (out, jnp.swapaxes(lse[..., 0], -1, -2))
    return (*results, largest.max((-1, -2))) if return_max_logit else results


def _of_rank(x: jax.Array, rank: int) -> jax.Array:
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _zero_past(x: jax.Array, lengths: Any, batch: list[int]) -> jax.Array:
    if lengths is None:
        return x
    index = _of_rank(jnp.arange(x.shape[-3], dtype=jnp.int32), len(batch) + 1)
    lengths = jnp.broadcast_to(_of_rank(jnp.asarray(lengths), len(batch)), batch)
    return jnp.where((index < lengths[..., None])[..., None, None], x, 0)


def _seen(
    i: jax.Array,
    j: jax.Array,
    row: jax.Array,
    batch: list[int],
    *,
    is_causal: bool = False,
    prefix_lengths: Any = None,
    local_window_size: Any = None,
    chunk_size: int | None = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    query_segment_ids: Any = None,
    key_value_segment_ids: Any = None,
) -> jax.Array:
    """Who sees whom, of shape ``(batch..., 1, rows, columns)``."""

    def of_batch(x: Any) -> jax.Array:
        x = jnp.broadcast_to(_of_rank(jnp.asarray(x, jnp.int32), len(batch)), batch)
        return x[..., None, None, None]

    seen = jnp.ones(jnp.broadcast_shapes(i.shape, j.shape), bool)
    if is_causal:
        seen &= (
            j <= i
            if prefix_lengths is None
            else (j <= i) | (j < of_batch(prefix_lengths))
        )
    if local_window_size is not None:
        sides = local_window_size
        left, right = (sides, sides) if isinstance(sides, int) else sides
        seen &= True if left is None else i - j <= left
        seen &= True if right is None else j - i <= right
    if chunk_size is not None:
        seen &= jnp.floor_divide(i, chunk_size) == jnp.floor_divide(j, chunk_size)
    if key_value_seq_lengths is not None:
        seen &= j < of_batch(key_value_seq_lengths)
    if query_seq_lengths is not None:
        seen &= _of_rank(row[:, None], i.ndim) < of_batch(query_seq_lengths)
    if query_segment_ids is not None:
        ids = key_value_segment_ids
        ids = query_segment_ids if ids is None else ids
        a, b = (_of_rank(x, len(batch) + 1) for x in (query_segment_ids, ids))
        seen &= a[..., None, :, None] == b[..., None, None, :]
    return seen
