"""Every private or version-dependent JAX name, in this file alone (jax 0.10 to 0.12)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import dispatch as _dispatch
from jax._src import mesh as _mesh
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir


def make_primitive(name: str, abstract_eval: Callable[..., Any]) -> Primitive:
    """A primitive with several results that also runs eagerly, by compiling itself."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(functools.partial(_dispatch.apply_primitive, primitive))
    return primitive


Rule = Callable[..., Any]


def lower(function: Callable[..., Any], ctx: Any, *operands: Any, **params: Any) -> Any:
    """Lowers by tracing ``function`` on the operands' full types."""
    rule = mlir.lower_fun(function, multiple_results=True)
    return rule(ctx, *operands, **params)


def lower_plain(
    function: Callable[..., Any], ctx: Any, *operands: Any, **params: Any
) -> Any:
    """Lowers by tracing ``function`` on unsharded, unvarying arrays.

    Under `jax.shard_map` the operands' types name the mesh axes they vary over, which a
    loop's fresh initial values would not; inside a lowering nothing checks or needs them.
    """
    plain = [_core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
    with _mesh.use_abstract_mesh(_mesh.empty_abstract_mesh):
        return lower(function, ctx.replace(avals_in=plain), *operands, **params)


def lower_manual(
    function: Callable[..., Any],
    axes: Sequence[tuple[str, int]],
    ctx: Any,
    *operands: Any,
) -> Any:
    """As `lower_plain`, where the function names manual mesh axes, given with sizes."""
    mesh = ctx.avals_in[0].sharding.mesh

    def plain(a: Any) -> Any:
        spec = jax.sharding.PartitionSpec(*[None] * a.ndim)
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return _core.ShapedArray(a.shape, a.dtype, sharding=sharding)

    avals = [plain(a) for a in ctx.avals_in]
    with (
        _mesh.use_abstract_mesh(mesh),
        _config._check_vma(False),
        _core.extend_axis_env_nd(axes),
    ):
        return lower(function, ctx.replace(avals_in=avals), *operands)


def register_lowering(
    primitive: Primitive, rule: Rule, platform: str | None = None
) -> None:
    mlir.register_lowering(primitive, rule, platform=platform)


def needs_devices(primitive: Primitive) -> None:
    """Lets a lowering use `custom_partitioning`, which asks for the devices' number."""
    _dispatch.prim_requires_devices_during_lowering.add(primitive)


_stacks = threading.local()


def drop_stacks() -> None:
    """The program that this thread builds next carries no Python stacks.

    For the one that `custom_partitioning` builds right after it traced a partition. Its
    stacks, put below the caller's when XLA inlines it, can send XLA (jaxlib 0.12) into
    an endless walk: a gradient on eight devices, compiled under a test runner's deep
    stack, never came back. Nothing calls us when that program is done, so the setting
    stays until `restore_stacks`, at our next lowering.
    """
    restore_stacks()
    _stacks.context = _config.traceback_in_locations_limit(0)
    _stacks.context.__enter__()


def restore_stacks() -> None:
    context = getattr(_stacks, "context", None)
    if context is not None:
        _stacks.context = None
        context.__exit__(None, None, None)


def over_devices(ctx: Any) -> bool:
    """Whether a lowering is for several devices, outside of `jax.shard_map`."""
    return getattr(ctx.module_context.axis_context, "num_devices", 1) > 1


def for_export(ctx: Any) -> bool:
    """Whether a lowering is `jax.export`'s."""
    return ctx.module_context.lowering_parameters.for_export


def result_type(
    name: str, avals: Sequence[Any], shape: Sequence[int], dtype: Any, spec: Any = None
) -> Any:
    """The type of a primitive's result: varies over the mesh axes its operands do.

    Under shard_map(check_vma=True) these must agree; see `align_varying`. ``spec`` says
    over which Explicit mesh axes the result is split; None is none.
    """
    _core.standard_vma_rule(name, *avals)
    like = avals[0]
    if spec is None:
        spec = jax.sharding.PartitionSpec(*[None] * len(shape))
    sharding = jax.sharding.NamedSharding(like.sharding.mesh, spec)
    return like.update(
        shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding
    )


def with_type_of(x: jax.Array, like: Any) -> jax.Array:
    """``x`` split over Explicit mesh axes as ``like``, an array or a type, is: the type
    of a cotangent is fixed."""
    aval = like if isinstance(like, _core.ShapedArray) else jax.typeof(like)
    sharding = aval.sharding
    return jax.sharding.reshard(x, sharding) if sharding.mesh.explicit_axes else x


def zero_tangent(x: jax.Array) -> Any:
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def align_varying(
    arrays: Sequence[jax.Array], axes: Sequence[str] = ()
) -> list[jax.Array]:
    """Casts every array to vary over the union of the mesh axes that any varies over,
    and over ``axes`` if there are any (else nothing is tracked, with check_vma=False).

    The transpose of the cast is the sum over devices that a replicated operand's
    gradient needs.
    """
    varying = [jax.typeof(a).mat.varying for a in arrays]
    union = frozenset().union(*varying)
    union = union | frozenset(axes) if union else union
    return [
        jax.lax.pcast(a, tuple(sorted(union - v)), to="varying") if union - v else a
        for a, v in zip(arrays, varying, strict=True)
    ]
