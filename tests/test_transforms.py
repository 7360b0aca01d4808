"""JAX's transformations of a call: vmap, scan, remat, jit, shard_map, derivatives."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cases import Case, results
from compare import assert_all_close, assert_bitwise_equal, assert_close
from jax_flash2 import flash_attention

blockwise = functools.partial(flash_attention, implementation="blockwise")


pytestmark = pytest.mark.usefixtures("quickly_compiled")


def count(jaxpr, *names):
    """How often primitives occur in a program, inner ones included."""
    counts = collections.Counter()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            counts[equation.primitive.name] += 1
            for leaf in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(leaf, "jaxpr", leaf)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jaxpr.jaxpr)
    return tuple(counts[name] for name in names)


# --------------------------------------------------------------------------------- vmap


class Call:
    """Output, logsumexp and gradients of one call, as a function of its operands."""

    options = ("prefix", "offset", "bias_of_heads", "alibi", "sinks", "scale_traced")
    names = (
        "query",
        "key",
        "value",
        "scale",
        "bias",
        "alibi_slopes",
        "sinks",
        "prefix_lengths",
        "query_offset",
    )

    def __init__(self, batch=(2,)):
        case = Case(self.options, 6, 7, batch, head_dim=4, value_dim=4)
        self.inputs = case.inputs()
        # Three elements of each operand, stacked in front.
        draws = [case.inputs(seed).arguments for seed in range(3)]
        self.stacked = {n: jnp.stack([d[n] for d in draws]) for n in self.names}
        self.one = {n: x[1] for n, x in self.stacked.items()}
        self.cotangents = self.inputs.cotangents

    def __call__(self, operands, cotangents):
        wrt = {
            n: x for n, x in operands.items() if not n.endswith(("offset", "lengths"))
        }
        rest = {n: x for n, x in operands.items() if n not in wrt}

        def call(wrt):
            return blockwise(**wrt, **rest, is_causal=True, return_residual=True)

        (out, lse), pullback = jax.vjp(call, wrt)
        return out, lse, pullback(cotangents)[0]


@pytest.fixture(scope="module")
def call():
    return Call()


@functools.cache
def _jitted(call):
    return jax.jit(call)


def mapped_equals_loop(call, mapped):
    axes = {n: 0 if n in mapped else None for n in call.names}
    operands = {n: (call.stacked if n in mapped else call.one)[n] for n in call.names}
    got = jax.jit(jax.vmap(call, in_axes=(axes, None)))(operands, call.cotangents)
    for e in range(3):
        element = {n: x[e] if n in mapped else x for n, x in operands.items()}
        right = _jitted(call)(element, call.cotangents)
        assert_bitwise_equal(
            jax.tree.map(lambda x, e=e: x[e], got), right, f"element {e}"
        )


SUBSETS = [
    *itertools.chain.from_iterable(
        itertools.combinations(("query", "key", "value"), n) for n in (1, 2, 3)
    ),
    *((name,) for name in Call.names[3:]),
    ("query", "bias", "prefix_lengths"),
    ("key", "scale", "sinks", "query_offset"),
    Call.names,
]


@pytest.mark.parametrize("mapped", SUBSETS, ids="+".join)
def test_vmap_over_operands_equals_the_loop_bitwise(call, mapped):
    mapped_equals_loop(call, mapped)


def test_vmap_over_every_subset_of_operands_adds_one_axis():
    """All 511, by the types of the results alone."""
    call = Call((1,))
    for n in range(1, len(call.names) + 1):
        for mapped in itertools.combinations(call.names, n):
            axes = {n: 0 if n in mapped else None for n in call.names}
            operands = {
                n: (call.stacked if n in mapped else call.one)[n] for n in call.names
            }

            def forward(operands):
                return blockwise(**operands, is_causal=True, return_residual=True)

            types = jax.eval_shape(jax.vmap(forward, in_axes=(axes,)), operands)
            out = (3, *call.one["query"].shape)
            assert [t.shape for t in types] == [out, out[:-1]], mapped


def test_vmap_over_other_axes_equals_the_loop_bitwise():
    inputs = Case(("causal",), 6, 7, (3,)).inputs()
    q, k, v = (inputs.wrt[n] for n in ("query", "key", "value"))
    run = functools.partial(blockwise, is_causal=True, return_residual=True)
    q_last, k_one = jnp.moveaxis(q, 0, -1), jnp.moveaxis(k, 0, 1)
    mapped = jax.vmap(run, in_axes=(-1, 1, 0), out_axes=(2, -1))
    got = mapped(q_last, k_one, v)
    out, lse = run(q, k, v)
    assert_bitwise_equal(got, (jnp.moveaxis(out, 0, 2), jnp.moveaxis(lse, 0, -1)))


def test_nested_vmap_equals_the_loops_bitwise(call):
    inner = jax.vmap(call, in_axes=({n: 0 for n in call.names}, None))
    outer_names = ("query", "bias", "query_offset")
    axes = {n: 0 if n in outer_names else None for n in call.names}
    outer = jax.jit(jax.vmap(inner, in_axes=(axes, None)))
    two = {n: jnp.stack([x, x[::-1]]) if n in outer_names else x
           for n, x in call.stacked.items()}  # fmt: skip
    got = outer(two, call.cotangents)
    for a, b in itertools.product(range(2), range(3)):
        element = {n: x[a, b] if n in outer_names else x[b] for n, x in two.items()}
        right = _jitted(call)(element, call.cotangents)
        assert_bitwise_equal(jax.tree.map(lambda x, a=a, b=b: x[a, b], got), right)


def test_gradient_of_vmap_equals_vmap_of_gradient_summed(call):
    """An unmapped operand's gradient is the sum over the elements."""
    mapped = ("query", "key", "value")
    axes = tuple(0 if n in mapped else None for n in call.names)
    operands = [(call.stacked if n in mapped else call.one)[n] for n in call.names]

    def loss(*operands):
        given = dict(zip(call.names, operands, strict=True))
        return (blockwise(**given, is_causal=True) * call.cotangents[0]).sum()

    def whole(*operands):
        return jax.vmap(loss, in_axes=axes)(*operands).sum()

    wrt = tuple(range(7))
    got = jax.jit(jax.grad(whole, wrt))(*operands)
    each = jax.jit(jax.vmap(jax.grad(loss, wrt), in_axes=axes))(*operands)
    for name, g, e in zip(call.names, got, each, strict=False):
        assert e.shape == (3, *call.one[name].shape), name
        assert_close(g, e if name in mapped else e.sum(0), 1e-5, name, relative=True)


