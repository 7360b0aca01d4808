"""The nnx module: flax's parameters, outputs and gradients, and what flax's lacks."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import jax_flash2
from jax_flash2 import ContextParallel, Flash2Attention, flash_attention

FEATURES, HEADS, LENGTH = 16, 4, 9
CONFIGURATIONS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "qkv_features": 32, "out_features": 8},
    "normalized": {"normalize_qk": True, "use_bias": False},
    "cross": {"in_kv_features": 24, "num_kv_heads": 1},
}


def layers(**arguments):
    """Ours and flax's, from the same seed."""
    arguments = {"num_heads": HEADS, "in_features": FEATURES, **arguments}
    ours = Flash2Attention(**arguments, rngs=nnx.Rngs(0))
    flax = nnx.MultiHeadAttention(**arguments, decode=False, rngs=nnx.Rngs(0))
    return ours, flax


def ours(implementation="reference", **arguments):
    """Ours alone, on the quickest implementation: the module is in question."""
    arguments = {"num_heads": HEADS, "in_features": FEATURES, **arguments}
    return Flash2Attention(**arguments, implementation=implementation, rngs=nnx.Rngs(0))


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def parameters(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def assert_close(a, b, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def assert_differ(a, b):
    assert float(jnp.max(jnp.abs(a - b))) > 1e-3


def direct(layer, x, turn=lambda x: x, **arguments):
    """What the layer should compute: its projections around flash_attention."""
    attention = flash_attention(
        turn(layer.query(x)),
        turn(layer.key(x)),
        layer.value(x),
        implementation="reference",
        **arguments,
    )
    return layer.out(attention)


def turned(x, positions, base=10000.0):
    """Rotary embedding as multiplication of complex numbers."""
    half = x.shape[-1] // 2
    z = np.asarray(x[..., :half]) + 1j * np.asarray(x[..., half:])
    angle = np.asarray(positions)[..., None, None] * base ** (-np.arange(half) / half)
    z = z * np.exp(1j * angle)
    return jnp.asarray(np.concatenate([z.real, z.imag], -1), x.dtype)


# The parameters and results of flax.


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_parameters_and_their_values_are_those_of_flax(name):
    a, b = layers(**CONFIGURATIONS[name], param_dtype=jnp.bfloat16, dropout_rate=0.5)
    assert_close(parameters(a), parameters(b), atol=0)
    assert_close(
        *[
            jax.tree.map(
                jax.random.key_data, nnx.to_pure_dict(nnx.state(m, nnx.RngKey))
            )
            for m in (a, b)
        ],
        atol=0,
    )


def test_checkpoints_swap_in_both_directions():
    a, b = layers()
    other_a, other_b = (
        kind(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(7))
        for kind in (Flash2Attention, nnx.MultiHeadAttention)
    )
    x = normal(0, 2, LENGTH, FEATURES)
    nnx.update(other_a, nnx.state(b, nnx.Param))
    nnx.update(other_b, nnx.state(a, nnx.Param))
    assert_close(other_a(x), b(x))
    assert_close(other_b(x), a(x))


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("plain", "none"),
        ("plain", "causal"),
        ("grouped", "bool"),
        ("normalized", "numbers"),
        ("cross", "both"),
    ],
)
def test_outputs_and_gradients_are_those_of_flax(name, masks):
    a, b = layers(**CONFIGURATIONS[name])
    x = normal(0, 2, LENGTH, FEATURES)
    inputs = (x, normal(1, 2, LENGTH, 24)) if name == "cross" else (x,)
    visible = jax.random.bernoulli(jax.random.key(2), 0.7, (2, 1, LENGTH, LENGTH))
    visible |= jnp.eye(LENGTH, dtype=bool)[None, None]
    real = (jnp.arange(2 * LENGTH).reshape(2, LENGTH) < 14).astype(jnp.float32)
    padding = nnx.make_attention_mask(jnp.ones((2, LENGTH)), real)
    mask = {"bool": visible, "numbers": padding, "both": visible}.get(masks)
    is_causal = masks in ("causal", "both")

    @nnx.jit
    def results(layer, inputs):
        def loss(layer, inputs):
            out = layer(*inputs, mask=mask, is_causal=is_causal)
            return jnp.sum(jnp.sin(out)), out

        argnums = nnx.DiffState(0, nnx.Param), 1
        grads, out = nnx.grad(loss, argnums=argnums, has_aux=True)(layer, inputs)
        return out, nnx.to_pure_dict(grads[0]), grads[1]

    assert_close(results(a, inputs), results(b, inputs), atol=3e-5)


