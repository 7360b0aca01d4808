"""The linen module: flax's parameters and results, and what the nnx module adds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jax_flash2
from jax_flash2.linen import Flash2Attention

FEATURES, HEADS, LENGTH = 16, 4, 9
KEY = jax.random.key(0)


def layers(**arguments):
    """Ours and flax's."""
    return tuple(
        kind(num_heads=HEADS, **arguments)
        for kind in (Flash2Attention, nn.MultiHeadDotProductAttention)
    )


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X = normal(1, 2, LENGTH, FEATURES)


def assert_close(a, b, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def assert_differ(a, b):
    assert float(jnp.max(jnp.abs(a - b))) > 1e-3


@pytest.mark.parametrize(
    "arguments",
    [
        {"param_dtype": jnp.bfloat16},
        {"qkv_features": 32, "out_features": 8, "use_bias": False},
        {"normalize_qk": True, "out_kernel_init": nn.initializers.normal()},
    ],
    ids=",".join,
)
def test_parameters_and_their_values_are_those_of_flax(arguments):
    a, b = layers(**arguments)
    # flax's own attention, unlike its parameters, needs standard promotion.
    with jax.numpy_dtype_promotion("standard"):
        assert_close(a.init(KEY, X), b.init(KEY, X), atol=0)


@pytest.mark.parametrize(
    ("masks", "arguments"),
    [
        ("none", {"qkv_features": 32, "out_features": 8}),
        ("causal", {"normalize_qk": True, "force_fp32_for_softmax": True}),
        ("cross", {"use_bias": False}),
    ],
)
def test_outputs_and_gradients_are_those_of_flax(masks, arguments):
    a, b = layers(**arguments)
    inputs = (X, normal(2, 2, 7, 24)) if masks == "cross" else (X,)
    mask = nn.make_causal_mask(X[..., 0]) if masks == "causal" else None
    variables = b.init(KEY, *inputs)

    @functools.partial(jax.jit, static_argnums=0)
    def results(layer, variables, inputs):
        def loss(variables, inputs):
            out = layer.apply(variables, *inputs, mask=mask)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, inputs)

    expected = results(b, variables, inputs)
    assert_close(results(a, variables, inputs), expected, atol=3e-5)
    if masks == "causal":
        assert_close(a.apply(variables, X, is_causal=True), expected[1])
        assert_close(a.clone(is_causal=True).apply(variables, X), expected[1])
    if masks == "cross":
        kwargs = {"inputs_kv": inputs[1]}
        assert_close(a.apply(variables, X, **kwargs), expected[1])


def test_bfloat16_computes_with_float32_parameters():
    a, b = layers(dtype=jnp.bfloat16, normalize_qk=True)
    with jax.numpy_dtype_promotion("standard"):
        variables = b.init(KEY, X)
        expected = b.apply(variables, X)
    out = a.apply(variables, X)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    assert_close(out, expected, atol=2e-2)


def test_projections_take_the_dot_general_given():
    def counting(name):
        def dot_general(*arrays, **arguments):
            calls.append(name)
            return jax.lax.dot_general(*arrays, **arguments)

        return dot_general

    for layer in layers(
        qkv_dot_general=counting("qkv"), out_dot_general_cls=lambda: counting("out")
    ):
        calls = []
        jax.eval_shape(layer.init, KEY, X)
        assert calls == ["qkv", "qkv", "qkv", "out"]


