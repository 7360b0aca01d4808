"""`flash_attention`: the call and what it means; everything else lies below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jax_flash2 import _arguments, _autodiff, _reference

Array = Any
Result = jax.Array | tuple[jax.Array, ...]


def flash_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    query_offset: int | Array | None = None,
    query_segment_ids: Array | Sequence[int] | None = None,
    key_value_segment_ids: Array | Sequence[int] | None = None,
    prefix_lengths: Array | None = None,
    chunk_size: int | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    deterministic_backward: bool = False,
    forward_mode: bool = False,
    return_max_logit: bool = False,
) -> Result:
    r"""Exact attention, ``softmax(scale * query @ key.T + ...) @ value``, in linear memory.

    FlashAttention-2 (Dao, arXiv 2307.08691, Algorithms 1 and 2), with the argument names
    and the meaning of `jax.nn.dot_product_attention`: changing the import is enough.

    The score of query i and key j is, in this order, ``scale * q.k``, the soft cap
    ``c * tanh(x / c)``, plus bias, plus ALiBi ``-slope * |i - j|``. A key is visible
    where all masks that are given agree. A row that sees no key gives 0, logsumexp
    ``-inf`` (or the sink's logit) and no gradient.

    Args:
      query: ``(batch..., query length, heads, head_dim)``, float16, bfloat16 or float32
        (float64 with ``implementation="blockwise"`` or ``"reference"``). Any number of
        batch axes, also none.
      key: ``(batch..., key length, kv heads, head_dim)``, query's dtype. ``kv heads``
        divides ``heads``: grouped-query attention, never materialised as repeats.
      value: ``(batch..., key length, kv heads, value head_dim)``, query's dtype.
      bias: added to the scores; broadcasts to ``(batch..., heads, query length, key
        length)``; float32 or query's dtype. ``-inf`` counts as masked.
      mask: bool, broadcasts like ``bias``; True where visible.
      scale: factor of the scores; None is ``1 / sqrt(head_dim)``. A float, or a floating
        scalar array, which then has a gradient.
      is_causal: key j is visible to query i where ``j <= i`` (top-left aligned).
      query_seq_lengths: int32, broadcasts to ``(batch...)``. Rows at or past the length
        see no key; what stands there, NaN too, and their cotangents reach nothing.
      key_value_seq_lengths: int32, broadcasts to ``(batch...)``. Keys and values at or
        past the length are not seen; what stands there, NaN too, reaches nothing.
      local_window_size: ``(left, right)``: ``i - left <= j <= i + right``; None is a side
        without bound, one int means both sides.
      implementation: ``"cuda"`` (or ``"cuda_sm80"``, that kernel family also on newer
        GPUs), ``"blockwise"`` or ``"reference"`` forces one; None takes the fastest that
        supports the call, decided at lowering: the kernels on an NVIDIA GPU, blockwise
        elsewhere.
      return_residual: also return the logsumexp, float32 (float64 for float64), natural
        logarithm, ``(batch..., query length, heads)``. It is differentiable.
      logits_soft_cap: c, a positive Python float. The CUDA kernels compute a score under
        it to within some 3e-7 c: a few of float32's last places of c.
      query_offset: position of query row 0 on the key axis (i below means row + offset);
        an int, or int32 that broadcasts to ``(batch...)``, may be negative. Positions
        are int32.
        FlashAttention's bottom-right alignment is ``key length - query length``.
      query_segment_ids: integers ``(batch..., query length)``: only equal ids see each
        other. In any order; sorted ids, with padding of a lower id before or behind
        (1 1 2 2 3 0 0), skip whole blocks, and Hopper's own kernels take them.
      key_value_segment_ids: integers ``(batch..., key length)``; default to the query's
        where the lengths are equal.
      prefix_lengths: int32, broadcasts to ``(batch...)``; with ``is_causal``: ``j <= i or
        j < prefix`` (prefix-LM).
      chunk_size: only keys of the same chunk, ``i // c == j // c``, are visible.
      alibi_slopes: broadcasts to ``(batch..., heads)``; float32 or query's dtype.
      sinks: one logit per head that joins the softmax's denominator and has no value;
        broadcasts to ``(batch..., heads)``; float32 or query's dtype.
      dropout_rate: probability in [0, 1) with which a probability is zeroed; the others
        are scaled by ``1 / (1 - rate)``. A Python float, resolved to 1/65536.
      dropout_key: a key of `jax.random`. The mask depends only on it and on the global
        (batch, head, row, column): the same on any mesh, backend, forward and backward.
        Under vmap an unmapped key gives every element the same mask.
      deterministic_backward: the gradient has the same bytes on every run (the forward
        always has).
      forward_mode: makes `jax.jvp`, `linearize` and `jacfwd` work, and gradients of
        them. Without it they raise a TypeError from JAX, because reverse mode is a
        `jax.custom_vjp`; Hessian-vector products as jvp or grad of a grad work either
        way.
      return_max_logit: also return the largest visible score per head, float32
        ``(batch..., heads)``, ``-inf`` where there is none; without gradient.

    Returns:
      ``(batch..., query length, heads, value head_dim)`` in query's dtype; with
      ``return_residual`` or ``return_max_logit`` a tuple of it, the logsumexp and the
      largest logits, as asked for, in this order.

      Gradients go to query, key, value, scale, bias, alibi_slopes and sinks, each in its
      own dtype, and through the logsumexp. Residuals carry the checkpoint names
      ``flash2_out`` and ``flash2_lse``: a `jax.checkpoint` policy that saves both runs
      the forward once. Derivatives up to the second order are exact and take memory
      linear in the length; the third raises NotImplementedError.

    Raises:
      ValueError: the call is wrong; the message names argument, rule and value.
      NotImplementedError: the call is right, but what it asks for is not available.

    Example:
      >>> import jax, jax_flash2
      >>> q = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
      >>> k = v = jax.random.normal(jax.random.key(1), (2, 128, 2, 64))
      >>> jax_flash2.flash_attention(q, k, v, is_causal=True).shape
      (2, 128, 8, 64)
    """
    spec, operands = _arguments.settle(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        logits_soft_cap=logits_soft_cap,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        prefix_lengths=prefix_lengths,
        chunk_size=chunk_size,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        deterministic_backward=deterministic_backward,
        return_max_logit=return_max_logit,
        flags={"return_residual": return_residual, "forward_mode": forward_mode},
    )
    if spec.implementation == "reference":
        out, lse, max_logit = _reference.attention(spec, operands)
    else:
        out, lse, max_logit = _autodiff.attend(spec, operands, forward_mode)
    return _arguments.results(
        out, lse if return_residual else None, max_logit if return_max_logit else None
    )
