"""Writes the README's figures from the result files, so that none is ever typed.

Between ``<!-- results: NAME -->`` and ``<!-- end -->`` in README.md stands what NAME gives:
  GPU/fwd, GPU/bwd    TFLOP/s of every contender, such as h100/fwd
  cpu/speed           milliseconds on CPU, and how many times the dense path's speed
  cpu/memory          peak memory on CPU
  GPU/variants        float16, groups, packing, determinism, caps and other head sizes beside the
                      plain setting
  GPU/parity          one model trained with several attentions: losses and step times
  GPU/ring            one sequence on several GPUs and on one, with its GPU/meta
  GPU/meta, cpu/meta  on what, with what, and when it was measured

  python benchmarks/report.py           rewrites README.md, and the plots results/GPU/*.png
  python benchmarks/report.py --check   fails where README.md is not what it would write
"""

import argparse
import re
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import _parity_report
import _results
import _variants_report
from _markdown import table

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
TITLES = {
    "jax_xla": "jax.nn, XLA",
    "torch_flash": "FlashAttention-2 (torch SDPA)",
    "torch_cudnn": "cuDNN (torch SDPA)",
    "jax_cudnn": "cuDNN (jax.nn)",
    "jax_tokamax": "tokamax",
    "fa4": "FlashAttention, CuTe",
    "jax_dew": "FlashAttention-3",
    "flash2_blockwise": "jax_flash2, plain JAX",
    "flash2_sm80": "**jax_flash2, sm80 kernels**",
    "flash2_sm90": "**jax_flash2, sm90 kernels**",
}
CELL = ("head_dim", "causal", "seq", "dtype")
# Whom our kernels are meant to be compared with: the same algorithm on any GPU, and on Hopper
# whatever else there is.
RIVALS = {
    "flash2_sm80": ("torch_flash",),
    "flash2_sm90": tuple(impl for impl in TITLES if not impl.startswith("flash2")),
}


def setting(row: dict[str, Any]) -> bool:
    """Whether a row belongs to the papers' setting."""
    plain = row["window"] is None and row["heads"] == row["heads_kv"]
    hidden = row["heads"] * row["head_dim"] == 2048
    return plain and hidden and row["seq"] * row["batch"] == 16384


def speeds(rows: list[dict[str, Any]], which: str) -> dict[Any, dict[str, Any]]:
    """``{(head_dim, causal): {impl: {seq: TFLOP/s}}}``, contenders in TITLES' order."""
    found: dict[Any, dict[str, Any]] = {}
    for impl in TITLES:
        for row in rows:
            fits = row["impl"] == impl and row["pass"] == which and setting(row)
            if fits and row["dtype"] == "bfloat16":
                cell = found.setdefault((row["head_dim"], row["causal"]), {})
                cell.setdefault(impl, {})[row["seq"]] = row["tflops"]
    return dict(sorted(found.items()))


def beside(rows: list[dict[str, Any]], which: str) -> str:
    """Our kernels over the fastest of their rivals that were timed with the same commit."""
    of_pass = [r for r in rows if r["pass"] == which and setting(r)]
    lines = []
    for ours, rivals in RIVALS.items():
        ratios, seen = [], set()
        for row in of_pass:
            others = [
                r
                for r in of_pass
                if r["impl"] in rivals
                and all(r[k] == row[k] for k in (*CELL, "commit"))
            ]
            if row["impl"] == ours and others:
                ratios.append(row["tflops"] / max(r["tflops"] for r in others))
                seen |= {r["impl"] for r in others}
        if ratios:
            lines.append(
                [
                    TITLES[ours],
                    ", ".join(TITLES[impl] for impl in rivals if impl in seen),
                    f"{geometric_mean(ratios):.2f}",
                    f"{min(ratios):.2f} to {max(ratios):.2f}",
                    f"{sum(r > 1 for r in ratios)} of {len(ratios)}",
                ]
            )
    head = [f"{_results.PASSES[which]}, all cells below", "over the fastest of"]
    return table([*head, "geometric mean", "least and most", "ahead in"], lines)


def gpu(results: dict[str, Any], which: str) -> str:
    parts = [beside(results["rows"], which)]
    for (head_dim, causal), impls in speeds(results["rows"], which).items():
        seqs = sorted({seq for by_seq in impls.values() for seq in by_seq})
        best = {s: max(by_seq.get(s, 0) for by_seq in impls.values()) for s in seqs}

        def show(value: float | None, largest: float) -> str:
            if value is None:
                return ""
            return f"**{value:.0f}**" if value == largest else f"{value:.0f}"

        kind = "causal" if causal else "full"
        lines = [
            [TITLES[impl], *(show(by_seq.get(s), best[s]) for s in seqs)]
            for impl, by_seq in impls.items()
        ]
        head = [
            f"{_results.PASSES[which]}, head_dim {head_dim}, {kind}",
            *map(str, seqs),
        ]
        parts.append(table(head, lines))
    return "\n".join(parts)


