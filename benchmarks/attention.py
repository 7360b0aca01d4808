"""Times attention on one GPU, ours beside every peer that is installed.

The papers' setting: 16k tokens in all, hidden size 2048 (32 heads of 64, 16 of 128, 8
of 256), lengths 512 to 16k, forward, and backward from the cotangent to the gradients
of query, key and value. All contenders of a cell run in this process, in turns: rounds
of at least 50 ms of back-to-back calls with pauses between, each round beginning with
another contender and every second in reverse; the median round counts. A call's time
is the sum of its kernels' times on the device, or the round's wall time where kernels
overlap and that is less. Before anything is timed its answer is checked. Cells are made
ready several at once, since that is mostly compilation, and timed while nothing else
runs.

  python benchmarks/attention.py                                   every cell, everyone
  python benchmarks/attention.py --impls flash2_sm80 torch_flash --passes fwd --dims 128
  python benchmarks/attention.py --merge DOWNLOADED.json           merges, times nothing

Rows go to benchmarks/results/<gpu>/attention.json, where those of other settings stay.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import _device
import _results
import jax
import jax.numpy as jnp
import numpy as np
from _contenders import CONCURRENT, CONTENDERS, Absent, Cell, Ready, inputs

FILE = "attention.json"
ROUND_MS, PAUSE_S, ROUNDS = 50.0, 0.03, 7
# How many cells are ready at a time: each holds about half a gigabyte a contender.
AHEAD = 6
# A contender may be this many times as wrong as the dense path in its own precision.
TOLERANCE = 3.0


def cells(a: argparse.Namespace) -> list[Cell]:
    found = []
    for head_dim in a.dims:
        for causal in a.causal:
            for seq in a.seqs:
                heads = a.hidden // head_dim
                found.append(
                    Cell(
                        dtype=a.dtype,
                        head_dim=head_dim,
                        causal=bool(causal),
                        window=a.window,
                        seq=seq,
                        batch=max(1, a.tokens // seq),
                        heads=heads,
                        heads_kv=heads // a.group,
                    )
                )
    return found


# ------------------------------------------------------------------------ the right answer


def _dense(q: Any, k: Any, v: Any, cell: Cell, rounded: Any) -> jax.Array:
    """One head, ``[seq, head_dim]``, float32; ``rounded`` is P's dtype on the way."""
    highest = jax.lax.Precision.HIGHEST
    s = jnp.dot(q, k.T, precision=highest) * np.float32(cell.head_dim**-0.5)
    if cell.soft_cap is not None:
        s = cell.soft_cap * jnp.tanh(s / cell.soft_cap)
    i, j = jnp.arange(cell.seq)[:, None], jnp.arange(cell.seq)[None]
    if cell.causal:
        s = jnp.where(j <= i, s, -jnp.inf)
    if cell.window is not None:
        s = jnp.where(j > i - cell.window, s, -jnp.inf)
    if cell.documents is not None:
        length = cell.seq // cell.documents
        s = jnp.where(i // length == j // length, s, -jnp.inf)
    # Not a cast there and back, which XLA leaves out on a GPU.
    bits = jnp.finfo(rounded)
    p = jax.lax.reduce_precision(jax.nn.softmax(s, axis=-1), bits.nexp, bits.nmant)
    return jnp.dot(p, v, precision=highest)


class Truth:
    """Output and gradients of a few heads, exact and as rounding would have them."""

    def __init__(self, cell: Cell, passes: list[str]) -> None:
        self.cell, self.group = cell, cell.heads // cell.heads_kv
        self.spots = sorted({(0, 0), (cell.batch - 1, cell.heads_kv - 1)})
        self.want: dict[str, list[Any]] = {w: [] for w in passes}
        dtype = jnp.dtype(cell.dtype)
        arrays = [x.astype(dtype).astype(np.float32) for x in inputs(cell)]

        def answer(q: Any, k: Any, v: Any, dout: Any, rounded: Any) -> Any:
            def call(q: Any, k: Any, v: Any) -> Any:  # q: [group, seq, head_dim]
                return jax.lax.map(lambda one: _dense(one, k, v, cell, rounded), q)

            if "bwd" not in passes:
                return [call(q, k, v)]
            out, pullback = jax.vjp(call, q, k, v)
            return [out, *pullback(dout)]

        # No search for the fastest product: that takes longer than the slowest.
        options = {"xla_gpu_autotune_level": 0}
        answer = jax.jit(answer, static_argnums=4, compiler_options=options)
        for b, h in self.spots:
            q, dout = (np.moveaxis(self._heads(arrays[i], b, h), 1, 0) for i in (0, 3))
            k, v = arrays[1][b, :, h], arrays[2][b, :, h]
            exact = [np.asarray(x) for x in answer(q, k, v, dout, jnp.float32)]
            near = [np.asarray(x) for x in answer(q, k, v, dout, dtype)]
            for which, part in (("fwd", slice(0, 1)), ("bwd", slice(1, None))):
                if which in passes:
                    self.want[which].append((exact[part], near[part]))

    def _heads(self, x: Any, b: int, h: int) -> Any:
        return x[b, :, h * self.group : (h + 1) * self.group]

    def wrong(self, which: str, one: Ready) -> str | None:
        """What is wrong with a contender's results, or None."""
        names = {"fwd": ["out"], "bwd": ["dq", "dk", "dv"]}[which]
        ulp = 2.0 ** {"bfloat16": -8, "float16": -11}[self.cell.dtype]
        got = one.results(which)
        for (b, h), (exact, near) in zip(self.spots, self.want[which], strict=True):
            for name, ref, base, full in zip(names, exact, near, got, strict=True):
                of_query = name in ("out", "dq")
                part = self._heads(full, b, h) if of_query else full[b, :, h]
                mine = one.to_numpy(part)
                mine = np.moveaxis(mine, 1, 0) if of_query else mine
                largest = np.abs(ref).max()
                allowed = TOLERANCE * np.abs(base - ref).max() + (1e-5 + ulp) * largest
                error = np.abs(mine - ref).max()
                if not error <= allowed:
                    return f"{name} is off by {error:.2e}; {allowed:.2e} allowed"
        return None


# -------------------------------------------------------------------------------- timing


def ready_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1))


