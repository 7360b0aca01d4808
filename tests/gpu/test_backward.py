"""The backward kernels by the rule of accuracy: every head_dim, option, length, and edge."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    IMPLEMENTATIONS,
    SUPPORTED,
    backward,
    check_backward,
    gpu_case,
    option_sets,
)

from cases import results
from compare import assert_bitwise_equal, assert_follows_the_rule
from jax_flash2 import _ffi, flash_attention

DTYPES = ("bfloat16", "float16")
DIMS = (64, 128, 256)
# Lengths that do not divide by any tile, and some that do.
LENGTHS = ((128, 128), (200, 333), (1, 257), (65, 64), (384, 129), (77, 1))


@pytest.mark.parametrize("head_dim", [*range(8, 257, 24), 64, 120, 136, 248, 256])
def test_head_dims(head_dim):
    case = gpu_case("causal", "key_lengths", head_dim=head_dim, length=150)
    check_backward(case.inputs(), str(case))


@pytest.mark.parametrize("head_dim", [1, 12, 100, 250])
def test_head_dims_that_are_padded(head_dim):
    case = gpu_case("causal", head_dim=head_dim, length=70)
    check_backward(case.inputs(), str(case))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 128), (128, 64), (192, 24)])
def test_value_with_a_head_dim_of_its_own(head_dim, value_dim):
    case = gpu_case("causal", head_dim=head_dim, value_dim=value_dim, length=150)
    check_backward(case.inputs(), str(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("options", [(), ("causal",)])
@pytest.mark.parametrize("length", [577, 2048])
def test_lengths_and_dtypes(dtype, head_dim, options, length):
    case = gpu_case(*options, dtype=dtype, head_dim=head_dim, length=length, batch=(1,))
    check_backward(case.inputs(), str(case))


@pytest.mark.parametrize(("number", "name"), list(enumerate(SUPPORTED)))
def test_every_option_alone_changes_the_gradient(number, name):
    shape = dict(zip(("q_length", "kv_length"), LENGTHS[number % 2], strict=True))
    shape |= {"head_dim": DIMS[number % 3], "dtype": DTYPES[number % 2]}
    # An offset moves the mask, so there must be one.
    base = ("causal",) if name.startswith("offset") else ()
    inputs = gpu_case(*base, name, **shape).inputs()
    ours = check_backward(inputs, name)
    if name == "deterministic":
        return
    bare = gpu_case(*base, **shape).inputs()
    bare = bare.replace(**{n: inputs.wrt[n] for n in ("query", "key", "value")})
    assert (backward(bare, IMPLEMENTATIONS[-1])["dquery"] != ours["dquery"]).any()


@pytest.mark.parametrize(("number", "options"), list(enumerate(option_sets(5))))
def test_every_pair_of_options(number, options):
    q_length, kv_length = LENGTHS[number % len(LENGTHS)]
    case = gpu_case(
        *options,
        q_length=q_length,
        kv_length=kv_length,
        head_dim=DIMS[number % 3],
        dtype=DTYPES[number % 2],
    )
    check_backward(case.inputs(seed=number), str(case))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (6, 2), (12, 3)])
@pytest.mark.parametrize("head_dim", DIMS)
def test_grouped_heads(heads, kv_heads, head_dim):
    case = gpu_case(
        "causal", heads=heads, kv_heads=kv_heads, head_dim=head_dim, length=130
    )
    check_backward(case.inputs(), str(case))


@pytest.mark.parametrize("head_dim", DIMS)
def test_only_the_logsumexp_has_a_cotangent(head_dim):
    inputs = gpu_case("causal", "sinks", head_dim=head_dim, length=100).inputs()
    out, lse = inputs.cotangents
    some = inputs.__class__(
        inputs.wrt, inputs.fixed, inputs.static, (jnp.zeros_like(out), lse)
    )
    ours = check_backward(some)
    assert (ours["dvalue"] == 0).all()
    assert (ours["dquery"] != 0).any()


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
    together = check_backward(
        inputs.replace(
            query_seq_lengths=lengths[:, 0], key_value_seq_lengths=lengths[:, 1]
        )
    )

    @jax.jit
    def one_by_one(arrays, cotangents):
        found = []
        for e, (q, k) in enumerate(pairs):
            ends = {"query": q, "key": k, "value": k}
            parts = {n: arrays[n][e : e + 1, :end] for n, end in ends.items()}
            call = lambda parts: flash_attention(  # noqa: E731
                **parts,
                **inputs.static,
                implementation=IMPLEMENTATIONS[-1],
                return_residual=True,
            )
            _, pullback = jax.vjp(call, parts)
            found.append(pullback(tuple(g[e : e + 1, :q] for g in cotangents))[0])
        return found

    for e, alone in enumerate(one_by_one(inputs.wrt, inputs.cotangents)):
        for name, x in alone.items():
            whole = together[f"d{name}"][e : e + 1]
            assert_bitwise_equal(x, whole[:, : x.shape[1]], f"{pairs[e]} {name}")
            assert (whole[:, x.shape[1] :] == 0).all()


@pytest.mark.parametrize("options", [(), ("causal",), ("window",)])
@pytest.mark.parametrize("head_dim", DIMS)
def test_every_residue_of_the_lengths(options, head_dim):
    """257 batch entries, each with lengths of its own, in one program."""
    case = gpu_case(
        *(*options, "key_lengths", "query_lengths"),
        **dict(length=256, batch=(257,), heads=2, kv_heads=1, head_dim=head_dim),
    )
    lengths = jnp.arange(257, dtype=jnp.int32)
    inputs = case.inputs().replace(
        key_value_seq_lengths=lengths, query_seq_lengths=lengths[::-1]
    )
    check_backward(inputs, str(case))


@pytest.mark.parametrize("q_length", [120, 127, 128, 129, 193])
def test_residues_of_the_shapes(q_length):
    case = gpu_case("causal", q_length=q_length, kv_length=320 - q_length, head_dim=128)
    check_backward(case.inputs(), str(case))


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize(
    ("options", "values"),
    [
        (("key_lengths",), {"key_value_seq_lengths": jnp.zeros(3, jnp.int32)}),
        (("query_lengths",), {"query_seq_lengths": jnp.zeros(3, jnp.int32)}),
        (("causal", "offset"), {"query_offset": jnp.full(3, -1000, jnp.int32)}),
        (("segments",), {"query_segment_ids": jnp.full((3, 128), 99, jnp.int32)}),
        (("chunk", "offset"), {"query_offset": jnp.full(3, 10**6, jnp.int32)}),
    ],
)
def test_rows_that_see_no_key(options, values, head_dim):
    case = gpu_case(*options, head_dim=head_dim)
    for implementation in IMPLEMENTATIONS:
        ours = backward(case.inputs().replace(**values), implementation)
        for name, x in ours.items():
            assert (x == 0).all(), (implementation, name)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_zero_sizes(shape):
    batch, q_length, kv_length = shape
    case = gpu_case(q_length=q_length, kv_length=kv_length, batch=(batch,))
    for implementation in IMPLEMENTATIONS:
        for x in backward(case.inputs(), implementation).values():
            assert (x == 0).all()


@pytest.mark.parametrize("head_dim", DIMS)
def test_nan_past_the_lengths_does_not_leak(head_dim):
    options = ("key_lengths", "query_lengths", "deterministic")
    inputs = gpu_case(*options, length=200, head_dim=head_dim).inputs()
    nan = {}
    for name in ("query", "key", "value", "out", "lse"):
        side = "key_value" if name in ("key", "value") else "query"
        past = jnp.arange(200)[None] >= inputs.fixed[f"{side}_seq_lengths"][:, None]
        nan[name] = past[..., None, None] if name != "lse" else past[..., None]

    def poison(x, name):
        return jnp.where(nan[name], jnp.asarray(jnp.nan, x.dtype), x)

    wrt = {name: poison(x, name) for name, x in inputs.wrt.items()}
    cotangents = tuple(map(poison, inputs.cotangents, ("out", "lse")))
    poisoned = inputs.__class__(wrt, inputs.fixed, inputs.static, cotangents)
    for implementation in IMPLEMENTATIONS:
        clean = backward(inputs, implementation)
        assert_bitwise_equal(backward(poisoned, implementation), clean)


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [30.0, -30.0, 1e-4])
def test_extreme_logits(head_dim, dtype, factor):
    """Scores of thousands, of either sign, and scores that are all the same."""
    case = gpu_case("causal", head_dim=head_dim, dtype=dtype, length=193)
    inputs = case.inputs()
    query = (inputs.wrt["query"].astype(jnp.float32) * factor).astype(dtype)
    key = jnp.abs(inputs.wrt["key"]) + jnp.asarray(3.0, dtype)
    check_backward(inputs.replace(query=query, key=key), str(case))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_without_and_with_a_sign(scale):
    inputs = gpu_case("causal", "scale", head_dim=128, length=150).inputs()
    check_backward(inputs.replace(scale=scale))


@pytest.mark.parametrize("head_dim", [40, 72, 200])
@pytest.mark.parametrize("options", [("key_lengths",), ("window", "query_lengths")])
def test_every_output_is_written(options, head_dim):
    """Freed memory full of NaN is what gradients and workspace are made from."""
    case = gpu_case(
        *(*options, "deterministic"),
        **dict(length=333, batch=(4,), head_dim=head_dim),
    )
    inputs = case.inputs()
    for implementation in IMPLEMENTATIONS:
        want = backward(inputs, implementation)
        for _ in range(5):
            poison = [jnp.full((64 << 20,), jnp.nan, jnp.float32) for _ in range(4)]
            jax.block_until_ready(poison)
            del poison
            assert_bitwise_equal(backward(inputs, implementation), want)


# --------------------------------------------------------------------------------- sizes


def gradients(implementation, q, k, v, dout):
    def run(q, k, v, dout):
        call = lambda *x: flash_attention(*x, implementation=implementation)  # noqa: E731
        return jax.vjp(call, q, k, v)[1](dout)

    return jax.jit(run)(q, k, v, dout)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def near(a, b):
    """The order of a sum over key tiles may differ, hence its last bits."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=2.0**-6, atol=2.0**-7 * np.abs(b).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_more_than_2_31_elements_of_query(implementation):
    rows, heads, head_dim = 2**18 + 128, 64, 128
    q, dout = normal(0, 1, rows, heads, head_dim), normal(3, 1, rows, heads, head_dim)
    assert q.size > 2**31
    k, v = normal(1, 1, 64, 64, head_dim), normal(2, 1, 64, 64, head_dim)
    dq, dk, dv = gradients(implementation, q, k, v, dout)
    for start in (0, 2**17, rows - 256):
        part = slice(start, start + 256)
        some, _, _ = gradients(implementation, q[:, part], k, v, dout[:, part])
        near(dq[:, part], some)
    one = slice(heads - 1, heads)
    _, *some = gradients(implementation, *(x[:, :, one] for x in (q, k, v, dout)))
    assert_bitwise_equal([dk[:, :, one], dv[:, :, one]], some)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_more_than_2_31_elements_of_key_and_value(implementation):
    rows, heads, head_dim = 2**18 + 128, 64, 128
    k, v = normal(1, 1, rows, heads, head_dim), normal(2, 1, rows, heads, head_dim)
    q, dout = normal(0, 1, 64, heads, head_dim), normal(3, 1, 64, heads, head_dim)
    dq, dk, dv = gradients(implementation, q, k, v, dout)
    for head in (0, heads - 1):
        one = slice(head, head + 1)
        some = gradients(implementation, *(x[:, :, one] for x in (q, k, v, dout)))
        near(dq[:, :, one], some[0])
        assert_bitwise_equal([dk[:, :, one], dv[:, :, one]], list(some[1:]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("batch", "heads"), [(71280, 1), (1, 71280)])
def test_more_heads_than_a_grid_axis_holds(batch, heads, implementation):
    q, dout = normal(0, batch, 3, heads, 64), normal(3, batch, 3, heads, 64)
    k, v = normal(1, batch, 5, heads, 64), normal(2, batch, 5, heads, 64)
    found = gradients(implementation, q, k, v, dout)
    b, h = slice(batch - 1, batch), slice(heads - 1, heads)
    some = gradients(implementation, *(x[b, :, h] for x in (q, k, v, dout)))
    assert_bitwise_equal([x[b, :, h] for x in found], list(some))


# ---------------------------------------------------------------------------- same bytes


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ((), dict(head_dim=64)),
        (("causal",), dict(head_dim=64)),
        (("causal",), dict(head_dim=128)),
        (("window",), dict(head_dim=128, dtype="float16")),
        ((), dict(head_dim=256)),
        (("causal", "offset", "key_lengths"), dict(head_dim=256)),
        (("segments", "alibi", "soft_cap"), dict(head_dim=64)),
    ],
)
def test_deterministic_gradients_repeat(options, shape, facts):
    """1,000 runs, which other work disturbs, give the bytes of the first."""
    runs = 1000
    case = gpu_case(
        *(*options, "deterministic"),
        **dict(length=1100, batch=(2,), heads=8, kv_heads=4),
        **shape,
    )
    inputs = case.inputs()
    want = {name: backward(inputs, name) for name in IMPLEMENTATIONS}
    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), a, b))
    noise = jax.jit(lambda x: jnp.tanh(x @ x))
    x, equal = jnp.ones((1024, 1024)), []
    for run in range(runs):
        if run % 3 == 0:
            x = noise(x)
        for name in IMPLEMENTATIONS:
            equal.append(same(backward(inputs, name), want[name]))
    assert all(map(bool, jax.tree.leaves(jax.device_get(equal))))
    facts("deterministic", str(case), runs)


def test_key_and_value_gradients_repeat_anyway():
    inputs = gpu_case("causal", length=1500, head_dim=128).inputs()
    for implementation in IMPLEMENTATIONS:
        want = backward(inputs, implementation)
        for _ in range(50):
            ours = backward(inputs, implementation)
            for name in ("dkey", "dvalue"):
                assert_bitwise_equal(ours[name], want[name])


def test_a_gradient_that_the_kernels_lack_runs_in_plain_jax(monkeypatch):
    monkeypatch.setattr(_ffi, "_warned", set())
    inputs = gpu_case("causal", "alibi", length=100).inputs()
    with pytest.warns(UserWarning, match="no gradient of alibi_slopes"):
        ours = results(inputs, None)
    assert_follows_the_rule(inputs, ours)
