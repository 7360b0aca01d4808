"""A pass over a sequence that several devices share: block by block, around a ring.

A block is an ordinary pass of some query rows over some keys, told where both lie in the
sequence by the operands that every implementation has: an offset, lengths, a prefix. So
whatever computes a call on one device computes it here.

The forward merges blocks by their logsumexps. Every other pass takes the whole call's
output and logsumexp (`_rules`) and is a sum over blocks. Keys, values and what goes with
them travel; gradients of them are sent home from where they were made and summed there in
float32. Nothing else leaves its device. Each hop is issued before the blocks that are
there already, so that the compiler may run both at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_flash2._passes import FORWARD, Named, Pass
from jax_flash2._sequence import Pairs, Part, Ring
from jax_flash2._spec import AttentionSpec, accumulator, axes_of, base_name

Block = Callable[[AttentionSpec, Named], Named]


def run(
    pass_: Pass, block: Block, spec: AttentionSpec, arrays: Named, ring: Ring
) -> Named:
    """One device's share of a pass, with the ring's mesh axes bound.

    Args:
      block: the pass on one device.
      arrays: this device's part of everything, by name; of dense masks and biases, its
        rows and all keys.

    Returns:
      This device's part of the results by name. Those that belong to neither rows nor
      keys are its own sum (of ``largest``, the maximum), to be joined over the ring.
    """
    anywhere = any(
        arrays.get(n) is not None for n in ("query_offset", "prefix_lengths")
    )
    me = lax.axis_index(ring.axes)
    if pass_ is not FORWARD:
        # Else XLA would keep every hop's keys from the forward on, to save these hops.
        arrays = lax.optimization_barrier(arrays)
    total = _Total(pass_ is FORWARD, arrays, ring)
    travelling = {name: a for name, a in arrays.items() if _travels(name)}
    at_rest = {name: a for name, a in arrays.items() if name not in travelling}
    going_up = going_down = travelling
    started: set[int] = set()
    for number, step in enumerate(ring.plan(spec, anywhere)):
        # Sent before they are used here: a hop and this step's blocks may overlap.
        next_up, next_down = (
            _send(going_up, ring, step.up),
            _send(going_down, ring, step.down),
        )
        for shift in step.shifts:
            keys = going_up if shift.shift == number else going_down
            source = (me - shift.shift) % ring.devices if shift.shift else me
            gradients: Named = {}
            for a, b in shift.blocks:
                same = not shift.shift and a == b and ring.rows == ring.keys
                part = _Where(ring, me, source, a, b, same)
                x = part.cut(at_rest | keys)
                if a in started:  # a sink is one column: of a row's first block
                    x = {n: v for n, v in x.items() if base_name(n) != "sinks"}
                started.add(a)
                results = block(*part.shift(spec, x))
                total.add(results, part)
                _add_keys(gradients, results, part)
            total.receive(
                _send(total.to_send(gradients), ring, shift.home)
                if shift.shift
                else gradients
            )
        going_up, going_down = next_up, next_down
    return total.results()


def tokens(ring: Ring) -> jax.Array:
    """Which token of the sequence each row of this device is: int32 ``(rows,)``."""
    rows, me = ring.rows, lax.axis_index(ring.axes)
    within = jnp.arange(rows.chunk, dtype=jnp.int32)
    origins = [rows.origin(me, a) for a in range(rows.chunks)]
    return jnp.concatenate([origin + within for origin in origins])


def _travels(name: str) -> bool:
    axes = axes_of(name)
    return "s" in axes and "l" not in axes


def _send(arrays: Named, ring: Ring, pairs: Pairs) -> Named:
    """Zeros where nothing is received."""
    if not pairs:
        return {}
    pairs = ring.on_mesh(pairs)
    return {n: lax.ppermute(a, ring.mesh_axes, pairs) for n, a in arrays.items()}


def _axis(name: str, letter: str) -> int:
    """An axis of an array by its letter, counted from the end."""
    axes = axes_of(name)
    return axes.index(letter) - len(axes)


class _Where:
    """The place of one block: chunk ``a`` of this device's rows, ``b`` of a source's keys."""

    def __init__(self, ring: Ring, me: Any, source: Any, a: int, b: int, same: bool):
        self.rows, self.keys = ring.rows, ring.keys
        self.a, self.b = a, b
        self.row = ring.rows.origin(me, a)
        self.key = ring.keys.origin(source, b)
        self.same = same  # both begin at one token
        # Dense arrays have the keys of all devices, in the order of the devices.
        self.column = 0 if ring.keys.whole else source * ring.keys.length
        self.column = self.column + b * ring.keys.chunk

    def cut(self, arrays: Named) -> Named:
        return {name: self._cut(name, a) for name, a in arrays.items()}

    def _cut(self, name: str, x: jax.Array) -> jax.Array:
        axes = axes_of(name)
        if "l" in axes and self.rows.chunks > 1:
            axis = _axis(name, "l") + x.ndim
            if x.shape[axis] != 1:
                x = lax.slice_in_dim(x, *_bounds(self.rows, self.a), axis=axis)
        if "s" not in axes:
            return x
        axis = _axis(name, "s") + x.ndim
        if _travels(name):
            if self.keys.chunks > 1:
                x = lax.slice_in_dim(x, *_bounds(self.keys, self.b), axis=axis)
        elif x.shape[axis] not in (1, self.keys.chunk):
            x = lax.dynamic_slice_in_dim(x, self.column, self.keys.chunk, axis)
        return x

    def shift(self, spec: AttentionSpec, x: Named) -> tuple[AttentionSpec, Named]:
        """The call of this block alone: what counts from the sequence's first token
        counts from the block's."""
        x = dict(x)
        ones = (1,) * (x["query"].ndim - 3)

        def number(n: Any) -> jax.Array:
            return jnp.asarray(n, jnp.int32).reshape(ones)

        def beyond(name: str, origin: Any, length: int) -> None:
            if name in x and not (self.same and isinstance(origin, int)):
                x[name] = jnp.clip(x[name] - number(origin), 0, length)

        beyond("query_seq_lengths", self.row, self.rows.chunk)
        beyond("key_value_seq_lengths", self.key, self.keys.chunk)
        beyond("prefix_lengths", self.key, self.keys.chunk)
        offset = x.get("query_offset")
        size = spec.chunk_size
        if size is not None and self.keys.chunk % size and "query_segment_ids" not in x:
            # Chunks that end within a block, in a form that kernels have.
            x["query_segment_ids"] = self._chunk_ids(size, x["query"], self.row, offset)
            x["key_value_segment_ids"] = self._chunk_ids(size, x["key"], self.key, None)
            spec = dataclasses.replace(spec, chunk_size=None)
        if spec.dropout_rate or (spec.chunk_size and self.keys.chunk % spec.chunk_size):
            x["origin"] = jnp.stack([number(self.row), number(self.key)], -1)
        bounded = spec.is_causal or spec.window != (None, None) or spec.chunk_size
        if not self.same and (bounded or "alibi_slopes" in x):
            apart = number(self.row) - number(self.key)
            x["query_offset"] = apart if offset is None else apart + offset
        return spec, x

    def _chunk_ids(
        self, size: int, x: jax.Array, origin: Any, offset: Any
    ) -> jax.Array:
        """The chunk of each token of ``x``: int32 ``(1..., length)``."""
        index = jnp.arange(x.shape[-3], dtype=jnp.int32) + jnp.asarray(
            origin, jnp.int32
        )
        index = index.reshape((1,) * (x.ndim - 3) + index.shape)
        return (index if offset is None else index + offset[..., None]) // size


