"""The blockwise code computes what the reference defines, to the accuracy promised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import Case, Inputs, blocks_of, results
from compare import (
    assert_accurate,
    assert_all_close,
    assert_bitwise_equal,
    assert_close,
    assert_follows_the_rule,
    dense,
)
from jax_flash2 import flash_attention

TINY = range(1, 10)


@pytest.fixture(scope="module")
def every_tiny_length():
    """All of 1..9 by 1..9 as batch entries of one call, and the reference's results."""
    case = Case(
        (), 9, 9, (len(TINY) ** 2,), heads=2, kv_heads=1, head_dim=8, value_dim=4
    )
    q_lengths, kv_lengths = (x.ravel() for x in np.meshgrid(TINY, TINY, indexing="ij"))
    fixed = {
        "query_seq_lengths": jnp.asarray(q_lengths, jnp.int32),
        "key_value_seq_lengths": jnp.asarray(kv_lengths, jnp.int32),
    }
    plain = case.inputs()
    inputs = Inputs(plain.wrt, fixed, {"is_causal": False}, plain.cotangents)
    causal = Inputs(plain.wrt, fixed, {"is_causal": True}, plain.cotangents)
    return {
        x.static["is_causal"]: (x, results(x, "reference")) for x in (inputs, causal)
    }


@pytest.fixture(scope="module")
def blocks_of_four():
    with blocks_of(4):
        yield


@pytest.mark.usefixtures("blocks_of_four")
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_tiny_length_by_every_tiny_length(every_tiny_length, is_causal):
    inputs, reference = every_tiny_length[is_causal]
    assert_all_close(results(inputs), reference)


@pytest.mark.slow
@pytest.mark.usefixtures("blocks_of_four")
@pytest.mark.parametrize("q_length", TINY)
def test_every_tiny_shape_by_every_tiny_shape(every_tiny_length, q_length):
    """The same, with arrays that really have those lengths."""
    inputs, reference = every_tiny_length[True]
    entries = [(q_length - 1) * len(TINY) + (n - 1) for n in TINY]

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(query, key, value):
        return [
            flash_attention(
                query[e, :q_length],
                key[e, :n],
                value[e, :n],
                is_causal=True,
                implementation="blockwise",
                return_residual=True,
            )
            for e, n in zip(entries, TINY, strict=True)
        ]

    arrays = [inputs.wrt[name] for name in ("query", "key", "value")]
    for e, n, (out, lse) in zip(entries, TINY, run(*arrays), strict=True):
        name = f"{q_length} by {n}"
        assert_close(out, reference["out"][e, :q_length], 1e-5, f"out {name}")
        assert_close(lse, reference["lse"][e, :q_length], 1e-5, f"lse {name}")


@pytest.mark.parametrize(
    ("q_length", "kv_length", "head_dim", "options"),
    [
        (512, 512, 64, ("causal",)),
        (512, 700, 128, ()),
        (1024, 1024, 128, ("causal",)),
        (1500, 1024, 64, ("window",)),
        (2048, 2048, 64, ("causal",)),
        (4096, 4096, 64, ("causal",)),
    ],
)
def test_float32_at_the_lengths_of_use(q_length, kv_length, head_dim, options):
    case = Case(
        options, q_length, kv_length, (1,), 1, 1, head_dim=head_dim, value_dim=head_dim
    )
    inputs = case.inputs()
    run = functools.partial(results, inputs, quick=False)
    assert_all_close(run("blockwise"), run("reference"))


@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(1, 1), (7, 5), (80, 80), (64, 128), (128, 64)]
)
def test_any_head_dim_and_another_for_value(head_dim, value_dim):
    case = Case(("causal",), 270, 300, (1,), head_dim=head_dim, value_dim=value_dim)
    inputs = case.inputs()
    assert_all_close(results(inputs), results(inputs, "reference"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (6, 1)])
