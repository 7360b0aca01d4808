"""Programs outlive the process: `jax.export`, and the persistent compilation cache."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash2
from cases import Case
from compare import assert_bitwise_equal
from jax_flash2 import _ffi, flash_attention

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def step(implementation):
    def loss(wrt, fixed):
        out = flash_attention(
            **wrt, **fixed, is_causal=True, implementation=implementation
        )
        return (out.astype(jnp.float32) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("implementation", ["blockwise", None])
def test_exported_training_step_comes_back_with_the_same_bytes(implementation):
    inputs = Case(("prefix", "offset", "sinks"), 20, 20).inputs()
    arguments = (inputs.wrt, inputs.fixed)
    run = step(implementation)
    data = export.export(run)(*arguments).serialize()
    assert_bitwise_equal(export.deserialize(data).call(*arguments), run(*arguments))


def test_export_for_cuda_from_a_cpu_blockwise():
    inputs = Case(("causal",), 20, 20, dtype="bfloat16").inputs()
    exported = export.export(step("blockwise"), platforms=["cuda"])(inputs.wrt, {})
    assert exported.platforms == ("cuda",)
    assert export.deserialize(exported.serialize()).platforms == ("cuda",)
    assert 'custom_call_target = "flash2' not in exported.mlir_module()


def test_export_for_cuda_from_a_cpu_takes_the_kernels(monkeypatch):
    """With the check that JAX has for custom calls of others named and switched off."""
    monkeypatch.setattr(_ffi, "_warned", set())
    x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in _ffi.TARGETS]
    warns = pytest.warns(UserWarning, match="runs in plain JAX on this GPU")
    with contextlib.nullcontext() if _ffi.available() else warns:
        exported = export.export(
            jax.jit(lambda x: flash_attention(x, x, x)),
            platforms=["cuda"],
            disabled_checks=checks,
        )(x)
    calls = [name for name in _ffi.TARGETS if name in exported.mlir_module()]
    assert calls == ([_ffi.FORWARD] if _ffi.available() else [])
    assert export.deserialize(exported.serialize()).platforms == ("cuda",)


def test_one_program_for_two_platforms():
    x = jnp.ones((1, 16, 2, 8))
    run = jax.jit(lambda x: flash_attention(x, x, x, implementation="blockwise"))
    exported = export.export(run, platforms=["cpu", "cuda"])(x)
    assert_bitwise_equal(exported.call(x), run(x))


# What a symbolic shape can meet: entries summed apart, facts of a batch entry, loops over
# blocks that masks bound, and rows and columns past the last whole block.
MANY = (
    *("prefix", "offset", "window", "chunk", "key_lengths"),
    *("bias_of_heads", "alibi", "sinks", "dropout"),
)


def symbolic(inputs, batch, length):
    """Types of the arrays, where the sizes 3 and 20 are the batch's and the length's."""
    names = {3: batch, 20: length}

    def type_of(x):
        return jax.ShapeDtypeStruct([names.get(n, n) for n in x.shape], x.dtype)

    return jax.tree.map(type_of, (inputs.wrt, inputs.fixed))


def training_step(static, **more):
    def loss(wrt, fixed):
        options = static | more
        out, lse = flash_attention(**wrt, **fixed, **options, return_residual=True)
        return (out**2).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "cuda"]])
@pytest.mark.parametrize("shape", ["batch, 20", "batch, length"])
def test_exported_training_step_takes_any_size_of_a_symbol(shape, platforms):
    case = Case(MANY, 20, 20, batch=(3,))
    inputs = case.inputs()
    fixed = {n: a for n, a in inputs.fixed.items() if n != "dropout_key"}
    inputs = dataclasses.replace(inputs, fixed=fixed)
    key = {"dropout_key": jax.random.key(3)}
    run = training_step(inputs.static | key, implementation="blockwise")
    types = symbolic(inputs, *export.symbolic_shape(shape))
    data = export.export(run, platforms=platforms)(*types).serialize()
    arguments = (inputs.wrt, inputs.fixed)
    found, expected = export.deserialize(data).call(*arguments), run(*arguments)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5),
        found,
        expected,
    )


def test_symbolic_length_longer_than_a_block():
    run = jax.jit(lambda x: flash_attention(x, x, x, is_causal=True))
    (length,) = export.symbolic_shape("length")
    exported = export.export(run)(jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32))
    x = jax.random.normal(jax.random.key(0), (1, 1100, 1, 8))
    np.testing.assert_allclose(exported.call(x), run(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("what", ["derivative", "vmap", "vmap_keys", "reference"])
def test_symbolic_batch_under_other_transformations(what):
    def attend(q, k, v, **options):
        return flash_attention(q, k, v, is_causal=True, **options)

    def derivative(q, k, v):
        def loss(q):
            return (attend(q, k, v, forward_mode=True) ** 2).sum()

        return jax.jvp(jax.grad(loss), (q,), (q,))[1]

    function = {
        "derivative": derivative,
        "vmap": jax.vmap(attend, in_axes=(0, 0, None)),
        "vmap_keys": jax.vmap(attend, in_axes=(None, 0, 0)),
        "reference": functools.partial(attend, implementation="reference"),
    }[what]
    shapes = {"q": (20, 4, 16), "k": (20, 2, 16), "v": (20, 2, 16)}
    whole = {"vmap": "v", "vmap_keys": "q"}.get(what, "")
    (batch,) = export.symbolic_shape("batch")
    types = [
        jax.ShapeDtypeStruct(s if name in whole else (batch, *s), jnp.float32)
        for name, s in shapes.items()
    ]
    x = [
        jax.random.normal(jax.random.key(i), s if name in whole else (3, *s))
        for i, (name, s) in enumerate(shapes.items())
    ]
    found = export.export(jax.jit(function))(*types).call(*x)
    np.testing.assert_allclose(found, function(*x), rtol=2e-5, atol=2e-5)


def test_lengths_that_a_symbolic_length_cannot_judge_are_taken():
    (length,) = export.symbolic_shape("length")
    lengths = np.array([3], np.int32)
    run = jax.jit(lambda x: flash_attention(x, x, x, key_value_seq_lengths=lengths))
    exported = export.export(run)(jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32))
    x = jax.random.normal(jax.random.key(0), (1, 20, 1, 8))
    np.testing.assert_allclose(exported.call(x), run(x), rtol=2e-5, atol=2e-5)


def kernels_of(shape, implementation):
    """The custom calls of a training step that is exported for CUDA."""
    x = jax.ShapeDtypeStruct((*export.symbolic_shape(shape), 2, 64), jnp.bfloat16)

    def loss(x):
        out = flash_attention(x, x, x, implementation=implementation)
        return out.astype(jnp.float32).sum()

    checks = [export.DisabledSafetyCheck.custom_call(name) for name in _ffi.TARGETS]
    exported = export.export(
        jax.jit(jax.grad(loss)), platforms=["cuda"], disabled_checks=checks
    )(x)
    data = exported.serialize()
    assert export.deserialize(data).platforms == ("cuda",)
    return [name for name in _ffi.TARGETS if name in exported.mlir_module()]


@pytest.mark.skipif(not _ffi.available(), reason="this install has no CUDA kernels")
def test_kernels_take_a_symbolic_batch():
    assert kernels_of("batch, 64", "cuda") == list(_ffi.TARGETS)


def test_kernels_take_no_symbolic_length_and_say_so(monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    monkeypatch.setattr(_ffi, "_warned", set())
    message = "symbolic batch .jax.export. and no symbolic length; got length"
    with pytest.raises(NotImplementedError, match=message):
        kernels_of("2, length", "cuda")
    with pytest.warns(UserWarning, match=message):
        assert kernels_of("batch, length", None) == []


def exported_over(kind, batch):
    """A call on four devices, exported; with the array it was exported for."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    at = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        type_of = jax.ShapeDtypeStruct((batch, 16, 2, 8), jnp.float32, sharding=at)
        run = jax.jit(lambda x: flash_attention(x, x, x, is_causal=True))
        data = export.export(run)(type_of).serialize()
        x = jax.device_put(jax.random.normal(jax.random.key(0), (4, 16, 2, 8)), at)
        return jax.jit(export.deserialize(data).call)(x), run(x)


