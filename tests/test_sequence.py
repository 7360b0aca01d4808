"""One sequence on several devices: the same numbers, and permutes or all-to-alls alone.

Every layout meets every set of options. Which hops a ring may make follows from the dense
mask: keys go no further than to the last device on which anyone sees them.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash2 import flash_attention, ring_attention, unzigzag, zigzag
from test_sharding import AUTO, EXPLICIT, collectives, make_mesh, normal

BATCH, LENGTH, HEADS, DIM = 2, 32, 4, 8
ROWS = ("query", "query_segment_ids", "bias")  # split by rows, the rest by keys
KEYS = ("key", "value", "key_value_segment_ids")
SIDES = ("sinks", "alibi_slopes")
DENSE = ("bias",)


pytestmark = pytest.mark.usefixtures("quickly_compiled")


@dataclasses.dataclass(frozen=True)
class Options:
    """One set of options; ``arrays`` are given beside query, key and value, and those of
    ``sides`` get gradients."""

    kv_heads: int
    static: dict[str, Any]
    arrays: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    sides: tuple[str, ...] = ()


IDS = jnp.broadcast_to(jnp.arange(LENGTH) // 11, (BATCH, LENGTH))
OPTIONS = {
    "causal, gqa": Options(2, {"is_causal": True}),
    "full, soft cap, mqa": Options(1, {"logits_soft_cap": 3.0}),
    "window": Options(HEADS, {"local_window_size": (9, 3)}),
    "causal window, sinks, slopes": Options(
        2,
        {"is_causal": True, "local_window_size": (5, None)},
        {"sinks": normal(4, HEADS), "alibi_slopes": jnp.abs(normal(5, HEADS))},
        ("sinks", "alibi_slopes"),
    ),
    "segments, lengths": Options(
        2,
        {
            "is_causal": True,
            "query_seq_lengths": jnp.array([LENGTH, 17]),
            "key_value_seq_lengths": jnp.array([29, 13]),
        },
        {"query_segment_ids": IDS, "key_value_segment_ids": IDS},
    ),
    "prefix, chunks": Options(
        HEADS,
        {
            "is_causal": True,
            "prefix_lengths": jnp.array([13, 30]),
            "chunk_size": 12,
        },
    ),
    "chunks, segments": Options(
        1,
        {"is_causal": True, "chunk_size": 12},
        {"query_segment_ids": IDS, "key_value_segment_ids": IDS},
    ),
    "dropout": Options(2, {"dropout_rate": 0.2, "dropout_key": jax.random.key(7)}),
    "bias, offset": Options(
        2,
        {"is_causal": True, "query_offset": jnp.array([3, -5])},
        {"bias": normal(3, HEADS, LENGTH, LENGTH)},
        ("bias",),
    ),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arrays of a case lie on a mesh.

    Attributes:
      mesh: axis sizes; ``kind`` their type.
      ring, exchange: the sequence's axes; an exchange needs a shard_map.
      data, tensor: axes of batch and heads.
      kv: whether keys are split too.
      manual: the call is `ring_attention`'s, in a shard_map over these axes.
    """

    mesh: dict[str, int]
    ring: tuple[str, ...] = ()
    exchange: tuple[str, ...] = ()
    data: str | None = None
    tensor: str | None = None
    zigzag: bool = False
    kv: bool = True
    kind: AxisType = AUTO
    manual: tuple[str, ...] = ()
    check_vma: bool = True

    @property
    def devices(self) -> int:
        return math.prod(self.mesh[axis] for axis in self.ring)

    def ways(self, axes: tuple[str | None, ...]) -> int:
        return math.prod(self.mesh[axis] for axis in axes if axis)


def manual(layout: Layout, **changes: Any) -> Layout:
    return dataclasses.replace(layout, manual=tuple(layout.mesh), **changes)


