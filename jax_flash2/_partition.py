"""Calls on sharded arrays: batch and heads cost no communication, the length a ring.

A `Layout` says over which mesh axes each batch axis, the query heads, the key heads, the
query rows and the keys are split; from it follow the specs of every operand and result,
and the mesh axes over which a gradient has to be summed because its operand was the same
on all of them. Key heads that the mesh axes of the query heads do not divide stay whole
on every device, which slices out those that its query heads need.

Keys are split as the rows are, and go around a ring (`_ring`), or are whole on every
device. Lengths that are sharded in another way, or that the axes do not divide, and
head_dim are gathered, with one warning.

How the layout reaches the compiler depends on the mesh that the operands' types name:
  none, or Auto axes     `custom_partitioning`, with a Shardy rule made from `AXES`
  Explicit axes          `jax.shard_map` by the specs in the types
  Manual axes, all       the call is local already
  Manual axes, some      the blockwise code, which XLA itself partitions over the rest
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
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
from jax_flash2._passes import Pass
from jax_flash2._sequence import Part, Ring
from jax_flash2._spec import AttentionSpec, joint

# One entry of a spec: the mesh axes that split an array's axis.
Split = tuple[str, ...]


def _split(entry: Any) -> Split:
    if entry is None or entry is P.UNCONSTRAINED:
        return ()
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def _entry(split: Split) -> Any:
    return None if not split else split[0] if len(split) == 1 else split


@dataclasses.dataclass(frozen=True)
class Array:
    """An operand or result: its axes after the batch axes (see `AXES`), its shape."""

    name: str
    axes: str
    shape: tuple[int, ...]

    @property
    def batch_axes(self) -> int:
        return len(self.shape) - len(self.axes)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes of each batch axis, of the query heads (h), of the key heads (n), of the
    query rows (l) and of the keys (s)."""

    batch: tuple[Split, ...]
    heads: Split
    kv_heads: Split
    rows: Split
    keys: Split

    def spec(self, a: Array) -> P:
        """An axis of size 1 broadcasts and is never split."""
        entries = [*self.batch, *(self.of(letter, a) for letter in a.axes)]
        return P(
            *(
                None if size == 1 else _entry(split)
                for split, size in zip(entries, a.shape, strict=True)
            )
        )

    def missing(self, a: Array) -> Split:
        """The mesh axes that split the call but not this operand, in a fixed order."""
        own = {axis for entry in self.spec(a) for axis in _split(entry)}
        splits = (*self.batch, self.heads, self.rows)
        used = [axis for split in splits for axis in split]
        return tuple(axis for axis in used if axis not in own)

    def of(self, letter: str, a: Array) -> Split:
        if letter == "s" and "l" in a.axes:  # dense: each row with all its keys
            return ()
        splits = {"h": self.heads, "n": self.kv_heads, "l": self.rows, "s": self.keys}
        return splits.get(letter, ())


def layout(
    arrays: Sequence[Array],
    specs: Sequence[Any],
    mesh_shape: Mapping[str, int],
    strict: bool,
) -> Layout:
    """The layout of a call whose operands are sharded by ``specs``.

    An axis that only some operands split is split in all: slicing is free, gathering is
    not. Where two disagree, the query's split wins, or with ``strict`` that is an error.
    """
    query, key = arrays[0], arrays[1]
    taken: dict[str, Any] = {}  # mesh axis to the axis of the call that it splits

    def choose(where: Any, size: int, pick: Callable[[Array], int | None]) -> Split:
        chosen: Split = ()
        for a, spec in zip(arrays, specs, strict=True):
            index = pick(a)
            if index is None or a.shape[index] == 1:
                continue
            split = _split(spec[index]) if index < len(spec) else ()
            if strict and chosen and split and split != chosen:
                raise ValueError(
                    f"flash_attention: {a.name}'s axis {index} must be sharded over "
                    f"{_entry(chosen)!r}, as query's, or not at all; got {spec}"
                )
            if chosen or not split:
                continue
            free = all(taken.get(axis, where) == where for axis in split)
            if free and size % _ways(split, mesh_shape) == 0:
                chosen = split
        taken.update(dict.fromkeys(chosen, where))
        return chosen

    def axis_of(letter: str) -> Callable[[Array], int | None]:
        def pick(a: Array) -> int | None:
            return a.batch_axes + a.axes.index(letter) if letter in a.axes else None

        return pick

    batch = []
    for i in range(query.batch_axes):
        size = joint(a.shape[i] for a in arrays)
        batch.append(choose(i, size, lambda a, i=i: i))
    heads, kv_heads = query.shape[-2], key.shape[-2]
    split = choose("heads", heads, axis_of("h"))
    if not split:  # query replicated over an axis that splits the key heads
        split = choose("heads", kv_heads, axis_of("n"))
    where = key.batch_axes + 1
    kv_split = _split(specs[1][where]) if len(specs[1]) > where else ()
    rows = choose("rows", query.shape[-3], axis_of("l"))
    length = key.shape[-3]
    keys = choose("rows", length, lambda a: None if "l" in a.axes else axis_of("s")(a))
    if keys and not rows and query.shape[-3] % _ways(keys, mesh_shape) == 0:
        rows = keys
    return Layout(
        tuple(batch),
        split,
        split if kv_split == split else (),
        rows,
        keys if keys == rows else (),
    )


def _ways(split: Split, mesh_shape: Mapping[str, int]) -> int:
    return math.prod(mesh_shape[axis] for axis in split)


_warned: set[str] = set()


def _check_whole(
    arrays: Sequence[Array], specs: Sequence[Any], lay: Layout, strict: bool
) -> None:
    """Warns, once for lengths and once for head_dim, of what must be gathered."""
    letters = {"l": "length", "s": "length", "d": "head_dim", "e": "head_dim"}
    for a, spec in zip(arrays, specs, strict=True):
        entries = (*spec, *[None] * (len(a.shape) - len(spec)))
        for letter, entry in zip(a.axes, entries[a.batch_axes :], strict=True):
            split = _split(entry)
            if letter not in letters or not split or split == lay.of(letter, a):
                continue
            what = letters[letter]
            if strict and what == "head_dim":
                raise ValueError(
                    f"flash_attention: {a.name}'s head_dim must not be sharded; got "
                    f"{spec}"
                )
            remedy = "batch, heads and length are the axes to shard"
            if what == "length":
                remedy = (
                    "shard the lengths of query, key and value over the same axes, whose "
                    "size divides them"
                )
            if what not in _warned:
                _warned.add(what)
                message = (
                    f"flash_attention: {a.name}'s {what} is sharded over {entry!r} and "
                    f"is gathered; {remedy}"
                )
                # A filter that makes it an error must not bring the compiler down.
                try:
                    warnings.warn(message, stacklevel=2)
                except UserWarning:
                    print(message)


# ------------------------------------------------------------------ one device's share


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
        heads = self.operands[0].shape[-2] // _ways(lay.heads, mesh_shape)
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
        n = _ways(lay.rows, mesh_shape)
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
        _check_whole(call.operands, specs, lay, strict=False)

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


def explicit_layout(operands: Sequence[Array], avals: Sequence[Any]) -> Layout:
    """The layout that the types of the operands ask for; raises where none can serve."""
    specs = [aval.sharding.spec for aval in avals]
    lay = layout(operands, specs, avals[0].sharding.mesh.shape, strict=True)
    _check_whole(operands, specs, lay, strict=True)
    return lay


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