def prepare(
    cells: list[Cell], impls: list[str], passes: list[str], pool: ThreadPoolExecutor
) -> list[dict[str, Ready]]:
    """Per cell the contenders whose answers are right, after their first calls."""
    # Peers that compile in Python, or whose settings are the process's, come one by one.
    here = [name for name in impls if name not in CONCURRENT]
    inputs(cells[0])  # before the threads ask for it
    truths = [pool.submit(Truth, cell, passes) for cell in cells]

    def one(name: str, cell: Cell, truth: Any) -> Ready | str:
        try:
            ready = CONTENDERS[name](cell, passes)
            for which in passes:
                if wrong := truth.result().wrong(which, ready):
                    return f"wrong answer: {wrong}"
            return ready
        except Absent as reason:
            return str(reason)
        except Exception as error:  # a peer's own trouble is not ours
            return f"{type(error).__name__}: " + " ".join(str(error).split())[:200]

    tasks = [
        {
            name: pool.submit(one, name, cell, truth)
            for name in impls
            if name in CONCURRENT
        }
        for cell, truth in zip(cells, truths, strict=True)
    ]
    found: list[dict[str, Ready]] = []
    for cell, truth, task in zip(cells, truths, tasks, strict=True):
        results = {name: one(name, cell, truth) for name in here}
        results |= {name: future.result() for name, future in task.items()}
        ready = {}
        for name in impls:
            result = results[name]
            if isinstance(result, str):
                print(f"{cell}\n  {name}: {result}", file=sys.stderr)
            else:
                ready[name] = result
        found.append(ready)
    return found


def run_round(ready: Ready, which: str, count: int) -> _device.Kernels:
    call = ready.run[which]
    with _device.recorded(ready.synchronize, start=call) as kernels:
        for _ in range(count):
            call()
    started = len(kernels.timings) // (count + 1)  # all calls have as many kernels
    del kernels.timings[:started]
    return kernels


