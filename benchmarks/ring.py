"""Times one long sequence on all GPUs of a machine beside the same call on one of them.

In order, a causal ring is as slow as its last device, which sees nearly all keys; in the
order of `zigzag` all have the same work. Forward, and forward with backward, by the wall
clock: what a kernel's own time does not show is whether the hops hide behind the blocks.

  python benchmarks/ring.py                  65536 tokens, 16 heads of 128, bfloat16
  python benchmarks/ring.py --tokens 131072 --kv-heads 4

Milliseconds go to benchmarks/results/<gpu>/ring.json, where those of other calls stay.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import _device
import _results
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_flash2 import flash_attention, ring_attention, zigzag

ROUNDS, ROUND_MS = 5, 300.0
AT = PartitionSpec(None, "seq")
# Ways to share a sequence out: arguments of `ring_attention`.
WAYS = {
    "in order": {"axis_name": "seq"},
    "zigzag": {"axis_name": "seq", "zigzag": True},
    "all-to-all": {"exchange_axis_name": "seq"},
}


def timed(run: Callable[..., Any], arrays: list[jax.Array]) -> float:
    """Milliseconds of a call: the median of rounds of calls that follow each other."""

    def calls(count: int) -> float:
        began = time.perf_counter()
        found = [run(*arrays) for _ in range(count)]
        jax.block_until_ready(found)
        return (time.perf_counter() - began) / count * 1e3

    calls(2)
    count = max(1, round(ROUND_MS / calls(2)))
    return median(calls(count) for _ in range(ROUNDS))


def passes(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    def both(*arrays: jax.Array) -> Any:
        out, pullback = jax.vjp(function, *arrays)
        return pullback(out)

    return {"fwd": jax.jit(function), "fwdbwd": jax.jit(both)}


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tokens", type=int, default=65536, help="of the whole sequence")
    p.add_argument("--heads", type=int, default=16)
    p.add_argument("--kv-heads", type=int, default=16)
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--causal", nargs="+", type=int, default=[1, 0], choices=[0, 1])
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--out", type=Path, help="default: results/<gpu>/ring.json")
    p.add_argument("--commit", default=None, help="where the tree is no git checkout")
    a = p.parse_args()
    commit = a.commit or _results.commit()

    devices = np.array(jax.devices())
    n = len(devices)
    mesh = Mesh(devices, ("seq",))
    shapes = [(1, a.tokens, h, a.head_dim) for h in (a.heads, a.kv_heads, a.kv_heads)]
    whole = [
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate(shapes)
    ]
    cell = {
        "seq": a.tokens,
        "batch": 1,
        "heads": a.heads,
        "heads_kv": a.kv_heads,
        "head_dim": a.head_dim,
        "dtype": "bfloat16",
        "window": None,
    }
    rows = []
    for causal in map(bool, a.causal):
        plain = functools.partial(flash_attention, is_causal=causal)
        want = jax.jit(plain)(*whole)
        one = {which: timed(run, whole) for which, run in passes(plain).items()}
        found = {"one device": (1, one)}
        for way in a.ways:
            call = functools.partial(ring_attention, is_causal=causal, **WAYS[way])
            function = jax.shard_map(call, mesh=mesh, in_specs=AT, out_specs=AT)
            order = "zigzag" in WAYS[way]
            reorder = functools.partial(zigzag, devices=n) if order else jnp.asarray
            arrays = [
                jax.device_put(reorder(x), NamedSharding(mesh, AT)) for x in whole
            ]
            runs = passes(function)
            check(runs["fwd"](*arrays), reorder(want), way)
            found[way] = n, {k: timed(run, arrays) for k, run in runs.items()}
        for way, (count, times) in found.items():
            for which, ms in times.items():
                rows.append(
                    cell
                    | {"impl": f"{way}, {count}", "pass": which, "causal": causal}
                    | {"devices": count, "ms": round(ms, 3), "commit": commit}
                )
                print(
                    f"{way:10} {count} {'causal' if causal else 'full':6} {which:6} "
                    f"{ms:8.2f} ms, {one[which] / ms:.2f} times as fast as one device",
                    flush=True,
                )
    machine, folder = _device.machine()
    meta = machine | {"versions": _results.versions(), "date": _results.today()}
    _results.merge(a.out or _results.FOLDER / folder / "ring.json", meta, rows)


def check(ours: jax.Array, want: jax.Array, way: str) -> None:
    """Two roundings of bfloat16 apart, at most: each block's and their sum's."""
    a, b = np.asarray(ours, np.float32), np.asarray(want, np.float32)
    error = np.abs(a - b).max() / np.abs(b).max()
    if not error <= 2**-7:
        raise SystemExit(f"{way}: wrong by {error:.2g} of the largest output")


if __name__ == "__main__":
    main()
