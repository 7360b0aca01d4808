"""One named grid of calls: for the tests here, and for what runs on a GPU.

A `Case` is a shape, a dtype and a set of options; `Case.inputs` draws its arrays. An
*option* is one thing that a call may ask for: a few arguments of `flash_attention`.
`results` evaluates a call: outputs and every gradient, by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash2 import _entries, flash_attention

# Arguments with a gradient.
WRT = ("query", "key", "value", "scale", "bias", "alibi_slopes", "sinks")


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of `flash_attention`, up to the values of its arrays."""

    options: tuple[str, ...] = ()
    q_length: int = 40
    kv_length: int = 40
    batch: tuple[int, ...] = (2,)
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: str = "float32"

    def __str__(self) -> str:
        batch = "x".join(map(str, self.batch))
        heads = f"{self.heads}/{self.kv_heads}x{self.head_dim}/{self.value_dim}"
        shape = f"{batch}x{self.q_length}/{self.kv_length}x{heads}"
        return "-".join([self.dtype, shape, "+".join(self.options) or "plain"])

    def inputs(self, seed: int = 0) -> Inputs:
        draw = Draw(self, np.random.default_rng(seed))
        arguments = {
            "query": draw.normal(*self.batch, self.q_length, self.heads, self.head_dim),
            "key": draw.normal(
                *self.batch, self.kv_length, self.kv_heads, self.head_dim
            ),
            "value": draw.normal(
                *self.batch, self.kv_length, self.kv_heads, self.value_dim
            ),
        }
        for name in self.options:
            arguments |= OPTIONS[name](draw)
        residual = jnp.float64 if self.dtype == "float64" else jnp.float32
        cotangents = (
            draw.normal(*self.batch, self.q_length, self.heads, self.value_dim),
            draw.normal(*self.batch, self.q_length, self.heads).astype(residual),
        )
        arrays = {n: a for n, a in arguments.items() if isinstance(a, jax.Array)}
        return Inputs(
            wrt={n: a for n, a in arrays.items() if n in WRT},
            fixed={n: a for n, a in arrays.items() if n not in WRT},
            static={n: a for n, a in arguments.items() if n not in arrays},
            cotangents=cotangents,
        )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of a call, and cotangents for its output and logsumexp."""

    wrt: dict[str, jax.Array]  # arrays with a gradient
    fixed: dict[str, jax.Array]  # other arrays
    static: dict[str, Any]
    cotangents: tuple[jax.Array, jax.Array]

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.wrt, **self.fixed, **self.static}

    def astype(self, dtype: Any) -> Inputs:
        """The same call with every floating array in ``dtype``."""

        def cast(x: jax.Array) -> jax.Array:
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        arrays = jax.tree.map(cast, (self.wrt, self.fixed, self.cotangents))
        wrt, fixed, cotangents = arrays
        return Inputs(wrt, fixed, self.static, cotangents)

    def replace(self, **arguments: Any) -> Inputs:
        """The same call with other values of some arguments, each of its old kind."""
        kinds = {
            name: {n: arguments.pop(n, a) for n, a in getattr(self, name).items()}
            for name in ("wrt", "fixed", "static")
        }
        assert not arguments, f"not arguments of this call: {list(arguments)}"
        return Inputs(**kinds, cotangents=self.cotangents)


def results(
    inputs: Inputs,
    implementation: str | None = "blockwise",
    *,
    function: Callable[..., Any] = flash_attention,
    jit: bool = True,
    quick: bool = True,
    **more: Any,
) -> dict[str, jax.Array]:
    """Output, logsumexp, largest logits if asked for, and all gradients, by name.

    ``quick`` spares a CPU's code generator its optimisations: for short lengths.
    """
    static = tuple(sorted((inputs.static | more).items()))
    quick = quick and jax.default_backend() == "cpu"
    evaluate = _evaluator(function, implementation, static, jit, quick)
    return evaluate(inputs.wrt, inputs.fixed, inputs.cotangents)


@functools.cache
def _evaluator(
    function: Callable[..., Any],
    implementation: str | None,
    static: tuple[tuple[str, Any], ...],
    jit: bool,
    quick: bool,
) -> Callable[..., dict[str, jax.Array]]:
    """One function for all values of the arrays, so that it is compiled once."""

    def evaluate(wrt: Any, fixed: Any, cotangents: Any) -> dict[str, jax.Array]:
        def call(wrt: Any) -> Any:
            out, lse, *largest = function(
                **wrt,
                **fixed,
                **dict(static),
                implementation=implementation,
                return_residual=True,
            )
            return (out, lse), largest

        (out, lse), pullback, largest = jax.vjp(call, wrt, has_aux=True)
        (grads,) = pullback(cotangents)
        named = {"out": out, "lse": lse} | {f"d{n}": g for n, g in grads.items()}
        return named | ({"max_logit": largest[0]} if largest else {})

    options = {"xla_backend_optimization_level": 0} if quick else None
    return jax.jit(evaluate, compiler_options=options) if jit else evaluate


# ------------------------------------------------------------------------------ options


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draws arrays for one case."""

    case: Case
    rng: np.random.Generator

    def normal(self, *shape: int, dtype: str | None = None) -> jax.Array:
        x = self.rng.standard_normal(shape)
        return jnp.asarray(x, dtype or self.case.dtype)

    def float32(self, *shape: int) -> jax.Array:
        """Side operands are float32 where query is narrower."""
        wide = "float64" if self.case.dtype == "float64" else "float32"
        return self.normal(*shape, dtype=wide)

    def integers(self, low: int, high: int, *shape: int) -> jax.Array:
        """From ``[low, high]``."""
        return jnp.asarray(self.rng.integers(low, high + 1, shape), jnp.int32)

    @property
    def scores(self) -> tuple[int, ...]:
        case = self.case
        return (*case.batch, case.heads, case.q_length, case.kv_length)

    @property
    def middle(self) -> int:
        """About a third of the keys."""
        return max(1, self.case.kv_length // 3)


def _lengths(name: str, length: str) -> Callable[[Draw], dict[str, Any]]:
    def option(draw: Draw) -> dict[str, Any]:
        return {name: draw.integers(0, getattr(draw.case, length), *draw.case.batch)}

    return option


def _segments(draw: Draw, *, packed: bool) -> dict[str, Any]:
    case = draw.case
    query_ids = draw.integers(-1, 1, *case.batch, case.q_length)
    key_ids = draw.integers(-1, 1, *case.batch, case.kv_length)
    if packed:
        query_ids, key_ids = jnp.sort(query_ids, -1), jnp.sort(key_ids, -1)
    return {"query_segment_ids": query_ids, "key_value_segment_ids": key_ids}


def _bias_masking(draw: Draw) -> dict[str, Any]:
    hidden = jnp.asarray(draw.rng.random(draw.scores) < 0.5)
    return {"bias": jnp.where(hidden, -jnp.inf, draw.float32(*draw.scores))}


OPTIONS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "causal": lambda draw: {"is_causal": True},
    "prefix": lambda draw: {
        "is_causal": True,
        "prefix_lengths": draw.integers(0, draw.case.kv_length, *draw.case.batch),
    },
    "offset": lambda draw: {
        "query_offset": draw.integers(
            -draw.middle, draw.case.kv_length, *draw.case.batch
        )
    },
    "offset_static": lambda draw: {
        "query_offset": draw.case.kv_length - draw.case.q_length - 2
    },
    "window": lambda draw: {"local_window_size": (draw.middle, draw.middle // 2)},
    "window_left": lambda draw: {"local_window_size": (draw.middle, None)},
    "window_right": lambda draw: {"local_window_size": (None, 1)},
    "chunk": lambda draw: {"chunk_size": draw.middle},
    "query_lengths": _lengths("query_seq_lengths", "q_length"),
    "key_lengths": _lengths("key_value_seq_lengths", "kv_length"),
    "segments": lambda draw: _segments(draw, packed=False),
    "segments_packed": lambda draw: _segments(draw, packed=True),
    "mask": lambda draw: {"mask": jnp.asarray(draw.rng.random(draw.scores) < 0.5)},
    "mask_of_keys": lambda draw: {
        "mask": jnp.asarray(draw.rng.random(draw.scores[-1:]) < 0.5)
    },
    "bias": lambda draw: {"bias": draw.normal(*draw.scores)},
    "bias_of_heads": lambda draw: {
        "bias": draw.float32(draw.case.heads, 1, draw.case.kv_length)
    },
    "bias_masking": _bias_masking,
    "alibi": lambda draw: {"alibi_slopes": 0.3 * draw.float32(draw.case.heads)},
    "alibi_of_batch": lambda draw: {
        "alibi_slopes": 0.3 * draw.normal(*draw.case.batch, draw.case.heads)
    },
    "sinks": lambda draw: {"sinks": draw.float32(draw.case.heads)},
    "soft_cap": lambda draw: {"logits_soft_cap": 1.5},
    "scale": lambda draw: {"scale": 0.7},
    "scale_traced": lambda draw: {"scale": draw.float32() * 0.1 + 0.4},
    "dropout": lambda draw: {
        "dropout_rate": 0.3,
        "dropout_key": jax.random.key(int(draw.rng.integers(1 << 30))),
    },
    "max_logit": lambda draw: {"return_max_logit": True},
    "deterministic": lambda draw: {"deterministic_backward": True},
}

# Arguments that two options may both give, to the same effect.
_SHARED = {"is_causal"}


def _legal(*options: str) -> bool:
    """Whether no two of the options give the same argument."""
    draw = Draw(Case(), np.random.default_rng(0))
    given = [set(OPTIONS[name](draw)) - _SHARED for name in options]
    return sum(map(len, given)) == len(set().union(*given))


PAIRS = tuple(p for p in itertools.combinations(OPTIONS, 2) if _legal(*p))


def covering(size: int, names: Iterable[str] = OPTIONS) -> list[tuple[str, ...]]:
    """Few sets of ``size`` options or less in which every legal pair of ``names`` occurs.

    Greedy: each set starts with a pair that is missing and grows by the option that
    brings the most missing pairs.
    """
    order = {name: n for n, name in enumerate(names)}
    missing = {pair for pair in PAIRS if order.keys() >= set(pair)}
    groups = []
    partners = {name: set() for name in order}
    for a, b in missing:
        partners[a].add(b)
        partners[b].add(a)

    def gain(name: str, group: list[str]) -> int:
        pairs = (tuple(sorted((name, other), key=order.get)) for other in group)
        return sum(pair in missing for pair in pairs)

    while missing:
        group = list(min(missing, key=lambda pair: (order[pair[0]], order[pair[1]])))
        while len(group) < size:
            legal = [n for n in order if all(n in partners[g] for g in group)]
            best = max(legal, key=lambda n: gain(n, group), default=None)
            if best is None or gain(best, group) == 0:
                break
            group.append(best)
        group.sort(key=order.get)
        missing -= set(itertools.combinations(group, 2))
        groups.append(tuple(group))
    return groups


# -------------------------------------------------------------------- how to compile


@contextlib.contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Runs the blockwise code with other blocks, so that short lengths have several.

    A compiled program keeps the blocks it was made with, so caches are cleared.
    """
    names = ("BLOCK", "WIDE_BLOCK", "NARROW_BLOCK")
    before = [getattr(_entries, name) for name in names]
    jax.clear_caches()
    for name in names:
        setattr(_entries, name, size)
    try:
        yield
    finally:
        for name, size in zip(names, before, strict=True):
            setattr(_entries, name, size)
        jax.clear_caches()


@contextlib.contextmanager
def quick_compilation(quick: bool = True) -> Iterator[None]:
    """Spares XLA's code generator its optimisations, or does not, whatever the environment
    says: for tests of many small programs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quick)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
