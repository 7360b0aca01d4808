"""The reference means what the documentation says: an oracle of plain Python loops.

The reference and the blockwise code share the definition of the structured masks; only
this oracle, which shares nothing with either, tells whether that definition is right.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import OPTIONS, Case, covering, results
from compare import assert_close
from jax_flash2 import flash_attention

# Every entry on its own; the masks of `dropout` have a file of their own.
OPTIONS_WITH_ORACLE = [name for name in OPTIONS if name != "dropout"]


pytestmark = pytest.mark.usefixtures("quickly_compiled")


def oracle(query, key, value, **given):
    """Output, logsumexp and largest logits in float64, element by element."""
    batch, q_length, heads, head_dim = query.shape
    kv_length, kv_heads, value_dim = value.shape[1:]
    out = np.zeros((batch, q_length, heads, value_dim))
    lse = np.full((batch, q_length, heads), -math.inf)
    largest = np.full((batch, heads), -math.inf)

    def of(name, *index, default=None):
        """An argument's element; its axes of size 1, and those it lacks, broadcast."""
        x = given.get(name)
        if x is None:
            return default
        x = np.asarray(x)
        index = index[len(index) - x.ndim :]
        return x[tuple(0 if n == 1 else i for i, n in zip(index, x.shape, strict=True))]

    scale = given.get("scale")
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    cap = given.get("logits_soft_cap")
    for b in range(batch):
        for h in range(heads):
            n = h // (heads // kv_heads)
            for row in range(q_length):
                scores = {}
                for j in range(kv_length):
                    i = row + int(of("query_offset", b, default=0))
                    if not visible(b, h, row, i, j, given, of):
                        continue
                    dot = sum(
                        float(query[b, row, h, d]) * float(key[b, j, n, d])
                        for d in range(head_dim)
                    )
                    score = scale * dot
                    if cap is not None:
                        score = cap * math.tanh(score / cap)
                    score += float(of("bias", b, h, row, j, default=0))
                    score -= float(of("alibi_slopes", b, h, default=0)) * abs(i - j)
                    if score > -math.inf:
                        scores[j] = score
                sink = of("sinks", b, h)
                logits = [*scores.values(), *([] if sink is None else [float(sink)])]
                if not logits:
                    continue
                top = max(logits)
                lse[b, row, h] = top + math.log(sum(math.exp(x - top) for x in logits))
                for j, score in scores.items():
                    p = math.exp(score - lse[b, row, h])
                    out[b, row, h] += p * np.asarray(value[b, j, n], np.float64)
                    largest[b, h] = max(largest[b, h], score)
    return out, lse, largest


def visible(b, h, row, i, j, given, of):
    """The paragraph on visibility, word by word."""
    if given.get("is_causal"):
        prefix = of("prefix_lengths", b)
        if not (j <= i or (prefix is not None and j < prefix)):
            return False
    window = given.get("local_window_size")
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        if left is not None and j < i - left:
            return False
        if right is not None and j > i + right:
            return False
    chunk = given.get("chunk_size")
    if chunk is not None and math.floor(i / chunk) != math.floor(j / chunk):
        return False
    if j >= of("key_value_seq_lengths", b, default=math.inf):
        return False
    if row >= of("query_seq_lengths", b, default=math.inf):
        return False
    query_id = of("query_segment_ids", b, row)
    if query_id is not None:
        key_id = of("key_value_segment_ids", b, j)
        key_id = of("query_segment_ids", b, j) if key_id is None else key_id
        if query_id != key_id:
            return False
    return bool(of("mask", b, h, row, j, default=True))


def check(inputs):
    arguments = inputs.arguments
    given = {n: a for n, a in arguments.items() if n != "return_max_logit"}
    got = flash_attention(
        **given, implementation="reference", return_residual=True, return_max_logit=True
    )
    for name, ours, right in zip(
        ("out", "lse", "max_logit"), got, oracle(**arguments), strict=True
    ):
        assert_close(ours, right, 1e-5, name)


@pytest.mark.parametrize("option", ["plain", *OPTIONS_WITH_ORACLE])
def test_reference_equals_plain_loops_for_each_option(option):
    options = () if option == "plain" else (option,)
    check(Case(options, 5, 7, head_dim=3, value_dim=2).inputs(seed=1))


@pytest.mark.parametrize("group", covering(5), ids="+".join)
def test_reference_equals_plain_loops_for_options_together(group):
    options = tuple(name for name in group if name != "dropout")
    check(Case(options, 7, 5, head_dim=2, value_dim=3).inputs(seed=2))


def test_one_integer_is_a_window_to_both_sides():
    check(Case(("window",), 9, 9, head_dim=2).inputs().replace(local_window_size=2))


def test_key_segment_ids_default_to_the_querys():
    inputs = Case(("segments",), 6, 6, head_dim=2).inputs()
    del inputs.fixed["key_value_segment_ids"]
    check(inputs)


def test_chunks_of_negative_positions_are_chunks():
    # Rows 0..4 at positions -7..-3 share a chunk with no key, 5..6 with keys 0 and 1.
    inputs = Case(("offset", "chunk", "query_lengths"), 9, 6, head_dim=2).inputs()
    check(inputs.replace(query_offset=jnp.int32([-7, -2]), chunk_size=2))


def test_bias_and_mask_broadcast_from_any_axis():
    inputs = Case(("bias", "mask"), 4, 5, head_dim=2).inputs()
    for axis in range(4):
        bias, mask = inputs.arguments["bias"], inputs.arguments["mask"]
        one = jax.lax.slice_in_dim(bias, 0, 1, axis=axis)
        few = jax.lax.slice_in_dim(mask, 0, 1, axis=3 - axis)
        check(inputs.replace(bias=one, mask=few))


def test_reference_gradients_equal_central_differences():
    """In float64: of every operand, through output and logsumexp, with all score terms."""
    options = (
        "causal",
        "scale_traced",
        "soft_cap",
        "bias",
        "alibi",
        "sinks",
        "key_lengths",
    )
    with jax.enable_x64(True):
        inputs = Case(options, 4, 4, head_dim=2, value_dim=2, dtype="float64").inputs(3)
        inputs = inputs.replace(key_value_seq_lengths=jnp.int32([3, 4]))
        grads = results(inputs, "reference")
        rng = np.random.default_rng(0)
        for name, x in inputs.wrt.items():
            direction = jnp.asarray(rng.standard_normal(x.shape))

            def loss(step, name=name, x=x, direction=direction):
                moved = inputs.replace(**{name: x + step * direction})
                out, lse = (results(moved, "reference")[n] for n in ("out", "lse"))
                dout, dlse = inputs.cotangents
                return float((out * dout).sum() + (lse * dlse).sum())

            slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
            assert_close(slope, (grads[f"d{name}"] * direction).sum(), 1e-7, name)


def test_max_logit_has_no_gradient():
    inputs = Case(("max_logit",), 4, 4).inputs()

    def largest(query, implementation):
        arguments = inputs.arguments | {"query": query}
        return flash_attention(**arguments, implementation=implementation)[1].sum()

    for implementation in ("reference", "blockwise"):
        gradient = jax.grad(largest)(inputs.wrt["query"], implementation)
        assert_close(gradient, jnp.zeros_like(gradient), 0.0)
