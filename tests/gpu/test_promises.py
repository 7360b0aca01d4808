"""What holds of every call on a GPU: same bytes, no copies, graphs, refusals."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    FORCED,
    HOPPER,
    check_command_buffers,
    each_family,
    forward,
    gpu_case,
)
from jax import export

from compare import assert_bitwise_equal
from jax_flash2 import _ffi, flash_attention

DIMS = (64, 128, 256)


def call(q, k, v, family=FORCED, **more):
    return flash_attention(q, k, v, is_causal=True, implementation=family, **more)


def qkv(batch=2, length=300, heads=4, kv_heads=2, head_dim=64):
    case = gpu_case(
        **dict(batch=(batch,), length=length, heads=heads, kv_heads=kv_heads),
        head_dim=head_dim,
    )
    inputs = case.inputs().wrt
    return inputs["query"], inputs["key"], inputs["value"]


# ------------------------------------------------------------------------------ same bytes


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("options", [(), ("causal",), ("segments", "sinks", "alibi")])
@each_family
def test_repeats_give_the_same_bytes(head_dim, options, family):
    case = gpu_case(*options, batch=(8,), heads=16, length=700, head_dim=head_dim)
    inputs = case.inputs()
    want = forward(inputs, family)
    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), a, b))
    for _ in range(300):
        assert all(map(bool, jax.tree.leaves(same(forward(inputs, family), want))))


@each_family
def test_a_sequence_is_the_same_alone_and_in_a_batch(family):
    q, k, v = qkv(batch=9)
    run = jax.jit(functools.partial(call, family=family))
    together = run(q, k, v)
    for b in (0, 4, 8):
        one = slice(b, b + 1)
        alone = run(q[one], k[one], v[one])
        assert_bitwise_equal(alone, together[one])


@each_family
def test_vmap_gives_the_bytes_of_the_elements(family):
    q, k, v = qkv(batch=3)
    run = functools.partial(call, family=family)
    whole = jax.jit(jax.vmap(run))(q, k, v)
    for b in range(3):
        assert_bitwise_equal(jax.jit(run)(q[b], k[b], v[b]), whole[b])


@pytest.mark.parametrize("kind", ["transposed", "sliced", "donated", "packed"])
def test_layouts_give_the_same_bytes(kind):
    q, k, v = qkv()
    want = jax.jit(call)(q, k, v)
    if kind == "transposed":
        swap = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        f = jax.jit(lambda *x: call(*map(swap, x)))
        got = f(*map(swap, (q, k, v)))
    elif kind == "sliced":
        pad = lambda x: jnp.pad(x, ((1, 0), (3, 2), (1, 1), (8, 8)))  # noqa: E731
        cut = lambda x: x[1:, 3:-2, 1:-1, 8:-8]  # noqa: E731
        got = jax.jit(lambda *x: call(*map(cut, x)))(*map(pad, (q, k, v)))
    elif kind == "packed":
        both = jnp.stack([k, v], 2)
        got = jax.jit(lambda q, kv: call(q, kv[:, :, 0], kv[:, :, 1]))(q, both)
    else:
        got = jax.jit(call, donate_argnums=0)(q + 0, k, v)
    assert_bitwise_equal(got, want)


# ------------------------------------------------------------------- what XLA makes of it


def optimised(f, *arrays):
    return jax.jit(f).lower(*arrays).compile().as_text()


@pytest.mark.parametrize("head_dim", [64, 72, 256])
def test_no_copies_of_the_operands(head_dim):
    text = optimised(call, *qkv(head_dim=head_dim))
    assert f'custom_call_target="{_ffi.FORWARD}"' in text
    for word in (" copy(", " transpose(", " broadcast(", " pad(", "fusion("):
        assert word not in text, text


def test_heads_are_not_repeated():
    q, k, v = qkv(heads=8, kv_heads=1)
    text = optimised(call, q, k, v)
    (line,) = [x for x in text.splitlines() if "custom_call_target" in x]
    assert "bf16[2,300,1,64]" in text
    assert "broadcast" not in line


def test_kernels_are_what_runs_without_asking():
    q, k, v = qkv()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = optimised(lambda *x: flash_attention(*x, is_causal=True), q, k, v)
    assert _ffi.FORWARD in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mask": np.ones((300, 300), bool)}, "dense mask"),
        ({"bias": np.ones((300, 300), np.float32)}, "dense bias"),
        ({"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}, "dropout"),
    ],
)
def test_what_the_kernels_lack_warns_once_or_raises(arguments, says, monkeypatch):
    monkeypatch.setattr(_ffi, "_warned", set())
    q, k, v = qkv()
    with pytest.warns(UserWarning, match=says):
        jax.jit(lambda *x: flash_attention(*x, **arguments))(q, k, v)
    with pytest.raises(NotImplementedError, match=says):
        jax.jit(lambda *x: call(*x, **arguments))(q, k, v)


COMMAND_BUFFERS = """
import hashlib, jax, jax.numpy as jnp, sys
from jax_flash2 import flash_attention
@jax.jit
def chain(q, k, v):
    for window in (None, 5, 64, 100, None, 7, 9, 50):
        q = flash_attention(q, k, v, is_causal=True, local_window_size=window,
                            implementation=sys.argv[1])
    return q
