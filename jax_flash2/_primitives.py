"""The primitives: what JAX's transformations see of a call, and what each platform runs.

Two layers. The *outer* primitives stand for a whole call: any number of batch axes,
abstract evaluation, vmap (a mapped axis becomes a leading batch axis; nothing is
reshaped or repeated), and a lowering that flattens the batch and binds the *inner*
ones. These have exactly one batch axis and one lowering per platform: the place where a
kernel is put beside the blockwise code. Derivatives are `_rules`'.

There is a pair for each of the five passes (`_passes`). Their arrays travel as a flat
list, named by the parameter ``present``; ``wrt`` names the gradients that are wanted
beside query's, key's and value's, and ``mapped`` counts the leading batch axes that vmap
made, over which a gradient is never summed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching

from jax_flash2 import _compat, _layout, _partition, _passes
from jax_flash2._local import Local, Shape, batch_shape, gradient_shape, sizes_of
from jax_flash2._passes import Named, Pass, Platform
from jax_flash2._spec import (
    AttentionSpec,
    Operands,
    accumulator,
    axes_of,
    base_name,
)


def forward(
    spec: AttentionSpec, x: Operands
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Output ``(batch..., l, h, e)``, logsumexp ``(batch..., h, l)`` and, where the spec
    asks for them, largest logits ``(batch..., h)``."""
    results = bind(forward_p, x._asdict(), spec=spec)
    return results["out"], results["lse"], results.get("largest")


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
    rows = {"out": out, "lse": lse, "dout": dout, "dlse": dlse}
    return bind(backward_p, x._asdict() | rows, spec=spec, wrt=wrt)


def bind(
    primitive: Primitive,
    arrays: Named,
    *,
    spec: AttentionSpec,
    wrt: tuple[str, ...] = (),
    mapped: int = 0,
) -> Named:
    """Binds an outer primitive to arrays by name, absent ones being None."""
    arrays = {name: a for name, a in arrays.items() if a is not None}
    params = dict(spec=spec, present=tuple(arrays), wrt=wrt, mapped=mapped)
    results = primitive.bind(*_compat.align_varying(list(arrays.values())), **params)
    return dict(
        zip(_passes.PASSES[primitive.name].results(spec, wrt), results, strict=True)
    )


def split_named(arrays: Named) -> tuple[Operands, Named]:
    """The operands, and what goes with them: results, cotangents and tangents."""
    x = {name: a for name, a in arrays.items() if name in Operands._fields}
    return Operands(**x), {n: a for n, a in arrays.items() if n not in x}


# --------------------------------------------------------------------- abstract evaluation


def _types(
    pass_: Pass,
    *avals: Any,
    spec: AttentionSpec,
    present: Any,
    wrt: tuple[str, ...],
    mapped: int = 0,
    **_: Any,
) -> list[Any]:
    """The types of a pass's results; a gradient is named after its operand."""
    named = dict(zip(present, avals, strict=True))
    batch = batch_shape(present, avals)
    explicit = bool(avals[0].sharding.mesh.explicit_axes)
    lay = None
    if explicit:
        lay = _layout.explicit_layout(_arrays(present, avals), avals)
    types = []
    for name in pass_.results(spec, wrt):
        part = None
        if name in named:
            like = named[name]
            shape, dtype = (
                gradient_shape(name, like.shape, batch, wrt, mapped),
                like.dtype,
            )
            if explicit:
                # As its operand, but for axes that it gained by vmap.
                own, lead = like.sharding.spec, avals[0].sharding.spec
                pairs = enumerate(zip(shape, like.shape, strict=True))
                part = [own[i] if a == b else lead[i] for i, (a, b) in pairs]
                part = jax.sharding.PartitionSpec(*part)
        else:
            shape = (*batch, *(sizes_of(named)[letter] for letter in axes_of(name)))
            query = named["query"].dtype
            dtype = query if base_name(name) == "out" else accumulator(query)
            if lay is not None:
                part = lay.spec(_layout.Array(name, axes_of(name), shape))
        types.append(_compat.result_type(pass_.name, avals, shape, dtype, part))
    return types


def _named_arrays(
    names: Sequence[str], shapes: Sequence[Shape]
) -> tuple[_layout.Array, ...]:
    pairs = zip(names, shapes, strict=True)
    return tuple(_layout.Array(n, axes_of(n), tuple(shape)) for n, shape in pairs)


