"""Sharded over batch and heads: the same numbers, and no communication.

Every layout meets every set of options. What the compiled program communicates is read
off its optimised HLO, and must be exactly the gradient sums of operands that are the
same on several devices: not one gather, in no disguise.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash2 import flash_attention

BATCH, LENGTH, HEADS, DIM = 8, 32, 8, 8
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def make_mesh(shape: dict[str, int], kind: AxisType = AUTO) -> Mesh:
    devices = np.array(jax.devices()[: math.prod(shape.values())])
    kinds = (kind,) * len(shape)
    return Mesh(devices.reshape(*shape.values()), tuple(shape), axis_types=kinds)


pytestmark = pytest.mark.usefixtures("quickly_compiled")


@dataclasses.dataclass(frozen=True)
class Options:
    """One set of options; arrays in ``sides`` get gradients."""

    kv_heads: int
    static: dict[str, Any]
    sides: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


OPTIONS = {
    "causal": Options(HEADS, {"is_causal": True}),
    "window, gqa 4": Options(4, {"local_window_size": (9, 3)}),
    "segments, lengths, gqa 2": Options(
        2,
        {
            "is_causal": True,
            "query_segment_ids": jnp.arange(LENGTH) // 11,
            "key_value_seq_lengths": jnp.arange(BATCH, dtype=jnp.int32) + 20,
        },
    ),
    "bias, sinks, slopes": Options(
        4,
        {},
        {
            "bias": normal(3, HEADS, LENGTH, LENGTH),
            "sinks": normal(4, HEADS),
            "alibi_slopes": jnp.abs(normal(5, HEADS)),
        },
    ),
    "dropout, mqa": Options(1, {"dropout_rate": 0.2, "dropout_key": jax.random.key(7)}),
}


def attend(options: Options, x: dict[str, jax.Array]) -> jax.Array:
    sides = {name: x[name] for name in options.sides}
    return flash_attention(x["query"], x["key"], x["value"], **sides, **options.static)


def arrays(options: Options) -> tuple[dict[str, jax.Array], jax.Array]:
    x = {
        "query": normal(0, BATCH, LENGTH, HEADS, DIM),
        "key": normal(1, BATCH, LENGTH, options.kv_heads, DIM),
        "value": normal(2, BATCH, LENGTH, options.kv_heads, DIM),
    }
    return x | options.sides, normal(6, BATCH, LENGTH, HEADS, DIM)


_expected: dict[str, Any] = {}


def expected(name: str) -> Any:
    """Output and gradients on one device, once per set of options."""
    if name not in _expected:
        options = OPTIONS[name]
        x, dout = arrays(options)
        out, vjp = jax.vjp(lambda x: attend(options, x), x)
        _expected[name] = jax.device_get((out, vjp(dout)[0]))
    return _expected[name]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arrays of one case lie on a mesh.

    Attributes:
      mesh: axis sizes; ``kind`` their type.
      query, kv: specs; ``kv`` holds where the key heads divide the last axis's size.
      manual: names of the axes of a `jax.shard_map` around the call.
    """

    mesh: dict[str, int]
    query: P
    kv: P
    kind: AxisType = AUTO
    manual: tuple[str, ...] = ()
    check_vma: bool = True
    use_set_mesh: bool = False


