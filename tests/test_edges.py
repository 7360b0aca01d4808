"""The edges: nothing to attend to, nothing that may be looked at, numbers at the limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import Case, Inputs, blocks_of, quick_compilation, results
from compare import assert_all_close, assert_bitwise_equal, assert_close
from jax_flash2 import flash_attention

IMPLEMENTATIONS = ("blockwise", "reference")


@pytest.fixture(scope="module", autouse=True)
def blocks_of_eight():
    with blocks_of(8), quick_compilation():
        yield


# ---------------------------------------------------------------------------- zero sizes

ZERO = {
    "batch": {"batch": (0,)},
    "one of two batch axes": {"batch": (2, 0)},
    "queries": {"q_length": 0},
    "keys": {"kv_length": 0},
    "queries and keys": {"q_length": 0, "kv_length": 0},
}


@pytest.mark.parametrize("options", [(), ("bias", "alibi", "key_lengths", "max_logit")])
@pytest.mark.parametrize("what", ZERO)
def test_zero_sizes_are_legal(what, options):
    """Every row is an empty row; every gradient is 0 and has its operand's shape."""
    case = Case(options, **{"q_length": 5, "kv_length": 6} | ZERO[what])
    inputs = case.inputs()
    for implementation in IMPLEMENTATIONS:
        got = results(inputs, implementation)
        assert got["out"].shape == (*case.batch, case.q_length, 4, 16)
        assert not np.any(got["out"])
        assert np.all(got["lse"] == -jnp.inf)
        assert np.all(got.get("max_logit", -jnp.inf) == -jnp.inf)
        for name, x in inputs.wrt.items():
            assert got[f"d{name}"].shape == x.shape, name
            assert got[f"d{name}"].dtype == x.dtype, name
            assert not np.any(got[f"d{name}"]), name


def test_sinks_alone_make_up_the_logsumexp_where_there_are_no_keys():
    inputs = Case(("sinks",), 5, 0).inputs()
    for implementation in IMPLEMENTATIONS:
        got = results(inputs, implementation)
        assert not np.any(got["out"])
        sinks = jnp.broadcast_to(inputs.wrt["sinks"], got["lse"].shape)
        assert_bitwise_equal(got["lse"], sinks)
        right = inputs.cotangents[1].sum((0, 1))
        assert_close(got["dsinks"], right, 1e-5, "dsinks")


@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3)], ids=str)
def test_any_number_of_batch_axes(batch):
    options = ("causal", "key_lengths", "query_lengths", "bias", "sinks", "segments")
    inputs = Case(options, 9, 10, batch).inputs()
    assert_all_close(results(inputs), results(inputs, "reference"))


def test_operands_that_broadcast_over_some_batch_axes():
    inputs = Case(("offset", "causal", "segments"), 9, 10, (2, 3)).inputs()
    fixed = inputs.fixed
    few = inputs.replace(
        query_offset=fixed["query_offset"][:1],
        query_segment_ids=fixed["query_segment_ids"][:, :1],
        key_value_segment_ids=fixed["key_value_segment_ids"][:1, :1],
    )
    whole = inputs.replace(
        **{n: jnp.broadcast_to(few.fixed[n], x.shape) for n, x in fixed.items()}
    )
    assert_bitwise_equal(results(few), results(whole))


# ------------------------------------------------------------------------- what is hidden