def cpu_speed(results: dict[str, Any]) -> str:
    times = {
        (row["seq"], row["window"], row["pass"], row["impl"]): row["ms"]
        for row in results["rows"]
    }
    lines = []
    for seq, window, which in dict.fromkeys(k[:3] for k in times):
        ours = times[seq, window, which, "flash2_blockwise"]
        dense = times.get((seq, window, which, "jax_xla"))
        lines.append(
            [
                f"{seq}" + (f", window {window}" if window else ""),
                {"fwd": "forward", "fwdbwd": "forward + backward"}[which],
                f"{ours:.0f}",
                "" if dense is None else f"{dense:.0f}",
                "" if dense is None else f"{dense / ours:.1f}",
            ]
        )
    head = ["length, causal", "pass", "jax_flash2, ms", "jax.nn, ms", "times as fast"]
    return table(head, lines)


def cpu_memory(results: dict[str, Any]) -> str:
    peaks = {(row["impl"], row["seq"]): row["call_mib"] for row in results["rows"]}
    seqs = sorted({seq for _, seq in peaks})
    lines = [
        [title, *(str(peaks.get((impl, s), "")) for s in seqs)]
        for impl, title in (("flash2_blockwise", "jax_flash2"), ("jax_xla", "jax.nn"))
    ]
    return table(["peak of forward + backward, MiB", *map(str, seqs)], lines)


def ring(results: dict[str, Any]) -> str:
    """Milliseconds, and how many times as fast as one device."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in results["rows"]:
        sizes = f"{row['seq']} tokens, {row['heads']}/{row['heads_kv']} heads"
        call = f"{sizes} of {row['head_dim']}, {'causal' if row['causal'] else 'full'}"
        way, devices = row["impl"].rsplit(", ", 1)
        times.setdefault((call, way, devices), {})[row["pass"]] = row["ms"]
    parts = []
    for call in dict.fromkeys(key[0] for key in times):
        one = times[call, "one device", "1"]
        lines = [
            [way if devices == "1" else f"{way}, {devices} devices"]
            + [f"{ms[k]:.1f}, {one[k] / ms[k]:.2f} x" for k in ("fwd", "fwdbwd")]
            for (of, way, devices), ms in times.items()
            if of == call
        ]
        parts.append(table([call, "forward, ms", "forward + backward, ms"], lines))
    return about(results) + "\n" + "\n".join(parts)


def about(results: dict[str, Any]) -> str:
    meta = results["meta"]
    machine = meta.get("gpu") or meta.get("cpu")
    driver = [f"driver {meta['driver']}"] if "driver" in meta else []
    versions = [f"{k} {v}" for k, v in meta["versions"].items()]
    return ", ".join([machine, *driver, *versions, meta["date"]]) + "\n"


def block(name: str) -> str:
    folder, which = name.split("/")
    of_gpu = {
        "parity": _parity_report.text,
        "ring": ring,
        "variants": _variants_report.text,
    }
    file = "memory" if which == "memory" else "speed"
    if folder != "cpu":
        file = which if which in of_gpu else "attention"
    path = _results.FOLDER / folder / f"{file}.json"
    if not path.exists():
        return "Not measured yet.\n"
    results = _results.read(path)
    if which == "meta":
        return about(results)
    if which in of_gpu:
        return of_gpu[which](results)
    if folder == "cpu":
        return {"speed": cpu_speed, "memory": cpu_memory}[which](results)
    return gpu(results, which)


def plot(folder: Path) -> None:
    """One picture a pass: TFLOP/s over length, a panel for each head_dim and mask."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _results.read(folder / "attention.json")["rows"]
    colours = {impl: f"C{n}" for n, impl in enumerate(TITLES)}
    for which, title in _results.PASSES.items():
        panels = speeds(rows, which)
        if not panels:
            continue
        dims = sorted({head_dim for head_dim, _ in panels})
        figure, axes = pyplot.subplots(
            2, len(dims), squeeze=False, sharey=True, figsize=(4 * len(dims), 6.5)
        )
        for (head_dim, causal), impls in panels.items():
            ax = axes[int(causal)][dims.index(head_dim)]
            ax.set_title(f"head_dim {head_dim}, {'causal' if causal else 'full'}")
            for impl, by_seq in impls.items():
                ours = impl.startswith("flash2")
                seqs = sorted(by_seq)
                ax.plot(
                    seqs,
                    [by_seq[s] for s in seqs],
                    label=TITLES[impl].replace("*", ""),
                    color=colours[impl],
                    linewidth=2.5 if ours else 1.2,
                    marker="o" if ours else ".",
                )
            ticks = sorted({seq for by_seq in impls.values() for seq in by_seq})
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [str(seq) for seq in ticks])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        for row in axes:
            row[0].set_ylabel("TFLOP/s")
            row[0].set_ylim(bottom=0)
        lines = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncol=4)
        figure.suptitle(f"Attention {title}, bfloat16, 16k tokens, hidden size 2048")
        figure.set_layout_engine("constrained")
        figure.savefig(folder / f"{title}.png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true")
    a = p.parse_args()
    text = README.read_text()
    new = BLOCK.sub(lambda m: f"{m[1]}{block(m[2])}{m[3]}", text)
    if a.check:
        sys.exit("README.md: run benchmarks/report.py" if new != text else 0)
    README.write_text(new)
    for path in sorted(_results.FOLDER.glob("*/attention.json")):
        plot(path.parent)
    for path in sorted(_results.FOLDER.glob("*/parity.json")):
        _parity_report.plot(path.parent)


if __name__ == "__main__":
    main()
