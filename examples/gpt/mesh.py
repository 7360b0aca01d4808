"""Several devices, of one host or more: the mesh of --mesh, and what lies where on it."""

import contextlib
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt.config import Config
from jax_flash2 import ContextParallel

AXES = ("data", "fsdp", "tensor", "seq")
BATCH = ("data", "fsdp")  # what sequences are split over

# Axes that split a parameter, by the end of its name; a layer's has the stack's axis in
# front. AdamW's moments end in the same names. The rest, vectors and counters, is small:
# every device has it whole.
PARAMETERS = {
    r"(query|key|value)/kernel": (None, "fsdp", "tensor", None),  # width, heads
    r"out/kernel": (None, "tensor", None, "fsdp"),  # heads, head_dim, width
    r"mlp_in/kernel": (None, "fsdp", "tensor"),
    r"mlp_out/kernel": (None, "tensor", "fsdp"),
    r"embedding/embedding": ("tensor", "fsdp"),  # vocabulary, width
}


class Hosts(NamedTuple):
    """One process of several, each with devices of its own."""

    coordinator: str  # host:port of process 0
    count: int
    index: int


def parse_hosts(text: str) -> Hosts | None:
    """`host:port,2,0` as process 0 of 2; '' is one process alone."""
    if not text:
        return None
    coordinator, *numbers = text.split(",")
    fits = len(numbers) == 2 and all(number.isdecimal() for number in numbers)
    if not (fits and ":" in coordinator and int(numbers[1]) < int(numbers[0])):
        raise ValueError(
            "--hosts must be like host0:1234,2,0: address and port of process 0, the "
            f"number of processes and this one's index, below that; got {text}"
        )
    return Hosts(coordinator, int(numbers[0]), int(numbers[1]))


def parse(text: str) -> dict[str, int]:
    """`data=2,tensor=4` as a dictionary in that order; '' is one device."""
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else []:
        name, _, size = part.partition("=")
        known = name in AXES and name not in sizes
        if not (known and size.isdecimal() and int(size) >= 1):
            raise ValueError(
                "--mesh must be like data=2,tensor=4: each of data, fsdp, tensor and "
                f"seq at most once, with a size of at least 1; got {text}"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str, hosts: Hosts | None = None) -> Mesh:
    """A mesh with all of AXES, of size 1 where `text` does not name them.

    Call it before anything uses JAX's devices: a CPU becomes as many as it needs, and
    the processes of `hosts` find each other.
    """
    sizes = parse(text)
    count = math.prod(sizes.values())
    here = count if hosts is None else -(-count // hosts.count)
    if here > max(1, jax.config.jax_num_cpu_devices):
        with contextlib.suppress(RuntimeError):  # too late; what is there may do
            jax.config.update("jax_num_cpu_devices", here)
    if hosts is not None:
        jax.distributed.initialize(hosts.coordinator, hosts.count, hosts.index)
    devices = jax.devices()
    if len(devices) % count or (hosts is not None and len(devices) != count):
        rule = "divides" if hosts is None else "is that of"
        raise ValueError(
            f"--mesh must have sizes whose product {rule} the {len(devices)} devices "
            f"of the platform {devices[0].platform}; got {text}, {count} devices"
        )
    sizes |= {name: 1 for name in AXES if name not in sizes}
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:count],
    )


def check(config: Config, mesh: Mesh) -> None:
    """Refuses a model or batch that the mesh cannot split evenly."""
    size = mesh.shape
    rules = (
        ("batch", size["data"] * size["fsdp"], "data * fsdp"),
        ("heads", size["tensor"], "tensor"),
        ("width", size["fsdp"], "fsdp"),
        ("length", 2 * size["seq"] if size["seq"] > 1 else 1, "2 * seq"),
    )
    for name, divisor, axes in rules:
        value = getattr(config, name)
        if value % divisor:
            raise ValueError(
                f"--{name} must be a multiple of {axes} = {divisor} of --mesh; "
                f"got {value}"
            )

    if size["seq"] > 1 and config.attention != "flash2":
        raise ValueError(
            "--attention must be flash2 where --mesh has a seq axis, since the others "
            f"have no ring; got {config.attention}"
        )


def context_parallel(mesh: Mesh) -> ContextParallel | None:
    """How sequences lie on the mesh: in zigzag order over seq, if that is an axis."""
    if mesh.shape["seq"] == 1:
        return None
    return ContextParallel(
        axis_name="seq",
        zigzag=True,
        batch_axis_name=BATCH,
        head_axis_name="tensor",
        mesh=mesh,
    )


def place(tokens: np.ndarray, mesh: Mesh) -> jax.Array:
    """Tokens, which every process has, as an array over all devices."""
    return jax.make_array_from_callback(
        tokens.shape, batch_sharding(mesh), lambda index: tokens[index]
    )


def stream_sharding(mesh: Mesh) -> NamedSharding:
    """Of the residual stream `[batch, length, width]`."""
    return NamedSharding(mesh, PartitionSpec(BATCH, "seq"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of tokens `[batch, length]`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Where each array of parameters and optimizer state belongs, by name and shape."""

    def sharding(path, x) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next(
            (axes for end, axes in PARAMETERS.items() if re.search(f"/{end}$", name)),
            (),
        )
        # A vocabulary that the axis does not divide stays whole.
        fitting = (
            axis if axis and length % mesh.shape[axis] == 0 else None
            for axis, length in zip(axes, x.shape, strict=False)
        )
        return NamedSharding(mesh, PartitionSpec(*fitting))

    return jax.tree.map_with_path(sharding, state)