def test_export_for_several_devices():
    assert_bitwise_equal(*exported_over(AxisType.Explicit, 4))


def test_export_for_several_devices_refuses_what_would_not_come_back():
    """XLA's compiler went down with a symbolic shape, JAX with a Python callback."""
    with pytest.raises(NotImplementedError, match=r"Explicit mesh axes .* got .*Auto"):
        exported_over(AxisType.Auto, 4)
    (batch,) = export.symbolic_shape("batch", constraints=["mod(batch, 4) == 0"])
    with pytest.raises(NotImplementedError, match=r"one device only.* got batch on"):
        exported_over(AxisType.Explicit, batch)


CACHED = """
import jax, jax.numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
from jax_flash2 import flash_attention
x = jnp.ones((1, 64, 2, 8))
def loss(x):
    return flash_attention(x, x, x, is_causal=True).sum()
jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(x))
count = lambda what: sum(name.endswith("compilation_cache/" + what) for name in events)
print("hits", count("cache_hits"), "misses", count("cache_misses"))
"""


def test_a_second_process_finds_the_compiled_program_in_the_cache(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # Where jax_flash2 comes from here, it comes from there.
        "PYTHONPATH": str(pathlib.Path(jax_flash2.__file__).parents[1]),
    }

    def run():
        done = subprocess.run(
            [sys.executable, "-c", CACHED],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        _, hits, _, misses = done.stdout.split()
        return int(hits), int(misses)

    hits, misses = run()
    assert hits == 0
    assert misses > 0
    assert run() == (misses, 0)
