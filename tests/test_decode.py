"""Autoregressive decoding: the cache gives what the whole sequence would have given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

from jax_flash2 import Flash2Attention, linen

FEATURES, HEADS, BATCH, LENGTH = 16, 4, 3, 12
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, FEATURES))
PROMPT = np.asarray([5, 1, 3], np.int32)


class Nnx:
    """A decoding nnx module, in the shape that both frameworks have here."""

    def __init__(self, max_length=LENGTH, **arguments):
        self.layer = Flash2Attention(HEADS, FEATURES, **arguments, rngs=nnx.Rngs(0))
        self.layer.init_cache((BATCH, max_length, FEATURES))
        self.eager = functools.partial(self.layer, decode=True)
        self.step = functools.partial(
            nnx.jit(lambda layer, x, **rest: layer(x, decode=True, **rest)), self.layer
        )

    def full(self, x, **rest):
        def call(layer, x, rest):
            return layer(x, is_causal=True, **rest)

        return nnx.jit(call)(self.layer, x, rest)

    def cache(self):
        layer = self.layer
        return [
            v[...] for v in (layer.cached_key, layer.cached_value, layer.cache_index)
        ]


class Linen:
    def __init__(self, max_length=LENGTH, **arguments):
        self.layer = linen.Flash2Attention(HEADS, decode=True, **arguments)
        x = jnp.zeros((BATCH, max_length, FEATURES))
        self.variables = self.layer.init(KEY, x)
        apply = functools.partial(self.layer.apply, mutable=["cache"])
        self.eager = functools.partial(self._update, apply)
        self.step = functools.partial(self._update, jax.jit(apply))

    def _update(self, apply, *inputs, **rest):
        out, update = apply(self.variables, *inputs, **rest)
        self.variables = {**self.variables, **update}
        return out

    def full(self, x, **rest):
        apply = self.layer.clone(decode=False, is_causal=True).apply
        return jax.jit(apply)({"params": self.variables["params"]}, x, **rest)

    def cache(self):
        cache = self.variables["cache"]
        return [cache[name] for name in ("cached_key", "cached_value", "cache_index")]


both = pytest.mark.parametrize("kind", [Nnx, Linen])


def assert_close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Nnx, {"rotary": True, "num_kv_heads": 2, "normalize_qk": True}),
        (Nnx, {"window": (3, 0), "alibi": True}),
        (
            Linen,
            {"num_kv_heads": 1, "sinks": True, "logits_soft_cap": 2.0, "window": 4},
        ),
        (Linen, {"rotary": True, "alibi": True, "num_kv_heads": 2}),
    ],
)
def test_ragged_prompts_then_tokens_equal_the_whole_sequence(kind, arguments):
    decoder = kind(**arguments)
    full = decoder.full(X)
    rows = np.arange(BATCH)
    # Whatever pads the prompts must not matter.
    prompt = jnp.where(
        np.arange(6)[None, :, None] < PROMPT[:, None, None], X[:, :6], jnp.nan
    )
    out = decoder.step(prompt, query_seq_lengths=PROMPT)
    for entry, length in enumerate(PROMPT):
        assert_close(out[entry, :length], full[entry, :length])
    position = PROMPT.copy()
    for tokens in (1, 1, 3, 1):
        where = position[:, None] + np.arange(tokens)
        out = decoder.step(X[rows[:, None], where])
        assert_close(out, full[rows[:, None], where])
        position += tokens
    assert decoder.cache()[2].tolist() == position.tolist()


def test_an_entry_that_has_finished_stands_still():
    decoder = Linen(rotary=True)
    full = decoder.full(X)
    decoder.step(X[:, :4])
    before = decoder.cache()
    decoder.step(X[:, 4:5], query_seq_lengths=np.asarray([1, 0, 1], np.int32))
    after = decoder.cache()
    assert after[2].tolist() == [5, 4, 5]
    assert_close(before[0][1], after[0][1])
    out = decoder.step(X[:, 4:6], query_seq_lengths=np.asarray([0, 2, 0], np.int32))
    assert_close(out[1], full[1, 4:6])


def test_rotated_keys_are_cached_at_the_positions_given():
    decoder, other = Nnx(rotary=True), Nnx(rotary=True)
    positions = jnp.arange(4, dtype=jnp.int32)[None] * 2 + 5
    positions = jnp.broadcast_to(positions, (BATCH, 4))
    out = decoder.step(X[:, :4], input_positions=positions)
    assert_close(out, other.full(X[:, :4], input_positions=positions))
    other.step(X[:, :4])
    assert float(jnp.abs(decoder.cache()[0] - other.cache()[0]).max()) > 1e-2


def test_masks_and_two_way_prompts_are_honoured():
    decoder = Linen()
    mask = np.ones((BATCH, 1, 4, LENGTH), np.float32)
    mask[:, :, 2:, 1] = 0.0
    out = decoder.step(X[:, :4], mask=jnp.asarray(mask))
    assert_close(out, decoder.full(X[:, :4], mask=jnp.asarray(mask[..., :4])))
    decoder = Nnx()
    out, full = decoder.eager(X[:, :4], is_causal=False), decoder.full
    assert_close(out[:, -1], full(X[:, :4])[:, -1])
    assert_close(out[:, 0], full(X[:, 3::-1])[:, -1])


@both
def test_an_overflow_is_an_error_or_nan(kind):
    decoder = kind(max_length=6)
    with pytest.raises(ValueError, match="at most 6; got up to 7 new ones"):
        decoder.step(X[:, :7])
    decoder.step(X[:, :5], query_seq_lengths=PROMPT)
    with pytest.raises(ValueError, match="up to 2 new ones where it holds up to 5"):
        decoder.eager(X[:, 5:7])
    full = decoder.full(X)
    out = decoder.step(X[np.arange(BATCH)[:, None], PROMPT[:, None] + np.arange(2)])
    assert jnp.isnan(out[0, 1]).all()
    assert_close(out[0, 0], full[0, 5])
    for entry in (1, 2):
        assert_close(out[entry], full[entry, PROMPT[entry] : PROMPT[entry] + 2])
    out = decoder.step(X[:, :1])
    assert np.isnan(out).all(axis=(1, 2)).tolist() == [True, False, False]


@both
def test_decoding_refuses_what_the_cache_cannot_know(kind):
    decoder = kind()
    ids = np.zeros((BATCH, 2), np.int32)
    with pytest.raises(
        ValueError, match="query_segment_ids must be None when decoding"
    ):
        decoder.eager(X[:, :2], query_segment_ids=ids)
    with pytest.raises(ValueError, match="key_value_seq_lengths must be None when"):
        decoder.eager(X[:, :2], key_value_seq_lengths=PROMPT)
    with pytest.raises(ValueError, match=r"keys must have shape \(3, 2, 4, 4\)"):
        decoder.eager(X[:, :2], X)
    with pytest.raises(ValueError, match=r"got \(1, 2, 4, 4\)"):
        decoder.eager(X[:1, :2])


def test_flax_caches_keep_working():
    """A scalar cache_index, as flax makes it, advances all entries together."""
    flax = nnx.MultiHeadAttention(HEADS, FEATURES, decode=True, rngs=nnx.Rngs(0))
    ours = Flash2Attention(HEADS, FEATURES, decode=True, rngs=nnx.Rngs(0))
    flax.init_cache(X.shape)
    for i in range(3):
        expected = flax(X[:, i : i + 1])
    ours.init_cache(X.shape)
    ours.cache_index = nnx.Cache(jnp.zeros((), jnp.int32))
    assert_close(ours(X[:, :3])[:, -1:], expected)
    nnx.update(ours, nnx.state(flax, nnx.Cache))
    assert_close(ours(X[:, 3:5])[:, :1], flax(X[:, 3:4]))
    assert ours.cache_index[...].tolist() == 5
    with pytest.raises(ValueError, match="needs a cache_index for each batch entry"):
        ours(X[:, 5:6], query_seq_lengths=np.ones(BATCH, np.int32))

    variables = nn.MultiHeadDotProductAttention(HEADS, decode=True).init(KEY, X)
    variables = jax.tree.map(np.asarray, variables)
    layer = linen.Flash2Attention(HEADS, decode=True)
    out, _ = layer.apply(variables, X[:, :3], mutable=["cache"])
    plain = linen.Flash2Attention(HEADS, is_causal=True)
    assert_close(out, plain.apply({"params": variables["params"]}, X[:, :3]))


def test_the_cache_has_the_dtype_of_the_computation():
    layer = Flash2Attention(HEADS, FEATURES, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.init_cache((BATCH, LENGTH, FEATURES))
    assert layer.cached_key.dtype == jnp.bfloat16
    assert layer(X[:, :2], decode=True).dtype == jnp.bfloat16
    layer.init_cache((BATCH, LENGTH, FEATURES), jnp.float32)
    with pytest.raises(ValueError, match="dtype of the keys, bfloat16; got float32"):
        layer(X[:, :2], decode=True)


def test_no_batch_axis_or_many():
    layer = Flash2Attention(HEADS, FEATURES, rotary=True, rngs=nnx.Rngs(0))
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    for shape in ((), (2, 3)):
        x = jax.random.normal(KEY, (*shape, 4, FEATURES))
        layer.init_cache(x.shape)
        out = [step(layer, x[..., i : i + 2, :]) for i in (0, 2)]
        full = nnx.jit(lambda layer, x: layer(x, is_causal=True))(layer, x)
        assert_close(jnp.concatenate(out, axis=-2), full)


def test_decoding_on_an_explicit_mesh():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    sharded = {"out_sharding": (None, "model", None)}
    with jax.set_mesh(mesh):
        layer = Flash2Attention(
            HEADS, FEATURES, rotary=True, kernel_metadata=sharded, rngs=nnx.Rngs(0)
        )
        heads = jax.P("data", None, "model")
        layer.init_cache((2, LENGTH, FEATURES), out_sharding=heads)
        call = functools.partial(
            layer, decode=True, out_sharding=jax.P("data"), qkv_sharding=heads
        )
        x = jax.device_put(X[:2], jax.P("data"))
        out = call(x[:, :4], query_seq_lengths=PROMPT[1:])
        assert layer.cached_key[...].sharding.spec[:3] == tuple(heads)
    plain = Flash2Attention(HEADS, FEATURES, rotary=True, rngs=nnx.Rngs(0))
    expected = plain(X[:2, :4], is_causal=True)
    out = np.asarray(out)
    for entry, length in enumerate(PROMPT[1:]):
        assert_close(out[entry, :length], expected[entry, :length])


def test_a_view_decodes_beside_its_model():
    layer = Flash2Attention(HEADS, FEATURES, is_causal=True, rngs=nnx.Rngs(0))
    view = nnx.view(layer, decode=True, batch_size=BATCH, max_length=LENGTH)
    assert_close(view(X[:, :4]), layer(X[:, :4]))
    assert layer.cached_key is None
    with pytest.raises(ValueError, match="must be given together"):
        nnx.view(layer, decode=True, batch_size=BATCH)


def test_decoding_in_a_scan_over_layers():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stack(rngs):
        layer = Flash2Attention(
            HEADS, FEATURES, rotary=True, is_causal=True, decode=False, rngs=rngs
        )
        layer.init_cache((BATCH, LENGTH, FEATURES))
        return layer

    layers = stack(nnx.Rngs(0))

    @nnx.jit(static_argnames="decode")
    def forward(layers, x, decode):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return x + layer(x, decode=decode)

        return run(x, layers)

    full = forward(layers, X, decode=False)
    out = [forward(layers, X[:, i : i + 3], decode=True) for i in range(0, LENGTH, 3)]
    np.testing.assert_allclose(jnp.concatenate(out, 1), full, rtol=0, atol=1e-5)
    assert layers.cache_index[...].tolist() == [[LENGTH] * BATCH] * 2


def test_decoding_in_a_linen_scan_over_layers():
    class Layer(nn.Module):
        decode: bool

        @nn.compact
        def __call__(self, x, _):
            attention = linen.Flash2Attention(
                HEADS, rotary=True, is_causal=True, decode=self.decode
            )
            return x + attention(x), None

    def model(decode):
        scan = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scan(decode)

    variables = model(True).init(KEY, X, None)
    full, _ = model(False).apply({"params": variables["params"]}, X, None)
    step = jax.jit(functools.partial(model(True).apply, mutable=["cache"]))
    out = []
    for i in range(0, LENGTH, 3):
        (y, _), update = step(variables, X[:, i : i + 3], None)
        variables = {**variables, **update}
        out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, 1), full, rtol=0, atol=1e-5)