@pytest.mark.parametrize(
    "dtypes",
    [
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.float16, "param_dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
    ],
    ids=str,
)
def test_dtypes_mean_what_they_mean_in_flax(dtypes):
    a, b = layers(**dtypes, normalize_qk=True)
    dtype = jnp.bfloat16 if dtypes.get("dtype") is None else jnp.float32
    x = normal(0, 2, LENGTH, FEATURES, dtype=dtype)
    with jax.numpy_dtype_promotion("standard"):
        expected = b(x)
    assert_close(a(x), expected, atol=2e-2)
    assert_close(parameters(a), parameters(b), atol=0)


def test_batch_axes_may_be_many_or_none():
    a, b = layers()
    call = nnx.jit(lambda layer, x: layer(x, is_causal=True))
    for shape in ((LENGTH, FEATURES), (2, 3, LENGTH, FEATURES)):
        x = normal(0, *shape)
        assert_close(call(a, x), call(b, x))


# What flax's lacks: each option changes the result, and matches the call.

SINKS = np.linspace(-1, 2, HEADS, dtype=np.float32)
SLOPES = (0.25, 0.0625, 0.015625, 0.00390625)
OPTIONS = {
    "is_causal": ({"is_causal": True}, {"is_causal": True}),
    "window": ({"window": (2, None)}, {"local_window_size": (2, None)}),
    "window, both sides": ({"window": 1}, {"local_window_size": 1}),
    "logits_soft_cap": ({"logits_soft_cap": 0.5}, {"logits_soft_cap": 0.5}),
    "sinks": ({"sinks": True}, {"sinks": SINKS}),
    "alibi": ({"alibi": True}, {"alibi_slopes": np.float32(SLOPES)}),
    "slopes": ({"alibi": [1, 2, 0, 4.5]}, {"alibi_slopes": np.float32([1, 2, 0, 4.5])}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_the_result_and_matches_the_call(name):
    option, arguments = OPTIONS[name]
    layer, plain = ours(**option), ours()
    if name == "sinks":
        assert layer.sinks[...].tolist() == [0.0] * HEADS
        layer.sinks[...] = jnp.asarray(SINKS)
    x = normal(0, 2, LENGTH, FEATURES)
    arguments = {
        k: jnp.asarray(v) if isinstance(v, np.ndarray) else v
        for k, v in arguments.items()
    }
    assert_close(layer(x), direct(plain, x, **arguments))
    assert_differ(layer(x), plain(x))


def test_rotary_turns_query_and_key_by_their_positions():
    x, plain = normal(0, 2, LENGTH, FEATURES), ours()
    places = np.arange(LENGTH)[None]
    positions = np.stack([np.arange(LENGTH) * 3, np.arange(LENGTH)[::-1] - 4]).astype(
        np.int32
    )
    for rotary, base in ((True, 10000.0), (500.0, 500.0)):
        layer = ours(rotary=rotary)
        turn = functools.partial(turned, positions=places, base=base)
        assert_close(layer(x), direct(plain, x, turn))
        assert_differ(layer(x), plain(x))
        turn = functools.partial(turned, positions=positions, base=base)
        assert_close(layer(x, input_positions=positions), direct(plain, x, turn))
    both = layer(x, x, input_positions=positions, key_value_positions=positions)
    assert_close(both, layer(x, input_positions=positions))
    assert_differ(layer(x, x, input_positions=positions), both)


def test_alibi_slopes_are_the_published_ones():
    from jax_flash2._positions import alibi_slopes

    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    twelve = [*alibi_slopes(8), *(2.0 ** -(i / 2) for i in (1, 3, 5, 7))]
    np.testing.assert_allclose(alibi_slopes(12), twelve)


def test_segments_and_lengths_at_call_time():
    layer, x = ours(), normal(0, 2, LENGTH, FEATURES)
    ids = jnp.asarray([[0] * 4 + [1] * 5, [2] * 9], jnp.int32)
    out = layer(x, query_segment_ids=ids)
    assert_close(out, direct(layer, x, query_segment_ids=ids))
    assert_close(out[0, 4:], layer(x[0, 4:]))
    lengths = jnp.asarray([3, 9], jnp.int32)
    out = layer(x, query_seq_lengths=lengths)
    assert_close(out[0, :3], layer(x[0, :3]))
    assert_close(out[1], layer(x[1]))
    out = layer(x, key_value_seq_lengths=lengths)
    assert_close(out, direct(layer, x, key_value_seq_lengths=lengths))
    other = layer(
        x,
        x,
        query_seq_lengths=lengths,
        key_value_segment_ids=ids,
        query_segment_ids=ids,
    )
    assert_differ(other, layer(x))


def test_the_rest_reaches_the_call(monkeypatch):
    seen = {}

    def record(*arrays, **arguments):
        seen.update(arguments)
        return flash_attention(*arrays, **{**arguments, **plain})

    plain = {
        "forward_mode": False,
        "deterministic_backward": False,
        "implementation": None,
    }
    monkeypatch.setattr("jax_flash2._modules.flash_attention", record)
    wanted = {
        "forward_mode": True,
        "deterministic_backward": True,
        "implementation": "blockwise",
    }
    ours(**wanted)(normal(0, 2, LENGTH, FEATURES))
    assert {name: seen[name] for name in wanted} == wanted
    ours(None)(normal(0, 2, LENGTH, FEATURES))
    assert {name: seen[name] for name in plain} == plain


# Dropout.


def test_dropout_is_reproducible_and_off_when_deterministic():
    x = normal(0, 2, LENGTH, FEATURES)
    layer, again, plain = ours(dropout_rate=0.5), ours(dropout_rate=0.5), ours()
    first, second = layer(x, deterministic=False), layer(x, deterministic=False)
    assert_close(first, again(x, deterministic=False), atol=0)
    assert_differ(first, second)
    assert_close(layer(x, deterministic=True), plain(x), atol=0)
    layer.eval()
    assert_close(layer(x), plain(x), atol=0)
    layer.train()
    assert_differ(layer(x), plain(x))

    key = nnx.Rngs(dropout=3).dropout()
    for rngs in (nnx.Rngs(dropout=3), nnx.Rngs(dropout=3).dropout):
        out = layer(x, rngs=rngs)
        assert_close(out, direct(plain, x, dropout_rate=0.5, dropout_key=key))


# Refusals.


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            ValueError,
            "attention_fn must be left alone",
            {"attention_fn": nnx.dot_product_attention},
        ),
        (
            ValueError,
            "broadcast_dropout must be False .*=True and dropout_rate=0.1",
            {"broadcast_dropout": True, "dropout_rate": 0.1},
        ),
        (
            NotImplementedError,
            "precision must be None .* got 'BF16_BF16_F32_X3'",
            {"precision": "BF16_BF16_F32_X3"},
        ),
        (
            ValueError,
            r"window must be None, an int in .0, 2147483647.* got \(1, 2, 3\)",
            {"window": (1, 2, 3)},
        ),
        (ValueError, "window .* got -1", {"window": -1}),
        (ValueError, "window .* got 2147483648", {"window": 2**31}),
        (ValueError, "logits_soft_cap must be .* got -1.0", {"logits_soft_cap": -1.0}),
        (
            ValueError,
            "implementation must be one of .* got 'xla'",
            {"implementation": "xla"},
        ),
        (ValueError, "forward_mode must be a bool; got 1", {"forward_mode": 1}),
        (ValueError, "is_causal must be a bool; got 1", {"is_causal": 1}),
        (ValueError, "sinks must be a bool; got 'yes'", {"sinks": "yes"}),
        (ValueError, "rotary must be .* got nan", {"rotary": float("nan")}),
        (ValueError, "rotary must be .* got inf", {"rotary": float("inf")}),
        (ValueError, "rotary must be .* got None", {"rotary": None}),
        (ValueError, "rotary must be .* got '100'", {"rotary": "100"}),
        (ValueError, "num_heads must be an int; got 4.0", {"num_heads": 4.0}),
        (ValueError, "num_kv_heads must be an int; got True", {"num_kv_heads": True}),
        (
            ValueError,
            "qkv_features must be a positive multiple .*=0 and num_heads=4",
            {"qkv_features": 0},
        ),
        (
            ValueError,
            "alibi must be a bool or one slope for each of 4 heads",
            {"alibi": (1.0, 2.0)},
        ),
        (ValueError, "rotary must be a bool or a base > 1; got 0.5", {"rotary": 0.5}),
        (
            ValueError,
            "head_dim must be even .* got 3",
            {"rotary": True, "qkv_features": 12},
        ),
        (
            ValueError,
            "num_heads must be a multiple of num_kv_heads; .*num_kv_heads=3",
            {"num_kv_heads": 3},
        ),
        (
            ValueError,
            "qkv_features must be a positive multiple of num_heads; .*=10",
            {"qkv_features": 10},
        ),
        (TypeError, "unexpected keyword argument 'windows'", {"windows": 1}),
    ],
)
def test_the_constructor_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        ours(**arguments)


