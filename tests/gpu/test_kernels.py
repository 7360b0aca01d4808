"""The kernels by the rule of accuracy: every head_dim, option, length, and edge.

Output, logsumexp and all gradients, from cotangents of both.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import large
import numpy as np
import pytest
from harness import (
    FAMILIES,
    FORCED,
    HOPPER,
    HOPPER_TAKES,
    SUPPORTED,
    check,
    check_families,
    each_family,
    evaluate,
    forward,
    gpu_case,
    without_slopes,
)

from cases import Inputs, covering, results
from compare import assert_bitwise_equal, assert_close
from jax_flash2 import flash_attention

DTYPES = ("bfloat16", "float16")
DIMS = (64, 128, 256)
# Lengths that do not divide by any tile, and some that do.
LENGTHS = ((128, 128), (200, 333), (1, 257), (65, 64), (384, 129), (77, 1))


@pytest.mark.parametrize("head_dim", list(range(8, 257, 8)))
def test_every_head_dim(head_dim):
    case = gpu_case("causal", "key_lengths", head_dim=head_dim, length=150)
    check(case.inputs(), str(case))


@pytest.mark.parametrize("head_dim", [1, 12, 60, 100, 250])
def test_head_dims_that_are_padded(head_dim):
    case = gpu_case("causal", head_dim=head_dim, length=70)
    check(case.inputs(), str(case))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 128), (128, 64), (192, 24)])
def test_value_with_a_head_dim_of_its_own(head_dim, value_dim):
    case = gpu_case("causal", head_dim=head_dim, value_dim=value_dim, length=150)
    check(case.inputs(), str(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [*DIMS, 192])
@pytest.mark.parametrize("options", [(), ("causal",)])
@pytest.mark.parametrize("length", [577, 2048])
def test_lengths_and_dtypes(dtype, head_dim, options, length):
    case = gpu_case(*options, dtype=dtype, head_dim=head_dim, length=length, batch=(1,))
    check(case.inputs(), str(case))


@pytest.mark.parametrize(("number", "name"), list(enumerate(SUPPORTED)))
def test_every_option_alone_changes_the_result(number, name):
    shape = dict(zip(("q_length", "kv_length"), LENGTHS[number % 2], strict=True))
    shape |= {"head_dim": DIMS[number % 3], "dtype": DTYPES[number % 2]}
    # An offset moves the mask, so there must be one.
    base = ("causal",) if name.startswith("offset") else ()
    inputs = gpu_case(*base, name, **shape).inputs()
    ours = check(inputs, name)
    if name == "deterministic":
        return
    bare = gpu_case(*base, **shape).inputs()
    bare = bare.replace(**{n: inputs.wrt[n] for n in ("query", "key", "value")})
    without = evaluate(bare)
    for result in ("out", "dquery"):
        assert (without[result] != ours[result]).any()


# For many options at once: several tiles, and rows that share a tile with another head's.
SEVERAL = ((128, 128), (200, 333), (129, 384), (65, 64), (5, 300))


def share_of_rows(out):
    """Of those that see a key."""
    return (out != 0).any(-1).mean()


def reference(inputs):
    return results(without_slopes(inputs).astype(jnp.float32), "reference")


def check_several(number, options, head_dim, family):
    shape = dict(zip(("q_length", "kv_length"), SEVERAL[number % 5], strict=True))
    dtype = DTYPES[number % 2]
    case = gpu_case(*options, **shape, head_dim=head_dim, dtype=dtype)
    # Many masks at once may leave next to nothing: then another draw.
    draws = (case.inputs(seed=seed) for seed in range(number, number + 50_000, 10_000))
    inputs = next(x for x in draws if share_of_rows(reference(x)["out"]) > 0.1)
    # The scale's gradient is one number: of two that are as exact, by chance alone one is
    # more than twice as far off as the other at every third draw.
    more = range(100, 1600, 100) if "scale_traced" in options else ()
    others = tuple(case.inputs(seed=number + seed) for seed in more)
    ours = check_families(inputs, str(case), (family,), others)[family]
    assert share_of_rows(ours["out"]) > 0.1  # the masks leave something


@pytest.mark.parametrize(("number", "options"), list(enumerate(covering(6, SUPPORTED))))
def test_every_pair_of_options(number, options):
    check_several(number, options, DIMS[number % 3], FORCED)


@pytest.mark.skipif(not HOPPER, reason="of Hopper's kernels")
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize(
    ("number", "options"), list(enumerate(covering(6, HOPPER_TAKES)))
)
def test_every_pair_of_options_of_hopper(number, options, head_dim):
    check_several(number + DIMS.index(head_dim), options, head_dim, "cuda")


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (6, 2), (12, 3)])
@pytest.mark.parametrize("head_dim", DIMS)
def test_grouped_heads(heads, kv_heads, head_dim):
    case = gpu_case(
        "causal", heads=heads, kv_heads=kv_heads, head_dim=head_dim, length=130
    )
    check(case.inputs(), str(case))


# Short queries, whose group of heads shares a tile on Hopper: every length up to 16 with one
# of the groups, among them some that are no power of two and one that no tile holds.
GROUPS = (2, 3, 4, 5, 6, 7, 8, 71)
MASKS = (
    (),
    ("causal", "offset_static"),
    ("causal", "offset", "sinks"),
    ("window", "offset"),
    ("chunk", "offset_static"),
    ("query_lengths", "key_lengths"),
    ("causal", "prefix", "key_lengths"),
    ("causal", "offset", "query_lengths", "key_lengths", "sinks"),
)


@pytest.mark.parametrize("q_length", range(1, 17))
@pytest.mark.parametrize("head_dim", DIMS)
def test_short_queries_of_grouped_heads(q_length, head_dim):
    group = GROUPS[(q_length + head_dim // 64) % len(GROUPS)]
    shape = dict(q_length=q_length, kv_length=201, heads=2 * group, head_dim=head_dim)
    for turn in range(2):
        number = q_length + DIMS.index(head_dim) + 4 * turn
        dtype = DTYPES[(number + turn) % 2]
        case = gpu_case(*MASKS[number % len(MASKS)], **shape, dtype=dtype)
        inputs = case.inputs(seed=number)
        check(inputs, str(case))
        first, again = (forward(inputs, FAMILIES[-1]) for _ in range(2))
        assert_bitwise_equal(first, again)


# From 4096 keys on a cluster shares them out, at head_dim 64 from 8192.
@pytest.mark.parametrize("kv_length", [4096, 8200, 16384])
@pytest.mark.parametrize("head_dim", DIMS)
def test_few_queries_of_many_keys(kv_length, head_dim):
    number = DIMS.index(head_dim) + kv_length // 4096
    for options in (MASKS[number % 3], MASKS[5 + number % 3]):
        case = gpu_case(
            *options,
            q_length=1 + number,
            kv_length=kv_length,
            heads=2 * (1, 6, 8)[number % 3],
            head_dim=head_dim,
            batch=(2,),
            dtype=DTYPES[number % 2],
        )
        inputs = case.inputs(seed=number)
        check(inputs, str(case))
        first, again = (forward(inputs, FAMILIES[-1]) for _ in range(2))
        assert_bitwise_equal(first, again)


# Of so few as 201 keys one block has all.
@pytest.mark.parametrize("kv_length", [201, 8200])
@pytest.mark.parametrize("head_dim", DIMS)
def test_soft_caps_of_few_queries(kv_length, head_dim):
    number = DIMS.index(head_dim)
    for turn, masks in enumerate((("causal", "offset", "sinks"), ("key_lengths",))):
        case = gpu_case(
            "soft_cap",
            *masks,
            q_length=1 + 2 * number,
            kv_length=kv_length,
            heads=8,
            head_dim=head_dim,
            batch=(2,),
            dtype=DTYPES[(number + turn) % 2],
        )
        inputs = case.inputs(seed=number)
        check(inputs, str(case))
        first, again = (forward(inputs, FAMILIES[-1]) for _ in range(2))
        assert_bitwise_equal(first, again)


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("cap", [0.1, 30.0, 300.0])
def test_small_and_large_soft_caps(cap, head_dim):
    inputs = gpu_case("soft_cap", "causal", length=700, head_dim=head_dim).inputs()
    check(inputs.replace(logits_soft_cap=cap))


@pytest.mark.parametrize("head_dim", DIMS)
@each_family
def test_a_huge_soft_cap_costs_what_the_docstring_says(head_dim, family):
    """The rule of accuracy would ask for more: it is for caps that something reaches."""
    cap = 1000.0
    inputs = gpu_case("soft_cap", "causal", length=700, head_dim=head_dim).inputs()
    inputs = inputs.replace(logits_soft_cap=cap)
    want = reference(inputs)["lse"]
    bound = 3e-7 * cap + 1e-5 * float(jnp.abs(want).max())
    assert_close(forward(inputs, family)["lse"], want, bound, f"{family} lse")


@pytest.mark.parametrize("q_length", [5, 200])
@pytest.mark.parametrize("head_dim", [96, 136, 192])
@pytest.mark.parametrize(
    "options", [("segments",), ("causal", "offset", "sinks"), ("causal", "soft_cap")]
)
def test_head_dims_between_the_buckets(options, head_dim, q_length):
    shape = dict(q_length=q_length, kv_length=333, heads=8, kv_heads=2)
    case = gpu_case(*options, **shape, head_dim=head_dim)
    check(case.inputs(), str(case))


@pytest.mark.parametrize("options", [(), ("soft_cap",)])
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_of_packed_heads(head_dim, scale, options):
    shape = dict(q_length=5, kv_length=300, heads=8, kv_heads=1, head_dim=head_dim)
    inputs = gpu_case("causal", "offset_static", "scale", *options, **shape).inputs()
    check(inputs.replace(scale=scale))


@pytest.mark.parametrize("head_dim", DIMS)
def test_packed_heads_give_the_bytes_of_heads_alone(head_dim):
    """A head, its keys' only one, makes a tile of its own: its sums come in the same order."""
    shape = dict(q_length=3, kv_length=500, heads=6, head_dim=head_dim, batch=(2,))
    case = gpu_case("causal", "offset_static", "key_lengths", "query_lengths", **shape)
    inputs = case.inputs()
    whole = forward(inputs, FAMILIES[-1])
    for head in range(6):
        key = slice(head // 3, head // 3 + 1)
        one = inputs.replace(
            query=inputs.wrt["query"][:, :, head : head + 1],
            key=inputs.wrt["key"][:, :, key],
            value=inputs.wrt["value"][:, :, key],
        )
        for name, x in forward(one, FAMILIES[-1]).items():
            assert_bitwise_equal(x[:, :, 0], whole[name][:, :, head], name)


# ---------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("options", [(), ("causal",)])
@pytest.mark.parametrize("head_dim", DIMS)
def test_tiny_lengths_exhaustively(options, head_dim):
    """1..9 x 1..9, as lengths of batch entries and as shapes, all in one program each."""
    pairs = list(itertools.product(range(1, 10), repeat=2))
    options = (*options, "query_lengths", "key_lengths")
    shape = dict(length=9, batch=(len(pairs),), heads=2, kv_heads=1)
    inputs = gpu_case(*options, **shape, head_dim=head_dim).inputs()
    lengths = jnp.asarray(pairs, jnp.int32)
    whole = check_families(
        inputs.replace(
            query_seq_lengths=lengths[:, 0], key_value_seq_lengths=lengths[:, 1]
        )
    )

    @functools.partial(jax.jit, static_argnums=2)
    def one_by_one(arrays, cotangents, family):
        found = []
        for e, (q, k) in enumerate(pairs):
            ends = {"query": q, "key": k, "value": k}
            parts = {n: arrays[n][e : e + 1, :end] for n, end in ends.items()}
            call = lambda parts: flash_attention(  # noqa: E731
                **parts,
                **inputs.static,
                implementation=family,
                return_residual=True,
            )
            (out, lse), pullback = jax.vjp(call, parts)
            grads = pullback(tuple(g[e : e + 1, :q] for g in cotangents))[0]
            found.append(
                {"out": out, "lse": lse} | {f"d{n}": g for n, g in grads.items()}
            )
        return found

    for family, together in whole.items():
        parts = one_by_one(inputs.wrt, inputs.cotangents, family)
        for (e, alone), name in itertools.product(enumerate(parts), together):
            x, ours = alone[name], together[name][e : e + 1]
            note = f"{family} {pairs[e]} {name}"
            assert_bitwise_equal(x, ours[:, : x.shape[1]], note)
            assert (ours[:, x.shape[1] :] == (-jnp.inf if name == "lse" else 0)).all()


@pytest.mark.parametrize("options", [(), ("causal",), ("window",)])
@pytest.mark.parametrize("head_dim", DIMS)
def test_every_residue_of_the_lengths(options, head_dim):
    """256 batch entries, each with lengths of its own, in one program."""
    case = gpu_case(
        *(*options, "key_lengths", "query_lengths"),
        **dict(length=256, batch=(257,), heads=2, kv_heads=1, head_dim=head_dim),
    )
    lengths = jnp.arange(257, dtype=jnp.int32)
    inputs = case.inputs().replace(
        key_value_seq_lengths=lengths, query_seq_lengths=lengths[::-1]
    )
    check(inputs, str(case))


@pytest.mark.parametrize("q_length", [120, *range(126, 131), 136, 193])
def test_residues_of_the_shapes(q_length):
    case = gpu_case("causal", q_length=q_length, kv_length=320 - q_length, head_dim=128)
    check(case.inputs(), str(case))


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize(
    ("options", "values"),
    [
        (("key_lengths",), {"key_value_seq_lengths": jnp.zeros(3, jnp.int32)}),
        (("query_lengths",), {"query_seq_lengths": jnp.zeros(3, jnp.int32)}),
        (("causal", "offset"), {"query_offset": jnp.full(3, -1000, jnp.int32)}),
        (("window", "offset"), {"query_offset": jnp.full(3, 1000, jnp.int32)}),
        (("segments",), {"query_segment_ids": jnp.full((3, 128), 99, jnp.int32)}),
        (("chunk", "offset"), {"query_offset": jnp.full(3, 10**6, jnp.int32)}),
    ],
)
@each_family
def test_rows_that_see_no_key(options, values, head_dim, family):
    case = gpu_case(*options, head_dim=head_dim)
    for name, x in evaluate(case.inputs().replace(**values), family).items():
        assert (x == (-jnp.inf if name == "lse" else 0)).all(), name


def test_rows_that_see_only_their_sink():
    case = gpu_case("key_lengths", "sinks")
    inputs = case.inputs().replace(key_value_seq_lengths=jnp.zeros(3, jnp.int32))
    ours = check(inputs)
    assert (ours["out"] == 0).all()
    np.testing.assert_allclose(
        np.asarray(ours["lse"]),
        np.broadcast_to(inputs.wrt["sinks"], ours["lse"].shape),
        rtol=1e-6,
    )


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
@each_family
def test_zero_sizes(shape, family):
    batch, q_length, kv_length = shape
    case = gpu_case(q_length=q_length, kv_length=kv_length, batch=(batch,))
    for name, x in evaluate(case.inputs(), family).items():
        assert (x == (-jnp.inf if name == "lse" else 0)).all(), name


@pytest.mark.parametrize("head_dim", DIMS)
@each_family
def test_nan_past_the_lengths_does_not_leak(head_dim, family):
    options = ("key_lengths", "query_lengths", "deterministic")
    inputs = gpu_case(*options, length=200, head_dim=head_dim).inputs()
    clean = evaluate(inputs, family)
    nan = {}
    for name in ("query", "key", "value", "out", "lse"):
        side = "key_value" if name in ("key", "value") else "query"
        past = jnp.arange(200)[None] >= inputs.fixed[f"{side}_seq_lengths"][:, None]
        nan[name] = past[..., None, None] if name != "lse" else past[..., None]

    def poison(x, name):
        return jnp.where(nan[name], jnp.asarray(jnp.nan, x.dtype), x)

    wrt = {name: poison(x, name) for name, x in inputs.wrt.items()}
    cotangents = tuple(map(poison, inputs.cotangents, ("out", "lse")))
    poisoned = Inputs(wrt, inputs.fixed, inputs.static, cotangents)
    assert_bitwise_equal(evaluate(poisoned, family), clean)


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [30.0, -30.0, 1e-4])
def test_extreme_logits(head_dim, dtype, factor):
    """Scores of thousands, of either sign, and scores that are all the same."""
    case = gpu_case("causal", head_dim=head_dim, dtype=dtype, length=193)
    inputs = case.inputs()
    query = (inputs.wrt["query"].astype(jnp.float32) * factor).astype(dtype)
    key = jnp.abs(inputs.wrt["key"]) + jnp.asarray(3.0, dtype)
    check(inputs.replace(query=query, key=key), str(case))


