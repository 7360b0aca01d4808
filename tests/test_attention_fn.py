"""`attention_fn` in the modules of flax that one may want to keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jax_flash2 import attention_fn, flash_attention

FEATURES, HEADS, LENGTH = 16, 4, 9
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, LENGTH, FEATURES))


def nnx_layer(function, **arguments):
    return nnx.MultiHeadAttention(
        HEADS,
        FEATURES,
        num_kv_heads=2,
        attention_fn=function,
        decode=False,
        rngs=nnx.Rngs(0),
        **arguments,
    )


def linen_layer(function, **arguments):
    return nn.MultiHeadDotProductAttention(HEADS, attention_fn=function, **arguments)


def assert_close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-5)


def assert_differ(a, b):
    assert float(jnp.max(jnp.abs(a - b))) > 1e-3


def test_nnx_layers_give_what_they_gave():
    a, b = nnx_layer(attention_fn), nnx_layer(nnx.dot_product_attention)
    mask = nnx.make_causal_mask(X[..., 0])
    for call in ({}, {"is_causal": True}, {"mask": mask}):
        assert_close(a(X, **call), b(X, **call))
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    for layer in (a, b):
        layer.init_cache(X.shape)
    for i in range(3):
        assert_close(step(a, X[:, i : i + 1]), step(b, X[:, i : i + 1]))


def test_linen_layers_give_what_they_gave():
    a, b = linen_layer(attention_fn), linen_layer(nn.dot_product_attention)
    variables = b.init(KEY, X)
    for mask in (None, nn.make_causal_mask(X[..., 0])):
        out = a.apply(variables, X, mask=mask)
        assert_close(out, b.apply(variables, X, mask=mask))


def test_options_of_the_call_can_be_bound():
    capped = functools.partial(attention_fn, logits_soft_cap=0.5)
    assert_differ(nnx_layer(capped)(X), nnx_layer(attention_fn)(X))
    variables = linen_layer(capped).init(KEY, X)
    out = linen_layer(capped).apply(variables, X)
    assert_differ(out, linen_layer(attention_fn).apply(variables, X))


def test_dropout_uses_the_key_of_the_module():
    drop = {"dropout_rate": 0.5, "broadcast_dropout": False}
    layer, plain = nnx_layer(attention_fn, **drop), nnx_layer(attention_fn)
    key = nnx.Rngs(dropout=3).dropout()
    projected = layer.query(X), layer.key(X), layer.value(X)
    expected = flash_attention(*projected, dropout_rate=0.5, dropout_key=key)
    out = layer(X, rngs=nnx.Rngs(dropout=3), deterministic=False)
    assert_close(out, layer.out(expected))
    assert_close(layer(X, deterministic=True), plain(X))

    layer = linen_layer(attention_fn, **drop)
    variables = layer.init({"params": KEY}, X, deterministic=True)
    apply = functools.partial(layer.apply, variables, X, deterministic=False)
    assert_close(apply(dropout_rng=KEY), apply(dropout_rng=KEY))
    assert_differ(apply(dropout_rng=KEY), apply(dropout_rng=jax.random.key(1)))


def test_modules_that_ask_for_more_are_refused():
    for sow in (
        functools.partial(nnx_layer(attention_fn), X),
        functools.partial(linen_layer(attention_fn).init, KEY, X),
    ):
        with pytest.raises(NotImplementedError, match="module must be False or None"):
            sow(sow_weights=True)
    with pytest.raises(ValueError, match="broadcast_dropout must be False"):
        nnx_layer(attention_fn, dropout_rate=0.5)(X, deterministic=False)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (NotImplementedError, "module must be False or None", {"module": object()}),
        (
            NotImplementedError,
            "qk_attn_weights_einsum must be None",
            {"qk_attn_weights_einsum": jnp.einsum},
        ),
        (
            NotImplementedError,
            "precision must be None",
            {"precision": ("highest", "F64_F64_F64")},
        ),
        (
            ValueError,
            "input_positions must be None",
            {"input_positions": jnp.arange(9)},
        ),
        (
            ValueError,
            "broadcast_dropout must be False",
            {"broadcast_dropout": True, "dropout_rate": 0.1},
        ),
        (ValueError, "dropout_rng must be a key .* 0.1", {"dropout_rate": 0.1}),
        (ValueError, "mask must be an array; got list", {"mask": [[True]]}),
        (TypeError, "unexpected keyword argument 'promote'", {"promote": True}),
    ],
)
def test_an_argument_that_it_cannot_honour_is_refused(error, message, arguments):
    x = jnp.ones((2, LENGTH, HEADS, 8))
    with pytest.raises(error, match=message):
        attention_fn(x, x, x, **arguments)


def test_arguments_without_effect_are_taken_and_dtype_converts():
    x = jax.random.normal(KEY, (2, LENGTH, HEADS, 8))
    taken = {"precision": "highest", "force_fp32_for_softmax": True}
    assert_close(attention_fn(x, x, x, **taken), attention_fn(x, x, x))
    half = attention_fn(x, x, x, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(half, np.float32), attention_fn(x, x, x), atol=2e-2
    )