ks = jax.random.split(jax.random.key(0), 3)
total = hashlib.sha256()
for i in range(20):
    q, k, v = (jax.random.normal(jax.random.fold_in(x, i), (2, 333, 4, 64), jnp.bfloat16)
               for x in ks)
    total.update(jax.device_get(chain(q, k, v)).tobytes())
print(total.hexdigest())
"""


@each_family
def test_command_buffers_give_the_same_bytes(family):
    check_command_buffers(COMMAND_BUFFERS, family)


@each_family
def test_an_exported_program_serves_any_batch_with_the_same_bytes(family):
    """The backward's workspace then has a symbolic size, too."""
    options = ("causal", "offset", "query_lengths", "key_lengths", "deterministic")

    def step(wrt, fixed, dout):
        def attend(wrt):
            return flash_attention(
                **wrt,
                **fixed,
                is_causal=True,
                implementation=family,
                deterministic_backward=True,
            )

        out, pullback = jax.vjp(attend, wrt)
        return out, *pullback(dout)

    def arguments(batch):
        inputs = gpu_case(*options, batch=(batch,), length=300, head_dim=128).inputs()
        return inputs.wrt, inputs.fixed, inputs.cotangents[0]

    (batch,) = export.symbolic_shape("batch")
    types = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), arguments(2)
    )
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in _ffi.TARGETS]
    run = jax.jit(step)
    exported = export.export(run, disabled_checks=checks)(*types)
    assert all(name in exported.mlir_module() for name in _ffi.TARGETS)
    program = export.deserialize(exported.serialize())
    for batch in (1, 3, 17):
        x = arguments(batch)
        assert_bitwise_equal(program.call(*x), run(*x), f"batch {batch}")


# -------------------------------------------------------------- the handler's own refusals


def handler(q, k, v, *sides, out=None, operands="", workspace=16, **changes):
    batch, length, heads, _ = q.shape
    out = (batch, length, heads, v.shape[-1]) if out is None else out
    attributes = dict(
        operands=operands,
        scale=np.float32(1),
        soft_cap=np.float32(0),
        is_causal=False,
        window_left=np.int32(-1),
        window_right=np.int32(-1),
        chunk_size=np.int32(0),
        family=np.int32(0),
    )
    results = (
        jax.ShapeDtypeStruct(out, q.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        jax.ShapeDtypeStruct((workspace,), jnp.uint8),
    )
    f = jax.ffi.ffi_call(_ffi.FORWARD, results)
    run = jax.jit(lambda *x: f(*x, **(attributes | changes)))
    return jax.block_until_ready(run(q, k, v, *sides))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(dtype=jnp.float32), r"float16 or bfloat16; got F32\[2,300,4,64\]"),
        (dict(head_dim=12), "head_dim"),
        (dict(kv_heads=3), "heads"),
        (
            dict(out=(2, 300, 4, 32)),
            r"out must be \[2,300,4,64\]; got BF16\[2,300,4,32\]",
        ),
        (dict(operands="sinks"), "operand 'sinks' is named but not given"),
        (dict(operands="mystery"), "unknown operand 'mystery'"),
        (dict(operands="sinks", side=(2, 3)), "second axis must be 4"),
        (dict(side=(2,)), "0 optional operands are named; got 1"),
        (dict(chunk_size=np.int32(-1)), "chunk -1"),
    ],
)
def test_handler_refuses_with_the_values(change, says):
    change = dict(change)
    q, k, v = qkv(
        kv_heads=change.pop("kv_heads", 2), head_dim=change.pop("head_dim", 64)
    )
    if dtype := change.pop("dtype", None):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
    sides = []
    if change.get("operands") == "mystery":
        sides = [jnp.zeros((2,), jnp.float32)]
    if shape := change.pop("side", None):
        sides = [jnp.zeros(shape, jnp.float32)]
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*{says}"):
        handler(q, k, v, *sides, **change)


@pytest.mark.skipif(not HOPPER, reason="the other kernels want no workspace")
def test_handler_refuses_a_workspace_that_is_too_small():
    says = r"INVALID_ARGUMENT.*the workspace must hold 16 bytes; got U8\[8\]"
    with pytest.raises(jax.errors.JaxRuntimeError, match=says):
        handler(*qkv(), workspace=8, is_causal=True)