# ------------------------------------------------------------------ scan, remat and jit


def attention_layers(policy, rematerialise=True):
    """A scan over layers, as trainers write it: loss and gradients of the weights."""

    def layer(x, w):
        y = blockwise(x @ w[0], x @ w[1], x @ w[2], is_causal=True)
        return x + y, None

    if rematerialise:
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)

    def loss(weights, x):
        y, _ = jax.lax.scan(layer, x, weights)
        return (y**2).mean()

    return loss


SAVE_BOTH = jax.checkpoint_policies.save_only_these_names("flash2_out", "flash2_lse")


@pytest.mark.parametrize("policy", [None, SAVE_BOTH], ids=["all", "save both"])
def test_scan_over_rematerialised_layers_has_the_same_gradients(policy):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal((3, 3, 8, 8)) * 0.3, jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 9, 4, 8)), jnp.float32)
    got = jax.jit(jax.value_and_grad(attention_layers(policy)))(weights, x)
    right = jax.jit(jax.value_and_grad(attention_layers(None, False)))(weights, x)
    assert_close(got[0], right[0], 1e-6, "loss")
    assert_close(got[1], right[1], 1e-6, "gradient")
    assert np.abs(right[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("names", "forwards"),
    [
        (("flash2_out", "flash2_lse"), 1),
        (("flash2_out",), 2),
        (("flash2_lse",), 2),
        ((), 2),
    ],
)
def test_remat_that_saves_both_names_runs_the_forward_once(names, forwards):
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def block(x, w):
        return blockwise(x @ w, x, x, is_causal=True).sum()

    x, w = jnp.ones((1, 8, 2, 4)), jnp.ones((4, 4))
    gradient = jax.value_and_grad(jax.checkpoint(block, policy=policy), (0, 1))
    # What the backward does not use is not run: remove it as jit would.
    counts = count(
        dead_code_removed(gradient, x, w), "flash2_forward", "flash2_backward"
    )
    assert counts == (forwards, 1)


def dead_code_removed(f, *arguments):
    from jax.interpreters import partial_eval

    closed = jax.make_jaxpr(f)(*arguments)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return closed.replace(jaxpr=jaxpr)


def test_jit_computes_the_same_bytes_as_eager():
    inputs = Case(("causal", "sinks"), 20, 20).inputs()
    run = functools.partial(blockwise, is_causal=True, return_residual=True)
    assert_bitwise_equal(jax.jit(run)(**inputs.wrt), run(**inputs.wrt))


def test_donated_inputs_give_the_same_bytes():
    q, k, v = (Case().inputs().wrt[n] for n in ("query", "key", "value"))
    right = jax.jit(blockwise)(q, k, v)
    donating = jax.jit(blockwise, donate_argnums=(0,))
    copy = q + 0
    assert_bitwise_equal(donating(copy, k, v), right)
    assert copy.is_deleted()


def test_other_values_of_traced_facts_do_not_compile_again():
    inputs = Case(
        (
            "prefix",
            "offset",
            "query_lengths",
            "key_lengths",
            "scale_traced",
            "segments",
        ),
        9,
        9,
    ).inputs()
    traces = []

    @jax.jit
    def run(arrays):
        traces.append(None)
        return blockwise(**arrays, is_causal=True)

    arrays = inputs.wrt | inputs.fixed
    first = run(arrays)
    for name in ("query_offset", "key_value_seq_lengths", "prefix_lengths"):
        run(arrays | {name: arrays[name] + 1})
    other = run(
        arrays | {"scale": arrays["scale"] * 2, "query_offset": jnp.int32([3, -2])}
    )
    assert len(traces) == 1
    assert np.abs(other - first).max() > 1e-3


# ----------------------------------------------------------------------------- shard_map


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layout", ["batch", "heads", "replicated keys"])
def test_shard_map_has_the_values_and_gradients_of_one_device(layout, check_vma):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    case = Case((), 8, 8, (4,), heads=4, kv_heads=4 if layout == "heads" else 1)
    inputs = case.inputs()
    arrays = [inputs.wrt[n] for n in ("query", "key", "value")]
    arrays.append(jnp.linspace(-1.0, 1.0, 4))  # sinks
    split = {"batch": P("x"), "heads": P(None, None, "x"), "replicated keys": P("x")}
    keys = {"batch": P("x"), "heads": P(None, None, "x"), "replicated keys": P()}
    specs = (
        split[layout],
        keys[layout],
        keys[layout],
        P("x" if layout == "heads" else None),
    )
    if layout == "replicated keys":
        arrays[1:3] = [x[:2] for x in arrays[1:3]]
        arrays[1:3] = [x[:1] for x in arrays[1:3]]

    def local(q, k, v, sinks):
        k, v = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])) for x in (k, v))
        return blockwise(q, k, v, sinks=sinks, is_causal=True)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=split[layout], check_vma=check_vma
    )

    def loss(f):
        return jax.value_and_grad(
            lambda *arrays: (f(*arrays) * inputs.cotangents[0]).sum(), (0, 1, 2, 3)
        )

    got, right = jax.jit(loss(sharded))(*arrays), jax.jit(loss(local))(*arrays)
    assert_close(got[0], right[0], 1e-4, "loss")
    for name, g, r in zip("qkvs", got[1], right[1], strict=True):
        assert_close(g, r, 1e-5, f"d{name}", relative=True)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_within_shard_map_sums_what_is_replicated(check_vma):
    """Keys that all devices share: differentiated inside, their gradient is each device's
    (unchecked) or the sum over devices (checked), as for any JAX function."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    inputs = Case((), 6, 6, (2,), heads=2, kv_heads=1, head_dim=4, value_dim=4).inputs()
    q, k, v = (inputs.wrt[n] for n in ("query", "key", "value"))

    def grads(implementation):
        def local(q, k, v):
            def loss(k, v):
                out = flash_attention(q, k, v, implementation=implementation)
                return (out**2).sum()

            dk, dv = jax.grad(loss, (0, 1))(k, v)
            return (dk, dv) if check_vma else jax.lax.psum((dk, dv), "x")

        return jax.jit(
            jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(P("x"), P(), P()),
                out_specs=(P(), P()),
                check_vma=check_vma,
            )
        )(q, k[:1], v[:1])

    for g, r in zip(grads("blockwise"), grads("reference"), strict=True):
        assert_close(g, r, 1e-5, relative=True)


# --------------------------------------------------------------------------- derivatives


def test_merging_two_halves_by_their_logsumexps_equals_the_whole():
    """Values and gradients: what ring attention and z-loss build upon."""
    inputs = Case((), 12, 16).inputs()
    q, k, v = (inputs.wrt[n] for n in ("query", "key", "value"))

    def halves(q, k, v):
        parts = [
            blockwise(q, k[:, s], v[:, s], return_residual=True)
            for s in (slice(0, 5), slice(5, None))
        ]
        lse = jnp.logaddexp(parts[0][1], parts[1][1])
        out = sum(o * jnp.exp(part - lse)[..., None] for o, part in parts)
        return out, lse

    def whole(q, k, v):
        return blockwise(q, k, v, return_residual=True)

    def evaluate(f):
        value, pullback = jax.vjp(f, q, k, v)
        return value, pullback(inputs.cotangents)

    got, right = jax.jit(evaluate, static_argnums=0)(halves), evaluate(whole)
    jax.tree.map(functools.partial(assert_close, bound=1e-5), got, right)


@pytest.mark.parametrize("part", ["out", "lse"])
def test_gradient_through_one_result_alone(part):
    inputs = Case(("causal", "sinks"), 9, 9).inputs()
    which = ("out", "lse").index(part)

    def loss(wrt, implementation):
        both = flash_attention(
            **wrt, is_causal=True, return_residual=True, implementation=implementation
        )
        return (both[which] * inputs.cotangents[which]).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got, right = (gradient(inputs.wrt, i) for i in ("blockwise", "reference"))
    for name in got:
        assert_close(got[name], right[name], 1e-5, name, relative=True)


def test_only_the_gradients_asked_for_are_computed():
    inputs = Case(("bias", "alibi", "scale_traced"), 8, 8).inputs()

    def program(*names):
        def loss(some):
            return blockwise(**inputs.wrt | some).sum()

        return str(jax.make_jaxpr(jax.grad(loss))({n: inputs.wrt[n] for n in names}))

    assert "wrt=()" in program("query")
    assert "wrt=('bias',)" in program("query", "bias")
    assert "wrt=('scale', 'alibi_slopes')" in program("scale", "alibi_slopes")


def test_forward_mode_without_its_argument_is_a_type_error_from_jax():
    x = jnp.ones((4, 2, 8))
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda x: blockwise(x, x, x), (x,), (x,))


def test_reference_has_every_derivative():
    inputs = Case(("causal",), 5, 5, head_dim=4, value_dim=4).inputs()
    run = functools.partial(flash_attention, implementation="reference", is_causal=True)
    tangents = {n: jnp.ones_like(x) for n, x in inputs.wrt.items()}
    jvp = jax.jit(lambda x, t: jax.jvp(lambda wrt: run(**wrt), (x,), (t,)))
    out, tangent = jvp(inputs.wrt, tangents)
    assert out.shape == tangent.shape
    x = inputs.wrt["query"]
    hessian = jax.jit(
        jax.hessian(lambda x: run(**inputs.wrt | {"query": x})[0, -1].sum())
    )(x)
    assert np.isfinite(hessian).all()
    assert np.abs(hessian).max() > 1e-4


def test_results_do_not_depend_on_neighbours_in_the_batch():
    """Batch invariance: an entry alone has the bytes that it has among others."""
    inputs = Case(("causal", "sinks", "key_lengths"), 20, 24, (3,)).inputs()
    batched = results(inputs)
    for e in range(3):

        def entry(x, e=e):
            return x[e : e + 1] if x.ndim and x.shape[0] == 3 else x

        alone = jax.tree.map(entry, (inputs.wrt, inputs.fixed, inputs.cotangents))
        got = results(type(inputs)(alone[0], alone[1], inputs.static, alone[2]))
        for name in ("out", "lse", "dquery", "dkey", "dvalue"):
            assert_bitwise_equal(got[name], batched[name][e : e + 1], name)


def test_arrays_of_another_layout_give_the_same_bytes():
    """Transposed and sliced views, as XLA may hand them over."""
    inputs = Case(("causal",), 9, 9).inputs()
    right = results(inputs)

    @jax.jit
    def run(wide):
        wrt = {n: jnp.swapaxes(x, 1, 2)[:, :9] for n, x in wide.items()}
        (out, lse), pullback = jax.vjp(
            lambda wrt: blockwise(**wrt, is_causal=True, return_residual=True), wrt
        )
        grads = pullback(inputs.cotangents)[0]
        return {"out": out, "lse": lse} | {f"d{n}": g for n, g in grads.items()}

    wide = {
        n: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, 3), (0, 0)))
        for n, x in inputs.wrt.items()
    }
    assert_all_close(run(wide), right, 0.0, 0.0)