def _arrays(present: Sequence[str], avals: Sequence[Any]) -> tuple[_layout.Array, ...]:
    return _named_arrays(present, [a.shape for a in avals])


# -------------------------------------------------------------------- outer: over a mesh


def _lower_over_mesh(pass_: Pass, inner: Primitive) -> Any:
    """Lowers an outer primitive: `Local` does one device's share of it."""

    def rule(ctx: Any, *operands: Any, **params: Any) -> Any:
        _compat.restore_stacks()
        avals = ctx.avals_in
        mesh = avals[0].sharding.mesh
        _check_devices(ctx, avals, mesh)
        # Axes that XLA assigns inside a region where others are manual or explicit.
        left_over = bool(mesh.auto_axes and (mesh.manual_axes or mesh.explicit_axes))
        spec, present, wrt = params["spec"], params["present"], params["wrt"]
        local = Local(pass_, inner, wrt, params["mapped"], left_over)
        call = _partition.Call(
            pass_,
            local,
            spec,
            _arrays(present, avals),
            _named_arrays(pass_.results(spec, wrt), [a.shape for a in ctx.avals_out]),
        )
        if spec.ring is not None:
            loop = zip(spec.ring.axes, spec.ring.sizes, strict=True)
            return _compat.lower_manual(call.on_ring, tuple(loop), ctx, *operands)
        if not mesh.explicit_axes and left_over:
            return _compat.lower_plain(call.whole, ctx, *operands)
        if mesh.explicit_axes:
            run = _partition.explicit(call, avals, ctx.avals_out)
            return _compat.lower(run, ctx, *operands)
        return _compat.lower_plain(_partition.partitioned(call), ctx, *operands)

    return rule


def _check_devices(ctx: Any, avals: Sequence[Any], mesh: Any) -> None:
    """Refuses what JAX has only for one device."""
    several = _compat.over_devices(ctx)
    if several and not jax.config.jax_use_shardy_partitioner:
        raise ValueError(
            "flash_attention: on several devices jax_use_shardy_partitioner must be "
            "True, as it is by default; got False"
        )
    if not _compat.for_export(ctx):
        return
    if several and not mesh.explicit_axes:
        raise NotImplementedError(
            "flash_attention: jax.export for several devices needs Explicit mesh axes or "
            "a jax.shard_map around the call, since how XLA splits it over Auto axes is "
            f"asked of this process; got mesh axes {mesh.axis_types}"
        )
    symbols = [n for a in avals for n in a.shape if not isinstance(n, int)]
    if symbols and mesh.size > 1:
        raise NotImplementedError(
            "flash_attention: jax.export has symbolic shapes for one device only, since "
            f"JAX cannot make them static in a jax.shard_map; got {symbols[0]} on a mesh "
            f"of {mesh.size} devices"
        )


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


# ------------------------------------------------------------------------ registration


def _make_primitive(pass_: Pass) -> Primitive:
    """The outer primitive of a pass, with its inner one."""
    types = functools.partial(_types, pass_)
    outer = _compat.make_primitive(pass_.name, types)
    inner = _compat.make_primitive(f"{pass_.name}_call", types)
    _compat.needs_devices(outer)
    _compat.register_lowering(outer, _lower_over_mesh(pass_, inner))
    batching.primitive_batchers[outer] = _batch_rule(outer)

    def call(platform: str, *arrays: jax.Array, **params: Any) -> list[jax.Array]:
        x, rows = split_named(dict(zip(params["present"], arrays, strict=True)))
        on = Platform(platform, params["together"], x.origin is not None)
        return pass_.run(on, params["spec"], x, rows, params["wrt"])

    # The first serves every platform that is not named after it.
    for platform in ("any", "cpu", "cuda"):
        rule = functools.partial(_compat.lower_plain, functools.partial(call, platform))
        _compat.register_lowering(inner, rule, None if platform == "any" else platform)
    return outer


forward_p = _make_primitive(_passes.FORWARD)
backward_p = _make_primitive(_passes.BACKWARD)
tangent_p = _make_primitive(_passes.TANGENT)
tangent2_p = _make_primitive(_passes.TANGENT2)
second_p = _make_primitive(_passes.SECOND)