GRID = {"data": 2, "tensor": 4}
BOTH = P("data", None, "tensor", None)
DATA = P("data", None, None, None)
NONE = P(None, None, None, None)
TENSOR = P(None, None, "tensor", None)
LAYOUTS = {
    "replicated": Layout(GRID, NONE, NONE),
    "data": Layout(GRID, DATA, DATA),
    "tensor": Layout(GRID, TENSOR, TENSOR),
    "data x tensor": Layout(GRID, BOTH, BOTH),
    "data x tensor, kv heads replicated": Layout(GRID, BOTH, DATA),
    "data x tensor, kv replicated": Layout(GRID, BOTH, NONE),
    "batch over two axes": Layout(
        {"data": 2, "fsdp": 4}, P(("data", "fsdp")), P(("data", "fsdp"))
    ),
    "heads over two axes": Layout(
        {"data": 2, "x": 2, "tensor": 2},
        P("data", None, ("x", "tensor"), None),
        P("data", None, ("x", "tensor"), None),
    ),
    "data x fsdp x tensor": Layout(
        {"data": 2, "fsdp": 2, "tensor": 2},
        P(("data", "fsdp"), None, "tensor", None),
        P(("data", "fsdp"), None, "tensor", None),
    ),
    "set_mesh": Layout(GRID, BOTH, BOTH, use_set_mesh=True),
    "explicit data": Layout(GRID, DATA, DATA, EXPLICIT),
    "explicit data x tensor": Layout(GRID, BOTH, BOTH, EXPLICIT),
    "explicit, kv heads replicated": Layout(GRID, BOTH, DATA, EXPLICIT),
    "shard_map": Layout(GRID, BOTH, BOTH, manual=("data", "tensor")),
    "shard_map, unchecked": Layout(
        GRID, BOTH, BOTH, manual=("data", "tensor"), check_vma=False
    ),
    "shard_map over data": Layout(GRID, BOTH, BOTH, manual=("data",)),
    "shard_map over data, unchecked": Layout(
        GRID, BOTH, BOTH, manual=("data",), check_vma=False
    ),
}


def ways(spec: P, mesh: Mesh, axis: int) -> int:
    entry = spec[axis] if axis < len(spec) else None
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh.shape[name] for name in names)


def specs(layout: Layout, options: Options, mesh: Mesh) -> dict[str, P]:
    """The specs of all operands: key heads stay whole where they cannot be divided."""
    kv = layout.kv
    if options.kv_heads % ways(kv, mesh, 2):
        kv = P(*kv[:2], None, None)
    result = {"query": layout.query, "key": kv, "value": kv}
    # Sides lie as the heads do, so that their gradients are summed over batch alone.
    heads = layout.query[2] if len(layout.query) > 2 else None
    result |= {
        "bias": P(heads, None, None),
        "sinks": P(heads),
        "alibi_slopes": P(heads),
    }
    return {name: result[name] for name in ("query", "key", "value", *options.sides)}


def collectives(text: str) -> dict[str, int]:
    """Elements that each kind of collective yields on one device, from optimised HLO."""
    found: dict[str, int] = {}
    pattern = rf"= (\([^=\n]*\)|[^ =\n]*) ({COLLECTIVES})(?:-start)?\("
    for result, kind in re.findall(pattern, text):
        sizes = re.findall(r"\w+\[([\d,]*)\]", result)
        total = sum(math.prod(int(n) for n in s.split(",") if n) for s in sizes)
        found[kind] = found.get(kind, 0) + total
    return found


