"""Several devices: the mesh of --mesh, and what lies where on it."""

import contextlib
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpt.config import Config

AXES = ("data", "fsdp", "tensor")
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


def parse(text: str) -> dict[str, int]:
    """`data=2,tensor=4` as a dictionary in that order; '' is one device."""
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else []:
        name, _, size = part.partition("=")
        known = name in AXES and name not in sizes
        if not (known and size.isdecimal() and int(size) >= 1):
            raise ValueError(
                "--mesh must be like data=2,tensor=4: each of data, fsdp and tensor at "
                f"most once, with a size of at least 1; got {text}"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(text: str) -> Mesh:
    """A mesh with all of AXES, of size 1 where `text` does not name them.

    Call it before anything uses JAX's devices: a CPU becomes as many as it needs.
    """
    sizes = parse(text)
    count = math.prod(sizes.values())
    if count > max(1, jax.config.jax_num_cpu_devices):
        with contextlib.suppress(RuntimeError):  # too late; what is there may do
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) % count:
        raise ValueError(
            f"--mesh must have sizes whose product divides the {len(devices)} devices "
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
    )
    for name, divisor, axes in rules:
        value = getattr(config, name)
        if value % divisor:
            raise ValueError(
                f"--{name} must be a multiple of {axes} = {divisor} of --mesh; "
                f"got {value}"
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of tokens `[batch, length]`, and of what has more axes after these."""
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
