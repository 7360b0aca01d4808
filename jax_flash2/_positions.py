"""Position encodings of the modules: rotary embedding and ALiBi's slopes."""

import math

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary embedding in halves.

    Turns each pair `(x[i], x[i + head_dim/2])` by `position / base^(2i/head_dim)`.

    Args:
      x: `(batch..., length, heads, head_dim)`; head_dim is even.
      positions: integers `(batch..., length)`.

    Returns:
      x rotated, in its dtype; computed in float32, or float64 for a float64 x.
    """
    dtype = x.dtype if x.dtype.itemsize > 4 else jnp.dtype(jnp.float32)
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=dtype) / half)
    frequencies = jnp.expand_dims(frequencies, tuple(range(positions.ndim)))
    angles = positions[..., None].astype(dtype) * frequencies
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """ALiBi's standard slopes: 2^(-8/n), 2^(-16/n), ..., 2^(-8) for n heads.

    Where n is no power of two: those of the largest power of two p below n, and then
    those of 2p that lie between them, from the first on, until there are n.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-4.0 * i / power) for i in range(1, 2 * power, 2)]
    return tuple(slopes + between[: num_heads - power])