def _bounds(part: Part, chunk: int) -> tuple[int, int]:
    return chunk * part.chunk, (chunk + 1) * part.chunk


class _Total:
    """The results so far."""

    def __init__(self, forward: bool, arrays: Named, ring: Ring):
        self.forward, self.arrays, self.ring = forward, arrays, ring
        self.dtype = accumulator(arrays["query"].dtype)
        self.types: dict[str, Any] = {}  # by name of a result
        self.by_rows: list[Named] = [{} for _ in range(ring.rows.chunks)]
        self.keys: Named = {}
        self.others: Named = {}

    def add(self, results: Named, where: _Where) -> None:
        """All but gradients of keys."""
        rows: Named = {}
        for name, r in results.items():
            self.types.setdefault(name, r.dtype)
            axes = axes_of(name)
            if _travels(name):
                continue
            if "s" in axes:
                self._add_dense(name, r, where)
            elif "l" in axes:
                rows[name] = r
            elif name == "largest":
                known = self.others.get(name)
                self.others[name] = r if known is None else jnp.maximum(known, r)
            else:
                self._add(self.others, name, r)
        mine = self.by_rows[where.a]
        if self.forward:
            self.by_rows[where.a] = _merge(mine, rows, self.dtype) if mine else rows
        else:
            for name, r in rows.items():
                self._add(mine, name, r)

    def _add(self, sums: Named, name: str, r: jax.Array) -> None:
        """One term stays as it is; more are summed in the accumulator's dtype."""
        known = sums.get(name)
        sums[name] = (
            r if known is None else known.astype(self.dtype) + r.astype(self.dtype)
        )

    def _add_dense(self, name: str, r: jax.Array, where: _Where) -> None:
        """A block's part of a dense array's gradient, where it belongs."""
        shape, starts = list(r.shape), [jnp.zeros((), jnp.int32)] * r.ndim
        for letter, start in (("l", where.a * where.rows.chunk), ("s", where.column)):
            axis = _axis(name, letter) + r.ndim
            full = self.arrays[name].shape[axis]
            if full != 1:
                shape[axis] = full
                starts[axis] = jnp.asarray(start, jnp.int32)
        total = self.others.get(name)
        if total is None:
            total = jnp.zeros(shape, self.dtype)
        r = r.astype(self.dtype) + lax.dynamic_slice(total, starts, r.shape)
        self.others[name] = lax.dynamic_update_slice(total, r, starts)

    def to_send(self, gradients: Named) -> Named:
        return {name: g.astype(self.types[name]) for name, g in gradients.items()}

    def receive(self, gradients: Named) -> None:
        for name, g in gradients.items():
            self._add(self.keys, name, g)

    def results(self) -> Named:
        found = self.keys | self.others
        for name in self.by_rows[0]:
            parts = [mine[name] for mine in self.by_rows]
            axis = _axis(name, "l")
            found[name] = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)
        return {name: found[name].astype(dtype) for name, dtype in self.types.items()}


