"""What the GPU tests share: forward and backward of a case, and their judgement."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from cases import OPTIONS, Case, Inputs, covering, results
from compare import assert_accurate, assert_follows_the_rule, dense
from jax_flash2 import flash_attention

FORCED = "cuda_sm80"
# All families of kernels that this GPU has.
IMPLEMENTATIONS = (
    (FORCED, "cuda") if jax.devices()[0].compute_capability == "9.0" else (FORCED,)
)
# What the kernels do not take, and `flash_attention` runs in plain JAX.
UNSUPPORTED = {
    *("mask", "mask_of_keys", "bias", "bias_of_heads", "bias_masking"),
    *("dropout", "max_logit"),
}
SUPPORTED = tuple(name for name in OPTIONS if name not in UNSUPPORTED)


def option_sets(size: int) -> list[tuple[str, ...]]:
    """Sets of the kernels' options in which every legal pair occurs."""
    sets = [tuple(o for o in group if o in SUPPORTED) for group in covering(size)]
    return list(dict.fromkeys(s for s in sets if s))


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


def forward(inputs: Inputs, function: Any = None, **more: Any) -> dict[str, jax.Array]:
    """Output and logsumexp; by the kernels unless told otherwise."""
    more.setdefault("implementation", FORCED)
    run = _compiled(
        function or flash_attention, tuple(sorted((inputs.static | more).items()))
    )
    return run({**inputs.wrt, **inputs.fixed})


@functools.cache
def _compiled(function: Any, static: tuple[tuple[str, Any], ...]) -> Any:
    def run(arrays: Any) -> dict[str, jax.Array]:
        out, lse = function(**arrays, **dict(static), return_residual=True)
        return {"out": out, "lse": lse}

    return jax.jit(run)


def check_forward(inputs: Inputs, note: str = "", **more: Any) -> dict[str, jax.Array]:
    """The kernels' output and logsumexp, after they passed the rule of accuracy."""
    ours = forward(inputs, **more)
    wide = forward(inputs.astype(jnp.float32), implementation="reference")
    baseline = forward(inputs, dense, implementation=None)
    for name, x in ours.items():
        assert_accurate(x, wide[name], baseline[name], f"{note} {name}".strip())
    return ours


def without_slopes(inputs: Inputs) -> Inputs:
    """The same call, ALiBi's slopes having no gradient: the kernels lack that one."""
    wrt, fixed = dict(inputs.wrt), dict(inputs.fixed)
    if "alibi_slopes" in wrt:
        fixed["alibi_slopes"] = wrt.pop("alibi_slopes")
    return Inputs(wrt, fixed, inputs.static, inputs.cotangents)


def backward(
    inputs: Inputs, implementation: str = FORCED, **more: Any
) -> dict[str, jax.Array]:
    """All gradients by the kernels, from cotangents of output and logsumexp."""
    found = results(without_slopes(inputs), implementation, **more)
    return {name: x for name, x in found.items() if name.startswith("d")}


def check_backward(inputs: Inputs, note: str = "") -> dict[str, jax.Array]:
    """The gradients of the fastest kernels, after those of all passed the rule of
    accuracy."""
    ours = {}
    for implementation in IMPLEMENTATIONS:
        ours = backward(inputs, implementation)
        text = f"{implementation} {note}".strip()
        assert_follows_the_rule(without_slopes(inputs), ours, text)
    return ours
