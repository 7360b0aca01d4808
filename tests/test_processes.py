"""Two processes that share one sequence: the ring crosses from one to the other.

The tests start this file itself, twice, with two CPU devices each.
"""

import contextlib
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
COUNT, LENGTH = 2, 32


def main(address: str, index: int) -> None:
    """One of the processes: compares its own part of the gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from jax_flash2 import flash_attention, ring_attention, unzigzag, zigzag

    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, COUNT, index)
    devices = np.array(jax.devices())
    assert devices.size == 4
    shapes = ((2, LENGTH, 4, 8), (2, LENGTH, 2, 8), (2, LENGTH, 2, 8))
    x = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes)]
    x = [np.asarray(a) for a in x]
    causal = dict(is_causal=True)

    def gradients(function: Any) -> Any:
        return jax.jit(jax.grad(lambda *x: (function(*x) ** 2).sum(), (0, 1, 2)))

    want = [
        np.asarray(g)
        for g in gradients(functools.partial(flash_attention, **causal))(*x)
    ]
    # Neighbours of the first ring are mostly of one process, of the second never.
    for order in (devices, devices.reshape(2, 2).T.reshape(-1)):
        mesh = Mesh(order, ("seq",))
        at = NamedSharding(mesh, P(None, "seq"))
        placed = [
            jax.make_array_from_callback(a.shape, at, lambda i, a=a: a[i]) for a in x
        ]
        call = functools.partial(ring_attention, axis_name="seq", zigzag=True, **causal)
        ring = jax.shard_map(call, mesh=mesh, in_specs=at.spec, out_specs=at.spec)

        def zigzagged(*x: jax.Array, ring: Any = ring) -> jax.Array:
            return unzigzag(ring(*(zigzag(a, 4) for a in x)), 4)

        for function in (functools.partial(flash_attention, **causal), zigzagged):
            for got, whole in zip(gradients(function)(*placed), want, strict=True):
                bound = 1e-5 * max(1.0, float(jnp.abs(whole).max()))
                for shard in got.addressable_shards:
                    part = np.asarray(shard.data)
                    np.testing.assert_allclose(part, whole[shard.index], 0, bound)
    print("equal")


def run_all(commands: Sequence[Sequence[str]]) -> list[str]:
    """Runs commands side by side; what they say, if all succeed."""
    import jax_flash2

    package = str(pathlib.Path(jax_flash2.__file__).resolve().parents[1])
    env = os.environ | {
        "PYTHONPATH": package,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time here
    }
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text
    return said


def free_address() -> str:
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def test_the_ring_crosses_from_process_to_process() -> None:
    address = free_address()
    commands = [[__file__, address, str(index)] for index in range(COUNT)]
    for text in run_all(commands):
        assert "equal" in text


def test_the_example_trains_in_two_processes_as_in_one(tmp_path: pathlib.Path) -> None:
    flags = [
        *("--layers", "1", "--width", "32", "--heads", "2", "--length", "32"),
        *("--batch", "2", "--steps", "4", "--eval-every", "2", "--eval-batches", "1"),
        *("--checkpoint-every", "2", "--sample", "5"),
    ]
    example = str(ROOT / "examples" / "train_gpt.py")
    address = free_address()
    one, two = tmp_path / "one", tmp_path / "two"
    run_all([[example, *flags, "--out", str(one)]])
    several = ["--out", str(two), "--mesh", "seq=4", "--hosts"]
    said, _ = run_all(
        [[example, *flags, *several, f"{address},2,{index}"] for index in range(COUNT)]
    )
    assert "on 4 devices (seq=4), each cpu" in said
    a, b = (json.loads((out / "history.json").read_text()) for out in (one, two))
    for name in a:
        assert len(a[name]) == len(b[name])
        assert all(abs(x - y) <= 5e-5 for x, y in zip(a[name], b[name], strict=True))
    texts = [(out / "sample.txt").read_text() for out in (one, two)]
    assert texts[0] == texts[1]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
