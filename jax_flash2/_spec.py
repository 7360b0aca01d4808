"""What one call is: its static facts, its arrays, and what their axes are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp

if TYPE_CHECKING:
    from jax_flash2._sequence import Ring


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static facts of a call; hashable, a parameter of the primitives.

    Attributes:
      scale: factor of the scores, or None where it is an operand.
      window: keys visible to the left and right of a query, None where unbounded.
      soft_cap: c in ``c * tanh(x / c)``, or None.
      implementation: as in `flash_attention`.
      ring: where the arrays are one device's part of a sequence, inside a
        `jax.shard_map`, how that lies on the devices.
    """

    scale: float | None = None
    is_causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    chunk_size: int | None = None
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    deterministic_backward: bool = False
    return_max_logit: bool = False
    implementation: str | None = None
    ring: Ring | None = None


class Operands(NamedTuple):
    """The arrays of a call; absent ones are None. All share the number of batch axes.

    Batch axes have full size or 1. `AXES` gives the axes after them.
    """

    query: Any = None
    key: Any = None
    value: Any = None
    scale: Any = None
    bias: Any = None
    mask: Any = None
    query_seq_lengths: Any = None
    key_value_seq_lengths: Any = None
    query_offset: Any = None
    prefix_lengths: Any = None
    query_segment_ids: Any = None
    key_value_segment_ids: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    dropout_streams: Any = None
    origin: Any = None


# The axes after the batch axes: l query length, s key length, h query heads, n key
# heads, d head_dim, e value's head_dim, r the two words of a dropout stream or the first
# row and the first key of a block of a longer sequence. An axis of l, s or h may have
# size 1 in bias, mask, slopes, sinks and streams (broadcast).
AXES = Operands(
    query="lhd",
    key="snd",
    value="sne",
    scale="",
    bias="hls",
    mask="hls",
    query_seq_lengths="",
    key_value_seq_lengths="",
    query_offset="",
    prefix_lengths="",
    query_segment_ids="l",
    key_value_segment_ids="s",
    alibi_slopes="h",
    sinks="h",
    dropout_streams="hr",
    origin="r",
)
# Operands with gradients beside query, key and value.
SIDE_OPERANDS = ("scale", "bias", "alibi_slopes", "sinks")
DIFFERENTIABLE = ("query", "key", "value", *SIDE_OPERANDS)
# Axes after the batch axes of the forward's results and of what goes with them.
RESULT_AXES = {"out": "lhe", "lse": "hl", "dout": "lhe", "dlse": "hl", "largest": "h"}
# A tangent is named after its array, with one of these before it: t and u are the two
# directions of the derivatives, w marks what comes out along both.
_TANGENTS = ("t_", "u_", "w_")


def base_name(name: str) -> str:
    """``t_query`` is a tangent of ``query``."""
    return name[2:] if name.startswith(_TANGENTS) else name


def axes_of(name: str) -> str:
    """The axes after the batch axes of an operand, a result or a tangent of one."""
    base = base_name(name)
    return RESULT_AXES[base] if base in RESULT_AXES else getattr(AXES, base)


def joint(sizes: Iterable[Any]) -> Any:
    """The size of an axis along which some arrays broadcast: the one that is not 1, be it
    0 or a symbol of `jax.export`, which has no maximum with a number."""
    return next((n for n in sizes if n != 1), 1)


def accumulator(dtype: Any) -> Any:
    """The dtype of scores, sums and logsumexps: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
