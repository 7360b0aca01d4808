"""Programs outlive the process: `jax.export`, and the persistent compilation cache."""

import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import export

import jax_flash2
from cases import Case
from compare import assert_bitwise_equal
from jax_flash2 import _ffi, flash_attention


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
