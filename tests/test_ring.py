"""What the ring promises beside equal numbers: balance, masks, accuracy, derivatives,
modules, and words where a layout cannot work."""

import dataclasses
import doctest
import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash2.linen
from jax_flash2 import (
    ContextParallel,
    Flash2Attention,
    _layout,
    _mask,
    _primitives,
    _ring,
    flash_attention,
    ring_attention,
    unzigzag,
    zigzag,
)
from jax_flash2._passes import FORWARD
from jax_flash2._ring import _Where
from jax_flash2._sequence import Part, Ring
from jax_flash2._spec import AttentionSpec, Operands
from test_sharding import AUTO, EXPLICIT, make_mesh, normal

CAUSAL = AttentionSpec(is_causal=True)


pytestmark = pytest.mark.usefixtures("quickly_compiled")


def on_ring(
    mesh: Any, order: bool = False, out: P | None = None, **options: Any
) -> Callable[..., Any]:
    """`ring_attention` of whole arrays over all axes of a mesh; ``order``: zigzag."""
    n, at = mesh.size, P(None, mesh.axis_names)
    call = functools.partial(
        ring_attention, axis_name=mesh.axis_names, zigzag=order, **options
    )
    run = jax.shard_map(
        call, mesh=mesh, in_specs=at, out_specs=at if out is None else out
    )

    def attend(*x: jax.Array) -> Any:
        if not order:
            return run(*x)
        results = run(*(zigzag(a, n) for a in x))
        return jax.tree.map(lambda a: unzigzag(a, n) if a.ndim > 2 else a, results)

    return attend


def arrays(batch: int = 2, length: int = 32, heads: int = 4, kv: int = 2, dim: int = 8):
    shapes = ((heads, dim), (kv, dim), (kv, dim))
    return [normal(i, batch, length, *shape) for i, shape in enumerate(shapes)]


# ------------------------------------------------------------------------ what is visited


