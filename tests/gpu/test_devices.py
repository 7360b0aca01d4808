"""Meshes of GPUs: batch, heads and length on as many as there are, and a ring of four on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import FAMILIES, each_family, gpu_case
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cases import results
from compare import assert_follow_the_rule, assert_follows_the_rule
from jax_flash2 import (
    _arguments,
    _primitives,
    _ring,
    flash_attention,
    ring_attention,
    unzigzag,
    zigzag,
)
from jax_flash2._passes import BACKWARD, FORWARD
from jax_flash2._sequence import Part, Ring
from jax_flash2._spec import axes_of

# A power of two of them, as far as heads and batch go.
DEVICES = 2 ** min(2, len(jax.local_devices()).bit_length() - 1)
MESH = Mesh(
    np.array(jax.local_devices()[:DEVICES]), ("mesh",), axis_types=(AxisType.Auto,)
)
BATCH, LENGTH = P("mesh"), P(None, "mesh")
OF_TOKENS = ("query", "key", "value", "query_segment_ids", "key_value_segment_ids")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
SHAPE = dict(batch=(4,), heads=8, kv_heads=4, length=640)


def under_jit(at):
    """`flash_attention` of query, key and value that are sharded so."""

    def attend(query, key, value, **options):
        place = functools.partial(
            jax.lax.with_sharding_constraint, shardings=NamedSharding(MESH, at)
        )
        return flash_attention(*map(place, (query, key, value)), **options)

    return attend


def under_shard_map(function, at, order=False):
    """A call whose arrays of tokens are sharded so, all others being whole everywhere."""

    def attend(**arguments):
        arrays = {n: a for n, a in arguments.items() if isinstance(a, jax.Array)}
        static = {n: a for n, a in arguments.items() if n not in arrays}
        if order:
            reorder = functools.partial(zigzag, devices=DEVICES)
            arrays |= {n: reorder(arrays[n]) for n in OF_TOKENS if n in arrays}
        specs = {n: at if n in OF_TOKENS else P() for n in arrays}
        found = jax.shard_map(
            lambda arrays: function(**arrays, **static),
            mesh=MESH,
            in_specs=(specs,),
            out_specs=at,
        )(arrays)
        return jax.tree.map(lambda x: unzigzag(x, DEVICES), found) if order else found

    return attend


RINGS = {
    "in order": under_jit(LENGTH),
    "zigzag": under_shard_map(
        functools.partial(ring_attention, axis_name="mesh", zigzag=True), LENGTH, True
    ),
    "exchange": under_shard_map(
        functools.partial(ring_attention, exchange_axis_name="mesh"), LENGTH
    ),
}


@pytest.mark.parametrize(
    ("options", "head_dim"),
    [
        ((), 64),
        (("causal", "deterministic"), 128),
        (("causal", "prefix", "query_lengths", "key_lengths"), 256),
        (("window", "offset"), 128),
        (("causal", "segments_packed", "soft_cap"), 64),
    ],
)
def test_rings(options, head_dim):
    inputs = gpu_case(*options, **SHAPE, head_dim=head_dim).inputs()
    ours = {
        f"{family} {how}": results(inputs, family, function=function)
        for family in FAMILIES
        for how, function in RINGS.items()
    }
    assert_follow_the_rule(inputs, ours)


@pytest.mark.parametrize("options", [("causal",), ("window", "soft_cap")])
def test_batch_and_heads(options):
    inputs = gpu_case(*options, **SHAPE).inputs()
    functions = {
        "batch": under_jit(BATCH),
        "heads": under_jit(P(None, None, "mesh")),
        "shard_map": under_shard_map(flash_attention, BATCH),
    }
    ours = {
        f"{family} {how}": results(inputs, family, function=function)
        for family in FAMILIES
        for how, function in functions.items()
    }
    assert_follow_the_rule(inputs, ours)
    for function in functions.values():
        run = functools.partial(function, **inputs.static, implementation=FAMILIES[-1])
        text = jax.jit(run).lower(**inputs.wrt).compile().as_text()
        assert "flash2_forward" in text
        assert not [word for word in COLLECTIVES if word in text]


@pytest.mark.parametrize(
    ("options", "order"), [(("causal",), True), (("window", "key_lengths"), False)]
)
@each_family
def test_ring_of_four_on_one_device(options, order, family):
    """The devices are a mapped axis. An offset of the queries makes every hop a whole one,
    without which vmap has no permutation."""
    n = 4
    inputs = gpu_case(*options, "offset", **SHAPE | {"length": 256 * n}).inputs()
    spec, operands = _arguments.settle(
        **inputs.arguments, implementation=family, flags={}, devices=1
    )
    part = Part(n, 256, order)
    ring = Ring(("seq",), (n,), ("seq",), part, part)

    def split(name, x):
        """The devices' parts along a first axis, of what has tokens."""
        letter = next((c for c in axes_of(name) if c in "ls"), None)
        if letter is None:
            return x, None
        axis = 1 + axes_of(name).index(letter)
        x = zigzag(x, n, axis) if order else x
        return jnp.stack(jnp.split(x, n, axis)), 0

    def join(x, axis):
        x = jnp.concatenate(list(x), axis)
        return unzigzag(x, n, axis) if order else x

    def run(pass_, primitive, arrays):
        parts = {k: split(k, a) for k, a in arrays.items() if a is not None}

        def block(spec, arrays):
            return _primitives.bind(primitive, arrays, spec=spec)

        return jax.vmap(
            lambda arrays: _ring.run(pass_, block, spec, arrays, ring),
            in_axes=({k: axis for k, (_, axis) in parts.items()},),
            axis_name="seq",
        )({k: a for k, (a, _) in parts.items()})

    @jax.jit
    def both(operands, dout, dlse):
        arrays = operands._asdict()
        found = run(FORWARD, _primitives.forward_p, arrays)
        out, lse = join(found["out"], 1), join(found["lse"], 2)
        rows = {"out": out, "lse": lse, "dout": dout, "dlse": jnp.swapaxes(dlse, 1, 2)}
        grads = run(BACKWARD, _primitives.backward_p, arrays | rows)
        named = {f"d{k}": join(grads[k], 1) for k in ("query", "key", "value")}
        return named | {"out": out, "lse": jnp.swapaxes(lse, 1, 2)}

    assert_follows_the_rule(inputs, both(operands, *inputs.cotangents), family)
