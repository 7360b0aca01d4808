"""What derivatives cost on CPU, as multiples of the forward and of its gradient.

float32, one batch entry, 1 head of 64, blockwise. Speed: the least processor time of
interleaved runs (the machine may be shared). Memory: what XLA plans for temporaries,
over lengths that are only compiled. Writes benchmarks/results/cpu/derivatives.json.

  python benchmarks/derivatives.py            two minutes on two cores
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import _results
import jax
import jax.numpy as jnp
from cpu import arrays, processor

import jax_flash2

SEQ = 4096
MEMORY = (4096, 8192, 16384)
# (of which, at most): what the derivatives are held to.
BOUNDS = {
    "jvp": ("forward", 3.0),
    "jvp of grad": ("gradient", 4.0),
    "grad of grad": ("gradient", 4.0),
    "grad of jvp": ("gradient", 4.0),
}
Operands = list[jax.Array]


def dot(a: Any, b: Any) -> Any:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def attend(x: Operands, forward_mode: bool = False) -> Any:
    return jax_flash2.flash_attention(
        *x, is_causal=True, implementation="blockwise", forward_mode=forward_mode
    )


def loss(x: Operands) -> jax.Array:
    return jnp.sum(attend(x) ** 2)


def jvp(x: Operands, t: Operands) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(lambda x: attend(x, forward_mode=True), (x,), (t,))


def jvp_of_grad(x: Operands, t: Operands) -> Any:
    return jax.jvp(jax.grad(loss), (x,), (t,))


def grad_of_grad(x: Operands, t: Operands) -> Any:
    return jax.grad(lambda x: dot(jax.grad(loss)(x), t))(x)


def grad_of_jvp(x: Operands, t: Operands) -> Any:
    return jax.grad(lambda x: dot(*[jvp(x, t)] * 2))(x)


CALLS: dict[str, Callable[[Operands, Operands], Any]] = {
    "forward": lambda x, t: attend(x),
    "gradient": lambda x, t: jax.value_and_grad(loss)(x),
    "jvp": jvp,
    "jvp of grad": jvp_of_grad,
    "grad of grad": grad_of_grad,
    "grad of jvp": grad_of_jvp,
}


def milliseconds(f: Callable[..., Any], *arguments: Any) -> float:
    start = time.process_time()
    jax.block_until_ready(f(*arguments))
    return (time.process_time() - start) * 1e3


def temporaries(seq: int, which: str) -> int:
    x = [jax.ShapeDtypeStruct((1, seq, 1, 64), jnp.float32)] * 3
    compiled = jax.jit(CALLS[which]).lower(x, x).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this version of XLA does not say what it allocates")
    return analysis.temp_size_in_bytes


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=7)
    a = p.parse_args()
    jax.config.update("jax_platforms", "cpu")
    x, t = arrays(SEQ, 1), arrays(SEQ, 1)[::-1]
    compiled = {n: jax.jit(f).lower(x, t).compile() for n, f in CALLS.items()}
    best = dict.fromkeys(CALLS, float("inf"))
    for _ in range(a.rounds):
        for name, f in compiled.items():
            best[name] = min(best[name], milliseconds(f, x, t))
    rows = []
    for name, ms in best.items():
        memory = [temporaries(seq, name) for seq in MEMORY]
        of, bound = BOUNDS.get(name, (name, 1.0))
        row = {"impl": "flash2_blockwise", "pass": name, "dtype": "float32"}
        row |= {"head_dim": 64, "causal": True, "window": None, "seq": SEQ, "batch": 1}
        row |= {"heads": 1, "heads_kv": 1, "cpu_ms": round(ms, 1), "of": of}
        row |= {"ratio": round(ms / best[of], 2), "bound": bound}
        row |= {"temporaries": dict(zip(map(str, MEMORY), memory, strict=True))}
        rows.append(row | {"commit": _results.commit()})
        planned = ", ".join(f"{m / 2**20:.1f}" for m in memory)
        print(
            f"{name:13} {ms:7.1f} ms, {row['ratio']:5.2f} of the {of} (at most {bound}); "
            f"{planned} MiB at {', '.join(map(str, MEMORY))}"
        )
    meta = {
        "cpu": processor(),
        "versions": _results.versions(),
        "date": _results.today(),
    }
    _results.merge(_results.FOLDER / "cpu" / "derivatives.json", meta, rows)


if __name__ == "__main__":
    main()
