"""The primitives: what JAX's transformations see of a call, and what each platform runs.

Two layers. The *outer* primitives stand for a whole call: any number of batch axes,
abstract evaluation, vmap (a mapped axis becomes a leading batch axis; nothing is
reshaped or repeated), and a lowering that flattens the batch and binds the *inner*
ones. These have exactly one batch axis and one lowering per platform: the place where a
kernel is put beside the blockwise code. Derivatives are `_autodiff`'s.

Operands travel as a flat list; the parameter ``present`` names the `Operands` fields
they belong to. ``mapped`` counts the leading batch axes that vmap made, over which a
gradient is never summed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching

from jax_flash2 import _blockwise, _compat, _ffi, _partition
from jax_flash2._spec import AXES, AttentionSpec, Operands, accumulator

# Axes after the batch axes of the forward's results and their cotangents.
_RESULT_AXES = {"out": "lhe", "lse": "hl", "dout": "lhe", "dlse": "hl", "largest": "h"}

Shape = tuple[int, ...]


def forward(
    spec: AttentionSpec, x: Operands
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Output ``(batch..., l, h, e)``, logsumexp ``(batch..., h, l)`` and, where the spec
    asks for them, largest logits ``(batch..., h)``."""
    present, arrays = _flatten(x)
    results = forward_p.bind(*arrays, spec=spec, present=present, mapped=0)
    out, lse, *largest = results
    return out, lse, largest[0] if largest else None


def backward(
    spec: AttentionSpec,
    x: Operands,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array | None,
    wrt: tuple[str, ...],
) -> dict[str, jax.Array]:
    """Gradients of query, key, value and of the operands in ``wrt``, by name.

    ``dlse`` is the logsumexp's cotangent, ``(batch..., h, l)``, or None for zero.
    """
    extra = {"out": out, "lse": lse, "dout": dout, "dlse": dlse}
    present, arrays = _flatten(x, extra)
    grads = backward_p.bind(*arrays, spec=spec, present=present, mapped=0, wrt=wrt)
    return dict(zip(("query", "key", "value", *wrt), grads, strict=True))


# --------------------------------------------------------------------- operands as lists


def _flatten(
    x: Operands, extra: dict[str, Any] | None = None
) -> tuple[tuple[str, ...], list[jax.Array]]:
    named = x._asdict() | (extra or {})
    named = {name: a for name, a in named.items() if a is not None}
    return tuple(named), _compat.align_varying(list(named.values()))


def _unflatten(
    present: tuple[str, ...], arrays: Sequence[Any]
) -> tuple[Operands, dict[str, Any]]:
    named = dict(zip(present, arrays, strict=True))
    extra = {name: named.pop(name) for name in present if name in _RESULT_AXES}
    return Operands(**named), extra


def _axes(name: str) -> str:
    return _RESULT_AXES[name] if name in _RESULT_AXES else getattr(AXES, name)


def _batch_axes(x: Operands) -> int:
    return len(x.query.shape) - len(AXES.query)


def _batch_shape(present: tuple[str, ...], arrays: Sequence[Any]) -> Shape:
    shapes = [
        a.shape[: len(a.shape) - len(_axes(name))]
        for name, a in zip(present, arrays, strict=True)
    ]
    # Sizes are one number or 1, so the number wins also where it is 0.
    return tuple(
        next((n for n in sizes if n != 1), 1) for sizes in zip(*shapes, strict=True)
    )


# --------------------------------------------------------------------- abstract evaluation


def _forward_types(
    *avals: Any, spec: AttentionSpec, present: Any, **_: Any
) -> list[Any]:
    x, _extra = _unflatten(present, avals)
    batch = _batch_shape(present, avals)
    length, heads = x.query.shape[-3:-1]
    residual = accumulator(x.query.dtype)
    results: list[tuple[Shape, Any]] = [
        ((*batch, length, heads, x.value.shape[-1]), x.query.dtype),
        ((*batch, heads, length), residual),
    ]
    if spec.return_max_logit:
        results.append(((*batch, heads), residual))
    specs: list[Any] = [None] * len(results)
    if avals[0].sharding.mesh.explicit_axes:
        lay = _partition.explicit_layout(_arrays(present, avals), avals)
        shapes = [shape for shape, _ in results]
        names = ("out", "lse", "largest")[: len(results)]
        specs = [lay.spec(a) for a in _named_arrays(names, shapes)]
    return [
        _compat.result_type("flash2_forward", avals, shape, dtype, spec)
        for (shape, dtype), spec in zip(results, specs, strict=True)
    ]


def _backward_types(
    *avals: Any, present: Any, wrt: tuple[str, ...], mapped: int = 0, **_: Any
) -> list[Any]:
    named = dict(zip(present, avals, strict=True))
    batch = _batch_shape(present, avals)
    query_spec = avals[0].sharding.spec
    types = []
    for name in ("query", "key", "value", *wrt):
        like = named[name]
        lead, rest = like.shape[: len(batch)], like.shape[len(batch) :]
        lead = batch if name not in wrt else batch[:mapped] + lead[mapped:]
        # A gradient has its operand's type but for axes that it gained by vmap.
        spec = None
        if like.sharding.mesh.explicit_axes:
            gained = [a != b for a, b in zip(lead, like.shape, strict=False)]
            own = like.sharding.spec
            entries = [query_spec[i] if g else own[i] for i, g in enumerate(gained)]
            spec = jax.sharding.PartitionSpec(*entries, *own[len(batch) :])
        shape = (*lead, *rest)
        types.append(
            _compat.result_type("flash2_backward", avals, shape, like.dtype, spec)
        )
    return types


