"""A pass on one device: any number of batch axes made one, and the inner primitive bound.

Arrays broadcast along batch axes by having size 1 there, and nothing is repeated where
that can be helped. Where there are no rows or no keys, nothing is bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from jax_flash2._passes import Named, Pass, zero_past
from jax_flash2._spec import AttentionSpec, accumulator, axes_of, base_name, joint

Shape = tuple[int, ...]


def batch_shape(present: tuple[str, ...], arrays: Sequence[Any]) -> Shape:
    shapes = [
        a.shape[: len(a.shape) - len(axes_of(name))]
        for name, a in zip(present, arrays, strict=True)
    ]
    return tuple(joint(sizes) for sizes in zip(*shapes, strict=True))


def sizes_of(named: Named) -> dict[str, int]:
    return {
        letter: size
        for name in ("query", "key", "value")
        for letter, size in zip(axes_of(name), named[name].shape[-3:], strict=True)
    }


def gradient_shape(
    name: str, shape: Shape, batch: Shape, wrt: tuple[str, ...], mapped: int
) -> Shape:
    """Query's, key's and value's gradients have the batch axes of the call; others their
    operand's, apart for the elements of a mapped axis."""
    lead = batch[:mapped] + shape[mapped : len(batch)] if name in wrt else batch
    return (*lead, *shape[len(batch) :])


@dataclasses.dataclass(frozen=True)
class Local:
    """A pass on one device, of all its part or of a block. Hashable, as `_partition.Call`
    wants it.

    Attributes:
      inner: its inner primitive.
      wrt, mapped: as in `_primitives`.
      together: as in `_passes.Platform`.
    """

    pass_: Pass
    inner: Primitive
    wrt: tuple[str, ...]
    mapped: int
    together: bool

    def __call__(self, spec: AttentionSpec, named: Named) -> Named:
        """Arrays and results by name, with any number of batch axes."""
        named = {name: a for name, a in named.items() if a is not None}
        present, wrt = tuple(named), self.wrt
        batch = batch_shape(present, tuple(named.values()))
        names = self.pass_.results(spec, wrt)
        # Batch axes of the gradients of wrt: elements of a mapped axis keep theirs apart.
        leads = {}
        for name in wrt:
            shape = gradient_shape(name, named[name].shape, batch, wrt, self.mapped)
            leads[name] = shape[: len(batch)]
        if 0 in batch or 0 in named["query"].shape or named["key"].shape[-3] == 0:
            return {name: _empty(name, named, batch, leads) for name in names}
        flat = []
        for name, a in named.items():
            if name in leads:
                a = jnp.broadcast_to(a, (*leads[name], *a.shape[len(batch) :]))
            flat.append(_flatten_batch(a, batch, len(axes_of(name))))
        params = dict(spec=spec, present=present, wrt=wrt, together=self.together)
        found = self.inner.bind(*flat, **params)
        return {
            name: _unflatten(r, batch, leads.get(name, batch))
            for name, r in zip(names, found, strict=True)
        }


def _empty(name: str, named: Named, batch: Shape, leads: dict[str, Shape]) -> jax.Array:
    """A result where there are no rows, or no keys: every row is an empty row."""
    if name in named:  # a gradient
        like = named[name]
        lead = leads.get(name, batch)
        return jnp.zeros((*lead, *like.shape[len(batch) :]), like.dtype)
    shape = (*batch, *(sizes_of(named)[letter] for letter in axes_of(name)))
    query = named["query"].dtype
    if base_name(name) == "out":
        return jnp.zeros(shape, query)
    dtype = accumulator(query)
    # All that an empty row's logsumexp has is its sink.
    sinks = named.get({"lse": "sinks", "t_lse": "t_sinks"}.get(name, ""))
    if sinks is None:
        return jnp.full(shape, -jnp.inf if name in ("lse", "largest") else 0, dtype)
    sinks = jnp.broadcast_to(sinks.astype(dtype)[..., None], shape)
    return (
        sinks if name == "lse" else zero_past(sinks, named.get("query_seq_lengths"), -1)
    )


def _flatten_batch(a: jax.Array, batch: Shape, axes: int) -> jax.Array:
    """One batch axis, of full size or 1; repeats only where some axes are 1, others not."""
    lead, rest = a.shape[: len(batch)], a.shape[len(batch) :]
    assert len(rest) == axes
    if lead != batch and math.prod(lead) != 1:
        a = jnp.broadcast_to(a, (*batch, *rest))
        lead = batch
    return a.reshape(math.prod(lead), *rest)


def _unflatten(r: jax.Array, batch: Shape, lead: Shape) -> jax.Array:
    """A result with the batch axes ``lead``, summed over what these lack of ``batch``."""
    if math.prod(lead) == r.shape[0]:
        return r.reshape(*lead, *r.shape[1:])
    # The operand was repeated along some batch axes and not along others.
    r = r.reshape(*batch, *r.shape[1:])
    axes = tuple(a for a, n in enumerate(lead) if n != batch[a])
    return r.sum(axes, keepdims=True)
