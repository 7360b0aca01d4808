"""Options together: every legal pair, and random ones with random shapes and values."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from cases import OPTIONS, PAIRS, Case, blocks_of, covering, results
from compare import assert_all_close

GROUPS = covering(6)
QUICK = GROUPS[1::3]  # with every option once at least
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def blocks_of_eight():
    with blocks_of(8):
        yield


def check(case, seed):
    """Values and gradients; scores may be large, so relative."""
    inputs = case.inputs(seed)
    assert_all_close(results(inputs), results(inputs, "reference"), relative=True)


def test_every_legal_pair_of_options_is_in_a_group():
    pairs = {p for group in GROUPS for p in itertools.combinations(group, 2)}
    assert pairs == set(PAIRS)
    assert set(itertools.chain(*QUICK)) == set(OPTIONS)
    # Illegal is only a pair that gives one argument twice.
    assert len(set(itertools.combinations(OPTIONS, 2)) - pairs) == 11


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(group, marks=[] if group in QUICK else [pytest.mark.slow])
        for group in GROUPS
    ],
    ids="+".join,
)
def test_options_together_match_the_reference(group):
    """Values, every gradient, and the logsumexp's part in them."""

    @hypothesis.settings(max_examples=3)
    @hypothesis.given(seed=SEEDS)
    def any_values(seed):
        case = Case(group, 19, 21, heads=2, kv_heads=1, head_dim=4, value_dim=3)
        check(case, seed)

    any_values()


@pytest.mark.slow
@hypothesis.settings(max_examples=hypothesis.settings.default.max_examples * 2 // 3)
@hypothesis.given(
    options=st.sampled_from(PAIRS),
    lengths=st.sampled_from([(7, 30), (30, 7), (20, 20)]),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    batch=st.sampled_from([(), (2,), (2, 1, 2)]),
    seed=SEEDS,
)
def test_any_two_options_match_the_reference(options, lengths, heads, batch, seed):
    check(Case(options, *lengths, batch, *heads, head_dim=4, value_dim=6), seed)
