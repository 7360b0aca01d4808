"""Every derivative up to second order, in every mode, against JAX's own of the reference.

`derivatives` evaluates five of them in one program: what the rules of `_rules` and the
two passes of `_tangents` and the one of `_second` can be asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from cases import OPTIONS, PAIRS, Case, Inputs, blocks_of
from compare import assert_close
from jax_flash2 import flash_attention

Tree = dict[str, jax.Array]
Results = dict[str, jax.Array]

# Each option is in one of these at least, with others that it may interfere with.
GROUPS = (
    (
        "causal",
        "prefix",
        "offset",
        "query_lengths",
        "key_lengths",
        "sinks",
        "soft_cap",
    ),
    (
        "window",
        "mask",
        "bias",
        "alibi",
        "sinks",
        "scale_traced",
    ),
    (
        "offset_static",
        "window_left",
        "segments_packed",
        "bias_of_heads",
        "scale_traced",
        "alibi_of_batch",
        "soft_cap",
    ),
    (
        "window_right",
        "chunk",
        "bias_masking",
        "mask_of_keys",
        "query_lengths",
        "dropout",
        "sinks",
        "max_logit",
    ),
    (
        "causal",
        "segments",
        "scale",
        "key_lengths",
        "alibi",
        "bias",
        "soft_cap",
        "deterministic",
    ),
)


pytestmark = pytest.mark.usefixtures("quickly_compiled")


def dot(a: Any, b: Any) -> jax.Array:
    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        return (x.astype(wide) * y.astype(wide)).sum()

    return sum(jax.tree.leaves(jax.tree.map(product, a, b)))


def curved(results: Any, cotangents: Any) -> jax.Array:
    """A scalar that has second derivatives of its own."""
    return dot(jax.tree.map(lambda x: x + x**2 / 2, results), cotangents)


def directions(inputs: Inputs, seed: int = 1) -> list[Tree]:
    """Two tangents of the arguments that have gradients."""
    rng = np.random.default_rng(seed)
    return [
        {
            n: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
            for n, x in sorted(inputs.wrt.items())
        }
        for _ in range(2)
    ]


def call_of(fixed: Tree, static: dict[str, Any], **how: Any) -> Callable[[Tree], Any]:
    def call(x: Tree) -> Any:
        out, lse, *_ = flash_attention(
            **x, **fixed, **static, **how, return_residual=True
        )
        # An empty row's logsumexp is -inf, of which nothing has a derivative.
        return out, jnp.where(jnp.isfinite(lse), lse, 0)

    return call


@functools.cache
def _evaluator(implementation: str, static: tuple[tuple[str, Any], ...]) -> Any:
    @jax.jit
    def evaluate(x: Tree, fixed: Tree, t: Tree, u: Tree, ct: Any) -> Results:
        call = call_of(fixed, dict(static), implementation=implementation)
        forward_call = call
        if implementation != "reference":
            how = dict(implementation=implementation, forward_mode=True)
            forward_call = call_of(fixed, dict(static), **how)

        def along(f: Any, t: Tree) -> Any:
            return lambda x: jax.jvp(f, (x,), (t,))[1]

        def loss(x: Tree) -> jax.Array:
            return curved(call(x), ct)

        jvp = along(forward_call, t)
        found = {
            "jvp": jvp(x),
            "jvp of jvp": along(jvp, u)(x),
            "grad of jvp": jax.grad(lambda x: curved(jvp(x), ct))(x),
            "jvp of grad": along(jax.grad(loss), t)(x),
            "grad of grad": jax.grad(lambda x: dot(jax.grad(loss)(x), t))(x),
        }
        return {
            f"{name} {jax.tree_util.keystr(path)}": leaf
            for name, tree in found.items()
            for path, leaf in jax.tree.leaves_with_path(tree)
        }

    return evaluate


def derivatives(inputs: Inputs, implementation: str, seed: int = 1) -> Results:
    evaluate = _evaluator(implementation, tuple(sorted(inputs.static.items())))
    t, u = directions(inputs, seed)
    return evaluate(inputs.wrt, inputs.fixed, t, u, inputs.cotangents)


def check(inputs: Inputs, bound: float, seed: int = 1) -> None:
    ours = derivatives(inputs, "blockwise", seed)
    right = derivatives(inputs, "reference", seed)
    for name, x in right.items():
        assert ours[name].dtype == x.dtype, name
        assert_close(ours[name], x, bound, name, relative=True)


# ---------------------------------------------------------------------------- correctness


@pytest.fixture(scope="module")
def small_blocks():
    with blocks_of(8):
        yield


def test_every_option_is_in_a_group():
    assert {name for group in GROUPS for name in group} == set(OPTIONS)


@pytest.mark.parametrize("group", GROUPS, ids="+".join)
def test_all_derivatives_in_float64(small_blocks, group):
    with jax.enable_x64(True):
        case = Case(group, 19, 21, (2,), 4, 2, 4, 3, dtype="float64")
        for seed in range(3):
            check(case.inputs(seed), 1e-9, seed)


@pytest.mark.slow
@hypothesis.settings(max_examples=hypothesis.settings.default.max_examples // 6)
@hypothesis.given(
    options=st.sampled_from(PAIRS),
    lengths=st.sampled_from([(7, 20), (20, 7)]),
    batch=st.sampled_from([(), (2, 1)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_two_options_in_float32(small_blocks, options, lengths, batch, seed):
    case = Case(options, *lengths, batch, heads=2, kv_heads=1, head_dim=4, value_dim=6)
    inputs = case.inputs(seed)
    check(inputs, 1e-4, seed)


def test_bfloat16_is_as_accurate_as_its_precision(small_blocks):
    options = ("causal", "sinks", "soft_cap")
    inputs = Case(options, 20, 20, dtype="bfloat16").inputs()
    ours = derivatives(inputs, "blockwise")
    wide = derivatives(inputs.astype(jnp.float32), "reference")
    for name, x in ours.items():
        assert_close(x, wide[name], 2**-5, name, relative=True)


@pytest.mark.parametrize(
    "forward_mode", [pytest.param(True, marks=pytest.mark.slow), False]
)
def test_check_grads_to_second_order(small_blocks, forward_mode):
    with jax.enable_x64(True):
        group = ("causal", "sinks", "soft_cap", "scale_traced", "alibi", "bias")
        inputs = Case(group, 9, 10, (), 2, 1, 3, 2, dtype="float64").inputs()
        how = dict(implementation="blockwise", forward_mode=forward_mode)
        call = jax.jit(call_of(inputs.fixed, inputs.static, **how))
        modes = ("fwd", "rev") if forward_mode else ("rev",)
        check_grads(call, (inputs.wrt,), order=2, modes=modes, atol=1e-5, rtol=1e-5)


def test_only_what_is_differentiated_gets_a_tangent():
    """jvp and gradients along some arguments only; cotangents of one result only."""
    inputs = Case(("sinks", "bias"), 12, 12).inputs()
    for names in (("value",), ("key", "bias"), ("query", "sinks")):
        t = {n: directions(inputs)[0][n] for n in names}

        def both(implementation, t=t, names=names):
            forward_mode = implementation != "reference"

            def f(x):
                how = dict(implementation=implementation, forward_mode=forward_mode)
                return call_of(inputs.fixed | (inputs.wrt | x), inputs.static, **how)(
                    {}
                )

            x = {n: inputs.wrt[n] for n in names}
            jvp = lambda x: jax.jvp(f, (x,), (t,))[1]  # noqa: E731
            grad = jax.grad(lambda x: (jvp(x)[1] ** 2).sum() + (f(x)[1] ** 2).sum())
            return jvp(x), grad(x)

        run = jax.jit(both, static_argnums=0)
        got, right = run("blockwise"), run("reference")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
            assert_close(a, b, 1e-5, str(names), relative=True)


def test_what_stands_past_a_length_reaches_no_derivative(small_blocks):
    inputs = Case(("query_lengths", "key_lengths"), 19, 21).inputs(3)
    bad = {}
    for name, lengths in (
        ("query", "query_seq_lengths"),
        ("key", "key_value_seq_lengths"),
        ("value", "key_value_seq_lengths"),
    ):
        x = inputs.wrt[name]
        past = jnp.arange(x.shape[1])[None, :] >= inputs.fixed[lengths][:, None]
        bad[name] = jnp.where(past[..., None, None], jnp.nan, x)
    t, _ = directions(inputs)

    def run(x, t):
        call = call_of(
            inputs.fixed, inputs.static, implementation="blockwise", forward_mode=True
        )
        jvp = lambda x: jax.jvp(call, (x,), (t,))[1]  # noqa: E731
        return jvp(x), jax.grad(lambda x: curved(jvp(x), inputs.cotangents))(x)

    got, right = jax.jit(run)(bad, t), jax.jit(run)(inputs.wrt, t)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_third_order_names_the_way_out():
    q = jnp.ones((4, 1, 2))
    f = lambda q: flash_attention(q, q, q, forward_mode=True).sum()  # noqa: E731
    for third in (jax.grad, jax.jacfwd):
        with pytest.raises(NotImplementedError, match="third and higher order"):
            third(lambda q: jax.jvp(jax.grad(f), (q,), (q,))[1].sum())(q)


# -------------------------------------------------------------------------- transformations


def pair(**how: Any) -> tuple[Inputs, Callable[[Tree], Any], Callable[[Tree], Any]]:
    inputs = Case(("causal", "sinks"), 12, 12, (2,), 2, 1, 4, 4).inputs()
    make = functools.partial(call_of, inputs.fixed, inputs.static)
    ours = make(implementation="blockwise", forward_mode=True, **how)
    return inputs, ours, make(implementation="reference")


def assert_trees_close(got: Any, right: Any, bound: float = 1e-5) -> None:
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(right), strict=True
    ):
        assert_close(a, b, bound, jax.tree_util.keystr(path), relative=True)


TRANSFORMED = {
    "linearize": lambda f, x, t: jax.linearize(f, x)[1](t),
    "jacfwd": lambda f, x, t: jax.jacfwd(lambda q: f(x | {"query": q})[0])(x["query"]),
    "jacrev": lambda f, x, t: jax.jacrev(lambda s: f(x | {"sinks": s}))(x["sinks"]),
    "hessian": lambda f, x, t: jax.hessian(lambda s: dot(f(x | {"sinks": s}), f(x)))(
        x["sinks"]
    ),
    "hessian of value": lambda f, x, t: jax.hessian(
        lambda v: (f(x | {"value": v[None, :, None] * t["value"]})[0] ** 2).sum()
    )(x["value"][0, :, 0]),
    "vmap of jvp": lambda f, x, t: jax.vmap(
        lambda t: jax.jvp(f, (x,), (t,))[1], out_axes=1
    )(jax.tree.map(lambda a: jnp.stack([a, 2 * a, a**2]), t)),
    "jvp of vmap": lambda f, x, t: jax.jvp(
        lambda x: jax.vmap(lambda k: f(x | {"key": k}))(
            jnp.stack([x["key"], -x["key"]])
        ),
        (x,),
        (t,),
    )[1],
    "grad of jvp of vmap": lambda f, x, t: jax.grad(
        lambda x: (
            jax.jvp(
                lambda x: jax.vmap(lambda k: f(x | {"key": k})[0])(
                    jnp.stack([x["key"], -x["key"]])
                ),
                (x,),
                (t,),
            )[1]
            ** 2
        ).sum()
    )(x),
    "vmap of grad of jvp": lambda f, x, t: jax.vmap(
        jax.grad(lambda x, t: dot(jax.jvp(f, (x,), (t,))[1], f(x))), in_axes=(None, 0)
    )(x, jax.tree.map(lambda a: jnp.stack([a, a**2]), t)),
    "scan": lambda f, x, t: jax.grad(
        lambda x: (
            jax.jvp(
                lambda q: jax.lax.scan(
                    lambda q, _: (q + f(x | {"query": q})[0], None), q, None, length=2
                )[0],
                (x["query"],),
                (t["query"],),
            )[1]
            ** 2
        ).sum()
    )(x),
    "remat": lambda f, x, t: jax.grad(
        lambda x: dot(jax.jvp(jax.checkpoint(f), (x,), (t,))[1], f(x))
    )(x),
    "grad of remat of grad": lambda f, x, t: jax.grad(
        lambda x: dot(jax.grad(jax.checkpoint(lambda x: dot(f(x), f(x))))(x), t)
    )(x),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations_compose(name):
    inputs, ours, reference = pair()
    t = directions(inputs)[0]
    run = jax.jit(TRANSFORMED[name], static_argnums=0)
    assert_trees_close(run(ours, inputs.wrt, t), run(reference, inputs.wrt, t))


def grad_of_jvp_and_hvp(call: Any, x: Tree, t: Tree) -> Any:
    """Outputs and tangents with the gradients of both, and a Hessian-vector product."""

    def loss(x: Tree) -> Any:
        primal, tangent = jax.jvp(call, (x,), (t,))
        return dot(primal, primal) + dot(tangent, tangent), (primal, tangent)

    def cubic(x: Tree) -> jax.Array:
        return curved(call(x), call(x))

    return jax.grad(loss, has_aux=True)(x), jax.jvp(jax.grad(cubic), (x,), (t,))


@functools.cache
def unsharded() -> tuple[Inputs, Tree, Any, Any]:
    """A call with its inputs, a direction, and the derivatives on one device."""
    inputs = Case(("causal", "sinks", "bias"), 12, 12, (2,), 4, 2, 4, 4).inputs()
    t = directions(inputs)[0]
    call = call_of({}, inputs.static, implementation="blockwise", forward_mode=True)
    right = jax.jit(functools.partial(grad_of_jvp_and_hvp, call))(inputs.wrt, t)
    return inputs, t, call, right


SHARDINGS = {
    "batch": ("auto", P("data")),
    "batch and heads": ("auto", P("data", None, "tensor")),
    "explicit": ("explicit", P("data", None, "tensor")),
    "shard_map": ("manual", P("data", None, "tensor")),
}


@pytest.mark.parametrize("name", SHARDINGS)
def test_sharded_equals_unsharded(name):
    kind, spec = SHARDINGS[name]
    inputs, t, call, right = unsharded()
    types = jax.sharding.AxisType
    axis = types.Explicit if kind == "explicit" else types.Auto
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(axis,) * 2)
    batch, heads = spec[0], spec[2] if len(spec) > 2 else None
    specs = {n: P(batch, None, heads) for n in ("query", "key", "value")}
    specs |= {"sinks": P(heads), "bias": P(batch, heads)}
    if kind == "manual":
        out = P(batch, None, heads)
        call = jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=(out, out))

    def place(tree: Tree) -> Tree:
        at = {n: NamedSharding(mesh, specs[n]) for n in tree}
        return {n: jax.device_put(x, at[n]) for n, x in tree.items()}

    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(grad_of_jvp_and_hvp, call))
        got = run(place(inputs.wrt), place(t))
    assert_trees_close(jax.device_get(got), right, 1e-5)
