"""The dropout mask: one pure function of the key and the global place of an element."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import blocks_of
from compare import assert_bitwise_equal, assert_close
from jax_flash2 import _dropout, flash_attention

RATE = 0.3
BATCH, HEADS, LENGTH = 2, 4, 70  # no multiple of 32 or of a block
DROPOUT_KEY = jax.random.key(3)


pytestmark = pytest.mark.usefixtures("quickly_compiled")


# ------------------------------------------------------------------------- the generator


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, words):
    got = _dropout.philox(*(tuple(map(jnp.uint32, x)) for x in (counter, key)))
    assert tuple(map(int, got)) == words


def philox(counter, key):
    """The same generator with Python's integers."""
    c0, c1, c2, c3 = counter
    for n in range(10):
        k0 = (key[0] + n * 0x9E3779B9) % 2**32
        k1 = (key[1] + n * 0xBB67AE85) % 2**32
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
    return c0, c1, c2, c3


def test_mask_is_laid_out_as_documented():
    """Bits of element (row, column): which call, which word, which half."""
    seed = [int(x) for x in jax.random.bits(DROPOUT_KEY, (2,), jnp.uint32)]
    right = np.empty((HEADS, 5, 70), bool)
    batch = 1
    for head in range(HEADS):
        stream = philox((batch, head, 0, 1), seed)[:2]
        for row in range(5):
            for column in range(70):
                call = 4 * (column // 32) + column % 8 // 2
                word = philox((row, call, 0, 0), stream)[column % 32 // 8]
                bits = word >> 16 if column % 2 else word & 0xFFFF
                right[head, row, column] = bits >= round(RATE * 65536)
    streams = _dropout.streams(DROPOUT_KEY, (BATCH,), HEADS)
    rows = jnp.arange(5, dtype=jnp.int32)
    got = _dropout.keep(streams, rows, 0, 70, RATE)
    assert_bitwise_equal(got[batch], right)
    later = _dropout.keep(streams, rows[2:], 32, 38, RATE)
    assert_bitwise_equal(later[batch], right[:, 2:, 32:])


# ------------------------------------------------------------------------ masks of calls


def mask_of(f, batch=(BATCH,), heads=HEADS, rows=LENGTH, columns=LENGTH):
    """The mask that ``f(query, key, value)`` applies: with equal scores and values that
    are one-hot, the output is the mask times a constant."""
    query = jnp.zeros((*batch, rows, heads, 1))
    key = jnp.zeros((*batch, columns, heads, 1))
    value = jnp.broadcast_to(
        jnp.eye(columns)[:, None, :], (*batch, columns, heads, columns)
    )
    out = f(query, key, value) * (columns * (1 - RATE))
    kept = np.asarray(out) > 0.5
    assert_close(out, kept.astype(np.float32), 1e-5, "a mask")
    return np.swapaxes(kept, -2, -3)


def call(dropout_key=DROPOUT_KEY, implementation="blockwise", rate=RATE, **more):
    return jax.jit(
        functools.partial(
            flash_attention,
            dropout_rate=rate,
            dropout_key=dropout_key,
            implementation=implementation,
            **more,
        )
    )


@pytest.fixture(scope="module")
def right():
    streams = _dropout.streams(DROPOUT_KEY, (BATCH,), HEADS)
    rows = jnp.arange(LENGTH, dtype=jnp.int32)
    return np.asarray(_dropout.keep(streams, rows, 0, LENGTH, RATE))


def test_reference_applies_the_mask(right):
    assert_bitwise_equal(mask_of(call(implementation="reference")), right)


@pytest.mark.parametrize("block", [8, 32, 64, 256])
def test_blockwise_applies_the_mask_whatever_its_blocks(right, block):
    with blocks_of(block):
        assert_bitwise_equal(mask_of(call()), right)


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_backward_applies_the_mask_of_the_forward(right, implementation):
    """The gradient of value is the transposed mask, if the cotangent is one-hot."""

    def gradient(query, key, value):
        run = call(implementation=implementation)
        _, pullback = jax.vjp(lambda v: run(query, key, v), value)
        return jnp.swapaxes(pullback(value)[0], -1, -3)

    with blocks_of(16):
        assert_bitwise_equal(mask_of(gradient), right)


def test_offset_and_masks_do_not_move_the_mask(right):
    offset = call(query_offset=jnp.int32([5, -3]), alibi_slopes=jnp.zeros(HEADS))
    assert_bitwise_equal(mask_of(offset), right)
    fewer_rows = mask_of(call(), rows=40)
    assert_bitwise_equal(fewer_rows, right[..., :40, :])
    fewer_columns = mask_of(call(), columns=33)
    assert_bitwise_equal(fewer_columns, right[..., :33])


def test_key_of_either_kind_gives_the_mask(right):
    legacy = jax.random.PRNGKey(3)
    assert_bitwise_equal(mask_of(call(legacy, "reference")), right)


def test_batch_axes_count_through_as_one(right):
    shape = (1, BATCH, 1)
    got = mask_of(call(implementation="reference"), batch=shape)
    assert_bitwise_equal(got.reshape(right.shape), right)


def test_heads_batch_entries_and_keys_have_masks_of_their_own(right):
    other = mask_of(call(jax.random.key(4), "reference"))
    masks = [
        m.ravel()
        for m in (*right.reshape(-1, LENGTH**2), *other.reshape(-1, LENGTH**2))
    ]
    agree = 1 - 2 * RATE * (1 - RATE)  # of independent masks
    for a in range(len(masks)):
        for b in range(a):
            assert abs((masks[a] == masks[b]).mean() - agree) < 0.04, (a, b)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_rate_is_kept(rate):
    streams = _dropout.streams(jax.random.key(0), (4,), 8)
    rows = jnp.arange(256, dtype=jnp.int32)
    kept = np.asarray(_dropout.keep(streams, rows, 0, 256, rate))
    deviation = (rate * (1 - rate) / kept.size) ** 0.5
    assert abs((1 - kept.mean()) - rate) < 5 * deviation + 1 / 65536
    # Nor does any row or column of the tile differ.
    for axes in ((0, 1, 3), (0, 1, 2)):
        spread = (rate * (1 - rate) / (32 * 256)) ** 0.5
        assert np.abs((1 - kept.mean(axes)) - rate).max() < 5 * spread


def test_higher_rate_drops_a_superset(right):
    more = mask_of(lambda *x: call(rate=0.6)(*x) * (0.4 / (1 - RATE)))
    assert (more <= right).all()
    assert more.sum() < right.sum()


def test_dropout_leaves_the_logsumexp_alone():
    rng = np.random.default_rng(0)
    q, k, v = jnp.asarray(rng.standard_normal((3, BATCH, 20, HEADS, 8)), jnp.float32)
    out, lse = call(return_residual=True)(q, k, v)
    plain_out, plain_lse = flash_attention(q, k, v, return_residual=True)
    assert_close(lse, plain_lse, 1e-6)
    assert np.abs(out - plain_out).max() > 0.1


def test_rate_zero_is_no_dropout():
    x = jnp.ones((BATCH, 8, HEADS, 4))
    assert_bitwise_equal(
        flash_attention(x, x, x, dropout_rate=0.0, dropout_key=DROPOUT_KEY),
        flash_attention(x, x, x),
    )


# --------------------------------------------------------------------------------- vmap


def test_vmap_with_one_key_gives_every_element_the_mask(right):
    def mapped(query, key, value):
        out = jax.vmap(call())(*(jnp.stack([x, x, x]) for x in (query, key, value)))
        assert_bitwise_equal(out[1], out[0])
        assert_bitwise_equal(out[2], out[0])
        return out[2]

    assert_bitwise_equal(mask_of(mapped), right)


def test_vmap_over_keys_gives_every_element_the_mask_of_its_key():
    keys = jax.random.split(DROPOUT_KEY, 3)

    def mapped(query, key, value):
        def one(dropout_key):
            return flash_attention(
                query, key, value, dropout_rate=RATE, dropout_key=dropout_key
            )

        out = jax.jit(jax.vmap(one))(keys)
        for e in range(3):
            assert_bitwise_equal(out[e], jax.jit(one)(keys[e]))
        return out[1]

    assert_bitwise_equal(mask_of(mapped), mask_of(call(keys[1], "reference")))


def test_key_may_be_traced():
    run = jax.jit(
        lambda x, key: flash_attention(x, x, x, dropout_rate=RATE, dropout_key=key)
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2, 4)), jnp.float32)
    first, again, other = (run(x, jax.random.key(n)) for n in (0, 0, 1))
    assert_bitwise_equal(first, again)
    assert np.abs(first - other).max() > 0.1