SEQ = Layout({"seq": 4}, ("seq",))
SEQ2 = Layout({"seq": 2}, ("seq",))
SEQ8 = Layout({"seq": 8}, ("seq",))
DATA = Layout({"data": 2, "seq": 4}, ("seq",), data="data")
TENSOR = Layout({"seq": 4, "tensor": 2}, ("seq",), tensor="tensor")
ALL = Layout({"data": 2, "seq": 2, "tensor": 2}, ("seq",), data="data", tensor="tensor")
TWO = Layout({"a": 2, "b": 4}, ("a", "b"))
SWAPPED = Layout({"a": 2, "b": 2}, ("b", "a"))
EXCHANGE = Layout({"seq": 4}, exchange=("seq",))
BOTH = Layout({"ring": 2, "seq": 2}, ("ring",), ("seq",))
LAYOUTS = {
    "auto 2": SEQ2,
    "auto 4": SEQ,
    "auto 8": SEQ8,
    "auto, data": DATA,
    "auto, tensor": TENSOR,
    "auto, data and tensor": ALL,
    "auto, two axes": TWO,
    "auto, two axes in another order": SWAPPED,
    "auto, rows alone": dataclasses.replace(SEQ, kv=False),
    "explicit 4": dataclasses.replace(SEQ, kind=EXPLICIT),
    "explicit, data and tensor": dataclasses.replace(ALL, kind=EXPLICIT),
    "explicit, two axes": dataclasses.replace(TWO, kind=EXPLICIT),
    "explicit, rows alone": dataclasses.replace(SEQ, kv=False, kind=EXPLICIT),
    "ring 4": manual(SEQ),
    "ring 4, unchecked": manual(SEQ, check_vma=False),
    "ring, data and tensor": manual(ALL),
    "ring, data left to the compiler": dataclasses.replace(DATA, manual=("seq",)),
    "ring, two axes": manual(SWAPPED),
    "zigzag 2": manual(SEQ2, zigzag=True),
    "zigzag 4": manual(SEQ, zigzag=True),
    "zigzag 4, unchecked": manual(SEQ, zigzag=True, check_vma=False),
    "zigzag, data and tensor": manual(ALL, zigzag=True),
    "zigzag, two axes": manual(SWAPPED, zigzag=True),
    "exchange 2": manual(Layout({"seq": 2}, exchange=("seq",))),
    "exchange 4": manual(EXCHANGE),
    "exchange, two axes": manual(Layout({"a": 2, "b": 2}, exchange=("a", "b"))),
    "exchange, data and tensor": manual(
        dataclasses.replace(ALL, ring=(), exchange=("seq",))
    ),
    "ring and exchange": manual(BOTH),
    "zigzag and exchange": manual(BOTH, zigzag=True),
    "zigzag and exchange, data": manual(
        Layout(
            {"data": 2, "ring": 2, "seq": 2}, ("ring",), ("seq",), "data", zigzag=True
        )
    ),
}


def meets(layout: Layout, options: Options) -> bool:
    """Inside a shard_map heads are local, and dropout's batch entries and heads.

    Without its checks, what differs is how gradients of shared operands are summed.
    """
    if not layout.check_vma and not (options.sides or options.static.get("is_causal")):
        return False
    if not layout.manual or layout.manual == ("seq",):
        return True
    if options.kv_heads % layout.ways((layout.tensor,)):
        return False
    return not (layout.data or layout.tensor) or "dropout_key" not in options.static


PAIRS = [
    pytest.param(name, other, marks=[pytest.mark.slow] if (i + j) % 4 else [])
    for i, name in enumerate(LAYOUTS)
    for j, other in enumerate(OPTIONS)
    if meets(LAYOUTS[name], OPTIONS[other])
]


def test_every_layout_and_every_option_is_in_a_quick_pair():
    quick = [pair.values for pair in PAIRS if not pair.marks]
    assert {name for name, _ in quick} == set(LAYOUTS)
    assert {name for _, name in quick} == set(OPTIONS)


def arrays(options: Options) -> tuple[dict[str, jax.Array], jax.Array]:
    x = {
        "query": normal(0, BATCH, LENGTH, HEADS, DIM),
        "key": normal(1, BATCH, LENGTH, options.kv_heads, DIM),
        "value": normal(2, BATCH, LENGTH, options.kv_heads, DIM),
    }
    return x | options.arrays, normal(6, BATCH, LENGTH, HEADS, DIM)


def call(function: Any, options: Options, x: dict[str, jax.Array], **more: Any) -> Any:
    static = options.static | more
    rest = {name: a for name, a in x.items() if name not in ("query", "key", "value")}
    return function(x["query"], x["key"], x["value"], **rest, **static)


