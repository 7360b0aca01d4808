"""Over which mesh axes a call is split, from how its operands are sharded.

A `Layout` says which mesh axes split each batch axis, the query heads, the key heads, the
query rows and the keys; from it follow the specs of every operand and result. Key heads
that the mesh axes of the query heads do not divide stay whole on every device. Keys are
split as the rows are, or are whole on every device.

Lengths that are sharded in another way, or that the axes do not divide, and head_dim are
gathered, with one warning.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec as P

from jax_flash2._spec import joint

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
            if free and size % ways(split, mesh_shape) == 0:
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
    if keys and not rows and query.shape[-3] % ways(keys, mesh_shape) == 0:
        rows = keys
    return Layout(
        tuple(batch),
        split,
        split if kv_split == split else (),
        rows,
        keys if keys == rows else (),
    )


def ways(split: Split, mesh_shape: Mapping[str, int]) -> int:
    return math.prod(mesh_shape[axis] for axis in split)


_warned: set[str] = set()


def check_whole(
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


def explicit_layout(operands: Sequence[Array], avals: Sequence[Any]) -> Layout:
    """The layout that the types of the operands ask for; raises where none can serve."""
    specs = [aval.sharding.spec for aval in avals]
    lay = layout(operands, specs, avals[0].sharding.mesh.shape, strict=True)
    check_whole(operands, specs, lay, strict=True)
    return lay
