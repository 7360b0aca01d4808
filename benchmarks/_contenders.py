"""Who takes part: us, and every peer that is installed. Each is made ready for a cell.

A contender's factory gets a `Cell` and returns a `Ready`, or raises `Absent` with the
reason why it does not take part. Peers are imported only there.
"""

import dataclasses
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Absent(Exception):
    """This contender does not take part in this cell."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting: ``[batch, seq, heads, head_dim]`` self-attention."""

    dtype: str
    head_dim: int
    causal: bool
    window: int | None  # keys to the left of a query that it sees
    seq: int
    batch: int
    heads: int
    heads_kv: int
    documents: int | None = None  # as long as each other, packed into a row; one
    deterministic: bool = False  # the backward
    soft_cap: float | None = None

    @property
    def scores(self) -> float:
        """Visible pairs of query and key, as the papers count: causal is one half."""
        if self.documents is not None:
            parts = dict(seq=self.seq // self.documents, documents=None)
            return self.documents * dataclasses.replace(self, **parts).scores
        if self.window is not None:
            rows = min(self.window, self.seq)
            return rows * self.seq - rows * (rows - 1) / 2
        return self.seq**2 * (0.5 if self.causal else 1.0)

    def flops(self, which: str) -> float:
        forward = 4.0 * self.batch * self.heads * self.head_dim * self.scores
        return {"fwd": forward, "bwd": 2.5 * forward}[which]


@dataclasses.dataclass
class Ready:
    """A contender with its inputs on the device.

    ``run[which]()`` enqueues one call; ``results(which)`` are arrays on the device,
    ``[batch, seq, heads, head_dim]``: the output, or the three gradients.
    ``to_numpy`` takes a part of one. ``flops``: of a call that is no attention.
    """

    run: dict[str, Callable[[], Any]]
    results: Callable[[str], list[Any]]
    to_numpy: Callable[[Any], np.ndarray]
    synchronize: Callable[[], Any]
    flops: float | None = None


def inputs(cell: Cell) -> list[np.ndarray]:
    """Query, key, value and the output's cotangent, the same for every contender."""
    q = (cell.batch, cell.seq, cell.heads, cell.head_dim)
    kv = (cell.batch, cell.seq, cell.heads_kv, cell.head_dim)
    return [
        _normal(which, int(np.prod(shape))).reshape(shape)
        for which, shape in enumerate((q, kv, kv, q))
    ]


@functools.cache
def _normal(seed: int, count: int) -> np.ndarray:
    """Every cell of a table has as many elements, so they are drawn once."""
    return np.random.default_rng(seed).standard_normal(count, np.float32)


# ------------------------------------------------------------------------------------ JAX


@functools.lru_cache(maxsize=8)
def _jax_inputs(cell: Cell) -> list[jax.Array]:
    return [jnp.asarray(x, cell.dtype) for x in inputs(cell)]


def _jax(call: Callable[..., Any], cell: Cell, passes: list[str]) -> Ready:
    q, k, v, dout = _jax_inputs(cell)
    forward = jax.jit(call)
    # The backward alone: everything from the cotangent to the gradients.
    run: dict[str, Callable[[], Any]] = {"fwd": lambda: forward(q, k, v)}
    if "bwd" in passes:
        _, pullback = jax.jit(lambda *x: jax.vjp(call, *x))(q, k, v)
        backward = jax.jit(lambda f, dout: f(dout))
        run["bwd"] = lambda: backward(pullback, dout)

    def results(which: str) -> list[jax.Array]:
        return jax.tree.leaves(run[which]())

    def to_numpy(x: jax.Array) -> np.ndarray:
        return np.asarray(x, np.float32)

    last: dict[str, Any] = {}

    def keep(which: str) -> Any:
        # What is waited for: the last result, in order behind all the others.
        last["result"] = run[which]()

    kept = {which: functools.partial(keep, which) for which in run}

    def synchronize() -> Any:
        jax.block_until_ready(last.get("result"))

    return Ready(kept, results, to_numpy, synchronize)


def flash2(implementation: str, cell: Cell, passes: list[str]) -> Ready:
    import jax_flash2

    window = None if cell.window is None else (cell.window - 1, None)
    ids = None
    if cell.documents is not None:
        row = np.arange(cell.seq, dtype=np.int32) // (cell.seq // cell.documents)
        ids = jnp.asarray(np.broadcast_to(row + 1, (cell.batch, cell.seq)))
    call = functools.partial(
        jax_flash2.flash_attention,
        is_causal=cell.causal,
        local_window_size=window,
        query_segment_ids=ids,
        deterministic_backward=cell.deterministic,
        logits_soft_cap=cell.soft_cap,
        implementation=implementation,
    )
    return _jax(call, cell, passes)


def jax_nn(implementation: str, cell: Cell, passes: list[str]) -> Ready:
    if implementation == "xla" and cell.seq > 4096:
        raise Absent("its scores would not fit")
    window = None if cell.window is None else (cell.window - 1, cell.seq)
    arguments: dict[str, Any] = {"implementation": implementation}
    call = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=cell.causal,
        local_window_size=window,
        **arguments,
    )
    return _jax(call, cell, passes)


