"""Trains one model with several attentions: the same losses, and what each costs.

A GPT of about 125M parameters (examples/gpt) learns bytes for some hundred steps, each
time from the same parameters and on the same batches: in bfloat16 with jax_flash2's
kernels, with cuDNN and with XLA through jax.nn, and in float32 with jax_flash2's dense
reference. How far a run strays from the float32 one is what its precision costs: ours
may at no step have strayed more than 1.5 times as far as another bfloat16 attention's.
No two runs are alike (products are chosen by timing, gradients summed by atomics), so
that this wants several of each.

  python benchmarks/parity.py                            minutes on an H100
  python benchmarks/parity.py --impls flash2 cudnn       one more run of these two
  python benchmarks/parity.py --preset smoke --steps 20  the model to try it with on a CPU

Loss and gradient norm of every step, milliseconds a step, and how many of them the
kernels of attention took, go to benchmarks/results/<gpu>/parity.json after each run;
benchmarks/report.py plots them. Runs that the file holds stay, each with its own versions
(--replace drops those of the same attention); runs of another configuration or machine
want a file of their own. The float32 run is not timed, so
XLA_FLAGS=--xla_gpu_autotune_level=0 spares it the search for fast products.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import _device
import _results
import jax
import numpy as np
from _parity_report import EXACT, TRAINED
from gpt.config import PRESETS, Config
from gpt.data import STANDARD_LIBRARY, Corpus, load
from gpt.training import State, Trainer
from tqdm import tqdm

# Steps that are timed together: enough to hide the host, few enough for a median.
TIMED = 20
# Steps whose kernels are recorded, after the others; and names of attention's kernels, ours
# and cuDNN's. XLA's own attention is not told apart from the rest.
RECORDED = 10
ATTENTION = ("flash2", "sdpa", "flash_fprop", "flash_bprop")
# No graphs of kernels in the steps that are recorded: these begin when the recording does,
# and CUPTI is not known to see into graphs that are older.
NO_GRAPHS = {"xla_gpu_graph_min_graph_size": 2**30}
TIMES = {
    "step_ms": "ms a step",
    "kernels_ms": "of kernels",
    "attention_ms": "of attention's",
}


def config(a: argparse.Namespace, corpus: Corpus, attention: str) -> Config:
    preset = PRESETS[a.preset]
    return Config(
        preset=a.preset,
        layers=preset.layers,
        width=preset.width,
        heads=preset.heads,
        vocab=preset.vocab,
        length=a.length or preset.length,
        batch=a.batch,
        steps=a.steps,
        learning_rate=preset.learning_rate,
        warmup=a.steps // 10,
        weight_decay=0.1,
        clip=1.0,
        eval_every=a.steps,
        eval_batches=1,
        seed=a.seed,
        dtype="float32" if attention == EXACT else "bfloat16",
        attention=attention,
        data=STANDARD_LIBRARY,
        data_sha256=corpus.sha256,
    )


def train(
    c: Config, corpus: Corpus, params: Any, timed: bool
) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Losses and gradient norms of every step, and if ``timed`` what a step takes.

    And what records the kernels of some more steps.
    """
    # float32 means float32: left alone, a GPU would multiply in TensorFloat-32.
    precision = "highest" if c.attention == EXACT else None
    with jax.default_matmul_precision(precision):
        trainer = Trainer(c, scan=True)
        state = State(params, jax.jit(trainer.optimizer.init)(params))
        state = jax.tree.map(jax.numpy.copy, state)  # each step donates it

        def batch(step: int) -> np.ndarray:
            return corpus.train_batch(c.seed, step, c.batch, c.length)

        lowered = trainer.step.lower(state, batch(0))
        step = lowered.compile()
        batches = [batch(i) for i in range(c.steps)]
        found, times, began = [], [], time.perf_counter()
        for i, tokens in enumerate(tqdm(batches, c.attention, unit="step"), 1):
            state, metrics = step(state, tokens)
            found.append(metrics)
            if i % TIMED == 0 or i == c.steps:
                jax.block_until_ready(state)
                now = time.perf_counter()
                times.append((now - began) / (i - (i - 1) // TIMED * TIMED) * 1e3)
                began = now
    found = jax.device_get(found)
    run = {
        "loss": [float(m.loss) for m in found],
        "grad_norm": [float(m.grad_norm) for m in found],
        "dtype": c.dtype,
    }
    if timed:
        run["step_ms"] = round(median(times), 3)
    return run, lambda: kernels(lowered, state, batches[:RECORDED])


def kernels(lowered: Any, state: Any, batches: list[np.ndarray]) -> dict[str, float]:
    """Milliseconds of a step in which kernels ran, and in which attention's did."""
    step = lowered.compile(compiler_options=NO_GRAPHS)
    with _device.recorded(lambda: jax.block_until_ready(state)) as seen:
        for tokens in batches:
            state, _ = step(state, tokens)
    attention = sum(
        ms for name, ms in seen.timings if any(word in name for word in ATTENTION)
    )
    whole = sum(ms for _, ms in seen.timings)
    found = {"kernels_ms": round(whole / len(batches), 3)}
    if attention:
        found["attention_ms"] = round(attention / len(batches), 3)
    return found


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    impls = list(TRAINED)
    p.add_argument("--impls", nargs="+", default=impls, choices=impls)
    p.add_argument("--preset", default="gpt3-125m", choices=PRESETS)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--length", type=int, help="default: the preset's")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--untimed", action="store_true", help="other work shares the device"
    )
    p.add_argument(
        "--replace", action="store_true", help="drop the earlier runs of --impls"
    )
    p.add_argument("--out", type=Path, help="default: results/<gpu>/parity.json")
    p.add_argument("--commit", default=None, help="where the tree is no git checkout")
    a = p.parse_args()

    machine, folder = _device.machine()
    driver = {k: machine.pop(k) for k in ("driver",) if k in machine}
    versions = driver | _results.versions()
    corpus = load(STANDARD_LIBRARY, a.length or PRESETS[a.preset].length)
    first = Trainer(config(a, corpus, EXACT), scan=True)
    params = first.init(jax.random.key(a.seed)).params
    settings = dataclasses.asdict(config(a, corpus, EXACT))
    for name in ("dtype", "attention"):
        del settings[name]
    meta = machine | {"parameters": first.num_params}
    out = a.out or _results.FOLDER / folder / "parity.json"
    if other := differences(_results.read(out), meta | settings):
        p.error(
            f"{out} holds runs of another setting ({other}); --out names another file"
        )
    commit = a.commit or _results.commit()
    for name in a.impls:
        began = time.perf_counter()
        run, record = train(config(a, corpus, name), corpus, params, not a.untimed)
        run |= {"date": _results.today(), "commit": commit, "versions": versions}
        runs = _results.read(out).get("runs", {})
        earlier = [] if a.replace else runs.get(name, [])
        merge(out, meta, settings, {name: [*earlier, run]})
        if "step_ms" in run and "gpu" in machine:
            run |= record()
            merge(out, meta, settings, {name: [*earlier, run]})
        times = [f"{run[k]:.1f} {what}" for k, what in TIMES.items() if k in run]
        loss = f"loss {run['loss'][0]:.4f} -> {run['loss'][-1]:.4f}"
        whole = f"{time.perf_counter() - began:.0f} s in all"
        print(f"{name:10} {', '.join([loss, *times, whole])}", flush=True)


def differences(old: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What a file's runs were made with that is not wanted; empty for no file."""
    there = old.get("meta", {}) | old.get("config", {})
    return ", ".join(
        f"{k}: {there[k]}, not {wanted.get(k)}"
        for k in there
        if there[k] != wanted.get(k)
    )


def merge(
    path: Path,
    meta: dict[str, Any],
    settings: dict[str, Any],
    runs: dict[str, list[Any]],
) -> None:
    """Puts ``runs`` into the file, in place of those of the same attention."""
    runs = _results.read(path).get("runs", {}) | runs
    lines = []
    for name, several in runs.items():
        each = ",\n  ".join(map(json.dumps, several))
        lines.append(f" {json.dumps(name)}: [\n  {each}\n ]")
    whole = ",\n".join(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'{{"meta": {json.dumps(meta)},\n"config": {json.dumps(settings)},\n'
        f'"runs": {{\n{whole}\n}}}}\n'
    )


if __name__ == "__main__":
    main()
