"""`ContextParallel`: a module's attention, with the sequence on several devices."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash2 import _arguments, _exchange, _ring, ring
from jax_flash2._sequence import Part
from jax_flash2._spec import Operands, axes_of
from jax_flash2.ring import AxisName


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """How a module's sequences lie on a mesh: `Flash2Attention(context_parallel=...)`.

    Inside a `jax.shard_map` over ``axis_name`` and ``exchange_axis_name`` the module's
    inputs are one device's part. Elsewhere they are whole arrays, and the module itself
    runs its attention in a shard_map over all axes of the mesh.

    Attributes:
      axis_name, exchange_axis_name, zigzag: as in `ring_attention`. With zigzag the
        module's inputs are in the order of `jax_flash2.zigzag`.
      batch_axis_name: mesh axes that split the first batch axis.
      head_axis_name: mesh axes that split the heads.
      mesh: None is that of `jax.set_mesh`.

    Raises:
      ValueError: no name of a mesh axis, one that is named twice, or a mesh that is none.
    """

    axis_name: AxisName = ()
    exchange_axis_name: AxisName = ()
    zigzag: bool = False
    batch_axis_name: AxisName = ()
    head_axis_name: AxisName = ()
    mesh: jax.sharding.Mesh | None = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name in (
            "axis_name",
            "exchange_axis_name",
            "batch_axis_name",
            "head_axis_name",
        ):
            axes = ring.as_tuple("context_parallel", name, getattr(self, name))
            object.__setattr__(self, name, axes)  # hashable, also if it was a list
            twice = seen & set(axes)
            if twice:
                raise ValueError(
                    "context_parallel must name each mesh axis once; got "
                    f"{sorted(twice)} again in {name}={axes}"
                )
            seen |= set(axes)
        if not isinstance(self.zigzag, bool):
            raise ValueError(
                f"context_parallel: zigzag must be a bool; got {self.zigzag!r}"
            )
        if self.mesh is not None and not isinstance(self.mesh, jax.sharding.Mesh):
            raise ValueError(
                "context_parallel: mesh must be None or a jax.sharding.Mesh; got "
                f"{self.mesh!r}"
            )

    @property
    def ring(self) -> tuple[str, ...]:
        return tuple(self.axis_name)

    @property
    def exchange(self) -> tuple[str, ...]:
        return tuple(self.exchange_axis_name)

    @property
    def batch(self) -> tuple[str, ...]:
        return tuple(self.batch_axis_name)

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(self.head_axis_name)

    @property
    def sequence(self) -> tuple[str, ...]:
        return (*self.ring, *self.exchange)

    def local(self) -> bool:
        """Whether the arrays here are one device's part."""
        manual = jax.sharding.get_abstract_mesh().manual_axes
        return bool(self.sequence) and set(self.sequence) <= set(manual)

    def tokens(self, length: int) -> int:
        """Of the whole sequence, of which ``length`` are here."""
        if not self.local():
            return length
        return length * math.prod(lax.axis_size(axis) for axis in self.sequence)

    def positions(self, length: int) -> jax.Array:
        """Which tokens of the sequence those here are: int32 ``(length,)``."""
        if not self.local():
            if not self.zigzag:
                return jnp.arange(length, dtype=jnp.int32)
            n = _size(self._mesh(), self.ring)
            self._check_zigzag(length, n)
            return jnp.asarray(ring.zigzag_index(length, n))
        n, ways = (
            math.prod(lax.axis_size(axis) for axis in axes)
            for axes in (self.ring, self.exchange)
        )
        part = Part(n, length * ways, self.zigzag)
        index = jnp.arange(part.length, dtype=jnp.int32)
        loop = ring.ring_of(self.ring, part, part)
        if loop is not None:
            index = _ring.tokens(loop)
        if ways > 1:
            start = lax.axis_index(self.exchange) * length
            index = lax.dynamic_slice_in_dim(index, start, length)
        return index

    def attention(
        self, query: Any, key: Any, value: Any, *, forward_mode: bool, **options: Any
    ) -> jax.Array:
        """`flash_attention` of arrays as this describes them."""
        if self.local():
            return ring.ring_attention(
                query,
                key,
                value,
                self.ring,
                exchange_axis_name=self.exchange,
                zigzag=self.zigzag,
                forward_mode=forward_mode,
                **options,
            )
        mesh = self._mesh()
        flags = {"forward_mode": forward_mode}
        spec, x = _arguments.settle(query, key, value, flags=flags, **options)
        ways = _size(mesh, self.heads)
        heads, kv_heads = x.query.shape[-2], x.key.shape[-2]
        self._check(mesh, "head_axis_name", self.heads, "heads", heads)
        if kv_heads % ways:
            index = _exchange.copies(ways, heads // ways, heads // kv_heads)
            x = x._replace(
                key=jnp.take(x.key, index, axis=-2),
                value=jnp.take(x.value, index, axis=-2),
            )
        for name in ("query", "key"):
            length = getattr(x, name).shape[-3]
            where = "axis_name and exchange_axis_name"
            self._check(mesh, where, self.sequence, f"{name}'s length", length)
            if self.zigzag:
                self._check_zigzag(length, _size(mesh, self.ring))
        if self.batch:
            batch = x.query.shape[0] if x.query.ndim > 3 else 1
            self._check(mesh, "batch_axis_name", self.batch, "batch", batch)
        arrays = {name: a for name, a in x._asdict().items() if a is not None}
        specs = {name: self._spec(name, a.shape) for name, a in arrays.items()}
        if mesh.explicit_axes:
            arrays = {
                name: jax.sharding.reshard(a, NamedSharding(mesh, specs[name]))
                for name, a in arrays.items()
            }

        def body(arrays: dict[str, jax.Array]) -> jax.Array:
            attend = functools.partial(ring.attend, spec, Operands(**arrays))
            out, _, _ = attend(self.ring, self.exchange, self.zigzag, forward_mode)
            return out

        out_specs = self._spec("out", x.query.shape)
        return jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=out_specs)(
            arrays
        )

    def _mesh(self) -> Any:
        mesh = self.mesh or jax.sharding.get_abstract_mesh()
        named = (*self.sequence, *self.batch, *self.heads)
        unknown = [axis for axis in named if axis not in mesh.axis_names]
        if unknown:
            raise ValueError(
                "context_parallel must name axes of its mesh, or else of jax.set_mesh's: "
                f"{list(mesh.axis_names)} here; got {unknown[0]!r}"
            )
        return mesh

    def _check(
        self, mesh: Any, where: str, axes: tuple[str, ...], what: str, size: int
    ) -> None:
        ways = _size(mesh, axes)
        if size % ways:
            raise ValueError(
                f"context_parallel: {what} must be a multiple of the {ways} devices of "
                f"{where}={axes}; got {size}"
            )

    def _check_zigzag(self, length: int, devices: int) -> None:
        if length % (2 * devices):
            raise ValueError(
                "context_parallel: with zigzag the length must be a multiple of 2 * "
                f"{devices} devices of axis_name={self.ring}; got {length}"
            )

    def _spec(self, name: str, shape: tuple[int, ...]) -> P:
        letters = axes_of(name)
        splits = {
            "l": self.sequence,
            "s": () if "l" in letters else self.sequence,
            "h": self.heads,
            "n": self.heads,
        }
        batch = [self.batch, *[()] * len(shape)][: len(shape) - len(letters)]
        entries = [*batch, *(splits.get(letter, ()) for letter in letters)]
        return P(
            *(
                entry if entry and size > 1 else None
                for entry, size in zip(entries, shape, strict=True)
            )
        )


def _size(mesh: Any, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
