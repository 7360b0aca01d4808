"""The pause between our kernels on the GPU, beside that between trivial custom calls.

A jitted chain of 100 calls is traced; the gap is from a kernel's end to the next one's
start on the device's timeline, the median over the chain and over several runs. The
trivial call, trivial_call.cu, is compiled here by nvcc.

  python benchmarks/gap.py
"""

import ctypes
import itertools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

import jax_flash2

CALLS, RUNS = 100, 10


def trivial_call() -> Callable[..., Any]:
    source = Path(__file__).with_name("trivial_call.cu")
    library = Path(tempfile.mkdtemp()) / "trivial_call.so"
    command = [
        "nvcc",
        "-std=c++17",
        "-shared",
        "-w",
        "-Xcompiler=-fPIC",
        "-arch=native",
    ]
    command += ["-I", jax.ffi.include_dir(), str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    handler = ctypes.CDLL(str(library)).Trivial
    jax.ffi.register_ffi_target(
        "trivial_call", jax.ffi.pycapsule(handler), platform="CUDA"
    )
    like = jax.ShapeDtypeStruct((32,), jnp.float32)
    return jax.ffi.ffi_call("trivial_call", like)


def gaps_us(f: Callable[..., Any], *arrays: Any) -> list[float]:
    """Gaps between the kernels of every run, in microseconds."""
    jax.block_until_ready(f(*arrays))
    folder = tempfile.mkdtemp()
    with jax.profiler.trace(folder):
        for _ in range(RUNS):
            jax.block_until_ready(f(*arrays))
    (path,) = Path(folder).rglob("*.xplane.pb")
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            events = sorted((e.start_ns, e.end_ns) for e in line.events)
            pairs = itertools.pairwise(events)
            gaps = [(later[0] - earlier[1]) / 1e3 for earlier, later in pairs]
            found += [gap for gap in gaps if gap < 1000]  # not between runs
    if len(found) < RUNS * (CALLS - 1):
        raise RuntimeError(
            f"the trace shows {len(found)} gaps; {RUNS * (CALLS - 1)} wanted"
        )
    return found


def main() -> None:
    trivial = trivial_call()

    @jax.jit
    def chain_of_trivial(x: jax.Array) -> jax.Array:
        for _ in range(CALLS):
            x = trivial(x)
        return x

    def chain_of_ours(q: Any, k: Any, v: Any) -> Any:
        for _ in range(CALLS):
            q = jax_flash2.flash_attention(
                q, k, v, is_causal=True, implementation="cuda_sm80"
            )
        return q

    q, k, v = (
        jax.random.normal(key, (2, 1024, 16, 64), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 3)
    )
    base = median(gaps_us(chain_of_trivial, jnp.zeros(32)))
    ours = median(gaps_us(jax.jit(chain_of_ours), q, k, v))
    print(
        f"gap: ours {ours:.2f} us, a trivial call {base:.2f} us, more by {ours - base:.2f}"
    )


if __name__ == "__main__":
    main()