def ring(n: int, length: int, order: bool) -> Ring:
    part = Part(n, length // n, order)
    return Ring(("seq",), (n,), ("seq",), part, part)


def block_products(loop: Ring, spec: AttentionSpec, block: int) -> np.ndarray:
    """How many pairs of blocks each device multiplies."""
    products = np.zeros(loop.devices, int)
    for step in loop.plan(spec, False):
        for shift, device in ((s, i) for s in step.shifts for i in range(loop.devices)):
            source = (device - shift.shift) % loop.devices
            for a, b in shift.blocks:
                where = _Where(loop, device, source, a, b, False)
                _, x = where.shift(spec, {"query": np.zeros((1, 1, 1))})
                operands = Operands(query_offset=x["query_offset"])
                lengths = loop.rows.chunk, loop.keys.chunk
                first, end = _mask.key_blocks(
                    spec, operands, 0, lengths, (block, block)
                )
                products[device] += int((end - first).sum())
    return products


def test_zigzag_gives_every_device_the_same_causal_work() -> None:
    products = block_products(ring(8, 8 * 2048, True), CAUSAL, 64)
    assert products.max() <= 1.02 * products.mean()
    in_order = block_products(ring(8, 8 * 2048, False), CAUSAL, 64)
    assert in_order.max() > 1.8 * in_order.mean()
    # Nothing is multiplied twice, nothing left out: the diagonal's blocks are halves.
    assert products.sum() == in_order.sum() == (256 * 257) // 2


def test_a_causal_ring_neither_sends_nor_computes_what_nobody_sees() -> None:
    steps = ring(4, 64, False).plan(CAUSAL, False)
    assert [step.up for step in steps] == [
        ((0, 1), (1, 2), (2, 3)),
        ((1, 2), (2, 3)),
        ((2, 3),),
        (),
    ]
    assert not any(step.down for step in steps)
    assert [step.shifts[0].home for step in steps[1:]] == [
        ((1, 0), (2, 1), (3, 2)),
        ((2, 0), (3, 1)),
        ((3, 0),),
    ]


@pytest.mark.parametrize(
    ("spec", "up", "down"),
    [
        (AttentionSpec(is_causal=True, window=(15, None)), 1, 0),
        (AttentionSpec(is_causal=True, window=(16, None)), 1, 0),
        (AttentionSpec(is_causal=True, window=(17, None)), 2, 0),
        (AttentionSpec(window=(16, 1)), 1, 1),
        (AttentionSpec(window=(0, 33)), 0, 3),
        (AttentionSpec(is_causal=True, chunk_size=16), 0, 0),
        (AttentionSpec(is_causal=True, chunk_size=32), 1, 0),
        (AttentionSpec(), 7, 0),
    ],
)
def test_a_window_visits_the_neighbours_it_reaches(
    spec: AttentionSpec, up: int, down: int
) -> None:
    steps = ring(8, 8 * 16, False).plan(spec, False)
    assert sum(bool(step.up) for step in steps) == up
    assert sum(bool(step.down) for step in steps) == down


def test_zigzag_orders_and_restores_whatever_has_tokens() -> None:
    assert zigzag(jnp.arange(8), 2, axis=0).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    x = normal(0, 3, 48, 2)
    for n in (1, 2, 3, 8):
        np.testing.assert_array_equal(unzigzag(zigzag(x, n), n), x)
    with pytest.raises(ValueError, match="devices = 10; got 48, axis 1"):
        zigzag(x, 5)
    for devices in (0, -1, 2.0):
        message = f"zigzag: devices must be a positive int; got {devices}"
        with pytest.raises(ValueError, match=message):
            zigzag(x, devices)
    with pytest.raises(ValueError, match=r"axis must be one of float32.*; got 3"):
        unzigzag(x, 2, axis=3)


def test_a_hop_is_issued_before_the_block_that_it_may_hide_behind() -> None:
    """And depends on no block, so that nothing keeps the compiler from running both."""
    loop = ring(4, 32, False)
    query, key, value = arrays(length=8)

    def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        def block(spec: AttentionSpec, named: Any) -> Any:
            return _primitives.bind(_primitives.forward_p, named, spec=spec)

        named = {"query": query, "key": key, "value": value}
        return _ring.run(FORWARD, block, CAUSAL, named, loop)["out"]

    jaxpr = jax.make_jaxpr(forward, axis_env=[("seq", 4)])(query, key, value).jaxpr
    order = [e.primitive.name for e in jaxpr.eqns]
    order = [name for name in order if name in ("ppermute", "flash2_forward")]
    hop = ["ppermute", "ppermute", "flash2_forward"]
    assert order == [*hop, *hop, *hop, "flash2_forward"]
    keys = set(jaxpr.invars[1:])
    for e in jaxpr.eqns:
        if e.primitive.name == "ppermute":
            assert set(e.invars) <= keys
            keys |= set(e.outvars)


def test_a_ring_of_one_device_is_the_plain_call() -> None:
    x = arrays()

    def cost(function: Any) -> dict[str, float]:
        compiled = jax.jit(jax.grad(lambda *x: function(*x).sum())).lower(*x).compile()
        assert "collective" not in compiled.as_text()
        found: Any = compiled.cost_analysis()
        return {name: found[name] for name in ("flops", "transcendentals")}

    mesh, at = make_mesh({"seq": 1}), P(None, "seq")
    plain = functools.partial(flash_attention, is_causal=True)
    want = cost(jax.shard_map(plain, mesh=mesh, in_specs=at, out_specs=at))
    for order in (False, True):
        assert cost(on_ring(mesh, order, is_causal=True)) == want


# ------------------------------------------------------------------------------- meaning


def test_dropout_masks_are_bitwise_equal_on_every_mesh() -> None:
    length, dropout = 32, dict(dropout_rate=0.5, dropout_key=jax.random.key(3))
    q = normal(0, 1, length, 8, 8)
    k = jnp.zeros((1, length, 8, 8))
    # With equal scores and unit vectors as values, an output is a row of the mask.
    v = jnp.broadcast_to(jnp.eye(length)[:, None], (1, length, 8, length))
    want = np.asarray(flash_attention(q, k, v, **dropout)) > 0
    assert 0.4 < want.mean() < 0.6
    at = P(None, "seq")
    for n in (1, 2, 4, 8):
        mesh = make_mesh({"seq": n})
        placed = [jax.device_put(a, NamedSharding(mesh, at)) for a in (q, k, v)]
        runs = [functools.partial(flash_attention, **dropout)]
        if n == 4:
            runs.append(on_ring(mesh, order=True, **dropout))
        if n == 8:
            run = functools.partial(ring_attention, exchange_axis_name="seq", **dropout)
            runs.append(jax.shard_map(run, mesh=mesh, in_specs=at, out_specs=at))
        for run in runs:
            got = np.asarray(jax.jit(run)(*placed)) > 0
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("order", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_logsumexp_and_its_gradient_cross_the_ring(order: bool) -> None:
    x, sequence = arrays(), P(None, "seq")
    results = dict(is_causal=True, return_residual=True, return_max_logit=True)
    mesh = make_mesh({"seq": 4})
    out = (sequence, sequence, P())

    def loss(function: Any) -> Any:
        def of(*x: jax.Array) -> Any:
            out, lse, largest = function(*x)
            return (out**2).sum() + jnp.sin(lse).sum(), (out, lse, largest)

        return jax.jit(jax.value_and_grad(of, (0, 1, 2), has_aux=True))(*x)

    want = loss(functools.partial(flash_attention, **results))
    got = loss(on_ring(mesh, order, out, **results))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)]
)
def test_blocks_are_merged_as_accurately_as_the_single_call(dtype: Any) -> None:
    """By the rule for all results: twice the single call's error, and 1e-5."""
    x = [a.astype(dtype) for a in arrays(1, 128, 2, 1, 32)]

    def both(function: Any, *x: jax.Array) -> Any:
        out, vjp = jax.vjp(function, *x)
        return out, *vjp(jnp.ones_like(out) + out)

    plain = functools.partial(flash_attention, is_causal=True)
    exact = functools.partial(plain, implementation="reference")
    want = jax.jit(functools.partial(both, exact))(*(a.astype(jnp.float32) for a in x))
    single = jax.jit(functools.partial(both, plain))(*x)
    for order in (False, True):
        mesh = make_mesh({"seq": 4 if order else 8})
        attend = on_ring(mesh, order, is_causal=True)
        merged = jax.jit(functools.partial(both, attend))(*x)
        for a, b, c in zip(merged, single, want, strict=True):
            errors = [np.abs(np.asarray(y, np.float32) - c).max() for y in (a, b)]
            top = np.abs(c).max()
            ulp = top * float(jnp.finfo(dtype).eps)
            assert errors[0] <= 2 * errors[1] + 1e-5 * max(1, top) + ulp


