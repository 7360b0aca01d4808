"""The passes: the maps that a call and its derivatives are made of, per platform.

Forward and backward are kernels on an NVIDIA GPU, where those serve the call; everything
else is blockwise, everywhere. `_primitives` makes a pair of primitives of each pass and
`_rules` says how they are each other's derivatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_flash2 import _blockwise, _ffi, _kernels, _second, _tangents
from jax_flash2._spec import AttentionSpec, Operands, accumulator

Named = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Platform:
    name: str
    together: bool  # entries at once, for XLA to partition over left-over mesh axes
    origin: bool  # the call is a block that has to know where in its sequence it lies

    @property
    def sequential(self) -> bool:
        return self.name == "cpu" and not self.together


@dataclasses.dataclass(frozen=True)
class Pass:
    """One map.

    Attributes:
      run: on a platform; takes the operands, with exactly one batch axis, the other
        arrays by name, and ``wrt``.
      results: names of the results, by spec and ``wrt``. A gradient has its operand's.
    """

    name: str
    run: Callable[..., list[jax.Array]]
    results: Callable[[AttentionSpec, tuple[str, ...]], tuple[str, ...]]


def _forward_results(spec: AttentionSpec, wrt: tuple[str, ...]) -> tuple[str, ...]:
    del wrt
    return ("out", "lse", "largest")[: 3 if spec.return_max_logit else 2]


def _tangent_results(spec: AttentionSpec, wrt: tuple[str, ...]) -> tuple[str, ...]:
    del spec, wrt
    return ("t_out", "t_lse")


def _tangent2_results(spec: AttentionSpec, wrt: tuple[str, ...]) -> tuple[str, ...]:
    del spec, wrt
    return ("w_out", "w_lse")


def _gradients(spec: AttentionSpec, wrt: tuple[str, ...]) -> tuple[str, ...]:
    del spec
    return ("query", "key", "value", *wrt)


def _run_forward(
    on: Platform, spec: AttentionSpec, x: Operands, rows: Named, wrt: Any
) -> list[jax.Array]:
    del rows, wrt
    if _kernels_serve(on, spec, _kernels.forward_lack(spec, x)):
        return _kernels.forward(spec, x)
    results = _blockwise.forward(spec, x, sequential=on.sequential)
    return list(results)[: 3 if spec.return_max_logit else 2]


def _run_backward(
    on: Platform, spec: AttentionSpec, x: Operands, rows: Named, wrt: tuple[str, ...]
) -> list[jax.Array]:
    if _kernels_serve(on, spec, _kernels.backward_lack(spec, x, wrt)):
        return _kernels.backward(spec, x, rows, wrt)
    delta = row_delta(rows["out"], rows["dout"], rows.get("dlse"))
    arrays = (rows["dout"], rows["lse"], delta, wrt)
    grads = _blockwise.backward(spec, x, *arrays, sequential=on.sequential)
    return [grads[name] for name in ("query", "key", "value", *wrt)]


def _run_tangent(
    on: Platform, spec: AttentionSpec, x: Operands, rows: Named, wrt: Any
) -> list[jax.Array]:
    del wrt
    return _tangents.tangent(spec, x, rows, sequential=on.sequential)


def _run_tangent2(
    on: Platform, spec: AttentionSpec, x: Operands, rows: Named, wrt: Any
) -> list[jax.Array]:
    del wrt
    return _tangents.tangent2(spec, x, rows, sequential=on.sequential)


def _run_second(
    on: Platform, spec: AttentionSpec, x: Operands, rows: Named, wrt: tuple[str, ...]
) -> list[jax.Array]:
    delta = row_delta(rows["out"], rows["dout"], rows.get("dlse"))
    t_delta = row_delta(rows["t_out"], rows["dout"], None)
    if "u_dout" in rows:
        t_delta += row_delta(rows["out"], rows["u_dout"], rows.get("u_dlse"))
    rows = rows | {"delta": delta, "t_delta": t_delta}
    grads = _second.second(spec, x, rows, wrt, sequential=on.sequential)
    return [grads[name] for name in ("query", "key", "value", *wrt)]


def _kernels_serve(on: Platform, spec: AttentionSpec, lack: str | None) -> bool:
    """Whether a call lowered for a platform goes to the CUDA kernels.

    Raises NotImplementedError where it must and cannot.
    """
    if spec.implementation == "blockwise":
        return False
    if on.name == "cuda":
        if on.together:
            lack = (
                "a kernel cannot be split over mesh axes that a shard_map leaves to the "
                "compiler; make all axes manual"
            )
        if on.origin:
            lack = (
                "the CUDA kernels have neither dropout nor chunks that end within a "
                "block, with segment ids, where the length is sharded"
            )
        return _ffi.use_kernels(spec, lack)
    if spec.implementation is not None:
        raise NotImplementedError(
            f"flash_attention: implementation={spec.implementation!r} runs on NVIDIA "
            "GPUs only, and this call is compiled for another platform"
        )
    return False


def row_delta(out: jax.Array, dout: jax.Array, dlse: jax.Array | None) -> jax.Array:
    """D of Algorithm 2, line 4: row sums of dO * O, less the logsumexp's cotangent.

    ``(batch..., l, h, e)`` to ``(batch..., h, l)``, in the accumulator's dtype.
    """
    dtype = accumulator(out.dtype)
    delta = jnp.swapaxes((out.astype(dtype) * dout.astype(dtype)).sum(-1), -1, -2)
    return delta if dlse is None else delta - dlse


def zero_past(
    x: jax.Array, lengths: jax.Array | None, axis: int, row: jax.Array | None = None
) -> jax.Array:
    """``x`` ``(batch..., ...)`` with zeros at and past the lengths ``(batch...)`` along
    ``axis``, which is negative. ``row`` tells which tokens lie there, by default 0, 1, ...
    """
    if lengths is None:
        return x
    if row is None:
        row = jnp.arange(x.shape[axis], dtype=jnp.int32)
    row = row.reshape((1,) * (x.ndim + axis) + (-1,) + (1,) * (-axis - 1))
    lengths = lengths.reshape(lengths.shape + (1,) * (x.ndim - lengths.ndim))
    return jnp.where(row < lengths, x, 0)


FORWARD = Pass("flash2_forward", _run_forward, _forward_results)
BACKWARD = Pass("flash2_backward", _run_backward, _gradients)
TANGENT = Pass("flash2_tangent", _run_tangent, _tangent_results)
TANGENT2 = Pass("flash2_tangent2", _run_tangent2, _tangent2_results)
SECOND = Pass("flash2_second", _run_second, _gradients)
PASSES = {p.name: p for p in (FORWARD, BACKWARD, TANGENT, TANGENT2, SECOND)}
