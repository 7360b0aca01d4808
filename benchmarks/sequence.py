"""Draws results/sequence.png: who computes what in a causal ring, and when.

python benchmarks/sequence.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from jax_flash2._sequence import Part, Ring
from jax_flash2._spec import AttentionSpec

OUT = Path(__file__).resolve().parent / "results" / "sequence.png"
DEVICES = 4
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")


def blocks(zigzag: bool) -> list[tuple[int, int, int, int]]:
    """(row chunk, key chunk, device, step) of every block, from the library's own plan."""
    part = Part(DEVICES, 2 if zigzag else 1, zigzag)
    ring = Ring(("seq",), (DEVICES,), ("seq",), part, part)
    found = []
    for time, step in enumerate(ring.plan(AttentionSpec(is_causal=True), False)):
        for shift in step.shifts:
            for device in range(DEVICES):
                source = (device - shift.shift) % DEVICES
                for a, b in shift.blocks:
                    row, key = part.origin(device, a), part.origin(source, b)
                    if key <= row:
                        found.append((row, key, device, time))
    return found


def draw(axes: Axes, bars: Axes, zigzag: bool) -> None:
    chunks = DEVICES * (2 if zigzag else 1)
    size = 8 / chunks
    work = np.zeros((DEVICES, DEVICES))
    for row, key, device, time in blocks(zigzag):
        x, y = key * size, row * size
        axes.add_patch(
            Rectangle((x, y), size, size, facecolor=COLOURS[device], edgecolor="white")
        )
        middle = (x + size / 2, y + size / 2)
        axes.text(*middle, str(time), ha="center", va="center", color="white")
        work[time, device] += size * size * (0.5 if row == key else 1)
    axes.set(
        xlim=(0, 8), ylim=(8, 0), aspect="equal", xlabel="keys", ylabel="query rows"
    )
    axes.set_xticks([])
    axes.set_yticks([])
    name = "zigzag: chunks i and 2n - 1 - i" if zigzag else "in order"
    axes.set_title(name)
    bottom = np.zeros(DEVICES)
    for time in range(DEVICES):
        bars.bar(
            range(DEVICES), work[time], bottom=bottom, color=COLOURS, edgecolor="white"
        )
        bottom += work[time]
    bars.set(ylim=(0, 16), xticks=range(DEVICES), xlabel="device", yticks=[])
    bars.set_title("work")


def main() -> None:
    figure, axes = plt.subplots(
        1, 4, figsize=(11, 3.4), width_ratios=(3, 1.3, 3, 1.3), layout="constrained"
    )
    draw(axes[0], axes[1], False)
    draw(axes[2], axes[3], True)
    figure.suptitle(
        "A causal ring of four devices: colours are devices, numbers the hops that the "
        "keys have made"
    )
    figure.savefig(OUT, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