def _add_keys(gradients: Named, results: Named, where: _Where) -> None:
    """Adds a block's gradients of keys to those of all keys of its source."""
    for name, g in results.items():
        if not _travels(name):
            continue
        keys = where.keys
        g = g.astype(accumulator(g.dtype))
        if keys.chunks > 1:
            widths = [(0, 0, 0)] * g.ndim
            low, high = _bounds(keys, where.b)
            widths[_axis(name, "s") + g.ndim] = (low, keys.length - high, 0)
            g = lax.pad(g, jnp.zeros((), g.dtype), widths)
        gradients[name] = gradients[name] + g if name in gradients else g


def _merge(one: Named, other: Named, dtype: Any) -> Named:
    """Two forwards of the same rows over different keys, as one over all of them."""
    lse_1, lse_2 = one["lse"], other["lse"]
    # Any shift is right; a row that sees nothing has none.
    shift = lax.stop_gradient(jnp.maximum(lse_1, lse_2))
    shift = jnp.where(shift == -jnp.inf, 0, shift)
    weight_1, weight_2 = jnp.exp(lse_1 - shift), jnp.exp(lse_2 - shift)
    total = weight_1 + weight_2
    divisor = jnp.where(total == 0, 1, total)

    def times(weight: jax.Array, out: jax.Array) -> jax.Array:
        weight = jnp.swapaxes(weight / divisor, -1, -2)[..., None]
        return weight * out.astype(dtype)

    return {
        "out": times(weight_1, one["out"]) + times(weight_2, other["out"]),
        "lse": jnp.where(total == 0, -jnp.inf, shift + jnp.log(divisor)),
    }