def poisoned(inputs, poison):
    """The same call with ``poison`` where nothing may look."""
    q_lengths = inputs.fixed["query_seq_lengths"][:, None]
    kv_lengths = inputs.fixed["key_value_seq_lengths"][:, None]

    def spoil(x, lengths):
        past = jnp.arange(x.shape[1], dtype=jnp.int32)[None] >= lengths
        return jnp.where(past.reshape(past.shape + (1,) * (x.ndim - 2)), poison, x)

    lengths = {"query": q_lengths, "key": kv_lengths, "value": kv_lengths}
    wrt = {
        n: spoil(x, lengths[n]) if n in lengths else x for n, x in inputs.wrt.items()
    }
    cotangents = tuple(spoil(x, q_lengths) for x in inputs.cotangents)
    return Inputs(wrt, inputs.fixed, inputs.static, cotangents)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "more", [(), ("bias", "sinks", "scale_traced", "alibi", "soft_cap")]
)
def test_what_stands_past_the_lengths_reaches_nothing(implementation, more):
    """NaN, infinities and huge numbers in query, key, value and both cotangents."""
    case = Case(("query_lengths", "key_lengths", *more), 20, 22, (4,))
    inputs = case.inputs().replace(
        query_seq_lengths=jnp.int32([0, 7, 19, 20]),
        key_value_seq_lengths=jnp.int32([22, 9, 0, 3]),
    )
    right = results(poisoned(inputs, 0.0), implementation)
    assert all(np.isfinite(x).all() for n, x in right.items() if n != "lse")
    for poison in (jnp.nan, jnp.inf, -jnp.inf, 3e38):
        got = results(poisoned(inputs, poison), implementation)
        assert_bitwise_equal(got, right, f"{poison}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_visible_and_nan_is_not_hidden(implementation):
    inputs = Case(("causal",), 9, 9).inputs()
    value = inputs.wrt["value"].at[:, 4].set(jnp.nan)
    out = results(inputs.replace(value=value), implementation)["out"]
    assert np.isnan(out[:, 4:]).all()


# A call of each kind of mask that leaves rows 0, 1, 2 without a key, and the others some.
HIDING = {
    "causal": {"is_causal": True, "query_offset": -3},
    "prefix": {"is_causal": True, "query_offset": -3, "prefix_lengths": 0},
    "window": {"local_window_size": (2, 0), "query_offset": -3},
    "window, past the end": {"local_window_size": (1, None), "query_offset": 12 - 10},
    "chunk": {"chunk_size": 3, "query_offset": -3},
    "key lengths": {"key_value_seq_lengths": 0},
    "query lengths": {"query_seq_lengths": 0},
    "segments": {
        "query_segment_ids": jnp.int32([9, 9, 9] + [1] * 9),
        "key_value_segment_ids": jnp.ones(10, jnp.int32),
    },
    "mask": {"mask": jnp.ones((12, 10), bool).at[:3].set(False)},
    "bias": {"bias": jnp.zeros((12, 10)).at[:3].set(-jnp.inf)},
}


@pytest.mark.parametrize(
    "with_sinks", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "sinks"]
)
@pytest.mark.parametrize("kind", HIDING)
def test_rows_that_see_no_key(kind, with_sinks):
    """Output 0, logsumexp -inf or the sink, no gradient to anything but the sink."""
    case = Case(("sinks",) if with_sinks else (), 12, 10, (1,), heads=2, kv_heads=1)
    inputs = case.inputs()
    given = HIDING[kind]
    fixed = {n: x for n, x in given.items() if isinstance(x, jax.Array) and n != "bias"}
    wrt = inputs.wrt | ({"bias": given["bias"]} if "bias" in given else {})
    static = {n: x for n, x in given.items() if not isinstance(x, jax.Array)}
    inputs = Inputs(wrt, fixed, static, inputs.cotangents)
    reference = results(inputs, "reference")
    got = results(inputs)
    assert_all_close(got, reference)
    lse_of_empty = np.asarray(inputs.wrt["sinks"]) if with_sinks else -np.inf
    rows = (np.asarray(reference["lse"][0]) == lse_of_empty).all(-1)
    assert rows.any(), "the case has no empty row"
    for result in (got, reference):
        assert not np.any(result["out"][0, rows])
        assert not np.any(result["dquery"][0, rows])
        assert all(np.isfinite(x).all() for n, x in result.items() if n != "lse")
        assert (np.asarray(result["lse"][0, rows]) == lse_of_empty).all()
        if rows.all():
            assert not np.any(result["dkey"])
            assert not np.any(result["dvalue"])


