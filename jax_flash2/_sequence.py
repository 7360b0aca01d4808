"""A sequence in parts: which device holds which tokens, and who needs what from whom.

A device holds one or two *chunks* of query rows and of keys, each a run of tokens that
starts at its *origin*. A ring moves the keys: after ``shift`` hops device ``i`` holds
those of device ``i - shift``. What can be visible follows from the origins alone, so the
hops and blocks that serve nobody are known before anything is traced.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from jax_flash2._spec import AttentionSpec

Pairs = tuple[tuple[int, int], ...]  # (from, to), as `jax.lax.ppermute` takes them


@dataclasses.dataclass(frozen=True)
class Part:
    """How one axis of tokens lies on the devices of a ring.

    Attributes:
      devices: of the ring.
      length: tokens of each device.
      zigzag: device i holds chunks i and 2n - 1 - i of 2n, else chunk i of n.
      whole: every device holds everything.
    """

    devices: int
    length: int
    zigzag: bool = False
    whole: bool = False

    @property
    def chunks(self) -> int:
        return 2 if self.zigzag else 1

    @property
    def chunk(self) -> int:
        return self.length // self.chunks

    def origin(self, device: Any, chunk: int) -> Any:
        """The first token of a device's chunk; for an int or a traced device."""
        if self.whole:
            return 0 * device
        index = 2 * self.devices - 1 - device if chunk else device
        return index * self.chunk


class Shift(NamedTuple):
    """The blocks of one shift: pairs of a chunk of rows and a chunk of keys, and over
    which pairs of devices gradients of the keys go home."""

    shift: int
    blocks: tuple[tuple[int, int], ...]
    home: Pairs


class Step(NamedTuple):
    """What happens between two hops: the next hop of either chain, up and down the ring
    (empty where there is none), and the blocks that are there already."""

    up: Pairs
    down: Pairs
    shifts: tuple[Shift, ...]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The rows and keys of one call on a ring.

    Attributes:
      axes: its mesh axes, which the tokens are split over in this order.
      sizes: theirs.
      mesh_axes: the same axes in the mesh's order, which alone permutes may name.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    mesh_axes: tuple[str, ...]
    rows: Part
    keys: Part

    @property
    def devices(self) -> int:
        return math.prod(self.sizes)

    def on_mesh(self, pairs: Pairs) -> Pairs:
        """Pairs of the ring's devices as pairs of indices along `mesh_axes`."""
        where = [self.axes.index(axis) for axis in self.mesh_axes]
        index = np.arange(self.devices).reshape([self.sizes[i] for i in where])
        index = index.transpose([self.mesh_axes.index(axis) for axis in self.axes])
        index = index.reshape(-1)
        return tuple((int(index[i]), int(index[j])) for i, j in pairs)

    def plan(self, spec: AttentionSpec, anywhere: bool) -> tuple[Step, ...]:
        """The steps of a call.

        Args:
          anywhere: whether rows may see keys that their own indices do not tell, as
            where they are offset, or with a prefix.
        """
        return _plan(self, _without_values(spec), anywhere)


def _without_values(spec: AttentionSpec) -> AttentionSpec:
    """What visibility depends on."""
    return AttentionSpec(
        is_causal=spec.is_causal, window=spec.window, chunk_size=spec.chunk_size
    )


def _may_see(spec: AttentionSpec, rows: tuple[int, int], keys: tuple[int, int]) -> bool:
    """Whether any of the rows [first, last] may see any of the keys [first, last]."""
    (first, last), (begin, end) = rows, keys
    left, right = spec.window
    if spec.is_causal:
        right = 0
    if right is not None and begin > last + right:
        return False
    if left is not None and end < first - left:
        return False
    size = spec.chunk_size
    return size is None or (
        begin // size <= last // size and first // size <= end // size
    )


@functools.lru_cache(maxsize=256)
def _plan(ring: Ring, spec: AttentionSpec, anywhere: bool) -> tuple[Step, ...]:
    n, rows, keys = ring.devices, ring.rows, ring.keys

    def needs(device: int, shift: int, a: int, b: int) -> bool:
        if anywhere:
            return True
        first, begin = rows.origin(device, a), keys.origin((device - shift) % n, b)
        ends = first + rows.chunk - 1, begin + keys.chunk - 1
        return _may_see(spec, (first, ends[0]), (begin, ends[1]))

    pairs = [(a, b) for a in range(rows.chunks) for b in range(keys.chunks)]
    shifts = range(1 if keys.whole else n)
    # By shift: the blocks, and the devices that need any of them.
    blocks = {
        s: [(a, b) for a, b in pairs if any(needs(i, s, a, b) for i in range(n))]
        for s in shifts
    }
    users = {
        s: [i for i in range(n) if any(needs(i, s, a, b) for a, b in blocks[s])]
        for s in shifts
    }
    visited = {a for s in shifts for a, _ in blocks[s]}
    # Rows that see nothing anywhere still have a result.
    blocks[0] += [(a, 0) for a in range(rows.chunks) if a not in visited]

    up, down = _chains(n, [s for s in shifts if s and users[s]])
    steps = []
    for k in range(max(up, down) + 1):
        here = [k] if k <= up else []
        here += [n - k] if 1 <= k <= down else []
        steps.append(
            Step(
                _hop(n, users, k + 1, up, 1) if k < up else (),
                _hop(n, users, k + 1, down, -1) if k < down else (),
                tuple(
                    Shift(
                        s, tuple(blocks[s]), tuple((i, (i - s) % n) for i in users[s])
                    )
                    for s in here
                    if blocks.get(s)
                ),
            )
        )
    return tuple(steps)


def _chains(n: int, shifts: list[int]) -> tuple[int, int]:
    """Hops up and down the ring that reach all shifts, as few as will do; with as many
    either way, up."""

    def down(up: int) -> int:
        return max((n - s for s in shifts if s > up), default=0)

    choices: list[tuple[int, int]] = [(up, down(up)) for up in range(n)]
    return min(choices, key=lambda c: (c[0] + c[1], c[1]))


def _hop(n: int, users: dict[int, list[int]], hop: int, last: int, step: int) -> Pairs:
    """Who sends to whom at a hop: keys that nobody further on needs stay where they are."""

    def wanted(source: int) -> bool:
        further = range(hop, last + 1)
        return any((source + step * k) % n in users[step * k % n] for k in further)

    return tuple(
        (i, (i + step) % n) for i in range(n) if wanted((i - step * (hop - 1)) % n)
    )