def _named_arrays(
    names: Sequence[str], shapes: Sequence[Shape]
) -> tuple[_partition.Array, ...]:
    pairs = zip(names, shapes, strict=True)
    return tuple(_partition.Array(n, _axes(n), tuple(shape)) for n, shape in pairs)


def _arrays(
    present: Sequence[str], avals: Sequence[Any]
) -> tuple[_partition.Array, ...]:
    return _named_arrays(present, [a.shape for a in avals])


# -------------------------------------------------------------------- outer: over a mesh


@dataclasses.dataclass(frozen=True)
class _Local:
    """A local function with its parameters: hashable, as `_partition.Call` wants it."""

    function: Any
    params: tuple[tuple[str, Any], ...]

    def __call__(self, *arrays: jax.Array) -> list[jax.Array]:
        return self.function(*arrays, **dict(self.params))


def _lower_over_mesh(function: Any, results: Any) -> Any:
    """Lowers an outer primitive: ``function`` does one device's share of it."""

    def rule(ctx: Any, *operands: Any, **params: Any) -> Any:
        _compat.restore_stacks()
        if _compat.without_shardy(ctx):
            raise ValueError(
                "flash_attention: on several devices jax_use_shardy_partitioner must be "
                "True, as it is by default; got False"
            )
        avals = ctx.avals_in
        mesh = avals[0].sharding.mesh
        # Axes that XLA assigns inside a region where others are manual or explicit.
        left_over = bool(mesh.auto_axes and (mesh.manual_axes or mesh.explicit_axes))
        local = _Local(function, (*sorted(params.items()), ("together", left_over)))
        if not mesh.explicit_axes and left_over:
            return _compat.lower_plain(local, ctx, *operands)
        call = _partition.Call(
            local,
            _arrays(params["present"], avals),
            _named_arrays(results(params), [a.shape for a in ctx.avals_out]),
        )
        if mesh.explicit_axes:
            run = _partition.explicit(call, avals, ctx.avals_out)
            return _compat.lower(run, ctx, *operands)
        return _compat.lower_plain(_partition.partitioned(call), ctx, *operands)

    return rule


# ------------------------------------------------------------------- outer to inner: local


def _forward_local(
    *arrays: jax.Array, spec: AttentionSpec, present: Any, mapped: int, together: bool
) -> list[jax.Array]:
    """The forward on one device: flattens the batch axes and binds the inner primitive."""
    del mapped  # the forward sums over nothing
    batch = _batch_shape(present, arrays)
    x, _ = _unflatten(present, arrays)
    if 0 in batch or 0 in x.query.shape or x.key.shape[-3] == 0:
        return _forward_empty(spec, x, batch)
    flat = [
        _flatten_batch(a, batch, len(_axes(name)))
        for name, a in zip(present, arrays, strict=True)
    ]
    results = forward_call_p.bind(*flat, spec=spec, present=present, together=together)
    return [r.reshape(*batch, *r.shape[1:]) for r in results]


def _forward_empty(spec: AttentionSpec, x: Operands, batch: Shape) -> list[jax.Array]:
    """No rows, or no keys: every row is an empty row."""
    length, heads = x.query.shape[-3:-1]
    dtype = accumulator(x.query.dtype)
    lse = jnp.full((*batch, heads, length), -jnp.inf, dtype)
    if x.sinks is not None:
        lse = jnp.broadcast_to(x.sinks.astype(dtype)[..., None], lse.shape)
    out = jnp.zeros((*batch, length, heads, x.value.shape[-1]), x.query.dtype)
    results = [out, lse]
    if spec.return_max_logit:
        results.append(jnp.full((*batch, heads), -jnp.inf, dtype))
    return results