def test_a_row_hidden_by_itself_hides_no_other():
    """The others' results are those of a call without the row."""
    inputs = Case((), 6, 6, (1,)).inputs()
    mask = jnp.ones((6, 6), bool).at[2].set(False)
    others = jnp.array([0, 1, 3, 4, 5])
    arrays = [inputs.wrt[n] for n in ("query", "key", "value")]
    out = flash_attention(*arrays, mask=mask)
    plain = flash_attention(*arrays)
    assert_bitwise_equal(out[:, others], plain[:, others])


def test_sinks_of_minus_infinity_are_no_sinks():
    inputs = Case(("sinks", "key_lengths"), 9, 9).inputs()
    inputs = inputs.replace(
        sinks=jnp.full(4, -jnp.inf), key_value_seq_lengths=jnp.int32([0, 5])
    )
    plain = Inputs(
        {n: x for n, x in inputs.wrt.items() if n != "sinks"},
        inputs.fixed,
        inputs.static,
        inputs.cotangents,
    )
    for implementation in IMPLEMENTATIONS:
        got, right = (results(x, implementation) for x in (inputs, plain))
        assert not np.any(got.pop("dsinks"))
        assert_all_close(got, right)


# ----------------------------------------------------------------------- numbers at limits


@pytest.mark.parametrize("shift", [-1e4, -100.0, 100.0, 1e4])
def test_scores_far_from_zero_do_not_overflow(shift):
    """A bias moves every score of a row: softmax is the same, the logsumexp moves along."""
    inputs = Case(("bias", "key_lengths"), 17, 23).inputs()
    bias = inputs.wrt["bias"]
    plain, moved = results(inputs), results(inputs.replace(bias=bias + shift))
    resolution = abs(shift) * 2.0**-22
    for name in ("out", "dquery", "dkey", "dvalue", "dbias"):
        assert np.isfinite(moved[name]).all()
        assert_close(moved[name], plain[name], 1e-4 + 40 * resolution, name)
    assert_close(moved["lse"], plain["lse"] + shift, 1e-5 + 2 * resolution, "lse")


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_one_hot_rows_of_huge_scores(size):
    """Query and key so large that a row is one key: exactly that value, no gradient."""
    x = jnp.eye(12)[None, :, None, :] * size
    value = jnp.asarray(
        np.random.default_rng(0).standard_normal((1, 12, 1, 4)), jnp.float32
    )
    for implementation in IMPLEMENTATIONS:
        out, pullback = jax.vjp(
            lambda q, k, v, i=implementation: flash_attention(
                q, k, v, implementation=i
            ),
            x,
            x,
            value,
        )
        assert_close(out, value, 1e-6)
        dq, dk, dv = pullback(jnp.ones_like(out))
        assert_close(dq, jnp.zeros_like(dq), 1e-6 * size)
        assert_close(dk, jnp.zeros_like(dk), 1e-6 * size)
        assert_close(dv, jnp.ones_like(dv), 1e-6)


@pytest.mark.parametrize(
    "offset", [-(2**31) + 64, -(10**6), -21, -20, 0, 19, 10**6, 2**31 - 64]
)
def test_offsets_of_any_size(offset):
    """Traced, so one program serves them all, and without overflow at the ends."""
    inputs = Case(("causal", "offset", "window_left"), 20, 20).inputs()
    inputs = inputs.replace(query_offset=jnp.int32([offset, offset]))
    assert_all_close(results(inputs), results(inputs, "reference"))
    hidden = offset < -19 or offset - 6 > 19
    assert np.isneginf(results(inputs)["lse"]).all() == hidden


