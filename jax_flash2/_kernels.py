"""The CUDA kernels: what they serve, and the calls of them.

Operands, results and attributes are what `cuda/handlers.cc` reads, by name and by exact
type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash2 import _ffi
from jax_flash2._spec import AttentionSpec, Operands, joint

_MAX_HEAD_DIM = 256
_MAX_POSITION = 2**29 - 1  # kMaxPosition of cuda/problem.h
# What the handler takes beside query, key and value, and in which dtype.
_SIDES = {
    "scale": jnp.float32,
    "query_offset": jnp.int32,
    "query_seq_lengths": jnp.int32,
    "key_value_seq_lengths": jnp.int32,
    "prefix_lengths": jnp.int32,
    "query_segment_ids": jnp.int32,
    "key_value_segment_ids": jnp.int32,
    "alibi_slopes": jnp.float32,
    "sinks": jnp.float32,
}


def forward_lack(spec: AttentionSpec, x: Operands) -> str | None:
    """What of this call the forward kernels cannot do, as a sentence, or None."""
    dtype = jnp.dtype(x.query.dtype).name
    head_dim = max(x.query.shape[-1], x.value.shape[-1])
    lengths = x.query.shape[-3], x.key.shape[-3]
    if dtype not in ("float16", "bfloat16"):
        return f"the CUDA kernels take float16 and bfloat16; got {dtype}"
    if head_dim > _MAX_HEAD_DIM:
        return f"the CUDA kernels take head_dim up to {_MAX_HEAD_DIM}; got {head_dim}"
    for length in lengths:
        if not isinstance(length, int):
            return (
                "the CUDA kernels take a symbolic batch (jax.export) and no symbolic "
                f"length; got {length}"
            )
        if length > _MAX_POSITION:
            return f"the CUDA kernels take lengths up to {_MAX_POSITION}; got {length}"
    for name in ("bias", "mask"):
        if getattr(x, name) is not None:
            return f"the CUDA kernels take no dense {name}"
    if spec.dropout_rate:
        return f"the CUDA kernels have no dropout; got {spec.dropout_rate=}"
    if spec.return_max_logit:
        return "the CUDA kernels have no return_max_logit"
    return None


def forward(spec: AttentionSpec, x: Operands) -> list[jax.Array]:
    """Output ``(b, l, h, e)`` and logsumexp ``(b, h, l)`` by the forward kernels.

    One batch axis; `forward_lack` must have found nothing. To be traced by a lowering.
    """
    value_dim = x.value.shape[-1]
    query, key, value = (_pad_head_dim(a) for a in (x.query, x.key, x.value))
    batch, length, heads, _ = _query_shape(x)
    call = jax.ffi.ffi_call(
        _ffi.FORWARD,
        (
            jax.ShapeDtypeStruct((batch, length, heads, value.shape[-1]), query.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
            jax.ShapeDtypeStruct((_forward_bytes(x, key.shape[1]),), jnp.uint8),
        ),
    )
    sides = _sides(x, _SIDES)
    out, lse, _ = call(
        query,
        key,
        value,
        *sides.values(),
        operands=",".join(sides),
        **_attributes(spec),
    )
    return [out[..., :value_dim], lse]


def backward_lack(spec: AttentionSpec, x: Operands, wrt: tuple[str, ...]) -> str | None:
    """What of this call the backward kernels cannot do, as a sentence, or None."""
    for name in wrt:
        if name != "scale":
            return (
                f"the CUDA kernels have no gradient of {name}, and jax.lax.stop_gradient "
                "of it asks for none"
            )
    return forward_lack(dataclasses.replace(spec, return_max_logit=False), x)


def backward(
    spec: AttentionSpec, x: Operands, rows: dict[str, jax.Array], wrt: tuple[str, ...]
) -> list[jax.Array]:
    """Gradients of query, key, value and of ``wrt``, by the backward kernels.

    One batch axis; `backward_lack` must have found nothing. To be traced by a lowering.

    Args:
      rows: ``out`` and ``dout`` ``(b, l, h, e)``, ``lse`` ``(b, h, l)`` and, unless it
        is zero, ``dlse`` like it.
    """
    arrays = (x.query, x.key, x.value, rows["out"], rows["dout"])
    query, key, value, out, dout = (_pad_head_dim(a) for a in arrays)
    batch, length, heads, head_dim = _query_shape(x)
    row_values = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    operands = _sides(x, {n: t for n, t in _SIDES.items() if n != "sinks"})
    if rows.get("dlse") is not None:
        operands["dlse"] = jnp.broadcast_to(rows["dlse"], row_values.shape)
    deterministic = bool(spec.deterministic_backward)
    segments = x.query_segment_ids is not None
    sizes = heads, length, query.shape[-1], key.shape[1], segments
    assert _ffi.module is not None
    size = _ffi.module.backward_workspace_bytes
    workspace = _of_batch(batch, lambda n: size(n, *sizes))
    grads = [(query, head_dim), (key, head_dim), (value, x.value.shape[-1])]
    results = jax.ffi.ffi_call(
        _ffi.BACKWARD,
        (
            *(jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a, _ in grads),
            jax.ShapeDtypeStruct((workspace,), jnp.uint8),
            *(row_values for _ in wrt),
        ),
    )(
        query,
        key,
        value,
        out,
        dout,
        jnp.broadcast_to(rows["lse"], row_values.shape),
        *operands.values(),
        operands=",".join(operands),
        **_attributes(spec),
        deterministic=deterministic,
    )
    found = [g[..., :d] for g, (_, d) in zip(results, grads, strict=False)]
    if wrt:  # the scale
        total = results[4].sum((1, 2)) * (1.0 if spec.scale is None else spec.scale)
        total = total if x.scale.shape == total.shape else total.sum(keepdims=True)
        found.append(total.astype(x.scale.dtype))
    return found


def _forward_bytes(x: Operands, keys: int) -> Any:
    """Of the forward's workspace."""
    assert _ffi.module is not None  # `_ffi.unavailable` has said so
    batch, length, _, _ = _query_shape(x)
    size = _ffi.module.forward_workspace_bytes
    if x.query_segment_ids is None:
        return size(1, length, keys, False)  # whatever the batch
    return _of_batch(batch, lambda n: size(n, length, keys, True))


