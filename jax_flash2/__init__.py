"""FlashAttention-2 for JAX: exact attention, in memory linear in the length."""

from typing import Any

from jax_flash2._context import ContextParallel
from jax_flash2._ffi import build_info
from jax_flash2.attention import flash_attention
from jax_flash2.ring import ring_attention, unzigzag, zigzag

__version__ = "0.1.0"
__all__ = [
    "ContextParallel",
    "Flash2Attention",
    "__version__",
    "attention_fn",
    "build_info",
    "flash_attention",
    "ring_attention",
    "unzigzag",
    "zigzag",
]


def __getattr__(name: str) -> Any:
    # The modules are imported when first asked for: flax takes longer than all the rest.
    if name in ("Flash2Attention", "attention_fn"):
        from jax_flash2 import nnx

        return getattr(nnx, name)
    if name in ("linen", "nnx"):
        import importlib

        return importlib.import_module(f"jax_flash2.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