def test_inputs_without_a_length_are_refused():
    message = (
        r"inputs_q must have shape \(batch..., length, features\); got shape \(16,\)"
    )
    with pytest.raises(ValueError, match=message):
        ours()(normal(0, FEATURES))


def test_numpy_integers_are_sizes_of_a_window():
    x = normal(0, 2, LENGTH, FEATURES)
    assert_close(ours(window=np.int64(3))(x), ours(window=3)(x), atol=0)


def test_modules_are_split_copied_and_pickled():
    """Static facts are hashable, so that equal modules share one compiled program."""

    def make():
        parallel = ContextParallel(axis_name=[], batch_axis_name=["data"])
        options = {"window": [3, 0], "alibi": np.ones(HEADS), "rotary": True}
        return ours(sinks=True, is_causal=True, context_parallel=parallel, **options)

    (one, state), (other, _) = nnx.split(make()), nnx.split(make())
    assert (one, hash(one)) == (other, hash(other))
    assert nnx.merge(one, state).options == make().options
    for again in (nnx.clone, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert again(make()).options == make().options


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            NotImplementedError,
            "sow_weights must be False .* got True",
            {"sow_weights": True},
        ),
        (
            ValueError,
            "input_positions and .* must be None where rotary is False",
            {"input_positions": np.arange(9)},
        ),
        (
            ValueError,
            "inputs_k must be given with inputs_v",
            {"inputs_v": np.ones((2, 9, 16), np.float32)},
        ),
        (
            ValueError,
            "inputs_k must have 16 features",
            {"inputs_k": np.ones((2, 9, 8), np.float32)},
        ),
        (ValueError, "decode needs a cache; got none", {"decode": True}),
        (ValueError, "mask must be an array; got list", {"mask": [[True]]}),
        (ValueError, "is_causal must be a bool; got 'yes'", {"is_causal": "yes"}),
        (TypeError, "unexpected keyword argument 'bias'", {"bias": None}),
    ],
)
def test_the_call_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        ours()(normal(0, 2, LENGTH, FEATURES), **arguments)