IDS = np.asarray([[0] * 4 + [1] * 5, [2] * 9], np.int32)
POSITIONS = np.stack([np.arange(LENGTH) * 3, np.arange(LENGTH)[::-1]]).astype(np.int32)
OPTIONS = {
    "num_kv_heads": ({"num_kv_heads": 2}, {}),
    "is_causal": ({"is_causal": True}, {}),
    "window": ({"window": (2, 0)}, {}),
    "logits_soft_cap": ({"logits_soft_cap": 0.5}, {}),
    "sinks": ({"sinks": True, "sinks_init": nn.initializers.ones}, {}),
    "alibi": ({"alibi": True}, {}),
    "slopes": ({"alibi": [1, 2, 0, 4.5]}, {}),
    "rotary": ({"rotary": True}, {}),
    "rotary, base": ({"rotary": 500.0}, {"input_positions": POSITIONS}),
    "key positions": (
        {"rotary": True},
        {"inputs_k": X, "key_value_positions": POSITIONS},
    ),
    "segments": ({}, {"query_segment_ids": IDS}),
    "key segments": (
        {},
        {"query_segment_ids": IDS, "key_value_segment_ids": IDS[::-1]},
    ),
    "lengths": ({}, {"query_seq_lengths": np.asarray([3, 9], np.int32)}),
    "key lengths": ({}, {"key_value_seq_lengths": np.asarray([3, 9], np.int32)}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_does_what_it_does_in_nnx_with_the_same_parameters(name):
    option, call = OPTIONS[name]
    option = {**option, "implementation": "reference"}
    layer = Flash2Attention(num_heads=HEADS, **option)
    variables = layer.init(KEY, X)
    module = jax_flash2.Flash2Attention(HEADS, FEATURES, **option, rngs=nnx.Rngs(0))
    nnx.update(module, variables["params"])
    out = layer.apply(variables, X, **call)
    assert_close(out, module(X, **call))
    if name != "num_kv_heads":
        params = {k: v for k, v in variables["params"].items() if k != "sinks"}
        plain = Flash2Attention(num_heads=HEADS)
        assert_differ(out, plain.apply({"params": params}, X))
    assert variables["params"]["key"]["kernel"].shape[1] == option.get(
        "num_kv_heads", 4
    )


def test_the_rest_reaches_the_call(monkeypatch):
    seen = {}
    call = jax_flash2.flash_attention

    def record(*arrays, **arguments):
        seen.update(arguments)
        return call(*arrays)

    monkeypatch.setattr("jax_flash2._modules.flash_attention", record)
    wanted = {
        "forward_mode": True,
        "deterministic_backward": True,
        "implementation": "blockwise",
    }
    Flash2Attention(num_heads=HEADS, **wanted).init(KEY, X)
    assert {name: seen[name] for name in wanted} == wanted


def test_dropout_is_reproducible_and_off_when_deterministic():
    layer, plain = (
        Flash2Attention(num_heads=HEADS, dropout_rate=r) for r in (0.5, 0.0)
    )
    variables = plain.init(KEY, X)
    drop = functools.partial(layer.apply, variables, X)
    first = drop(deterministic=False, rngs={"dropout": KEY})
    assert_close(first, drop(deterministic=False, rngs={"dropout": KEY}), atol=0)
    assert_differ(first, drop(deterministic=False, rngs={"dropout": jax.random.key(1)}))
    assert_differ(first, drop(deterministic=False, dropout_rng=KEY))
    assert_close(drop(deterministic=True), plain.apply(variables, X), atol=0)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "attention_fn must be left", {"attention_fn": jnp.dot}),
        (
            NotImplementedError,
            "qk_attn_weights_einsum_cls must be None",
            {"qk_attn_weights_einsum_cls": lambda: jnp.einsum},
        ),
        (NotImplementedError, "precision .* got 'TF32'", {"precision": "TF32"}),
        (
            ValueError,
            "broadcast_dropout must be False .* got .*=True and dropout_rate=0.1",
            {"broadcast_dropout": True, "dropout_rate": 0.1},
        ),
        (ValueError, "window .* got -1", {"window": -1}),
        (ValueError, "logits_soft_cap must be .* got 0", {"logits_soft_cap": 0}),
        (ValueError, "is_causal must be a bool; got 1", {"is_causal": 1}),
        (ValueError, "sinks must be a bool; got 'yes'", {"sinks": "yes"}),
        (ValueError, "rotary must be .* got nan", {"rotary": float("nan")}),
        (ValueError, "multiple of num_kv_heads; .*=3", {"num_kv_heads": 3}),
        (ValueError, "multiple of num_heads; .*=10", {"qkv_features": 10}),
    ],
)
def test_the_module_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        Flash2Attention(num_heads=HEADS, **arguments).init(KEY, X)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (NotImplementedError, "sow_weights must be False", {"sow_weights": True}),
        (ValueError, "inputs_k must be given with inputs_v", {"inputs_v": X}),
        (ValueError, "inputs_kv must be None", {"inputs_k": X, "inputs_kv": X}),
        (ValueError, "where rotary is False", {"input_positions": np.arange(LENGTH)}),
        (ValueError, "mask must be an array; got list", {"mask": [[True]]}),
        (
            ValueError,
            r"inputs_k must have shape .* got shape \(5,\)",
            {"inputs_k": X[0, 0, :5]},
        ),
        (TypeError, "unexpected keyword argument", {"bias": None}),
    ],
)
def test_the_call_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        Flash2Attention(num_heads=HEADS).init(KEY, X, **arguments)


def test_inputs_without_a_length_are_refused():
    message = (
        r"inputs_q must have shape \(batch..., length, features\); got shape \(3,\)"
    )
    with pytest.raises(ValueError, match=message):
        Flash2Attention(num_heads=HEADS).init(KEY, X[0, 0, :3])


def test_a_scan_over_rematerialised_layers_is_a_loop():
    make = functools.partial(
        Flash2Attention, HEADS, num_kv_heads=2, rotary=True, is_causal=True, sinks=True
    )

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + make(name="attention")(x), None

    scan = nn.scan(
        nn.remat(Layer, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=2,
    )()
    variables = scan.init(KEY, X, None)

    def loop(variables, x):
        for i in range(2):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"])
            x = x + make().apply({"params": params["attention"]}, x)
        return jnp.sum(x**2)

    def scanned(variables, x):
        return jnp.sum(scan.apply(variables, x, None)[0] ** 2)

    value, grads = jax.jit(jax.value_and_grad(scanned))(variables, X)
    expected, expected_grads = jax.jit(jax.value_and_grad(loop))(variables, X)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_close(grads, expected_grads, atol=1e-3)


def test_partitioning_metadata_is_that_of_flax():
    a, b = layers(
        kernel_init=nn.with_partitioning(
            nn.initializers.lecun_normal(), ("embed", "heads", "kv")
        ),
        out_kernel_init=nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), ("heads", "kv", "embed")
        ),
    )
    specs = [nn.get_partition_spec(jax.eval_shape(m.init, KEY, X)) for m in (a, b)]
    assert specs[0] == specs[1]
    assert specs[0]["params"]["query"]["kernel"] == jax.P("embed", "heads", "kv")
    init = nn.with_partitioning(nn.initializers.zeros, ("heads",))
    layer = a.clone(sinks=True, sinks_init=init)
    spec = nn.get_partition_spec(jax.eval_shape(layer.init, KEY, X))
    assert spec["params"]["sinks"] == jax.P("heads")
