"""Every option does something, and does what the reference says."""

import jax.numpy as jnp
import numpy as np
import pytest

from cases import OPTIONS, Case, blocks_of, quick_compilation, results
from compare import assert_all_close, assert_bitwise_equal
from jax_flash2 import flash_attention

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