def check_communication(
    found: dict[str, int], x: dict[str, jax.Array], at: dict[str, P], mesh: Mesh
) -> None:
    """Only gradients of operands that are whole where the call is split may travel.

    Those without batch entries of their own are sums: all-reduces of just their size.
    Key and value that are replicated where the query is split get their gradient back
    on every device: sums, or parts put together, of no more than that gradient's size.
    """

    def names(entry: Any) -> set[str]:
        if entry is None:
            return set()
        return set(entry) if isinstance(entry, tuple) else {entry}

    used = {n for entry in at["query"] for n in names(entry)}
    sums = bound = 0
    for name, a in x.items():
        if used <= {n for entry in at[name] for n in names(entry)}:
            continue
        local = math.prod(n // ways(at[name], mesh, i) for i, n in enumerate(a.shape))
        if name in ("key", "value"):
            bound += local
        else:
            sums += local
    if not bound:
        assert found == ({"all-reduce": sums} if sums else {})
    else:
        assert set(found) <= {"all-reduce", "all-gather"}
        assert sums < sum(found.values()) <= sums + 2 * bound


def meets(layout: Layout, options: Options) -> bool:
    """Inside a shard_map a call is local: dropout's indices are, and so are groups."""
    if not layout.manual:
        return True
    kv_shards = 4 if "tensor" in layout.manual else 1
    return "dropout_key" not in options.static and options.kv_heads % kv_shards == 0


PAIRS = [
    pytest.param(name, other, marks=[pytest.mark.slow] if (i + j) % 2 else [])
    for i, name in enumerate(LAYOUTS)
    for j, other in enumerate(OPTIONS)
    if meets(LAYOUTS[name], OPTIONS[other])
]


def test_every_layout_and_every_option_is_in_a_quick_pair():
    quick = [pair.values for pair in PAIRS if not pair.marks]
    assert {name for name, _ in quick} == set(LAYOUTS)
    assert {name for _, name in quick} == set(OPTIONS)


@pytest.mark.parametrize(("layout_name", "options_name"), PAIRS)
def test_sharded_equals_unsharded_and_communicates_only_gradient_sums(
    layout_name: str, options_name: str
) -> None:
    layout, options = LAYOUTS[layout_name], OPTIONS[options_name]
    mesh = make_mesh(layout.mesh, layout.kind)
    x, dout = arrays(options)
    at = specs(layout, options, mesh)

    def call(x: dict[str, jax.Array], static: dict[str, Any]) -> jax.Array:
        return attend(dataclasses.replace(options, static=static), x)

    static = dict(options.static)
    if layout.manual:

        def only_manual(spec: P) -> P:
            return P(*(e if e in layout.manual else None for e in spec))

        lengths = static.pop("key_value_seq_lengths", None)
        traced = {} if lengths is None else {"key_value_seq_lengths": lengths}
        inner = jax.shard_map(
            lambda x, traced: call(x, static | traced),
            mesh=mesh,
            axis_names=set(layout.manual),
            in_specs=(
                {name: only_manual(spec) for name, spec in at.items()},
                {name: P("data") for name in traced},
            ),
            out_specs=only_manual(at["query"]),
            check_vma=layout.check_vma,
        )

        def run(x: dict[str, jax.Array]) -> jax.Array:
            return inner(x, traced)

    else:

        def run(x: dict[str, jax.Array]) -> jax.Array:
            return call(x, static)

    def both(x: Any, dout: Any) -> Any:
        out, vjp = jax.vjp(run, x)
        return out, vjp(dout)[0]

    placed = {n: jax.device_put(a, NamedSharding(mesh, at[n])) for n, a in x.items()}
    dout = jax.device_put(dout, NamedSharding(mesh, at["query"]))
    # Gradients stay as their operands are: what is asked of every trainer.
    shardings = {n: NamedSharding(mesh, at[n]) for n in placed}
    out_sharding = NamedSharding(mesh, at["query"])
    jitted = jax.jit(both, out_shardings=(out_sharding, shardings))
    if layout.kind == EXPLICIT or layout.use_set_mesh:
        with jax.set_mesh(mesh):
            compiled = jitted.lower(placed, dout).compile()
            forward = jax.jit(run).lower(placed).compile()
    else:
        compiled = jitted.lower(placed, dout).compile()
        forward = jax.jit(run).lower(placed).compile()
    assert collectives(forward.as_text()) == {}
    check_communication(collectives(compiled.as_text()), x, at, mesh)

    out, grads = jax.device_get(compiled(placed, dout))
    want_out, want = expected(options_name)
    np.testing.assert_allclose(out, want_out, rtol=0, atol=1e-5)
    for name, g in grads.items():
        bound = 1e-5 * max(1.0, float(np.abs(want[name]).max()))
        np.testing.assert_allclose(g, want[name], rtol=0, atol=bound, err_msg=name)


def test_dropout_mask_is_the_same_on_every_mesh() -> None:
    q = normal(0, BATCH, LENGTH, HEADS, DIM)
    k = jnp.zeros((BATCH, LENGTH, HEADS, DIM))  # equal scores: the mask alone decides
    v = normal(2, BATCH, LENGTH, HEADS, DIM)
    key = jax.random.key(3)

    @jax.jit
    def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return flash_attention(q, k, v, dropout_rate=0.5, dropout_key=key)

    want = np.asarray(f(q, k, v))
    for shape in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (1, 8)):
        mesh = make_mesh(dict(zip(("data", "tensor"), shape, strict=True)))
        placed = [jax.device_put(a, NamedSharding(mesh, BOTH)) for a in (q, k, v)]
        np.testing.assert_array_equal(np.asarray(f(*placed)), want)