def gradients(run: Any, options: Options) -> Any:
    """A function of the arrays and the output's cotangent: output and gradients."""
    wanted = ("query", "key", "value", *options.sides)

    def both(x: dict[str, jax.Array], dout: jax.Array) -> Any:
        fixed = {name: a for name, a in x.items() if name not in wanted}
        out, vjp = jax.vjp(lambda w: run(w | fixed), {n: x[n] for n in wanted})
        return out, vjp(dout)[0]

    return both


@functools.lru_cache
def expected(name: str) -> Any:
    """Output and gradients on one device, once per set of options."""
    options = OPTIONS[name]
    x, dout = arrays(options)
    run = functools.partial(call, flash_attention, options)
    return jax.device_get(jax.jit(gradients(run, options))(x, dout))


def specs(layout: Layout, x: dict[str, jax.Array]) -> dict[str, P]:
    sequence = (*layout.ring, *layout.exchange) or None
    keys = sequence if layout.kv else None
    data, tensor = layout.data, layout.tensor
    divided = x["key"].shape[2] % layout.ways((tensor,)) == 0
    at = {
        "query": P(data, sequence, tensor, None),
        "key": P(data, keys, tensor if divided else None, None),
        "query_segment_ids": P(data, sequence),
        "key_value_segment_ids": P(data, keys),
        "bias": P(tensor, sequence, None),
        "sinks": P(tensor),
        "alibi_slopes": P(tensor),
    }
    at["value"] = at["key"]
    return {name: at[name] for name in x}


def in_order(layout: Layout, x: dict[str, Any], back: bool = False) -> dict[str, Any]:
    """Arrays in the order of the layout, or back from it."""
    if not layout.zigzag:
        return x
    order = functools.partial(unzigzag if back else zigzag, devices=layout.devices)
    return {
        name: order(order(a, axis=1), axis=2)
        if name in DENSE
        else a
        if name in SIDES
        else order(a)
        for name, a in x.items()
    }


def ring_traffic(layout: Layout, options: Options) -> tuple[int, int]:
    """How many hops keys make, and how often gradients of them go home."""
    static, n = options.static, layout.devices
    if n == 1 or not layout.kv:
        return 0, 0
    i, j = np.mgrid[:LENGTH, :LENGTH]
    seen = np.full((LENGTH, LENGTH), True)
    if "prefix_lengths" not in static and "query_offset" not in static:
        if static.get("is_causal"):
            seen &= j <= i
        left, right = static.get("local_window_size", (None, None))
        seen &= (left is None or j >= i - left) & (
            right is None or j <= i + (right or 0)
        )
        if "chunk_size" in static:
            seen &= i // static["chunk_size"] == j // static["chunk_size"]
    tokens = np.arange(LENGTH)
    if layout.zigzag:
        tokens = np.asarray(zigzag(tokens, n, axis=0))
    parts = tokens.reshape(n, -1)
    pairs = itertools.product(range(n), repeat=2)
    shifts = {(a - b) % n for a, b in pairs if seen[np.ix_(parts[a], parts[b])].any()}
    shifts -= {0}
    hops = min(
        up + max((n - s for s in shifts if s > up), default=0) for up in range(n)
    )
    return hops, len(shifts)