# --------------------------------------------------------------------------- derivatives


def derivatives(function: Any, forward: Any) -> Any:
    """A loss's Hessian times a vector by grad of grad, and the gradient of a jvp's."""
    x = arrays(length=16)
    t = [normal(i, *a.shape) for i, a in enumerate(x, 5)]

    def loss(*x: jax.Array) -> jax.Array:
        return (function(*x) ** 2).sum()

    def slope(*x: jax.Array) -> jax.Array:
        grads = jax.grad(loss, (0, 1, 2))(*x)
        return sum(
            ((g * d).sum() for g, d in zip(grads, t, strict=True)), jnp.zeros(())
        )

    def speed(*x: jax.Array) -> jax.Array:
        return (jax.jvp(forward, tuple(x), tuple(t))[1] ** 2).sum()

    return [jax.grad(f, (0, 1, 2)) for f in (slope, speed)], x


@pytest.mark.parametrize(
    "kind", ["jit", "ring", pytest.param("zigzag", marks=pytest.mark.slow)]
)
def test_second_order_and_forward_mode_cross_the_ring(kind: str) -> None:
    mesh = make_mesh({"seq": 2})
    options: Any = dict(is_causal=True, logits_soft_cap=3.0)
    plain = functools.partial(flash_attention, **options)
    want, x = derivatives(plain, functools.partial(plain, forward_mode=True))
    if kind == "jit":
        got = want
    else:
        attend = on_ring(mesh, kind == "zigzag", **options)
        forward = on_ring(mesh, kind == "zigzag", forward_mode=True, **options)
        got, _ = derivatives(attend, forward)
    placed = [jax.device_put(a, NamedSharding(mesh, P(None, "seq"))) for a in x]
    for f, g in zip(want, got, strict=True):
        for a, b in zip(jax.jit(g)(*placed), jax.jit(f)(*x), strict=True):
            bound = 1e-5 * max(1.0, float(jnp.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def test_under_vmap_and_remat() -> None:
    mesh = make_mesh({"seq": 2})
    x = [jnp.stack([a, -a]) for a in arrays(length=16)]

    def loss(function: Any) -> Any:
        kept = jax.checkpoint_policies.save_only_these_names("flash2_out", "flash2_lse")
        mapped = jax.vmap(jax.checkpoint(function, policy=kept))
        return jax.jit(jax.grad(lambda *x: (mapped(*x) ** 2).sum(), (0, 1, 2)))(*x)

    want = loss(functools.partial(flash_attention, is_causal=True))
    got = loss(on_ring(mesh, True, is_causal=True))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------- modules

PARALLEL = {
    "ring": ContextParallel(axis_name="seq", batch_axis_name="data"),
    "zigzag, exchange, tensor": ContextParallel(
        axis_name="seq", exchange_axis_name="data", head_axis_name="tensor", zigzag=True
    ),
    "exchange": ContextParallel(exchange_axis_name=("seq", "tensor")),
}
SETTINGS: Any = dict(
    num_heads=4, num_kv_heads=2, rotary=True, is_causal=True, window=(13, 0), sinks=True
)


@pytest.mark.parametrize("name", PARALLEL)
def test_modules_give_the_same_on_several_devices(name: str) -> None:
    mesh = make_mesh({"data": 2, "seq": 2, "tensor": 2})
    parallel = dataclasses.replace(PARALLEL[name], mesh=mesh)
    settings = SETTINGS | dict(dropout_rate=0.2, deterministic=False)
    x, weights = normal(0, 2, 32, 32), normal(1, 2, 32, 32)

    def both(context: ContextParallel | None) -> Any:
        module = Flash2Attention(
            in_features=32,
            decode=False,
            **settings,
            context_parallel=context,
            rngs=nnx.Rngs(0),
        )
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        order = context is not None and context.zigzag

        def loss(params: Any, x: jax.Array) -> jax.Array:
            module = nnx.merge(graph, params, rest)
            y = module(zigzag(x, 2) if order else x, rngs=nnx.Rngs(dropout=3))
            return ((unzigzag(y, 2) if order else y) * weights).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

    want, got = both(None), both(parallel)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        bound = 1e-5 * max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def test_linen_and_set_mesh_and_a_shard_map_of_ones_own() -> None:
    x = normal(0, 2, 32, 32)
    plain = jax_flash2.linen.Flash2Attention(**SETTINGS)
    variables = plain.init(jax.random.key(0), x)
    want = plain.apply(variables, x)
    parallel = ContextParallel(axis_name="seq", zigzag=True)
    module = jax_flash2.linen.Flash2Attention(**SETTINGS, context_parallel=parallel)
    mesh = make_mesh({"seq": 4})
    with jax.set_mesh(mesh):
        got = unzigzag(jax.jit(module.apply)(variables, zigzag(x, 4)), 4)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    at = P(None, "seq")
    body = jax.shard_map(
        lambda x: module.apply(variables, x), mesh=mesh, in_specs=at, out_specs=at
    )
    got = unzigzag(body(zigzag(x, 4)), 4)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


# -------------------------------------------------------------------- what cannot work


def local(message: str, mesh: dict[str, int], x: Any = None, **options: Any) -> None:
    devices = make_mesh(mesh)
    at = P(None, devices.axis_names)
    call = functools.partial(ring_attention, **options)
    run = jax.shard_map(call, mesh=devices, in_specs=at, out_specs=at)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        jax.jit(run).lower(*(arrays() if x is None else x))


def test_the_docstrings_example_runs() -> None:
    assert doctest.testmod(importlib.import_module("jax_flash2.ring")) == (0, 8)


def test_wrong_calls_say_argument_rule_and_value_before_compiling() -> None:
    local(
        r"axis_name must name mesh axes that a jax.shard_map around it makes manual, "
        r"\['seq'\] here; got 'sequence'",
        {"seq": 4},
        axis_name="sequence",
    )
    local(r"name of a mesh axis or a tuple of such; got 3", {"seq": 4}, axis_name=3)
    local(
        r"must not hold axes of axis_name; got \['seq'\] in both",
        {"seq": 4},
        axis_name="seq",
        exchange_axis_name="seq",
    )
    local(
        r"heads must be a multiple of the 8 devices of exchange_axis_name=\('seq',\); got "
        r"float32\[2, 4, 4, 8\]",
        {"seq": 8},
        exchange_axis_name="seq",
    )
    local(
        "an even length on each device of axis_name; got 3 rows of query and 3 of key",
        {"seq": 4},
        arrays(length=12),
        axis_name="seq",
        zigzag=True,
    )
    local("zigzag must be a bool; got 1", {"seq": 4}, axis_name="seq", zigzag=1)
    local(
        "dense and has no ring", {"seq": 2}, axis_name="seq", implementation="reference"
    )
    local(
        r"query_seq_lengths must lie in \[0, 32\]; got \[33\]",
        {"seq": 2},
        axis_name="seq",
        query_seq_lengths=np.array([33, 2]),
    )
    with pytest.raises(ValueError, match=r"makes manual, \[\] here; got 'seq'"):
        ring_attention(*arrays(), "seq")
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        local("is refused", {"seq": 2}, axis_name="seq", causal=True)


def test_modules_say_what_a_layout_lacks() -> None:
    def refused(message: str, x: jax.Array, parallel: Any, **settings: Any) -> None:
        module = jax_flash2.linen.Flash2Attention(
            **SETTINGS | settings, context_parallel=parallel
        )
        variables = None
        if settings.get("decode"):  # the first call only makes the cache
            variables = module.init(jax.random.key(0), x)

        def run() -> None:
            if variables is None:
                module.init(jax.random.key(0), x)
            else:
                module.apply(variables, x[:, :2], mutable=["cache"])

        with pytest.raises((ValueError, NotImplementedError), match=message):
            run()

    x = normal(0, 2, 32, 32)
    mesh = make_mesh({"data": 4, "seq": 2})
    seq = functools.partial(ContextParallel, axis_name="seq", mesh=mesh)
    refused("must be None or a jax_flash2.ContextParallel; got 'seq'", x, "seq")
    refused("axes of its mesh.*here; got 'ring'", x, seq(head_axis_name="ring"))
    refused(
        "zigzag the length must be a multiple of 2 . 2 .*; got 30",
        x[:, 2:],
        seq(zigzag=True),
    )
    refused("query's length must be a multiple of the 2 .*; got 31", x[:, 1:], seq())
    refused(
        r"heads must be a multiple of the 8 .*; got 4",
        x,
        seq(axis_name=(), head_axis_name=("data", "seq")),
    )
    refused(
        "batch must be a multiple of the 4 devices of batch_axis_name",
        x,
        seq(batch_axis_name="data"),
    )
    refused("when decoding", x, seq(), decode=True)
    with pytest.raises(
        ValueError, match=r"axis once; got \['seq'\] again in head_axis"
    ):
        ContextParallel(axis_name="seq", head_axis_name="seq")
    for message, arguments in (
        ("context_parallel: axis_name must be .* got None", {"axis_name": None}),
        ("context_parallel: zigzag must be a bool; got 1", {"zigzag": 1}),
        ("context_parallel: mesh must be None or .* got 'm'", {"mesh": "m"}),
    ):
        with pytest.raises(ValueError, match=message):
            ContextParallel(**arguments)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_lengths_sharded_apart_are_gathered_with_one_warning(kind: Any) -> None:
    mesh = make_mesh({"a": 2, "b": 4}, kind)
    q, k, v = arrays()
    want = flash_attention(q, k, v)
    _layout._warned.clear()
    with jax.set_mesh(mesh):
        by_a, by_b = (NamedSharding(mesh, P(None, axis)) for axis in "ab")
        placed = [jax.device_put(a, s) for a, s in ((q, by_a), (k, by_b), (v, by_b))]
        with pytest.warns(
            UserWarning, match="key's length is sharded over 'b' and is"
        ) as w:
            out = jax.jit(flash_attention)(*placed)
        assert len(w) == 1
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)
        # Rows that the axis does not divide, as in decoding: one row, keys gathered.
        one = jax.device_put(q[:, :1], NamedSharding(mesh, P()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = jax.jit(flash_attention)(one, *placed[1:])
    np.testing.assert_allclose(got, want[:, :1], rtol=0, atol=1e-5)