def _of_batch(batch: Any, size: Callable[[int], int]) -> Any:
    """``size(batch)``, or for a symbolic batch as much or a little more."""
    return size(batch) if isinstance(batch, int) else batch * size(1)


def _query_shape(x: Operands) -> tuple[int, int, int, int]:
    """Query's, with the batch of the call."""
    return (joint(a.shape[0] for a in x if a is not None), *x.query.shape[1:])


def _sides(x: Operands, dtypes: dict[str, Any]) -> dict[str, jax.Array]:
    """The optional operands that are there, as the handlers take them."""
    present = {n: getattr(x, n) for n in dtypes if getattr(x, n) is not None}
    return {n: a.astype(dtypes[n]) for n, a in present.items()}


def _attributes(spec: AttentionSpec) -> dict[str, Any]:
    # The C++ side reads attributes by exact type and converts nothing.
    left, right = (_window_side(side) for side in spec.window)
    return dict(
        scale=np.float32(1.0 if spec.scale is None else spec.scale),
        soft_cap=np.float32(spec.soft_cap or 0.0),
        is_causal=bool(spec.is_causal),
        window_left=left,
        window_right=right,
        chunk_size=np.int32(min(spec.chunk_size or 0, _MAX_POSITION)),
        family=np.int32(80 if spec.implementation == "cuda_sm80" else 0),
    )


def _pad_head_dim(x: jax.Array) -> jax.Array:
    """Zeros up to the next multiple of 8, which a row's 16-byte loads need."""
    missing = -x.shape[-1] % 8
    return jnp.pad(x, ((0, 0),) * 3 + ((0, missing),)) if missing else x


def _window_side(side: int | None) -> np.int32:
    """-1 where unbounded, also in effect: no two positions are further apart."""
    return np.int32(-1 if side is None or side >= _MAX_POSITION else side)