def check_communication(
    layout: Layout, options: Options, x: dict[str, jax.Array], text: str, backward: bool
) -> None:
    """The collectives of optimised HLO are the expected ones, to the element."""
    found = collectives(text)
    split = layout.ways((layout.data,))
    elements = {n: a.size // split for n, a in x.items() if n not in (*SIDES, *DENSE)}
    tensor, sequence = layout.ways((layout.tensor,)), layout.ways(layout.exchange)
    for name in ("query", "key", "value"):
        heads = x[name].shape[2]
        elements[name] //= tensor if heads % tensor == 0 else 1
    kv_heads = max(1, options.kv_heads // tensor)
    keys = [name for name in KEYS if name in x]
    grads = [name for name in keys if name in ("key", "value")]

    # Permutes: this ring's part of the keys, which an exchange has made longer.
    hops, homes = ring_traffic(layout, options)
    heads = HEADS // tensor // sequence
    needed = max(1, heads * kv_heads * tensor // HEADS) if sequence > 1 else kv_heads
    size = {n: elements[n] // layout.devices for n in keys}
    for name in grads:
        size[name] = size[name] * needed // kv_heads
    forward = hops * sum(size.values())
    permutes = forward
    if backward:
        permutes += forward + homes * sum(size[name] for name in grads)
    got = found.pop("collective-permute", 0)
    old = jax.__version_info__ < (0, 11) and layout.kind == EXPLICIT
    old |= jax.__version_info__ < (0, 11) and bool(layout.manual)
    # XLA of jax 0.10 takes the backward's hops from the forward.
    assert got == permutes or (old and backward and got == permutes - forward)

    # All-to-alls: query, key, value and output there and back; a key head goes to all
    # that need it. Ids and rows of a dense array are made longer by a gather.
    if layout.exchange:
        copies = needed * sequence / kv_heads
        local = layout.devices * sequence
        moved = 2 * elements["query"] / local
        moved += copies * sum(elements[name] for name in grads) / local
        if "bias" in x:
            moved += x["bias"].size / local / tensor
        assert found.pop("all-to-all") == moved * (1 + backward)
        ids = sum(a.size for name, a in x.items() if name.endswith("segment_ids"))
        assert found.pop("all-gather", 0) == ids // split // layout.devices

    if layout.manual == ("seq",):  # the rest is the compiler's
        return
    # Sums of gradients of what several devices share; a sink's come from each sequence.
    sums = 0
    if backward:
        sums = sum(BATCH * x[name].size for name in options.sides if name in SIDES)
        if "bias" in x and layout.data:
            sums += x["bias"].size
        if not layout.kv:
            sums += sum(elements[name] for name in grads)
        if options.kv_heads % tensor:
            sums += sum(elements[name] // layout.devices for name in grads)
    if not sums:
        assert found == {}
    else:
        assert set(found) == {"all-reduce"}
        assert found["all-reduce"] <= sums


@pytest.mark.parametrize(("layout_name", "options_name"), PAIRS)
def test_sequence_on_several_devices_equals_one(
    layout_name: str, options_name: str
) -> None:
    layout, options = LAYOUTS[layout_name], OPTIONS[options_name]
    mesh = make_mesh(layout.mesh, layout.kind)
    x, dout = arrays(options)
    at = specs(layout, x)

    def run(x: dict[str, jax.Array]) -> jax.Array:
        if not layout.manual:
            return call(flash_attention, options, x)
        # Lengths and so on come from outside, with a part of the batch each.
        batched = {
            name: a
            for name, a in options.static.items()
            if isinstance(a, jax.Array) and a.shape == (BATCH,)
        }

        def body(x: dict[str, jax.Array], batched: dict[str, jax.Array]) -> jax.Array:
            more = dict(exchange_axis_name=layout.exchange, zigzag=layout.zigzag)
            return call(
                ring_attention, options, x, axis_name=layout.ring, **more, **batched
            )

        def only_manual(spec: P) -> P:
            return P(
                *(None if e not in (*layout.manual, sequence) else e for e in spec)
            )

        sequence = (*layout.ring, *layout.exchange)
        return jax.shard_map(
            body,
            mesh=mesh,
            axis_names=set(layout.manual),
            in_specs=(
                {name: only_manual(spec) for name, spec in at.items()},
                {name: only_manual(P(layout.data)) for name in batched},
            ),
            out_specs=only_manual(at["query"]),
            check_vma=layout.check_vma,
        )(x, batched)

    placed = {
        name: jax.device_put(a, NamedSharding(mesh, at[name]))
        for name, a in in_order(layout, x).items()
    }
    query_at = NamedSharding(mesh, at["query"])
    dout = jax.device_put(in_order(layout, {"out": dout})["out"], query_at)
    both = gradients(run, options)
    wanted = ("query", "key", "value", *options.sides)
    shardings = {n: NamedSharding(mesh, at[n]) for n in wanted}
    with jax.set_mesh(mesh):
        jitted = jax.jit(both, out_shardings=(query_at, shardings))
        compiled = jitted.lower(placed, dout).compile()
        check_communication(layout, options, x, compiled.as_text(), True)
        if options_name == next(iter(OPTIONS)):
            forward = jax.jit(run).lower(placed).compile().as_text()
            check_communication(layout, options, x, forward, False)
        out, grads = jax.device_get(compiled(placed, dout))

    got = in_order(layout, {"out": out} | grads, back=True)
    want_out, want = expected(options_name)
    for name, a in ({"out": want_out} | want).items():
        bound = 1e-5 * max(1.0, float(np.abs(a).max()))
        np.testing.assert_allclose(got[name], a, rtol=0, atol=bound, err_msg=name)