def test_eager_calls_on_sharded_arrays_work() -> None:
    mesh = make_mesh(GRID)
    options = OPTIONS["causal"]
    x, _ = arrays(options)
    placed = {n: jax.device_put(a, NamedSharding(mesh, BOTH)) for n, a in x.items()}
    out = attend(options, placed)
    np.testing.assert_allclose(out, expected("causal")[0], rtol=0, atol=1e-5)


def test_a_loss_that_replicates_the_cotangent_needs_no_gather() -> None:
    """The cotangent of sum() is a broadcast scalar, with no sharding of its own."""
    mesh = make_mesh(GRID)
    options = OPTIONS["causal"]
    x, _ = arrays(options)
    placed = {n: jax.device_put(a, NamedSharding(mesh, BOTH)) for n, a in x.items()}
    grad = jax.jit(jax.grad(lambda x: attend(options, x).sum()))
    compiled = grad.lower(placed).compile()
    assert collectives(compiled.as_text()) == {}
    want = jax.grad(lambda x: attend(options, x).sum())(x)
    for name, g in compiled(placed).items():
        np.testing.assert_allclose(g, want[name], rtol=0, atol=1e-5)


def test_scan_over_rematerialised_layers_trains_under_fsdp() -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    policy = jax.checkpoint_policies.save_only_these_names("flash2_out", "flash2_lse")
    width = HEADS * DIM

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        q = (x @ w).reshape(BATCH, LENGTH, HEADS, DIM)
        out = flash_attention(q, q, q, is_causal=True)
        return x + out.reshape(BATCH, LENGTH, width), None

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(layer, policy=policy), x, w)[0].var()

    w, x = normal(0, 3, width, width) / 8, normal(1, BATCH, LENGTH, width)
    want = jax.value_and_grad(loss)(w, x)
    placed_w = jax.device_put(w, NamedSharding(mesh, P(None, "fsdp", "tensor")))
    placed_x = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
    got = jax.jit(jax.value_and_grad(loss))(placed_w, placed_x)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("query", "kv", "message"),
    [
        (
            P("data", None, None, "tensor"),
            DATA,
            r"query's head_dim must not be sharded; got P\('data', None, None, 'tensor'\)",
        ),
        (
            DATA,
            P("tensor", None, None, None),
            r"key's axis 0 must be sharded over 'data', as query's, or not at all; got "
            r"P\('tensor'",
        ),
    ],
)
def test_explicit_types_that_cannot_work_raise_before_compiling(
    query: P, kv: P, message: str
) -> None:
    mesh = make_mesh(GRID, EXPLICIT)
    x, _ = arrays(OPTIONS["causal"])
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x["query"], query)]
        placed += [jax.device_put(x[name], kv) for name in ("key", "value")]
        with pytest.raises(ValueError, match=message):
            jax.jit(flash_attention).lower(*placed)


def test_without_shardy_the_setting_is_named() -> None:
    mesh = make_mesh(GRID)
    x, _ = arrays(OPTIONS["causal"])
    placed = [jax.device_put(a, NamedSharding(mesh, BOTH)) for a in x.values()]
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        with pytest.raises(ValueError, match="jax_use_shardy_partitioner must be True"):
            jax.jit(flash_attention).lower(*placed)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
