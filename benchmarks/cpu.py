"""Speed and memory on CPU: our blockwise attention beside `jax.nn`'s dense one.

float32, one batch entry. Speed: 4 heads of 64, medians of calls in a row, taken in turns,
forward, and forward with backward. Memory: peak of a fresh process over forward and
backward, 1 head of 64. Writes benchmarks/results/cpu/speed.json and memory.json.

  python benchmarks/cpu.py            about five minutes on two cores
"""

import argparse
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import _results
import jax
import jax.numpy as jnp

import jax_flash2

OURS, DENSE = "flash2_blockwise", "jax_xla"
CALLS: dict[str, Callable[..., Any]] = {
    OURS: functools.partial(jax_flash2.flash_attention, implementation="blockwise"),
    DENSE: functools.partial(jax.nn.dot_product_attention, implementation="xla"),
}
# (length, window): causal throughout; a window of 512 sees 512 keys to the left.
SPEED = ((2048, None), (4096, None), (8192, None), (8192, 512))
MEMORY = (4096, 8192, 16384, 32768)
DENSE_LIMIT = 8192  # the longest that the dense path's memory is measured at


def function(impl: str, which: str, window: int | None) -> Callable[..., Any]:
    call = functools.partial(CALLS[impl], is_causal=True)
    if window is not None:
        call = functools.partial(call, local_window_size=(window, 0))
    if which == "fwd":
        return jax.jit(call)

    def loss(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(call(*qkv) ** 2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def arrays(seq: int, heads: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (1, seq, heads, 64), jnp.float32) for k in keys]


def milliseconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(f())
    return (time.perf_counter() - start) * 1e3


def speed(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for seq, window in SPEED:
        qkv = arrays(seq, 4)
        for which in ("fwd", "fwdbwd"):
            impls = [OURS] if window else [OURS, DENSE]
            calls = {
                impl: functools.partial(function(impl, which, window), *qkv)
                for impl in impls
            }
            for call in calls.values():
                milliseconds(call)
            times: dict[str, list[float]] = {impl: [] for impl in impls}
            for _ in range(rounds):
                for impl, call in calls.items():
                    milliseconds(call)  # what the other one left in the caches is gone
                    times[impl] += [milliseconds(call) for _ in range(3)]
            for impl in impls:
                row = {"impl": impl, "pass": which, "dtype": "float32", "head_dim": 64}
                row |= {"causal": True, "window": window, "seq": seq, "batch": 1}
                row |= {"heads": 4, "heads_kv": 4, "ms": round(median(times[impl]), 3)}
                rows.append(row | {"commit": _results.commit()})
                print(
                    f"{seq:6} {window or '':5} {which:7} {impl:17} {row['ms']:9.1f} ms"
                )
    return rows


def peak_mib() -> float:
    """This process's largest resident size; ru_maxrss would count its parent's too."""
    with open("/proc/self/status") as lines:
        (line,) = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def peak(impl: str, seq: int) -> None:
    """In a process of its own: prints the peak before and after a long call, in MiB."""
    run = function(impl, "fwdbwd", None)
    jax.block_until_ready(run(*arrays(256, 1)))
    before = peak_mib()
    jax.block_until_ready(run(*arrays(seq, 1)))
    print(json.dumps([before, peak_mib()]))


def memory() -> list[dict[str, Any]]:
    rows = []
    for impl in CALLS:
        for seq in MEMORY:
            if impl == DENSE and seq > DENSE_LIMIT:
                continue
            command = [sys.executable, __file__, "--peak", impl, str(seq)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            before, after = json.loads(done.stdout)
            row = {"impl": impl, "pass": "fwdbwd", "dtype": "float32", "head_dim": 64}
            row |= {"causal": True, "window": None, "seq": seq, "batch": 1}
            row |= {"heads": 1, "heads_kv": 1, "peak_mib": round(after)}
            row |= {"call_mib": round(after - before), "commit": _results.commit()}
            rows.append(row)
            print(
                f"{seq:6} {impl:17} peak {after:7.0f} MiB, {after - before:7.0f} by it"
            )
    return rows


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [
                x.split(":")[1].strip() for x in lines if x.startswith("model name")
            ]
        return f"{len(names)} x {names[0]}"
    except (OSError, IndexError):
        return platform.processor()


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--peak", nargs=2, metavar=("IMPL", "SEQ"), help=argparse.SUPPRESS)
    p.add_argument("--only", choices=["speed", "memory"])
    a = p.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if a.peak:
        peak(a.peak[0], int(a.peak[1]))
        return
    meta = {
        "cpu": processor(),
        "versions": _results.versions(),
        "date": _results.today(),
    }
    for name, run in (
        ("speed", functools.partial(speed, a.rounds)),
        ("memory", memory),
    ):
        if a.only in (None, name):
            _results.merge(_results.FOLDER / "cpu" / f"{name}.json", meta, run())


if __name__ == "__main__":
    main()