def _backward_local(
    *arrays: jax.Array,
    spec: AttentionSpec,
    present: Any,
    mapped: int,
    wrt: tuple[str, ...],
    together: bool,
) -> list[jax.Array]:
    """The backward on one device: flattens the batch axes and binds the inner primitive."""
    batch = _batch_shape(present, arrays)
    x, _ = _unflatten(present, arrays)
    names = ("query", "key", "value", *wrt)
    leads = {}  # batch axes of the gradients of wrt
    for name in wrt:
        lead = getattr(x, name).shape[: len(batch)]
        leads[name] = batch[:mapped] + lead[mapped:]
    if 0 in batch or 0 in x.query.shape or x.key.shape[-3] == 0:
        likes = [getattr(x, name) for name in names]
        return [
            jnp.zeros((*leads.get(name, batch), *like.shape[len(batch) :]), like.dtype)
            for name, like in zip(names, likes, strict=True)
        ]
    flat = []
    for name, a in zip(present, arrays, strict=True):
        if name in leads:  # elements of a mapped axis keep their gradients apart
            a = jnp.broadcast_to(a, (*leads[name], *a.shape[len(batch) :]))
        flat.append(_flatten_batch(a, batch, len(_axes(name))))
    params = dict(spec=spec, present=present, wrt=wrt, together=together)
    grads = backward_call_p.bind(*flat, **params)
    results = []
    for name, g in zip(names, grads, strict=True):
        lead = leads.get(name, batch)
        if math.prod(lead) == g.shape[0]:
            results.append(g.reshape(*lead, *g.shape[1:]))
            continue
        # The operand was repeated along some batch axes and not along others.
        g = g.reshape(*batch, *g.shape[1:])
        axes = tuple(a for a, n in enumerate(lead) if n != batch[a])
        results.append(g.sum(axes, keepdims=True))
    return results


def _flatten_batch(a: jax.Array, batch: Shape, axes: int) -> jax.Array:
    """One batch axis, of full size or 1; repeats only where some axes are 1, others not."""
    lead, rest = a.shape[: len(batch)], a.shape[len(batch) :]
    assert len(rest) == axes
    if lead != batch and math.prod(lead) != 1:
        a = jnp.broadcast_to(a, (*batch, *rest))
        lead = batch
    return a.reshape(math.prod(lead), *rest)


# ------------------------------------------------------------------ inner: per platform


def _call_forward(platform: str) -> Any:
    def run(
        *arrays: jax.Array, spec: AttentionSpec, present: Any, together: bool
    ) -> list[jax.Array]:
        x, _ = _unflatten(present, arrays)
        lack = _ffi.forward_lack(spec, x)
        if _kernels_serve(platform, spec, together, lack):
            return _ffi.forward(spec, x)
        sequential = platform == "cpu" and not together
        out, lse, largest = _blockwise.forward(spec, x, sequential=sequential)
        return [out, lse, largest][: 3 if spec.return_max_logit else 2]

    return run


def _call_backward(platform: str) -> Any:
    def run(
        *arrays: jax.Array,
        spec: AttentionSpec,
        present: Any,
        wrt: tuple[str, ...],
        together: bool,
    ) -> list[jax.Array]:
        x, extra = _unflatten(present, arrays)
        lack = "the CUDA kernels have no gradient yet"
        _kernels_serve(platform, spec, together, lack)
        dout, lse = extra["dout"], extra["lse"]
        delta = row_delta(extra["out"], dout, extra.get("dlse"))
        sequential = platform == "cpu" and not together
        grads = _blockwise.backward(
            spec, x, dout, lse, delta, wrt, sequential=sequential
        )
        return [grads[name] for name in ("query", "key", "value", *wrt)]

    return run


def _kernels_serve(
    platform: str, spec: AttentionSpec, together: bool, lack: str | None
) -> bool:
    """Whether a call lowered for ``platform`` goes to the CUDA kernels.

    Raises NotImplementedError where it must and cannot.
    """
    if spec.implementation == "blockwise":
        return False
    if platform == "cuda":
        if together:
            lack = (
                "a kernel cannot be split over mesh axes that a shard_map leaves to the "
                "compiler; make all axes manual"
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


# --------------------------------------------------------------------------------- vmap


def _batch_rule(primitive: Primitive) -> Any:
    def rule(arrays: Sequence[Any], dims: Sequence[Any], **params: Any) -> Any:
        params["mapped"] += 1
        arrays = [
            jnp.expand_dims(a, 0) if d is None else jnp.moveaxis(a, d, 0)
            for a, d in zip(arrays, dims, strict=True)
        ]
        results = primitive.bind(*arrays, **params)
        return results, [0] * len(results)

    return rule


forward_p = _compat.make_primitive("flash2_forward", _forward_types)
backward_p = _compat.make_primitive("flash2_backward", _backward_types)
forward_call_p = _compat.make_primitive("flash2_forward_call", _forward_types)
backward_call_p = _compat.make_primitive("flash2_backward_call", _backward_types)


def _forward_results(params: dict[str, Any]) -> tuple[str, ...]:
    return ("out", "lse", "largest")[: 3 if params["spec"].return_max_logit else 2]


def _backward_results(params: dict[str, Any]) -> tuple[str, ...]:
    return ("query", "key", "value", *params["wrt"])


for _primitive, _local, _results in (
    (forward_p, _forward_local, _forward_results),
    (backward_p, _backward_local, _backward_results),
):
    _compat.needs_devices(_primitive)
    _compat.register_lowering(_primitive, _lower_over_mesh(_local, _results))
    batching.primitive_batchers[_primitive] = _batch_rule(_primitive)

# The first serves every platform that is not named after it.
for _primitive, _call in (
    (forward_call_p, _call_forward),
    (backward_call_p, _call_backward),
):
    for _platform in ("any", "cpu", "cuda"):
        _rule = functools.partial(_compat.lower_plain, _call(_platform))
        _named = None if _platform == "any" else _platform
        _compat.register_lowering(_primitive, _rule, _named)
