"""`jax.nn.dot_product_attention`, called with the same arguments, gives the same."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import quick_compilation
from compare import assert_close
from jax_flash2 import flash_attention

BATCH, Q_LENGTH, KV_LENGTH, HEADS, HEAD_DIM = 2, 10, 12, 4, 8
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


QUERY = normal(BATCH, Q_LENGTH, HEADS, HEAD_DIM)
KEY, VALUE = (normal(BATCH, KV_LENGTH, 2, HEAD_DIM) for _ in "kv")
SCORES = (BATCH, HEADS, Q_LENGTH, KV_LENGTH)
# Every query sees a key, so that no row is empty.
MASK = jnp.asarray(RNG.random(SCORES) < 0.5).at[..., 0].set(True)

CALLS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "is_causal": {"is_causal": True},
    "bias": {"bias": normal(*SCORES)},
    "bias that broadcasts": {"bias": normal(1, HEADS, 1, KV_LENGTH)},
    "mask": {"mask": MASK},
    "mask that broadcasts, and bias": {"mask": MASK[:1, :1], "bias": normal(*SCORES)},
    "lengths": {
        "query_seq_lengths": jnp.int32([10, 6]),
        "key_value_seq_lengths": jnp.int32([12, 5]),
    },
    "lengths, causal": {
        "query_seq_lengths": jnp.int32([3, 10]),
        "key_value_seq_lengths": jnp.int32([12, 5]),
        "is_causal": True,
    },
    "window": {"local_window_size": 3},
    "window of two sides": {"local_window_size": (4, 1)},
    "window, causal, scale": {
        "local_window_size": (2, 0),
        "is_causal": True,
        "scale": 0.5,
    },
}


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    with quick_compilation():
        yield


def evaluate(function, arrays, static, dout, bias):
    """Output and the gradients of query, key, value and bias."""

    def call(wrt):
        return function(**wrt, **arrays, **static)

    wrt = {"query": QUERY, "key": KEY, "value": VALUE}
    wrt |= {} if bias is None else {"bias": bias}
    out, pullback = jax.vjp(call, wrt)
    return {"out": out, **pullback(dout)[0]}


@pytest.mark.parametrize("name", CALLS)
def test_same_arguments_give_the_same_values_and_gradients(name):
    arguments = dict(CALLS[name])
    bias = arguments.pop("bias", None)
    arrays = {n: x for n, x in arguments.items() if isinstance(x, jax.Array)}
    static = {n: x for n, x in arguments.items() if n not in arrays}
    dout = normal(BATCH, Q_LENGTH, HEADS, HEAD_DIM)
    within = jnp.full((BATCH, Q_LENGTH), True)
    if "query_seq_lengths" in arrays:
        rows = jnp.arange(Q_LENGTH, dtype=jnp.int32)
        within = rows[None] < arrays["query_seq_lengths"][:, None]
        dout = jnp.where(within[..., None, None], dout, 0)
    ours, theirs = (
        jax.jit(lambda a, d, b, f=f: evaluate(f, a, static, d, b))(arrays, dout, bias)
        for f in (flash_attention, jax.nn.dot_product_attention)
    )
    assert ours.keys() == theirs.keys()
    for part in ours:
        a, b = ours[part], theirs[part]
        if part == "out":  # a query row past its length is empty with us
            a, b = a[within], b[within]
        assert_close(a, b, 1e-5 if part == "out" else 1e-4, part)


def test_same_residual():
    arguments = {"is_causal": True, "scale": 0.4, "return_residual": True}
    try:
        theirs = jax.nn.dot_product_attention(QUERY, KEY, VALUE, **arguments)
    except TypeError:  # jax.nn has it since 0.7
        pytest.fail("jax.nn.dot_product_attention takes no return_residual")
    ours = flash_attention(QUERY, KEY, VALUE, **arguments)
    for name, a, b in zip(("out", "lse"), ours, theirs, strict=True):
        assert_close(a, b, 1e-5, name)


def test_same_without_a_batch_axis():
    q, k, v = QUERY[0], KEY[0], VALUE[0]
    theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    assert_close(flash_attention(q, k, v, is_causal=True), theirs, 1e-5)


def test_same_names_in_the_same_order_with_the_same_defaults():
    ours = inspect.signature(flash_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    assert set(theirs) <= set(ours)
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name

    def positional(parameters):
        return [n for n, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD]

    assert positional(ours) == positional(theirs)
