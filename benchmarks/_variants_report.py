"""The table of variants.py's measurements."""

from statistics import geometric_mean
from typing import Any

import _results
from _markdown import table

PRODUCT = "xla_dot"
# The kernels' sizes beside which other ones are timed.
KERNELS = {80: 128, 96: 128, 192: 256}


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row shares with the plain one that was timed in turns with it."""
    head_dim, documents = row["head_dim"], row.get("documents") or 1
    seq = row["seq"] // documents
    return row["pass"], KERNELS.get(head_dim, head_dim), row["causal"], seq


def variant(row: dict[str, Any]) -> str | None:
    """What is other than plain, or None."""
    head_dim, group = row["head_dim"], row["heads"] // row["heads_kv"]
    if row["impl"] == PRODUCT:
        if row["dtype"] != "bfloat16":
            return f"XLA's matrix product, {row['dtype']}, over bfloat16"
        return f"head_dim {head_dim}, over XLA's matrix product"
    if row.get("documents"):
        return f"{row['seq']} tokens of packed documents, over rows of their own"
    if row.get("deterministic"):
        return "deterministic, over sums in any order"
    if row.get("soft_cap"):
        return f"soft cap of {row['soft_cap']:g}, over none"
    if head_dim in KERNELS:
        return f"head_dim {head_dim}, over {KERNELS[head_dim]}"
    if group > 1:
        return f"{group} query heads a key head, over one"
    return None if row["dtype"] == "bfloat16" else f"{row['dtype']}, over bfloat16"


def text(results: dict[str, Any]) -> str:
    """Ratios of TFLOP/s: geometric mean, least and most of the cells."""
    rows = results["rows"]
    plain = {place(row): row["tflops"] for row in rows if variant(row) is None}
    of_bfloat16 = (r for r in rows if r["dtype"] == "bfloat16")
    product = {place(r): r["tflops"] for r in of_bfloat16 if r["impl"] == PRODUCT}
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if (name := variant(row)) is None:
            continue
        if row["impl"] != PRODUCT:
            ratio = row["tflops"] / plain[place(row)]
        elif row["dtype"] == "bfloat16":
            ratio = plain[place(row)] / row["tflops"]
        else:
            ratio = row["tflops"] / product[place(row)]
        which, size, causal, seq = place(row)
        cell = f"{size} {'causal' if causal else 'full'} {seq}"
        ratios.setdefault((_results.PASSES[which], name), {})[cell] = ratio
    lines = []
    for (which, name), cells in sorted(
        ratios.items(), key=lambda item: item[0][0], reverse=True
    ):
        least, most = (
            min(cells, key=cells.__getitem__),
            max(cells, key=cells.__getitem__),
        )
        lines.append(
            [
                f"{which}, {name}",
                f"{geometric_mean(cells.values()):.2f}",
                f"{cells[least]:.2f} ({least})",
                f"{cells[most]:.2f} ({most})",
                str(len(cells)),
            ]
        )
    return table(["TFLOP/s", "geometric mean", "least", "most", "cells"], lines)