def test_rows_that_see_one_key_nearly_alone():
    """Its probability is exactly 1, or its rounding would be most of the error of dQ."""
    shape = dict(q_length=200, kv_length=333, head_dim=128, dtype="float16")
    check(gpu_case("scale", **shape).inputs(seed=61))


@pytest.mark.parametrize(
    ("options", "head_dim"), [((), 128), (("soft_cap",), 128), (("soft_cap",), 256)]
)
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_without_and_with_a_sign(scale, options, head_dim):
    case = gpu_case("causal", "scale", *options, head_dim=head_dim, length=150)
    check(case.inputs().replace(scale=scale), str(case))


@each_family
def test_every_output_is_written(family):
    """Freed memory full of NaN is what results and workspace are made from."""
    case = gpu_case("key_lengths", "deterministic", length=333, batch=(4,), head_dim=72)
    inputs = case.inputs()
    want = evaluate(inputs, family)
    for _ in range(5):
        poison = [jnp.full((64 << 20,), jnp.nan, jnp.float32) for _ in range(4)]
        jax.block_until_ready(poison)
        del poison
        assert_bitwise_equal(evaluate(inputs, family), want)


# --------------------------------------------------------------------------------- sizes


# 2^31 elements and some more.
LARGE = (2**18 + 128, 64, 64, 128)  # rows, rows of the other side, heads, head_dim


@pytest.mark.first
@each_family
def test_more_than_2_31_elements_of_query(family):
    large.alone("elements", large.many_queries, family, *LARGE)


@pytest.mark.first
@each_family
def test_more_than_2_31_elements_of_key_and_value(family):
    large.alone("elements", large.many_keys, family, *LARGE)


@pytest.mark.first
@pytest.mark.parametrize(("batch", "heads"), [(71280, 1), (1, 71280), (8300, 16)])
@each_family
def test_more_heads_than_a_grid_axis_holds(batch, heads, family):
    large.alone("heads", large.many_heads, family, batch, heads)
