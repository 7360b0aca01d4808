"""What float16, grouped queries, packing, determinism, a soft cap and other head sizes cost
beside bfloat16, plain heads, rows of their own, sums in any order and no cap.

The papers' setting and the way to time of attention.py: of each cell all variants run in this
process, in turns. ``xla_dot`` is XLA's product of two matrices of 8192 rows and columns, in both
dtypes, in turns with length 16384: at its power limit the chip itself is slower in float16.

  python benchmarks/variants.py                       every cell, both passes
  python benchmarks/variants.py --dims 128 --seqs 1024 16384 --passes bwd
  python benchmarks/variants.py --merge DOWNLOADED.json

Rows go to benchmarks/results/<gpu>/variants.json.
"""

import argparse
import dataclasses
import os
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import _device
import attention
import jax
import jax.numpy as jnp
import numpy as np
from _contenders import Cell, Ready
from _variants_report import KERNELS, PRODUCT

FILE = "variants.json"
OURS = "flash2_sm90"
PLAIN: dict[str, Any] = {
    "dtype": "bfloat16",
    "window": None,
    "group": 1,
    "tokens": 16384,
    "hidden": 2048,
}
GROUP = 8
SOFT_CAP = 50.0  # Gemma 2's
ROWS = 8192
# Where the product is timed: the chip is at its power limit there.
LONGEST = 16384
# How many cells are made ready at a time, with all their variants.
AHEAD = 3


def variants(plain: Cell) -> list[Cell]:
    found = [plain, dataclasses.replace(plain, dtype="float16")]
    found.append(dataclasses.replace(plain, heads_kv=plain.heads // GROUP))
    for size in (s for s, kernel in KERNELS.items() if kernel == plain.head_dim):
        heads = PLAIN["hidden"] // size
        found.append(
            dataclasses.replace(plain, head_dim=size, heads=heads, heads_kv=heads)
        )
    found.append(dataclasses.replace(plain, deterministic=True))
    found.append(dataclasses.replace(plain, soft_cap=SOFT_CAP))
    if plain.batch > 1:  # its rows as documents of one
        one = dict(seq=plain.seq * plain.batch, batch=1, documents=plain.batch)
        found.append(dataclasses.replace(plain, **one))
    return found


def product(dtype: str) -> Ready:
    """Either pass is the product."""
    a, b = jax.random.normal(jax.random.key(0), (2, ROWS, ROWS), jnp.dtype(dtype))
    dot, last = jax.jit(jnp.dot), {"result": a}

    def run() -> None:
        last["result"] = dot(a, b)

    return Ready(
        run={"fwd": run, "bwd": run},
        results=lambda _: [last["result"]],
        to_numpy=lambda x: np.asarray(x, np.float32),
        synchronize=lambda: jax.block_until_ready(last["result"]),
        flops=2.0 * ROWS**3,
    )


def main() -> None:
    p = attention.parser(__doc__, FILE)
    a = p.parse_args()
    if others := set(a.dims) & set(KERNELS):
        p.error(
            f"--dims are the kernels'; {sorted(others)} come beside theirs by themselves"
        )
    if (where := attention.destination(a, FILE)) is None:
        return
    todo = attention.cells(argparse.Namespace(**vars(a), **PLAIN))
    with attention.ready_pool() as pool, _device.Clock() as clock:
        for start in range(0, len(todo), AHEAD):
            groups = [variants(cell) for cell in todo[start : start + AHEAD]]
            cells = [cell for group in groups for cell in group]
            found = attention.prepare(cells, [OURS], a.passes, pool)
            ready = dict(zip(cells, found, strict=True))
            for group in groups:
                plain = group[0]
                print(plain, flush=True)
                # What is timed is let go, to make room.
                timed = {(OURS, cell): ready.pop(cell)[OURS] for cell in group}
                if plain.seq == LONGEST:
                    for dtype in ("bfloat16", "float16"):
                        cell = dataclasses.replace(plain, dtype=dtype)
                        timed[PRODUCT, cell] = product(dtype)
                for which in a.passes:
                    differ = {
                        key: one
                        for key, one in timed.items()
                        if which == "bwd" or not key[1].deterministic
                    }
                    attention.run_cell(differ, which, a.rounds, clock, *where)


if __name__ == "__main__":
    main()