def measure(
    ready: dict[tuple[str, Cell], Ready], which: str, rounds: int, clock: _device.Clock
) -> dict[tuple[str, Cell], dict[str, Any]]:
    """Per contender: milliseconds a call, by device and by wall, and the SM clock."""
    counts, device, wall = {}, {}, {}
    busy: dict[tuple[str, Cell], list[tuple[float, float]]] = {}
    for name, one in ready.items():
        run_round(one, which, 3)
        each = run_round(one, which, 5).ms / 5
        if each <= 0:
            raise RuntimeError(f"{name}: CUPTI saw no kernel")
        counts[name] = max(10, int(ROUND_MS / each) + 1)
        device[name], wall[name], busy[name] = [], [], []
    order = list(ready)
    for turn in range(rounds):
        shift = turn % len(order) if order else 0
        turned = order[shift:] + order[:shift]
        # Whom one comes after shows near the power limit.
        for name in turned if turn % 2 == 0 else turned[::-1]:
            start = time.perf_counter()
            kernels = run_round(ready[name], which, counts[name])
            busy[name].append((start, time.perf_counter()))
            device[name].append(kernels.ms / counts[name])
            wall[name].append(kernels.wall_ms / counts[name])
            time.sleep(PAUSE_S)
    return {
        name: {
            "ms": median(device[name]),
            "wall_ms": median(wall[name]),
            "spread": (max(device[name]) - min(device[name])) / median(device[name]),
            "sm_mhz": clock.between(busy[name]),
        }
        for name in order
    }


def parser(description: str | None, file: str) -> argparse.ArgumentParser:
    """What all who time cells into ``file`` understand."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--passes", nargs="+", default=["fwd", "bwd"], choices=["fwd", "bwd"]
    )
    p.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256])
    p.add_argument("--causal", nargs="+", type=int, default=[0, 1], choices=[0, 1])
    p.add_argument("--seqs", nargs="+", type=int, default=[512 << i for i in range(6)])
    p.add_argument("--rounds", type=int, default=ROUNDS)
    p.add_argument("--out", type=Path, help=f"default: results/<gpu>/{file}")
    p.add_argument("--commit", default=None, help="where the tree is no git checkout")
    p.add_argument(
        "--merge", type=Path, metavar="FILE", help="merge its rows into --out"
    )
    return p


def destination(
    a: argparse.Namespace, file: str
) -> tuple[Path, dict[str, Any], str] | None:
    """Where rows go, what is said of all of them, and the commit; None if ``--merge`` was
    all that was asked for."""
    if a.merge:
        _results.merge_file(a.merge, a.out, file)
        return None
    meta, folder = _device.machine()
    about = meta | {"versions": _results.versions(), "date": _results.today()}
    out = a.out or _results.FOLDER / folder / file
    return out, about, a.commit or _results.commit()


def main() -> None:
    p = parser(__doc__, FILE)
    p.add_argument("--impls", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    p.add_argument("--window", type=int, help="keys that a query sees, with --causal 1")
    p.add_argument("--group", type=int, default=1, help="query heads per key head")
    p.add_argument("--tokens", type=int, default=16384)
    p.add_argument("--hidden", type=int, default=2048)
    a = p.parse_args()
    if a.window is not None and a.causal != [1]:
        p.error("--window needs --causal 1: it counts keys to the left")
    if (where := destination(a, FILE)) is None:
        return
    todo = cells(a)
    with ready_pool() as pool, _device.Clock() as clock:
        for start in range(0, len(todo), AHEAD):
            some = todo[start : start + AHEAD]
            ready = prepare(some, a.impls, a.passes, pool)
            while some:  # what is timed is let go, to make room
                cell, found = some.pop(0), ready.pop(0)
                print(cell, flush=True)
                mine = {(name, cell): one for name, one in found.items()}
                for which in a.passes:
                    run_cell(mine, which, a.rounds, clock, *where)


def run_cell(
    ready: dict[tuple[str, Cell], Ready],
    which: str,
    rounds: int,
    clock: _device.Clock,
    out: Path,
    meta: dict[str, Any],
    commit: str,
) -> None:
    """Times a pass of whom it is given, by name and setting, in turns, and adds their rows."""
    rows = []
    for (impl, cell), times in measure(ready, which, rounds, clock).items():
        flops = ready[impl, cell].flops or cell.flops(which)
        tflops = flops / times["ms"] * 1e-9
        size = f"{cell.heads}/{cell.heads_kv} x {cell.head_dim} {cell.dtype}"
        print(
            f"  {which} {impl:16} {size:22} {times['ms']:9.4f} ms {tflops:6.0f}"
            f" TFLOP/s at {times['sm_mhz'] or 0:.0f} MHz",
            flush=True,
        )
        row = {"impl": impl, "pass": which, **vars(cell)}
        row |= {k: v if v is None else round(v, 5) for k, v in times.items()}
        rows.append(row | {"tflops": round(tflops, 1), "commit": commit})
    _results.merge(out, meta, rows)


if __name__ == "__main__":
    main()