def test_query_heads_share_key_heads(heads, kv_heads):
    inputs = Case(("causal",), 33, 20, heads=heads, kv_heads=kv_heads).inputs()
    assert_all_close(results(inputs), results(inputs, "reference"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("causal", "soft_cap", "sinks"),
        ("window", "bias", "scale_traced", "key_lengths"),
        ("chunk", "alibi_of_batch", "segments", "bias_of_heads", "query_lengths"),
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_narrow_dtypes_follow_the_rule(dtype, options):
    with blocks_of(32):
        inputs = Case(options, 90, 90, head_dim=64, value_dim=64, dtype=dtype).inputs()
        assert_follows_the_rule(inputs, results(inputs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_follow_the_rule_at_length_1024(dtype):
    case = Case(("causal",), 1024, 1024, (1,), 2, 1, 128, 128, dtype=dtype)
    inputs = case.inputs()
    assert_follows_the_rule(inputs, results(inputs, quick=False))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_have_the_dtypes_promised(dtype):
    options = ("bias_of_heads", "alibi_of_batch", "sinks", "scale_traced", "max_logit")
    inputs = Case(options, 8, 8, dtype=dtype).inputs()
    for implementation in ("blockwise", "reference"):
        got = results(inputs, implementation)
        assert got["out"].dtype == jnp.dtype(dtype)
        assert got["lse"].dtype == got["max_logit"].dtype == jnp.float32
        for name, x in inputs.wrt.items():
            assert got[f"d{name}"].dtype == x.dtype, name
            assert got[f"d{name}"].shape == x.shape, name


def test_float64_keeps_its_precision():
    options = ("causal", "bias", "soft_cap", "alibi", "sinks", "scale_traced")
    with jax.enable_x64(True), blocks_of(16):
        inputs = Case(options, 50, 40, dtype="float64").inputs()
        got = results(inputs)
        assert all(x.dtype == jnp.float64 for x in got.values())
        assert_all_close(got, results(inputs, "reference"), 1e-13, 1e-12, relative=True)


def test_float32_is_the_same_where_64_bits_are_enabled():
    inputs = Case(("prefix", "window", "key_lengths"), 20, 20).inputs()
    right = results(inputs)
    with jax.enable_x64(True):
        assert_bitwise_equal(results(inputs), right)


def test_long_rows_lose_nothing_to_the_order_of_their_sum():
    """In float32 against float64: rows of 8192 keys, of which few have any weight."""
    case = Case((), 4, 8192, (1,), 1, 1, 64, 64)
    inputs = case.inputs()
    inputs = inputs.replace(query=4 * inputs.wrt["query"])
    got = results(inputs)
    with jax.enable_x64(True):
        right = results(inputs.astype(jnp.float64), "reference")
    for name in got:
        assert_close(got[name], right[name], 1e-5, name, relative=True)


def test_the_baseline_is_the_reference_but_for_rounding():
    """The rule is worth what its baseline is: in float32 the two agree."""
    options = ("prefix", "offset", "window", "chunk", "key_lengths", "query_lengths")
    more = ("segments", "mask", "bias", "alibi", "sinks", "soft_cap", "scale_traced")
    for group in (options, more):
        inputs = Case((*group, "max_logit"), 12, 14).inputs()
        baseline, reference = (
            results(inputs, function=dense),
            results(inputs, "reference"),
        )
        assert_all_close(baseline, reference, relative=True)


def test_the_rule_refuses_twice_and_a_bit():
    reference = np.array([1.0, -2.0, np.nan, -np.inf])
    baseline = reference + np.array([1e-2, 0, 0, 0])
    fine = jnp.asarray(reference + np.array([0, 1.9e-2, 0, 0]), jnp.float32)
    assert_accurate(fine, reference, baseline)
    for wrong in (
        reference + np.array([0, 2.1e-2, 0, 0]),
        np.array([1.0, -2.0, 0.0, -np.inf]),
        np.array([1.0, -2.0, np.nan, np.inf]),
        np.array([np.nan, -2.0, np.nan, -np.inf]),
    ):
        with pytest.raises(AssertionError):
            assert_accurate(jnp.asarray(wrong, jnp.float32), reference, baseline)
