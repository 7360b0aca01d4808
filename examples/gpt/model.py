"""A decoder-only GPT in flax.nnx: pre-norm, rotary positions, tied embedding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gpt.config import Config
from gpt.mesh import context_parallel, stream_sharding
from jax_flash2 import ContextParallel, Flash2Attention

REMAT_POLICIES = {
    # The names that jax_flash2 gives to the residuals of its backward pass.
    "flash2": jax.checkpoint_policies.save_only_these_names("flash2_out", "flash2_lse"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    """Attention, then an MLP, each on a normalised copy of the residual stream."""

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        parallel: ContextParallel | None = None,
    ):
        self.dtype = jnp.dtype(config.dtype)
        width = config.width
        # Layers that write to the residual stream start smaller, so that its variance
        # does not grow with depth.
        init = initializer(width)
        init_out = initializer(width, 1 / (2 * config.layers) ** 0.5)
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=self.dtype, rngs=rngs
        )
        self.attention_norm = layer_norm(width, rngs)
        self.attention = attention(config, init, init_out, rngs, parallel)
        self.mlp_norm = layer_norm(width, rngs)
        self.mlp_in = linear(width, 4 * width, kernel_init=init)
        self.mlp_out = linear(4 * width, width, kernel_init=init_out)

    def __call__(self, x: jax.Array, decode: bool = False) -> jax.Array:
        h = normalise(self.attention_norm, x)
        x = x + self.attention(h, is_causal=True, decode=decode)
        h = normalise(self.mlp_norm, x)
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(h)))


class GPT(nnx.Module):
    """Tokens `[batch, length]` to float32 logits `[batch, length, vocab]`.

    The layers' parameters are stacked along a leading axis, whether the layers run as
    one scanned loop (compiles once for all) or unrolled (faster): checkpoints fit both.
    """

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        remat: str = "none",
        scan: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config, self.remat, self.scan = config, remat, scan
        self.sharding = None if mesh is None else stream_sharding(mesh)
        parallel = None if mesh is None else context_parallel(mesh)
        self.embedding = nnx.Embed(
            config.vocab,
            config.width,
            embedding_init=initializer(config.width),
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs):
            return Block(config, rngs, parallel)

        self.blocks = stack(rngs)
        self.norm = layer_norm(config.width, rngs)

    def __call__(self, tokens: jax.Array, decode: bool = False) -> jax.Array:
        graph, params, cache = nnx.split(self.blocks, nnx.Param, nnx.Cache)

        def layer(x, variables):
            block = nnx.merge(graph, *variables)
            x = self.place(block(x, decode=decode))
            return x, nnx.state(block, nnx.Cache)

        if self.remat != "none" and not decode:
            layer = jax.checkpoint(
                layer, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan
            )
        x = self.place(self.embedding(tokens))
        x, cache = jax.lax.scan(layer, x, (params, cache), unroll=not self.scan)
        if decode:
            nnx.update(self.blocks, cache)
        x = normalise(self.norm, x)
        return self.embedding.attend(x).astype(jnp.float32)

    def place(self, x: jax.Array) -> jax.Array:
        """Splits the residual stream over batch and length.

        Without this, XLA may gather activations where it should gather parameters.
        """
        if self.sharding is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding)

    def init_cache(self, batch: int, length: int) -> None:
        """Room for `length` keys and values in every layer."""
        shape, dtype = (batch, length, self.config.width), jnp.dtype(self.config.dtype)
        nnx.vmap(lambda block: block.attention.init_cache(shape, dtype))(self.blocks)


def attention(
    config: Config,
    init,
    init_out,
    rngs: nnx.Rngs,
    parallel: ContextParallel | None,
) -> nnx.Module:
    """Any choice of `--attention`: same parameters, same meaning."""
    settings: dict[str, Any] = dict(
        num_heads=config.heads,
        in_features=config.width,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=init,
        out_kernel_init=init_out,
        rngs=rngs,
    )
    if config.attention in ("cudnn", "xla"):
        function = functools.partial(jax_nn_attention, implementation=config.attention)
        return nnx.MultiHeadAttention(**settings, attention_fn=function)
    implementation = None if config.attention == "flash2" else config.attention
    return Flash2Attention(
        **settings,
        rotary=True,
        implementation=implementation,
        context_parallel=parallel,
    )


def jax_nn_attention(query, key, value, *, is_causal, implementation, **_):
    """JAX's own attention behind flax's module, for comparison, without a cache.

    What else flax passes, masks and dropout, is None or 0 in this model.
    """
    query, key = rotary(query), rotary(key)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=is_causal, implementation=implementation
    )


def rotary(x: jax.Array) -> jax.Array:
    """Turns the halves of `[batch, length, heads, head_dim]` by their position."""
    length, half = x.shape[1], x.shape[3] // 2
    frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.outer(jnp.arange(length, dtype=jnp.float32), frequency)
    angle = angle[None, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def initializer(width: int, factor: float = 1.0):
    """Normal with variance 2 / (5 width), as in Nguyen and Salazar (2019)."""
    return nnx.initializers.normal(factor * (0.4 / width) ** 0.5)


def layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, use_bias=False, dtype=jnp.float32, rngs=rngs)


def normalise(norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
    """In float32, whatever the dtype of x."""
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def generate(model: GPT, prompt: jax.Array, count: int, key, temperature=1.0):
    """`count` bytes that follow `prompt [batch, length]`, through the cache.

    The prompt fills the cache in one call; then one token at a time. Temperature 0
    takes the likeliest byte.
    """
    batch, length = prompt.shape
    model.init_cache(batch, length + count)
    logits = model(prompt, decode=True)[:, -1]
    graph, params, cache = nnx.split(model, nnx.Param, nnx.Cache)

    def sample(logits, key):
        logits = logits[:, :256]
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature)

    def step(carry, key):
        token, cache = carry
        model = nnx.merge(graph, params, cache)
        logits = model(token[:, None], decode=True)[:, -1]
        return (sample(logits, key), nnx.state(model, nnx.Cache)), token

    keys = jax.random.split(key, count)
    token = sample(logits, keys[0])
    (token, _), tokens = jax.lax.scan(step, (token, cache), keys[1:])
    return jnp.concatenate([tokens.T, token[:, None]], axis=1)
