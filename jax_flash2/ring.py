"""Context parallelism inside `jax.shard_map`: one sequence on several devices.

`ring_attention` is the call, `zigzag` and `unzigzag` order tokens so that causal work is
the same on every device. Under plain `jax.jit` none of it is needed: `flash_attention` of
arrays whose length is sharded runs the ring by itself.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash2 import _arguments, _autodiff, _checks, _exchange
from jax_flash2._sequence import Part, Ring
from jax_flash2._spec import AttentionSpec, Operands

AxisName = str | tuple[str, ...]


def ring_attention(
    query: Any,
    key: Any,
    value: Any,
    axis_name: AxisName = (),
    *,
    exchange_axis_name: AxisName = (),
    zigzag: bool = False,
    return_residual: bool = False,
    forward_mode: bool = False,
    **options: Any,
) -> Any:
    """`flash_attention` of a sequence that several devices share, in `jax.shard_map`.

    Two ways, and both at once. Over ``axis_name`` keys and values go around a ring (Liu
    et al., arXiv 2310.01889), one hop ahead of the blocks that they feed; hops and blocks
    that the masks leave nothing of are left out. Over ``exchange_axis_name`` two
    all-to-alls exchange heads for length (DeepSpeed Ulysses, arXiv 2309.14509): each
    device then has all of those tokens, for a part of the heads. With both the sequence
    is split over ``axis_name`` and each part of it over ``exchange_axis_name``, as
    ``PartitionSpec((*axis_name, *exchange_axis_name))`` has it.

    Args:
      query: ``(batch..., query length, heads, head_dim)``: this device's part.
      key, value: ``(batch..., key length, kv heads, head_dim)``: this device's part.
      axis_name: mesh axes of the ring.
      exchange_axis_name: mesh axes of the all-to-alls; their size divides the query's
        heads. Key heads that it does not divide are sent to all that need them.
      zigzag: the tokens are in the order of `zigzag`, for as many devices as
        ``axis_name`` has; then all have the same causal work. Else they are in order.
      return_residual, forward_mode: as in `flash_attention`.
      options: every other argument of `flash_attention`. Those that count tokens
        (lengths, offset, prefix, window, chunk) count those of the whole sequence, in
        its own order; segment ids are this device's part. ``bias`` and ``mask`` have
        this device's rows and all keys, in the order of the devices. Dropout goes by
        the tokens' place in the sequence; batch entries and heads count from this
        device's first, so fold the index on other mesh axes into ``dropout_key``.

    Returns:
      As `flash_attention`, this device's part.

    Raises:
      ValueError: as `flash_attention`; an axis that no shard_map around has made manual;
        heads that the exchange cannot divide; an odd length with zigzag.
      NotImplementedError: as `flash_attention`, and implementation="reference".

    Example:
      >>> import functools, jax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from jax_flash2 import ring_attention
      >>> mesh = jax.make_mesh((jax.device_count(),), ("seq",))
      >>> attend = jax.shard_map(
      ...     functools.partial(ring_attention, axis_name="seq", is_causal=True),
      ...     mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"))
      >>> at = NamedSharding(mesh, P(None, "seq"))
      >>> x = jax.device_put(jax.numpy.ones((2, 128, 8, 64)), at)
      >>> attend(x, x, x).shape
      (2, 128, 8, 64)
    """
    ring_axes = _axes("axis_name", axis_name)
    exchange_axes = _axes("exchange_axis_name", exchange_axis_name)
    twice = set(ring_axes) & set(exchange_axes)
    _require(
        not twice,
        f"exchange_axis_name must not hold axes of axis_name; got {sorted(twice)} in both",
    )
    devices = math.prod(jax.lax.axis_size(a) for a in ring_axes + exchange_axes)
    _require(isinstance(zigzag, bool), f"zigzag must be a bool; got {zigzag!r}")
    spec, operands = _arguments.settle(
        query,
        key,
        value,
        flags={"return_residual": return_residual, "forward_mode": forward_mode},
        devices=devices,
        **options,
    )
    out, lse, largest = attend(
        spec, operands, ring_axes, exchange_axes, zigzag, forward_mode
    )
    return _arguments.results(out, lse if return_residual else None, largest)


def attend(
    spec: AttentionSpec,
    x: Operands,
    ring_axes: tuple[str, ...],
    exchange_axes: tuple[str, ...],
    zigzag: bool,
    forward_mode: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """One device's part of a settled call: output, logsumexp ``(batch..., h, l)`` and
    largest logits, which are those of all devices."""
    if spec.implementation == "reference":
        raise NotImplementedError(
            "ring_attention: implementation='reference' is dense and has no ring; use "
            "flash_attention on arrays sharded over batch and heads"
        )
    ways = math.prod(jax.lax.axis_size(a) for a in exchange_axes)
    _require(
        x.query.shape[-2] % ways == 0,
        f"query's heads must be a multiple of the {ways} devices of exchange_axis_name="
        f"{exchange_axes}; got {_checks.describe(x.query)}",
    )
    if ways > 1:
        x = _exchange.to_heads(x, exchange_axes, ways)
    n = math.prod(jax.lax.axis_size(a) for a in ring_axes)
    lengths = x.query.shape[-3], x.key.shape[-3]
    _require(
        not zigzag or all(length % 2 == 0 for length in lengths),
        f"zigzag needs an even length on each device of axis_name; got {lengths[0]} rows "
        f"of query and {lengths[1]} of key",
    )
    ring = ring_of(ring_axes, *(Part(n, length, zigzag) for length in lengths))
    spec = dataclasses.replace(spec, ring=ring)
    out, lse, largest = _attend(spec, x, forward_mode)
    if largest is not None and n > 1:
        largest = jax.lax.pmax(jax.lax.stop_gradient(largest), ring_axes)
    if ways > 1:
        out, lse, largest = _exchange.to_length(out, lse, largest, exchange_axes)
    return out, lse, largest


# Compiled, because a shard_map outside jit cannot run a custom_vjp.
_attend = jax.jit(_autodiff.attend, static_argnums=(0, 2))


def ring_of(axes: tuple[str, ...], rows: Part, keys: Part) -> Ring | None:
    """The ring over manual axes; None where it has one device."""
    sizes = tuple(jax.lax.axis_size(axis) for axis in axes)
    if math.prod(sizes) == 1:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    on_mesh = tuple(axis for axis in mesh.axis_names if axis in axes)
    return Ring(axes, sizes, on_mesh, rows, keys)


def zigzag(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """Tokens in the order in which a ring has the same causal work everywhere.

    Cut into 2n chunks, device i gets chunks i and 2n - 1 - i: one that few keys come
    before and one that many do.

    Args:
      x: anything with one entry for each token (tokens, positions, segment ids, labels,
        embeddings), in order.
      devices: n, of the mesh axes of the ring alone.
      axis: of the tokens, a multiple of 2n long.

    Returns:
      x reordered, to be sharded along that axis over those devices.

    Raises:
      ValueError: devices that are no positive int, an axis that is not there, or a length
        that is no multiple of 2n.
    """
    return _reorder(x, devices, axis, _zigzag_order(devices))


def unzigzag(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """Undoes `zigzag`."""
    order = _zigzag_order(devices)
    return _reorder(x, devices, axis, sorted(range(len(order)), key=order.__getitem__))


def zigzag_index(length: int, devices: int) -> np.ndarray:
    """The tokens in the order of `zigzag`, as a constant."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return chunks[np.array(_zigzag_order(devices))].reshape(-1)


def _zigzag_order(devices: int) -> list[int]:
    if not _checks.is_static_int(devices) or devices < 1:
        raise ValueError(f"zigzag: devices must be a positive int; got {devices!r}")
    return [c for i in range(devices) for c in (i, 2 * devices - 1 - i)]


def _reorder(x: jax.Array, devices: int, axis: int, order: list[int]) -> jax.Array:
    x = jnp.asarray(x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"zigzag: axis must be one of {_checks.describe(x)}; got {axis}"
        )
    length = x.shape[axis]
    if length % (2 * devices):
        raise ValueError(
            f"zigzag: the length must be a multiple of 2 * devices = {2 * devices}; got "
            f"{length}, axis {axis} of {_checks.describe(x)}"
        )
    chunks = jnp.split(x, 2 * devices, axis)
    return jnp.concatenate([chunks[c] for c in order], axis)


def as_tuple(caller: str, name: str, axes: Any) -> tuple[str, ...]:
    """One or more mesh axes as a tuple."""
    given = (axes,) if isinstance(axes, str) else axes
    if not isinstance(given, (tuple, list)) or not all(
        isinstance(a, str) for a in given
    ):
        raise ValueError(
            f"{caller}: {name} must be the name of a mesh axis or a tuple of such; got "
            f"{axes!r}"
        )
    return tuple(given)


def _axes(name: str, axes: Any) -> tuple[str, ...]:
    """Mesh axes as a tuple, all manual here."""
    given = as_tuple("ring_attention", name, axes)
    for axis in given:
        try:
            jax.lax.axis_size(axis)
        except NameError:
            manual = jax.sharding.get_abstract_mesh().manual_axes
            raise ValueError(
                f"ring_attention: {name} must name mesh axes that a jax.shard_map around "
                f"it makes manual, {list(manual)} here; got {axis!r}"
            ) from None
    return given


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"ring_attention: {message}")
