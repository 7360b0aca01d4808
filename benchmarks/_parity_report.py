"""What report.py says of parity.json: how far the runs stray from float32, and their times."""

from itertools import accumulate, permutations, product
from math import inf
from pathlib import Path
from statistics import fmean, median
from typing import Any

import _results
from _markdown import table

# How many times as far as another bfloat16 run ours may have strayed from the float32 one.
STRAYS_AT_MOST = 1.5
# What parity.py trains with; the last is the one that the others are compared with.
TRAINED = {
    "flash2": "**jax_flash2**, bfloat16",
    "cudnn": "cuDNN, bfloat16",
    "xla": "XLA, bfloat16",
    "reference": "dense reference, float32",
}
EXACT = "reference"


def strays(run: dict[str, Any], exact: dict[str, Any], which: str) -> list[float]:
    """How far a run is from the float32 one: the largest deviation up to each step."""
    pairs = zip(run[which], exact[which], strict=True)
    return list(accumulate((abs(x - y) for x, y in pairs), max))


def strays_on_average(runs: dict[str, Any], impl: str, which: str) -> list[float]:
    """The same, of all runs of an implementation."""
    each = [strays(run, runs[EXACT][-1], which) for run in runs[impl]]
    return [fmean(step) for step in zip(*each, strict=True)]


def text(results: dict[str, Any]) -> str:
    runs, lines = results["runs"], []
    for impl, title in TRAINED.items():
        if impl not in runs:
            continue
        far = impl != EXACT and EXACT in runs
        last = [fmean(run["loss"][-20:]) for run in runs[impl]]
        steps = [run["step_ms"] for run in runs[impl] if "step_ms" in run]
        shares = [
            run["attention_ms"] / run["kernels_ms"]
            for run in runs[impl]
            if "attention_ms" in run
        ]
        lines.append(
            [
                title,
                str(len(runs[impl])),
                f"{fmean(last):.4f}",
                *(
                    f"{strays_on_average(runs, impl, which)[-1]:.4f}" if far else ""
                    for which in ("loss", "grad_norm")
                ),
                f"{median(steps):.1f}" if steps else "",
                f"{100 * median(shares):.0f} %" if shares else "",
            ]
        )
    head = [
        "",
        "runs",
        "loss, last 20 steps",
        "loss strays by",
        "gradient norm by",
        "ms a step",
        "of its kernels' time, attention",
    ]
    return table(head, lines) + rule(runs)


def rule(runs: dict[str, Any]) -> str:
    """How far ours strays beside each other bfloat16 run, at the step where it is most."""
    if not {"flash2", EXACT} <= runs.keys():
        return ""
    named = {i: t for i, t in TRAINED.items() if i in runs and i != EXACT}
    both = ("loss", "grad_norm")
    lines, singles, kept = [], [], True
    broken = compared = 0
    for impl, title in named.items():
        if impl == "flash2":
            continue
        line = [title]
        for which in both:
            ours, theirs = (strays_on_average(runs, i, which) for i in ("flash2", impl))
            ratios = _ratios(ours, theirs)
            most, above = max(ratios), sum(r > STRAYS_AT_MOST for r in ratios)
            kept = kept and not above
            where = f"step {ratios.index(most) + 1}"
            if above:
                where += f"; above {STRAYS_AT_MOST} at {above} of {len(ratios)}"
            line.append(f"{most:.2f} ({where})")
        lines.append(line)
        pairs = list(product(runs["flash2"], runs[impl]))
        ours = f"one of jax_flash2's beyond one of {title.split(',')[0]}'s"
        singles.append([ours, *(f"{_most(runs, pairs, which):.2f}" for which in both)])
        compared += len(pairs)
        broken += sum(
            max(_most(runs, [pair], which) for which in both) > STRAYS_AT_MOST
            for pair in pairs
        )
    for impl, title in named.items():
        pairs = list(permutations(runs[impl], 2))
        if pairs:
            own = f"one of {title.split(',')[0].strip('*')}'s beyond another of its own"
            singles.append(
                [own, *(f"{_most(runs, pairs, which):.2f}" for which in both)]
            )
    head = ["jax_flash2 strays, at most, times as far as", "loss", "gradient norm"]
    single = ["single runs, at most", "loss", "gradient norm"]
    return (
        f"\nOn average over the runs:\n\n{table(head, lines)}\n"
        f"At most {STRAYS_AT_MOST} at every step is the rule: on average it is "
        f"{'kept' if kept else '**not kept**'}; of {compared} pairs of single runs {broken} "
        f"break it. How far single runs are from each other:\n\n{table(single, singles)}"
    )


def _most(runs: dict[str, Any], pairs: list[tuple[Any, Any]], which: str) -> float:
    """How many times as far as the second of a pair the first strays, at most."""
    exact = runs[EXACT][-1]
    each = (_ratios(*(strays(run, exact, which) for run in pair)) for pair in pairs)
    return max(map(max, each))


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [
        a / b if b else inf if a else 0.0 for a, b in zip(ours, theirs, strict=True)
    ]


def plot(folder: Path) -> None:
    """Losses and gradient norms of every run, and how far each strays from float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = _results.read(folder / "parity.json")
    runs = results["runs"]
    figure, axes = pyplot.subplots(2, 2, sharex=True, figsize=(10, 6))
    names = {"loss": "loss", "grad_norm": "gradient norm"}
    for column, (which, name) in enumerate(names.items()):
        above, below = axes[0][column], axes[1][column]
        above.set_title(name)
        below.set_title(f"{name}: largest deviation from float32 so far")
        for n, (impl, title) in enumerate(TRAINED.items()):
            if impl not in runs:
                continue
            style = {"color": f"C{n}", "linewidth": 1}
            for k, run in enumerate(runs[impl]):
                steps = range(1, len(run[which]) + 1)
                label = None if k else title.replace("*", "")
                above.plot(steps, run[which], label=label, **style)
                if impl != EXACT and EXACT in runs:
                    below.plot(steps, strays(run, runs[EXACT][-1], which), **style)
        for ax in (above, below):
            ax.grid(alpha=0.3)
            ax.set_yscale("log")
        below.set_xlabel("step")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncol=4)
    millions = results["meta"]["parameters"] / 1e6
    figure.suptitle(f"A GPT of {millions:.0f}M parameters, same start, same batches")
    figure.set_layout_engine("constrained")
    figure.savefig(folder / "parity.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
