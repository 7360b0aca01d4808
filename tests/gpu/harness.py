"""What the GPU tests share: forward and backward of a case, and their judgement."""

import functools
import os
import subprocess
import sys
from typing import Any

import jax
import pytest

from cases import OPTIONS, Case, Inputs, results
from compare import assert_follow_the_rule
from jax_flash2 import _ffi, flash_attention

FORCED = "cuda_sm80"
# Every family of kernels that this GPU runs. On Hopper "cuda" takes the sm90 kernels where
# they serve the call.
HOPPER = getattr(jax.local_devices()[0], "compute_capability", None) == "9.0"
FAMILIES = (FORCED, "cuda") if HOPPER else (FORCED,)
each_family = pytest.mark.parametrize("family", FAMILIES)
# What the kernels do not take, and `flash_attention` runs in plain JAX.
UNSUPPORTED = {
    *("mask", "mask_of_keys", "bias", "bias_of_heads", "bias_masking"),
    *("dropout", "max_logit"),
}
SUPPORTED = tuple(name for name in OPTIONS if name not in UNSUPPORTED)
# What Hopper's kernels leave to the others; soft caps at head_dim 64 in the backward besides.
GENERAL = {"alibi", "alibi_of_batch"}
HOPPER_TAKES = tuple(name for name in SUPPORTED if name not in GENERAL)


def gpu_case(*options: str, length: int = 128, **more: Any) -> Case:
    defaults = dict(
        q_length=length,
        kv_length=length,
        batch=(3,),
        heads=4,
        kv_heads=2,
        head_dim=64,
        dtype="bfloat16",
    )
    defaults |= more
    defaults.setdefault("value_dim", defaults["head_dim"])
    return Case(options=options, **defaults)


def evaluate(
    inputs: Inputs, implementation: str = FORCED, **more: Any
) -> dict[str, jax.Array]:
    """Output, logsumexp and all gradients by the kernels, from one compiled call."""
    return results(without_slopes(inputs), implementation, **more)


def check_families(
    inputs: Inputs,
    note: str = "",
    families: tuple[str, ...] = FAMILIES,
    others: tuple[Inputs, ...] = (),
) -> dict[str, dict[str, jax.Array]]:
    """What `evaluate` gives, by family, after all of them passed the rule of accuracy."""
    ours = {family: evaluate(inputs, family) for family in families}
    notes = {f"{note} {family}".strip(): x for family, x in ours.items()}
    first, *more = map(without_slopes, (inputs, *others))
    assert_follow_the_rule(first, notes, more)
    return ours


def check(inputs: Inputs, note: str = "") -> dict[str, jax.Array]:
    """`check_families`, of which the family that every GPU has."""
    return check_families(inputs, note)[FORCED]


def without_slopes(inputs: Inputs) -> Inputs:
    """The same call, ALiBi's slopes having no gradient: the kernels lack that one."""
    wrt, fixed = dict(inputs.wrt), dict(inputs.fixed)
    if "alibi_slopes" in wrt:
        fixed["alibi_slopes"] = wrt.pop("alibi_slopes")
    return Inputs(wrt, fixed, inputs.static, inputs.cotangents)


def forward(inputs: Inputs, family: str = FORCED) -> dict[str, jax.Array]:
    """Output and logsumexp alone."""
    run = _compiled(family, tuple(sorted(inputs.static.items())))
    return run(inputs.wrt | inputs.fixed)


@functools.cache
def _compiled(family: str, static: tuple[tuple[str, Any], ...]) -> Any:
    def run(arrays: Any) -> dict[str, jax.Array]:
        out, lse = flash_attention(
            **arrays, **dict(static), implementation=family, return_residual=True
        )
        return {"out": out, "lse": lse}

    return jax.jit(run)


def check_command_buffers(program: str, *arguments: str) -> None:
    """What the program prints last is the same with XLA's command buffers and without."""

    def run(flags: str) -> str:
        package = os.path.dirname(os.path.dirname(_ffi.__file__))
        paths = [package, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {"XLA_FLAGS": flags}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        done = subprocess.run(
            # -P: not the source tree's package, where pytest was started there.
            [sys.executable, "-P", "-c", program, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.split()[-1]

    within = (
        "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL "
        "--xla_gpu_graph_min_graph_size=1"
    )
    assert run(within) == run("--xla_gpu_enable_command_buffer=")