def tokamax(cell: Cell, passes: list[str]) -> Ready:
    if cell.window is not None:
        raise Absent("not set up for windows")
    try:  # its benchmarking module wants a tool that attention does not
        import xprof  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError:
        for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
            sys.modules.setdefault(name, types.ModuleType(name))
        tool = "get_kernel_stats_tool"
        stub = types.ModuleType(f"xprof.cli.tools.{tool}")
        sys.modules.setdefault(stub.__name__, stub)
        setattr(sys.modules["xprof.cli.tools"], tool, stub)
    import tokamax  # pyright: ignore[reportMissingImports]

    call = functools.partial(
        tokamax.dot_product_attention, is_causal=cell.causal, implementation="mosaic"
    )
    return _jax(call, cell, passes)


def dew(cell: Cell, passes: list[str]) -> Ready:
    if cell.window is not None:
        raise Absent("not set up for windows")
    from dew_flash_attn import flash_mha  # pyright: ignore[reportMissingImports]

    return _jax(functools.partial(flash_mha, is_causal=cell.causal), cell, passes)


# ---------------------------------------------------------------------------------- torch


def _torch(call: Callable[..., Any], heads_first: bool, cell: Cell) -> Ready:
    import torch  # pyright: ignore[reportMissingImports]

    def put(x: np.ndarray) -> Any:
        t = torch.from_numpy(x).cuda().to(getattr(torch, cell.dtype))
        return (t.transpose(1, 2).contiguous() if heads_first else t).detach()

    q, k, v, dout = map(put, inputs(cell))
    for x in (q, k, v):
        x.requires_grad_()

    def forward() -> Any:
        with torch.no_grad():
            return call(q, k, v)

    out = call(q, k, v)

    def backward() -> Any:
        return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    run = {"fwd": forward, "bwd": backward}

    def results(which: str) -> list[Any]:
        found = run[which]()
        found = found if isinstance(found, tuple) else (found,)
        return [x.transpose(1, 2) if heads_first else x for x in found]

    def to_numpy(x: Any) -> np.ndarray:
        return x.detach().float().cpu().numpy()

    return Ready(run, results, to_numpy, torch.cuda.synchronize)


def torch_sdpa(backend: str, cell: Cell, passes: list[str]) -> Ready:
    del passes
    if cell.window is not None:
        raise Absent("has no windows")
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import (  # pyright: ignore[reportMissingImports]
        SDPBackend,
        sdpa_kernel,
    )

    def call(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=cell.causal, enable_gqa=cell.heads != cell.heads_kv
            )

    return _torch(call, True, cell)


def fa4(cell: Cell, passes: list[str]) -> Ready:
    del passes
    from flash_attn.cute import (  # pyright: ignore[reportMissingImports]
        flash_attn_func,
    )

    window = (None, None) if cell.window is None else (cell.window - 1, None)

    def call(q: Any, k: Any, v: Any) -> Any:
        result = flash_attn_func(q, k, v, causal=cell.causal, window_size=window)
        return result[0] if isinstance(result, tuple) else result

    return _torch(call, False, cell)


# Their first calls compile outside of Python's lock, several at once.
CONCURRENT = ("flash2_sm80", "flash2_sm90", "flash2_blockwise")
CONCURRENT += ("jax_cudnn", "jax_xla", "jax_dew")
CONTENDERS: dict[str, Callable[[Cell, list[str]], Ready]] = {
    "flash2_sm80": functools.partial(flash2, "cuda_sm80"),
    "flash2_sm90": functools.partial(flash2, "cuda"),
    "flash2_blockwise": functools.partial(flash2, "blockwise"),
    "torch_flash": functools.partial(torch_sdpa, "FLASH_ATTENTION"),
    "torch_cudnn": functools.partial(torch_sdpa, "CUDNN_ATTENTION"),
    "jax_cudnn": functools.partial(jax_nn, "cudnn"),
    "jax_xla": functools.partial(jax_nn, "xla"),
    "jax_tokamax": tokamax,
    "fa4": fa4,
    "jax_dew": dew,
}
