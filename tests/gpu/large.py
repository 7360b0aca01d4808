"""Calls that take up to 26 GB of the GPU, each in a process that gives them back.

XLA's allocator keeps what it has once taken, so that in a process of pytest such a call would
starve all that runs beside it and after it.
"""

import fcntl
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from compare import assert_bitwise_equal
from jax_flash2 import flash_attention


def alone(kind: str, check: Callable[..., None], *arguments: Any) -> None:
    """``check(*arguments)``, a function of a module, in a new process, one of a kind at a time.

    One of all processes of pytest-xdist: two of the largest side by side are too large. Its
    environment is the caller's, since importing this module already starts XLA.
    """
    path = Path(tempfile.gettempdir()) / f"jax_flash2_large_tests_{kind}"
    spawn = multiprocessing.get_context("spawn")
    takes_what_is_needed = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    with path.open("w") as lock, mock.patch.dict(os.environ, takes_what_is_needed):
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ProcessPoolExecutor(1, spawn) as pool:
            pool.submit(check, *arguments).result()


def attend(q: Any, k: Any, v: Any, dout: Any, family: str) -> Any:
    """Output and gradients."""

    def run(q: Any, k: Any, v: Any, dout: Any) -> Any:
        call = lambda *x: flash_attention(*x, implementation=family)  # noqa: E731
        out, pullback = jax.vjp(call, q, k, v)
        return out, *pullback(dout)

    return jax.jit(run)(q, k, v, dout)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def equal_on_device(a: Any, b: Any) -> bool:
    return bool(jax.jit(lambda a, b: (a == b).all())(a, b))


def near(a: Any, b: Any) -> None:
    """The order of a sum over key tiles may differ, hence its last bits."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=2.0**-6, atol=2.0**-7 * np.abs(b).max())


def many_queries(family: str, rows: int, few: int, heads: int, head_dim: int) -> None:
    q, dout = normal(0, 1, rows, heads, head_dim), normal(3, 1, rows, heads, head_dim)
    k, v = normal(1, 1, few, heads, head_dim), normal(2, 1, few, heads, head_dim)
    out, dq, dk, dv = attend(q, k, v, dout, family)
    for start in (0, rows // 2 // 256 * 256, rows - 256):
        part = slice(start, start + 256)
        some, some_dq, _, _ = attend(q[:, part], k, v, dout[:, part], family)
        assert equal_on_device(out[:, part], some)
        near(dq[:, part], some_dq)
    one = slice(heads - 1, heads)
    some = attend(*(x[:, :, one] for x in (q, k, v, dout)), family)
    assert_bitwise_equal([dk[:, :, one], dv[:, :, one]], list(some[2:]))


def many_keys(family: str, rows: int, few: int, heads: int, head_dim: int) -> None:
    k, v = normal(1, 1, rows, heads, head_dim), normal(2, 1, rows, heads, head_dim)
    q, dout = normal(0, 1, few, heads, head_dim), normal(3, 1, few, heads, head_dim)
    out, dq, dk, dv = attend(q, k, v, dout, family)
    for head in (0, heads - 1):
        one = slice(head, head + 1)
        some = attend(*(x[:, :, one] for x in (q, k, v, dout)), family)
        assert equal_on_device(out[:, :, one], some[0])
        near(dq[:, :, one], some[1])
        assert_bitwise_equal([dk[:, :, one], dv[:, :, one]], list(some[2:]))


def many_heads(family: str, batch: int, heads: int) -> None:
    q, dout = normal(0, batch, 3, heads, 64), normal(3, batch, 3, heads, 64)
    k, v = normal(1, batch, 5, heads, 64), normal(2, batch, 5, heads, 64)
    found = attend(q, k, v, dout, family)
    b, h = slice(batch - 1, batch), slice(heads - 1, heads)
    some = attend(*(x[b, :, h] for x in (q, k, v, dout)), family)
    assert_bitwise_equal([x[b, :, h] for x in found], list(some))
