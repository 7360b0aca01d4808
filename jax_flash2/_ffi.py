"""The compiled module: loaded, checked and registered with XLA.

The module `jax_flash2._cuda` may be missing (an install without nvcc), too new for
jaxlib, or on a machine whose driver or GPU is too old. None of that is an error before
a kernel is asked for; then `unavailable` has the sentence.
"""

from __future__ import annotations

import functools
import importlib
import pathlib
import re
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax

from jax_flash2._spec import AttentionSpec

# Operands, results and attributes of a target are a contract with compiled programs
# that outlive this process; whoever changes them raises the version, in handlers.cc too.
FORWARD = "flash2_forward_v2"
BACKWARD = "flash2_backward_v1"
TARGETS = (FORWARD, BACKWARD)

_REBUILD = (
    "reinstall jax_flash2 where nvcc is on the PATH, or with JAX_FLASH2_CUDA=pypi set, "
    "which fetches nvcc from PyPI for the build"
)
# Each major version of CUDA names the oldest driver that serves it.
_OLDEST_DRIVER = {12: 525, 13: 580}
_OLDEST_GPU = 80


def _load() -> tuple[ModuleType | None, str | None]:
    """The module with its targets registered, or None and the reason."""
    try:
        module = importlib.import_module("jax_flash2._cuda")
    except ModuleNotFoundError:
        return None, f"this install of jax_flash2 has no CUDA kernels; {_REBUILD}"
    except ImportError as error:
        return None, f"jax_flash2's CUDA kernels failed to load ({error}); {_REBUILD}"
    # XLA refuses newer handlers than itself, and takes the whole backend down with them.
    reason = ffi_problem(module.build_info()["ffi"], _installed_ffi())
    if reason is None:
        for name, capsule in module.registrations().items():
            jax.ffi.register_ffi_target(name, capsule, platform="CUDA")
    return module, reason


def _installed_ffi() -> tuple[int, int] | None:
    """The FFI version of the installed jaxlib, by its header."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        text = header.read_text()
    except OSError:
        return None
    found = [re.search(rf"XLA_FFI_API_{x}\s+(\d+)", text) for x in ("MAJOR", "MINOR")]
    major, minor = (int(m.group(1)) if m else -1 for m in found)
    return (major, minor) if min(major, minor) >= 0 else None


def ffi_problem(
    built: tuple[int, int], installed: tuple[int, int] | None
) -> str | None:
    """Why handlers of FFI version ``built`` cannot run here, or None."""
    if installed is None or (built[0] == installed[0] and built[1] <= installed[1]):
        return None
    return (
        f"jax_flash2's CUDA kernels were built for XLA FFI {built[0]}.{built[1]}, and the "
        f"installed jaxlib has {installed[0]}.{installed[1]}: install a newer jaxlib, or "
        "rebuild jax_flash2"
    )


def driver_problem(built: tuple[int, int], driver: tuple[int, int]) -> str | None:
    """Why kernels built by CUDA ``built`` cannot run on this driver, or None.

    A driver serves every minor version of its own and of older majors. It need not be
    the CUDA that jax itself was installed for.
    """
    if driver == (0, 0) or driver[0] >= built[0]:  # (0, 0): no driver, so no GPU either
        return None
    oldest = _OLDEST_DRIVER.get(built[0])
    return (
        f"jax_flash2's CUDA kernels were built by CUDA {built[0]}.{built[1]} and need "
        f"NVIDIA driver {oldest or 'of that CUDA'} or newer; the installed one serves "
        f"CUDA up to {driver[0]}.{driver[1]}: update the driver, or rebuild jax_flash2 "
        "with that CUDA's nvcc"
    )


def gpu_problem(capabilities: Sequence[str]) -> str | None:
    """Why the kernels cannot run on GPUs of these compute capabilities, or None."""
    for capability in capabilities:
        major, _, minor = capability.partition(".")
        if int(major) * 10 + int(minor or 0) < _OLDEST_GPU:
            return (
                "jax_flash2's CUDA kernels need a GPU of compute capability 8.0 or newer "
                f"(Ampere); got {capability}"
            )
    return None


def _capabilities() -> list[str]:
    """Compute capabilities of this process's CUDA GPUs; none where there are none."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # lowering for a GPU elsewhere
        return []
    found = [getattr(device, "compute_capability", None) for device in devices]
    return sorted({str(c) for c in found if c is not None})


module, _load_problem = _load()


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why no CUDA kernel can run in this process, as a sentence, or None."""
    if module is None or _load_problem is not None:
        return _load_problem
    built, driver = module.build_info()["cuda"], module.driver_cuda()
    return driver_problem(built, driver) or gpu_problem(_capabilities())


def available() -> bool:
    """Whether the CUDA kernels can run in this process."""
    return unavailable() is None


def build_info() -> dict[str, Any] | None:
    """What the CUDA kernels were built from; None for an install without them.

    Keys: ``compiler``, ``host_compiler``, ``cuda`` and ``ffi`` (version tuples), and
    ``architectures``.
    """
    return None if module is None else dict(module.build_info())


_warned: set[str] = set()


def use_kernels(spec: AttentionSpec, lack: str | None) -> bool:
    """Whether the kernels serve a call on a CUDA GPU; ``lack`` is what they cannot do.

    Where they do not, a call that asks for them raises, and any other warns, once for
    each reason.
    """
    reason = unavailable() or lack
    if reason is None:
        return True
    if spec.implementation is not None:
        raise NotImplementedError(
            f"flash_attention: implementation={spec.implementation!r}: {reason}"
        )
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"flash_attention runs in plain JAX on this GPU, slower than its kernels: "
            f"{reason}. implementation='blockwise' says that this is intended.",
            stacklevel=2,
        )
    return False