@pytest.mark.parametrize("side", [2**31 - 1, 2**31 - 2, 2**31 - 20, 2**30])
@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_windows_wider_than_any_length_hide_nothing(side, implementation):
    """The sum of a row and a side overflowed, and every row but the first saw nothing."""
    inputs = Case((), 20, 20).inputs()
    whole = results(inputs, implementation)
    for window in ((side, side), (None, side), (side, None)):
        found = results(inputs, implementation, local_window_size=window)
        assert_all_close(found, whole)


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_windows_and_offsets_at_both_ends(implementation):
    inputs = Case((), 20, 20).inputs()
    whole = results(inputs, implementation)
    end = 2**31 - 1
    for more in (
        {"query_offset": end - 20, "is_causal": True, "local_window_size": (end, 0)},
        {"query_offset": -end - 1, "local_window_size": (0, end)},
    ):
        found = results(inputs, implementation, **more)
        if more["query_offset"] > 0:  # row i sees the keys from i - 20 on: all
            assert_all_close(found, whole)
        else:  # row i sees the keys up to i - 1
            assert np.isneginf(found["lse"][:, 0]).all()
            assert np.isfinite(found["lse"][:, 1:]).all()


def test_lengths_beyond_the_arrays_are_the_arrays():
    """Traced lengths cannot be judged: they cut nothing then, and never read outside."""
    inputs = Case(("query_lengths", "key_lengths"), 9, 11).inputs()
    beyond = inputs.replace(
        query_seq_lengths=jnp.int32([9, 1000]),
        key_value_seq_lengths=jnp.int32([99, 11]),
    )
    whole = inputs.replace(
        query_seq_lengths=jnp.int32([9, 9]), key_value_seq_lengths=jnp.int32([11, 11])
    )
    none = inputs.replace(
        query_seq_lengths=jnp.int32([-1, -9]), key_value_seq_lengths=jnp.int32([-5, 3])
    )
    zero = inputs.replace(
        query_seq_lengths=jnp.int32([0, 0]), key_value_seq_lengths=jnp.int32([0, 3])
    )
    for implementation in IMPLEMENTATIONS:
        assert_bitwise_equal(
            results(beyond, implementation), results(whole, implementation)
        )
        assert_bitwise_equal(
            results(none, implementation), results(zero, implementation)
        )


@pytest.mark.parametrize("dtype", ["int8", "uint16"])
def test_integers_may_be_narrow(dtype):
    names = (
        "prefix_lengths",
        "query_offset",
        "query_seq_lengths",
        "key_value_seq_lengths",
    )
    options = ("prefix", "offset", "query_lengths", "key_lengths", "segments")
    inputs = Case(options, 9, 9).inputs()
    fixed = {n: x for n, x in inputs.fixed.items()}
    if dtype.startswith("u"):
        fixed = {n: jnp.abs(x) for n, x in fixed.items()}
    assert set(names) < set(fixed)
    wide = Inputs(inputs.wrt, fixed, inputs.static, inputs.cotangents)
    narrow = {n: x.astype(dtype) for n, x in fixed.items()}
    got = Inputs(inputs.wrt, narrow, inputs.static, inputs.cotangents)
    assert_bitwise_equal(results(got), results(wide))


def test_segment_ids_may_be_any_integers():
    inputs = Case(("segments_packed",), 20, 20).inputs()
    ids = jnp.int32([-(2**31), -1, 0, 7, 2**31 - 1])[
        jnp.arange(20, dtype=jnp.int32) * 7 % 5
    ]
    ids = jnp.broadcast_to(ids, (2, 20))
    inputs = inputs.replace(query_segment_ids=ids, key_value_segment_ids=ids[:, ::-1])
    assert_all_close(results(inputs), results(inputs, "reference"))


def test_numpy_arrays_and_python_values_are_taken():
    inputs = Case(("causal",), 5, 5, (2,)).inputs()
    arrays = [inputs.wrt[n] for n in ("query", "key", "value")]
    right = flash_attention(
        *arrays, query_seq_lengths=jnp.int32([2, 5]), is_causal=True
    )
    got = flash_attention(
        *map(np.asarray, arrays), query_seq_lengths=[2, 5], is_causal=True
    )
    assert_bitwise_equal(got, right)