def test_dropout_must_be_decided_and_have_a_key():
    layer = ours(dropout_rate=0.5, keep_rngs=False)
    x = normal(0, 2, LENGTH, FEATURES)
    with pytest.raises(ValueError, match="deterministic must be given"):
        layer(x)
    with pytest.raises(ValueError, match="rngs must be given"):
        layer(x, deterministic=False)


# Transformations and sharding.


def test_a_scan_over_rematerialised_layers_is_a_loop():
    x = normal(0, 2, LENGTH, FEATURES)
    make = functools.partial(
        Flash2Attention,
        *(HEADS, FEATURES),
        num_kv_heads=2,
        rotary=True,
        is_causal=True,
        sinks=True,
    )

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stack(rngs):
        return make(rngs=rngs)

    layers = stack(nnx.Rngs(0))

    def loss(layers, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, layer):
            return x + layer(x)

        return jnp.sum(forward(x, layers) ** 2)

    value, grads = nnx.jit(nnx.value_and_grad(loss))(layers, x)
    state = nnx.state(layers)

    def loop(state, x):
        for i in range(2):
            layer = make(rngs=nnx.Rngs(0))
            nnx.update(layer, jax.tree.map(lambda leaf, i=i: leaf[i], state))
            x = x + layer(x)
        return jnp.sum(x**2)

    expected, expected_grads = jax.jit(jax.value_and_grad(loop))(state, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected_grads), atol=1e-3)


def test_sharding_metadata_is_that_of_flax():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    metadata = {"out_sharding": (None, "model", None)}
    with jax.set_mesh(mesh):
        a, b = layers(
            kernel_metadata=metadata,
            out_kernel_metadata={"out_sharding": ("model", None, None)},
        )
        assert nnx.get_partition_spec(nnx.state(a)) == nnx.get_partition_spec(
            nnx.state(b)
        )
        assert a.query.kernel[...].sharding.spec[1] == "model"
        layer = ours(
            sinks=True,
            sinks_init=nnx.with_partitioning(nnx.initializers.zeros_init(), ("model",)),
        )
        assert layer.sinks[...].sharding.spec == jax.P("model")
        x = jax.device_put(normal(0, 2, LENGTH, FEATURES), jax.P("data"))
        out = nnx.jit(lambda a, x: a(x, is_causal=True))(a, x)
    assert_close(
        np.asarray(out),
        np.asarray(ours()(normal(0, 2, LENGTH, FEATURES), is_causal=True)),
    )


def test_names_are_public_and_lazy():
    from jax_flash2 import linen
    from jax_flash2 import nnx as module

    assert jax_flash2.Flash2Attention is module.Flash2Attention
    assert jax_flash2.attention_fn is module.attention_fn is linen.attention_fn
