"""What the GPU did: kernel times by CUPTI, and its clock. Never a host clock."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any


class Kernels:
    """The kernels that ran inside `recorded`: names and milliseconds, in order.

    Copies and memsets are no kernels and are not in their sum; `wall_ms` bounds them.
    """

    timings: list[tuple[str, float]]
    wall_ms: float

    @property
    def ms(self) -> float:
        """How long the device was at work, at most: kernels that overlap, as those of a
        programmatic dependent launch do while they wait, count twice in the sum."""
        return min(sum(ms for _, ms in self.timings), self.wall_ms)


@contextlib.contextmanager
def recorded(
    synchronize: Callable[[], Any], start: Callable[[], Any] = lambda: None
) -> Iterator[Kernels]:
    """Records every kernel of this process, whichever framework launches it.

    ``start`` is called first: a recording's first kernels take milliseconds to begin,
    which is no part of `wall_ms`. Kernels of its own are in the list.
    """
    from jax._src.lib import mosaic_gpu

    ext: Any = getattr(mosaic_gpu, "_mosaic_gpu_ext")  # noqa: B009
    kernels = Kernels()
    synchronize()
    ext._cupti_init()
    try:
        start()
        synchronize()
        began = time.perf_counter()
        yield kernels
        synchronize()
        kernels.wall_ms = (time.perf_counter() - began) * 1e3
    finally:
        kernels.timings = list(ext._cupti_get_timings(True) or [])


def query(fields: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [field.strip() for field in done.stdout.splitlines()[0].split(",")]


class Clock:
    """Samples the SM clock in the background."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._process = subprocess.Popen(
            [
                *("nvidia-smi", "--query-gpu=clocks.sm", "-i", "0"),
                *("--format=csv,noheader,nounits", "-lms", "50"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self._samples.append((time.perf_counter(), float(line)))

    def between(self, intervals: list[tuple[float, float]]) -> float | None:
        """Median clock in MHz inside the intervals of `time.perf_counter`."""
        seen = [
            mhz
            for at, mhz in list(self._samples)
            if any(start <= at <= end for start, end in intervals)
        ]
        return median(seen) if seen else None

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()


def folder(name: str) -> str:
    """``h100`` for "NVIDIA H100 80GB HBM3"."""
    words = [w for w in name.lower().split() if w not in ("nvidia", "geforce", "rtx")]
    return words[0] if words else "gpu"


def machine() -> tuple[dict[str, str], str]:
    """What JAX runs on, and the folder of its results."""
    import jax

    if jax.default_backend() != "gpu":
        return {"cpu": jax.devices()[0].device_kind}, "cpu"
    gpu, driver = query("name,driver_version")
    return {"gpu": gpu, "driver": driver}, folder(gpu)
