"""Every option does something, and does what the reference says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import OPTIONS, Case, blocks_of, quick_compilation, results
from compare import assert_all_close, assert_bitwise_equal
from jax_flash2 import _blockwise, flash_attention

# Options that ask for more than the output, or for the way it is made.
WITHOUT_EFFECT = {"max_logit", "deterministic"}
# What an option needs in order to matter, and the score that it is judged against.
NEEDS = {"offset": "causal", "offset_static": "causal"}


@pytest.fixture(scope="module", autouse=True)
def blocks_of_sixteen():
    with blocks_of(16), quick_compilation():
        yield


@pytest.mark.parametrize("option", OPTIONS)
def test_option_matches_the_reference_and_changes_the_result(option):
    needs = (NEEDS[option],) if option in NEEDS else ()
    inputs, without = Case((*needs, option)).inputs(), Case(needs).inputs()
    assert_bitwise_equal(inputs.wrt["query"], without.wrt["query"])
    got = results(inputs)
    assert_all_close(got, results(inputs, "reference", jit=False))
    change = np.abs(got["out"] - results(without)["out"]).max()
    assert (change > 0.01) == (option not in WITHOUT_EFFECT)
    for name in set(inputs.wrt) - {"query", "key", "value"}:
        assert np.abs(got[f"d{name}"]).max() > 1e-3, f"{name} has no gradient"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bias", (2, 1, 40, 40)),
        ("bias", (2, 4, 1, 40)),
        ("bias", (1, 4, 40, 1)),
        ("bias", (40, 40)),
        ("bias", ()),
        ("alibi_slopes", (2, 1)),
        ("alibi_slopes", ()),
        ("sinks", (2, 4)),
        ("sinks", (2, 1)),
        ("sinks", ()),
    ],
)
def test_gradient_of_an_operand_that_broadcasts_is_summed(name, shape):
    option = {"bias": "bias", "alibi_slopes": "alibi", "sinks": "sinks"}[name]
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    inputs = Case((option,)).inputs().replace(**{name: x})
    got = results(inputs)
    assert got[f"d{name}"].shape == shape
    assert_all_close(got, results(inputs, "reference", jit=False))


@pytest.mark.parametrize(
    ("options", "low"),
    [
        (("prefix",), 0),
        (("causal", "offset"), -20),
        (("window", "offset"), -20),
        (("chunk", "offset"), -20),
        (("key_lengths",), 0),
        (("query_lengths", "causal"), 0),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, tuple) else "",
)
def test_every_value_of_a_traced_fact(options, low):
    """All at once, one for each batch entry: across every edge of the blocks."""
    case = Case(options, 40, 40, (60,), heads=1, kv_heads=1, head_dim=4, value_dim=4)
    inputs = case.inputs()
    values = jnp.arange(low, low + 60, dtype=jnp.int32)
    (name,) = inputs.fixed
    inputs = inputs.replace(**{name: values if low else jnp.minimum(values, 40)})
    assert_all_close(results(inputs), results(inputs, "reference"))


@pytest.mark.parametrize(
    "options",
    [
        ("prefix", "offset", "bias_of_heads", "sinks", "dropout"),
        ("window", "offset", "key_lengths", "alibi", "max_logit"),
        ("causal", "query_lengths", "segments_packed", "bias", "scale_traced"),
    ],
    ids="+".join,
)
def test_entries_may_run_together(options, monkeypatch):
    """As they do where there is no CPU: all entries in one loop over shared blocks."""
    inputs = Case(options).inputs()
    runs = []

    def together(function):
        def run(*arguments, sequential):
            runs.append(sequential)
            return function(*arguments, sequential=False)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(_blockwise, name, together(getattr(_blockwise, name)))
    jax.clear_caches()
    got = results(inputs)
    assert runs == [True, True]
    jax.clear_caches()
    assert_all_close(got, results(inputs, "reference", jit=False))


@pytest.mark.parametrize(
    ("arguments", "rows", "columns"),
    [
        ({"is_causal": True}, slice(0, 16), slice(16, None)),
        ({"is_causal": True, "query_offset": -8}, slice(0, 16), slice(16, None)),
        ({"is_causal": True, "prefix_lengths": 10}, slice(0, 16), slice(16, None)),
        ({"local_window_size": (8, 8)}, slice(32, None), slice(0, 16)),
        ({"local_window_size": (None, 0)}, slice(16, 32), slice(32, None)),
        ({"chunk_size": 32}, slice(32, None), slice(0, 32)),
        ({"key_value_seq_lengths": 16}, slice(0, None), slice(16, None)),
        (
            {"query_segment_ids": np.int32([0] * 16 + [1] * 32)},
            slice(16, None),
            slice(0, 16),
        ),
        (
            {"query_segment_ids": np.int32([0] * 16 + [1] * 32)},
            slice(0, 16),
            slice(16, None),
        ),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
)
def test_blocks_that_a_mask_excludes_are_not_visited(arguments, rows, columns):
    """A block that is visited and then masked would spread its NaN: 0 * NaN is NaN."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((48, 1, 4)), jnp.float32)
    value = x.at[columns].set(jnp.nan)
    out = flash_attention(x, x, value, **arguments, implementation="blockwise")
    assert np.isfinite(out[rows]).all()


def test_max_logit_is_the_largest_visible_score():
    inputs = Case(("causal", "max_logit", "key_lengths")).inputs()
    got = results(inputs)["max_logit"]
    assert_all_close(
        {"max_logit": got},
        {"max_logit": results(inputs, "reference", jit=False)["max_logit"]},
    )
    assert got.shape == (2, 4)


def test_results_come_in_the_order_asked_for():
    q = jnp.ones((3, 2, 4))
    out = flash_attention(q, q, q)
    assert out.shape == (3, 2, 4)
    both = flash_attention(q, q, q, return_residual=True, return_max_logit=True)
    assert [x.shape for x in both] == [(3, 2, 4), (3, 2), (2,)]
    assert [x.shape for x in flash_attention(q, q, q, return_max_logit=True)] == [
        (3, 2, 4),
        (2,),
    ]


@pytest.mark.parametrize("implementation", ["blockwise", "reference", None])
def test_forward_and_backward_have_the_same_bytes_on_every_run(implementation):
    inputs = Case(("causal", "bias", "sinks", "deterministic")).inputs()
    first = results(inputs, implementation)
    for _ in range(3):
        assert_bitwise_equal(results(inputs, implementation), first)


def test_default_on_a_cpu_is_blockwise():
    inputs = Case(("causal",)).inputs()
    assert_bitwise_equal(results(inputs, None), results(inputs, "blockwise"))
