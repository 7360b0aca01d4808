"""Calls on sharded arrays: batch and heads cost no communication, the length a ring.

What each device does follows from the call's `Layout`. Keys that are split go around a
ring (`_ring`); of key heads that are whole on every device, each slices out those that its
query heads need; a gradient is summed over the mesh axes on all of which its operand was
the same.

How the layout reaches the compiler depends on the mesh that the operands' types name:
  none, or Auto axes     `custom_partitioning`, with a Shardy rule made from `AXES`
  Explicit axes          `jax.shard_map` by the specs in the types
  Manual axes, all       the call is local already
  Manual axes, some      the blockwise code, which XLA itself partitions over the rest
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash2 import _compat, _ring
from jax_flash2._layout import Array, Layout, check_whole, explicit_layout, layout, ways
from jax_flash2._passes import Pass
from jax_flash2._sequence import Part, Ring
from jax_flash2._spec import AttentionSpec, joint


@dataclasses.dataclass(frozen=True)
class Call:
    """One bind of an outer primitive: what runs locally, and its arrays.

    Attributes:
      local: the pass on one device, of all its part or of a block: arrays by name.
      operands: query and key first.
      results: gradients are named after their operand.
    """

    pass_: Pass
    local: Callable[[AttentionSpec, dict[str, jax.Array]], dict[str, jax.Array]]
    spec: AttentionSpec
    operands: tuple[Array, ...]
    results: tuple[Array, ...]

    @property
    def group(self) -> int:
        return self.operands[0].shape[-2] // self.operands[1].shape[-2]

    def whole(self, *arrays: jax.Array) -> list[jax.Array]:
        """The call where nothing is split."""
        return list(self.local(self.spec, self._named(arrays)).values())

    def on_ring(self, *arrays: jax.Array) -> list[jax.Array]:
        """The call where a shard_map around it has split the sequence."""
        assert self.spec.ring is not None
        spec = dataclasses.replace(self.spec, ring=None)
        found = _ring.run(
            self.pass_, self.local, spec, self._named(arrays), self.spec.ring
        )
        return [found[a.name] for a in self.results]

    def share(self, lay: Layout, mesh_shape: Mapping[str, int]) -> Callable[..., Any]:
        """What one device does under a layout; mesh axes are bound where it is traced."""
        kv_heads = self.operands[1].shape[-2]
        heads = self.operands[0].shape[-2] // ways(lay.heads, mesh_shape)
        slices = lay.heads != lay.kv_heads and kv_heads > 1
        gradients = {a.name for a in self.operands} & {a.name for a in self.results}
        ring = self._ring(lay, mesh_shape)

        def run(*arrays: jax.Array) -> list[jax.Array]:
            arrays = tuple(arrays)
            index = None
            if slices:
                first = lax.axis_index(lay.heads) * heads
                index = _needed_heads(first, heads, self.group)
                arrays = tuple(
                    jnp.take(x, index, axis=-2, mode="clip") if "n" in a.axes else x
                    for a, x in zip(self.operands, arrays, strict=True)
                )
            named = self._named(arrays)
            if ring is None:
                found = self.local(self.spec, named)
            else:
                found = _ring.run(self.pass_, self.local, self.spec, named, ring)
            results = []
            for a in self.results:
                g = found[a.name]
                if a.name == "largest" and lay.rows:
                    g = lax.pmax(g, lay.rows)
                if a.name in gradients:
                    if slices and "n" in a.axes:
                        shape = (*g.shape[:-2], kv_heads, g.shape[-1])
                        g = jnp.zeros(shape, g.dtype).at[..., index, :].add(g)
                    axes = lay.missing(a)
                    g = lax.psum(g, axes) if axes else g
                results.append(g)
            return results

        return run

    def _named(self, arrays: Sequence[jax.Array]) -> dict[str, jax.Array]:
        return {a.name: x for a, x in zip(self.operands, arrays, strict=True)}

    def _ring(self, lay: Layout, mesh_shape: Mapping[str, int]) -> Ring | None:
        n = ways(lay.rows, mesh_shape)
        if n == 1:
            return None
        rows, keys = (a.shape[-3] for a in self.operands[:2])
        whole = not lay.keys
        keys = Part(n, keys if whole else keys // n, whole=whole)
        sizes = tuple(mesh_shape[axis] for axis in lay.rows)
        on_mesh = tuple(axis for axis in mesh_shape if axis in lay.rows)
        return Ring(lay.rows, sizes, on_mesh, Part(n, rows // n), keys)


def _needed_heads(first: jax.Array, heads: int, group: int) -> jax.Array:
    """The key heads of ``heads`` query heads from ``first`` on, as few as will do."""
    if heads % group == 0:
        return first // group + jnp.arange(heads // group)
    if group % heads == 0:
        return first // group + jnp.arange(1)
    # Groups straddle devices: each query head gets a copy of its key head.
    return (first + jnp.arange(heads)) // group


# --------------------------------------------------------------------- Auto: custom call


@functools.lru_cache(maxsize=1024)
def partitioned(call: Call) -> Callable[..., list[jax.Array]]:
    """The call as a `custom_partitioning`, for meshes whose axes XLA assigns."""

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        del results
        _compat.restore_stacks()
        specs = [x.sharding.spec for x in operands]
        lay = layout(call.operands, specs, mesh.shape, strict=False)
        check_whole(call.operands, specs, lay, strict=False)

        def shardings(arrays: Sequence[Array]) -> list[NamedSharding]:
            return [NamedSharding(mesh, lay.spec(a)) for a in arrays]

        share = call.share(lay, mesh.shape)

        def run(*arrays: jax.Array) -> list[jax.Array]:
            _compat.drop_stacks()
            return share(*arrays)

        return mesh, run, shardings(call.results), tuple(shardings(call.operands))

    def rule(mesh: Any, operands: Any, results: Any) -> SdyShardingRule:
        del mesh, operands, results
        return _sharding_rule(call)

    def run(*arrays: jax.Array) -> list[jax.Array]:
        return call.whole(*arrays)

    function = custom_partitioning(run)
    function.def_partition(partition=partition, sharding_rule=rule)
    return function


def _sharding_rule(call: Call) -> SdyShardingRule:
    """Factors are the axes' letters; the key heads are the query heads' without groups.

    An axis of size 1 that broadcasts gets a factor of its own.
    """
    query = call.operands[0]
    batch = [joint(a.shape[i] for a in call.operands) for i in range(query.batch_axes)]
    sizes = {f"b{i}": n for i, n in enumerate(batch)}
    for a in call.operands:
        for letter, n in zip(a.axes, a.shape[a.batch_axes :], strict=True):
            sizes[letter] = joint((sizes.get(letter, 1), n))
    fresh: list[str] = []

    def mapping(a: Array) -> ArrayMapping:
        names = []
        letters = [f"b{i}" for i in range(a.batch_axes)] + list(a.axes)
        for letter, n in zip(letters, a.shape, strict=True):
            if n != sizes[letter]:
                fresh.append(f"x{len(fresh)}")
                names.append(fresh[-1])
            else:
                names.append("h" if letter == "n" and call.group == 1 else letter)
        return ArrayMapping(*names)

    operands = tuple(mapping(a) for a in call.operands)
    results = tuple(mapping(a) for a in call.results)
    names = dict.fromkeys(name for m in (*operands, *results) for name in m)
    whole = tuple(name for name in names if name in "der" or name in fresh)
    return SdyShardingRule(operands, results, need_replication_factors=whole)


# ------------------------------------------------------------------ Explicit: shard_map


def explicit(
    call: Call, avals: Sequence[Any], results: Sequence[Any]
) -> Callable[..., list[jax.Array]]:
    """The call for Explicit axes: operands and results keep the types they have."""
    mesh = avals[0].sharding.mesh
    lay = explicit_layout(call.operands, avals)
    in_specs = tuple(lay.spec(a) for a in call.operands)
    out_specs = [lay.spec(a) for a in call.results]

    def with_spec(x: jax.Array, own: Any, wanted: P) -> jax.Array:
        if own.sharding.spec == wanted:
            return x
        return jax.sharding.reshard(x, NamedSharding(mesh, wanted))

    def run(*arrays: jax.Array) -> list[jax.Array]:
        body = jax.shard_map(
            call.share(lay, mesh.shape),
            mesh=mesh,
            axis_names=set(mesh.explicit_axes),
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )
        outputs = body(*map(with_spec, arrays, avals, in_specs))
        return [
            y
            if aval.sharding.spec == spec
            else with_spec(y, jax.typeof(y), aval.sharding.spec)
            for y, spec, aval in zip(outputs, out_specs, results, strict=True)
        ]

    return run
