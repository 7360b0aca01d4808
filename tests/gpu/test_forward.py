"""The forward kernels by the rule of accuracy: every head_dim, option, length, and edge."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import FORCED, SUPPORTED, check_forward, forward, gpu_case, option_sets

from compare import assert_accurate, assert_bitwise_equal, dense
from jax_flash2 import flash_attention

DTYPES = ("bfloat16", "float16")
DIMS = (64, 128, 256)
# Lengths that do not divide by any tile, and some that do.
LENGTHS = ((128, 128), (200, 333), (1, 257), (65, 64), (384, 129), (77, 1))


@pytest.mark.parametrize("head_dim", list(range(8, 257, 8)))
def test_every_head_dim(head_dim):
    case = gpu_case("causal", "key_lengths", head_dim=head_dim, length=150)
    check_forward(case.inputs(), str(case))


@pytest.mark.parametrize("head_dim", [1, 12, 60, 100, 250])
def test_head_dims_that_are_padded(head_dim):
    case = gpu_case("causal", head_dim=head_dim, length=70)
    check_forward(case.inputs(), str(case))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 128), (128, 64), (192, 24)])
def test_value_with_a_head_dim_of_its_own(head_dim, value_dim):
    case = gpu_case("causal", head_dim=head_dim, value_dim=value_dim, length=150)
    check_forward(case.inputs(), str(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("options", [(), ("causal",)])
@pytest.mark.parametrize("length", [128, 577, 2048])
def test_lengths_and_dtypes(dtype, head_dim, options, length):
    case = gpu_case(*options, dtype=dtype, head_dim=head_dim, length=length, batch=(1,))
    check_forward(case.inputs(), str(case))


@pytest.mark.parametrize(("number", "name"), list(enumerate(SUPPORTED)))
def test_every_option_alone_changes_the_result(number, name):
    shape = dict(zip(("q_length", "kv_length"), LENGTHS[number % 2], strict=True))
    shape |= {"head_dim": DIMS[number % 3], "dtype": DTYPES[number % 2]}
    # An offset moves the mask, so there must be one.
    base = ("causal",) if name.startswith("offset") else ()
    inputs = gpu_case(*base, name, **shape).inputs()
    ours = check_forward(inputs, name)
    if name == "deterministic":  # of the backward alone
        return
    bare = gpu_case(*base, **shape).inputs()
    bare = bare.replace(**{n: inputs.wrt[n] for n in ("query", "key", "value")})
    assert (forward(bare)["out"] != ours["out"]).any()


@pytest.mark.parametrize(("number", "options"), list(enumerate(option_sets(4))))
def test_every_pair_of_options(number, options):
    q_length, kv_length = LENGTHS[number % len(LENGTHS)]
    case = gpu_case(
        *options,
        q_length=q_length,
        kv_length=kv_length,
        head_dim=DIMS[number % 3],
        dtype=DTYPES[number % 2],
    )
    check_forward(case.inputs(seed=number), str(case))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 1), (6, 2), (12, 3)])
@pytest.mark.parametrize("head_dim", DIMS)
def test_grouped_heads(heads, kv_heads, head_dim):
    case = gpu_case(
        "causal", heads=heads, kv_heads=kv_heads, head_dim=head_dim, length=130
    )
    check_forward(case.inputs(), str(case))


# ---------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("options", [(), ("causal",)])
@pytest.mark.parametrize("head_dim", DIMS)
def test_tiny_lengths_exhaustively(options, head_dim):
    """1..9 x 1..9 in one program."""
    shapes = list(itertools.product(range(1, 10), repeat=2))
    cases = [
        gpu_case(*options, q_length=q, kv_length=k, head_dim=head_dim, batch=(2,))
        for q, k in shapes
    ]
    inputs = [case.inputs(seed=n) for n, case in enumerate(cases)]
    arrays = [x.wrt for x in inputs]
    wide = [x.astype(jnp.float32).wrt for x in inputs]

    def all_of(function, arrays, **more):
        def run(arrays):
            static = inputs[0].static | more
            return [function(**a, **static, return_residual=True) for a in arrays]

        return jax.jit(run)(arrays)

    ours = all_of(flash_attention, arrays, implementation=FORCED)
    reference = all_of(flash_attention, wide, implementation="reference")
    baseline = all_of(dense, arrays)
    for shape, *three in zip(shapes, ours, reference, baseline, strict=True):
        for name, *results in zip(("out", "lse"), *three, strict=True):
            assert_accurate(*results, f"{shape} {name}")


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
    check_forward(inputs, str(case))


@pytest.mark.parametrize("q_length", list(range(120, 137)))
def test_every_residue_of_the_shapes(q_length):
    case = gpu_case("causal", q_length=q_length, kv_length=256 - q_length, head_dim=128)
    check_forward(case.inputs(), str(case))


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
def test_rows_that_see_no_key(options, values, head_dim):
    case = gpu_case(*options, head_dim=head_dim)
    ours = check_forward(case.inputs().replace(**values), str(case))
    assert (ours["out"] == 0).all()
    assert (ours["lse"] == -jnp.inf).all()


def test_rows_that_see_only_their_sink():
    case = gpu_case("key_lengths", "sinks")
    inputs = case.inputs().replace(key_value_seq_lengths=jnp.zeros(3, jnp.int32))
    ours = check_forward(inputs)
    assert (ours["out"] == 0).all()
    np.testing.assert_allclose(
        np.asarray(ours["lse"]),
        np.broadcast_to(inputs.wrt["sinks"], ours["lse"].shape),
        rtol=1e-6,
    )


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_zero_sizes(shape):
    batch, q_length, kv_length = shape
    case = gpu_case(q_length=q_length, kv_length=kv_length, batch=(batch,))
    ours = forward(case.inputs())
    assert (ours["out"] == 0).all()
    assert (ours["lse"] == -jnp.inf).all()


@pytest.mark.parametrize("head_dim", DIMS)
def test_nan_past_the_lengths_does_not_leak(head_dim):
    case = gpu_case("key_lengths", "query_lengths", length=200, head_dim=head_dim)
    inputs = case.inputs()
    clean = forward(inputs)
    poisoned = {}
    for name in ("query", "key", "value"):
        side = "query" if name == "query" else "key_value"
        past = jnp.arange(200)[None] >= inputs.fixed[f"{side}_seq_lengths"][:, None]
        x = inputs.wrt[name]
        nan = jnp.asarray(jnp.nan, x.dtype)
        poisoned[name] = jnp.where(past[..., None, None], nan, x)
    assert_bitwise_equal(forward(inputs.replace(**poisoned)), clean)


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [30.0, -30.0, 1e-4])
def test_extreme_logits(head_dim, dtype, factor):
    """Scores of thousands, of either sign, and scores that are all the same."""
    case = gpu_case("causal", head_dim=head_dim, dtype=dtype, length=193)
    inputs = case.inputs()
    query = (inputs.wrt["query"].astype(jnp.float32) * factor).astype(dtype)
    key = jnp.abs(inputs.wrt["key"]) + jnp.asarray(3.0, dtype)
    check_forward(inputs.replace(query=query, key=key), str(case))


def test_every_output_is_written():
    """Freed memory full of NaN is what the outputs are made from."""
    case = gpu_case("key_lengths", length=333, batch=(4,), head_dim=72)
    inputs = case.inputs()
    want = forward(inputs)
    for _ in range(5):
        poison = [jnp.full((64 << 20,), jnp.nan, jnp.float32) for _ in range(4)]
        jax.block_until_ready(poison)
        del poison
        assert_bitwise_equal(forward(inputs), want)


# --------------------------------------------------------------------------------- sizes


def equal_on_device(a, b):
    return bool(jax.jit(lambda a, b: (a == b).all())(a, b))


def attend(q, k, v, **more):
    call = lambda q, k, v: flash_attention(  # noqa: E731
        q, k, v, implementation=FORCED, return_residual=True, **more
    )
    return jax.jit(call)(q, k, v)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def test_more_than_2_31_elements_of_query_and_out():
    rows, heads, head_dim = 2**18 + 128, 64, 128
    q = normal(0, 1, rows, heads, head_dim)
    assert q.size > 2**31
    k, v = normal(1, 1, 64, 1, head_dim), normal(2, 1, 64, 1, head_dim)
    out, lse = attend(q, k, v)
    for start in (0, 2**17, rows - 256):
        part = slice(start, start + 256)
        some, some_lse = attend(q[:, part], k, v)
        assert equal_on_device(out[:, part], some)
        assert equal_on_device(lse[:, part], some_lse)


def test_more_than_2_31_elements_of_key_and_value():
    rows, heads, head_dim = 2**18 + 128, 64, 128
    k, v = normal(1, 1, rows, heads, head_dim), normal(2, 1, rows, heads, head_dim)
    q = normal(0, 1, 64, heads, head_dim)
    out, _ = attend(q, k, v)
    for head in (0, heads - 1):
        one = slice(head, head + 1)
        some, _ = attend(q[:, :, one], k[:, :, one], v[:, :, one])
        assert equal_on_device(out[:, :, one], some)


@pytest.mark.parametrize(("batch", "heads"), [(71280, 1), (1, 71280), (8300, 16)])
def test_more_heads_than_a_grid_axis_holds(batch, heads):
    q = normal(0, batch, 3, heads, 64)
    k, v = normal(1, batch, 5, heads, 64), normal(2, batch, 5, heads, 64)
    out, _ = attend(q, k, v)
    b, h = slice(batch - 1, batch), slice(heads - 1, heads)
    some, _ = attend(q[b, :, h], k[b, :, h], v[b, :, h])
    assert equal_on_device(out[b, :, h], some)
