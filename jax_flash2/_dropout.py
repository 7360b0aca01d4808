"""The dropout mask: a pure function of the key and the global (batch, head, row, column).

One counter-based generator serves the reference, the blockwise code and the kernels,
so that a mask never depends on a tile size, a device, a mesh or the pass that asks.

Philox4x32-10 (Salmon et al., SC 2011) turns a 64-bit key and a 128-bit counter into
four 32-bit words. Each (batch, head) has a key of its own, its *stream*; the counter
is (row, 4 * (column // 32) + (column % 8) // 2, 0, 0), and the eight 16-bit halves of
the four words belong to the columns 8 * word + 2 * quad + half of that group of 32:
what one thread of a tensor-core tile holds, so that a kernel calls the generator once
for eight of its elements. Rates are resolved to 1 / 65536.
"""

from typing import Any

import jax
import jax.numpy as jnp

GROUP = 32  # columns that share the counters of one row; tiles start at a multiple

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply_high_low(x: jax.Array, multiplier: int) -> tuple[jax.Array, jax.Array]:
    """The 64-bit product of uint32 and a constant, as two words, in 32-bit arithmetic."""
    m_low, m_high = jnp.uint32(multiplier & 0xFFFF), jnp.uint32(multiplier >> 16)
    x_low, x_high = x & jnp.uint32(0xFFFF), x >> jnp.uint32(16)
    low = x_low * m_low
    # Neither sum overflows: (2^16 - 1)^2 + 2 * (2^16 - 1) = 2^32 - 1.
    middle = x_high * m_low + (low >> jnp.uint32(16))
    cross = x_low * m_high + (middle & jnp.uint32(0xFFFF))
    high = x_high * m_high + (middle >> jnp.uint32(16)) + (cross >> jnp.uint32(16))
    return high, x * jnp.uint32(multiplier)


def philox(counter, key) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Philox4x32-10: four uint32 counters and two uint32 keys (they broadcast) to words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply_high_low(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply_high_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + jnp.uint32(_WEYL[0]), k1 + jnp.uint32(_WEYL[1])
    return c0, c1, c2, c3


def streams(key: Any, batch_shape: tuple[int, ...], heads: int) -> jax.Array:
    """One Philox key for each (batch entry, head): uint32 ``(batch..., heads, 2)``.

    Computed from indices alone, so it may be sharded over batch and heads like the
    arrays it accompanies, whatever the implementation of ``key``.
    """
    seed = jax.random.bits(key, (2,), jnp.uint32)
    shape = (*batch_shape, heads)
    entry = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(batch_shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        entry = entry * jnp.uint32(size) + index
    head = jax.lax.broadcasted_iota(jnp.uint32, shape, len(batch_shape))
    # The last counter word tells these calls from those for elements, which have 0.
    words = philox((entry, head, jnp.uint32(0), jnp.uint32(1)), (seed[0], seed[1]))
    return jnp.stack(words[:2], axis=-1)


def keep(
    stream: jax.Array,
    row: jax.Array,
    column: jax.Array | int,
    columns: int,
    rate: float,
) -> jax.Array:
    """True where an element survives: bool ``(..., rows, columns)``.

    Args:
      stream: uint32 ``(..., 2)``, from `streams`.
      row: int32 ``(rows,)``, indices in the whole array.
      column: first column, a multiple of `GROUP`; may be traced.
      columns: how many.
      rate: probability of being dropped.
    """
    groups = -(-columns // GROUP)
    first = jnp.asarray(column, jnp.int32).astype(jnp.uint32) // jnp.uint32(GROUP)
    # Calls of one row: four (the quads) for each group, counted through.
    call = jnp.arange(4 * groups, dtype=jnp.uint32) + jnp.uint32(4) * first
    lead = (1,) * (stream.ndim - 1)
    call = call.reshape(*lead, 1, groups, 4)
    row = row.astype(jnp.uint32).reshape(*lead, -1, 1, 1)
    k0 = stream[..., 0][..., None, None, None]
    k1 = stream[..., 1][..., None, None, None]
    zero = jnp.uint32(0)
    words = jnp.stack(philox((row, call, zero, zero), (k0, k1)), axis=-2)
    halves = jnp.stack([words & jnp.uint32(0xFFFF), words >> jnp.uint32(16)], axis=-1)
    bits = halves.reshape(*halves.shape[:-4], groups * GROUP)[..., :columns]
    return bits >= jnp.uint32(round(rate * 65536))


def keep_anywhere(
    stream: jax.Array, row: jax.Array, column: jax.Array, columns: int, rate: float
) -> jax.Array:
    """As `keep`, from any first column on: a few more are made and cut off."""
    within = column % GROUP
    wide = keep(stream, row, column - within, columns + GROUP, rate)
    return jax.lax.dynamic_slice_in_dim(wide, within, columns, -1)
