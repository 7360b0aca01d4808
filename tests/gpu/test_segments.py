"""Segment ids on Hopper: packed ones by its own kernels, all others by those of every GPU.

Which of the two does the work is decided on the device, by what the ids are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import FORCED, HOPPER, check_families, evaluate, forward, gpu_case

from cases import Inputs

DIMS = (64, 128, 256)


def runs(*lengths: int, ids: list[int] | None = None, length: int) -> np.ndarray:
    """Ids in runs of these lengths, 1, 2, ... if not said; zeros up to ``length``."""
    names = ids or range(1, len(lengths) + 1)
    found = np.repeat(np.asarray(list(names), np.int32), lengths)
    return np.pad(found, (0, length - len(found)))


def with_ids(
    inputs: Inputs, query: np.ndarray, key: np.ndarray | None = None
) -> Inputs:
    """Three entries: these ids, the same in one run less, and one segment alone.

    Without ``key`` both arguments are one array, which kernels search once.
    """

    def entries(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.stack([x, np.where(x == 2, 1, x), x * 0 + 7]))

    ids = entries(query)
    return inputs.replace(
        query_segment_ids=ids,
        key_value_segment_ids=ids if key is None else entries(key),
    )


PACKED = {
    "padded behind": (runs(100, 28, 300, 1, 65, length=577), None),
    "padded before": (np.roll(runs(100, 28, 300, 1, 65, length=577), 83), None),
    "one long": (runs(577, length=577), None),
    "each alone": (np.arange(577, dtype=np.int32), None),
    "negative": (runs(200, 377, ids=[-5, -2], length=577), None),
    # Rows whose id no key has, keys whose id no row has, also where tiles of 64 and 128 begin.
    "ids that lack": (
        runs(64, 64, 128, 100, 21, ids=[1, 5, 7, 9, 12], length=577),
        runs(128, 128, 64, 100, 90, ids=[1, 6, 7, 8, 12], length=577),
    ),
    "padding of queries alone": (
        runs(250, 250, length=577),
        runs(250, 327, length=577),
    ),
    "padding of keys alone": (runs(250, 327, length=577), runs(250, 250, length=577)),
}
MIXED = {
    "turning twice": (runs(100, 100, 100, 100, ids=[2, 1, 2, 1], length=577), None),
    "an id twice": (runs(100, 100, 100, 277, ids=[1, 2, 1, 3], length=577), None),
    "falling": (runs(200, 200, 177, ids=[3, 2, 1], length=577), None),
    "keys in another order": (
        runs(200, 377, ids=[1, 2], length=577),
        runs(200, 377, ids=[2, 1], length=577),
    ),
    "drawn": (np.random.default_rng(0).integers(0, 3, 577).astype(np.int32), None),
}


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize("options", [("segments",), ("segments", "causal")])
def test_ids_of_every_kind(options, head_dim):
    inputs = gpu_case(*options, length=577, head_dim=head_dim).inputs()
    for name, ids in (PACKED | MIXED).items():
        check_families(with_ids(inputs, *ids), name)


@pytest.mark.parametrize(
    "options", [("window",), ("chunk",), ("key_lengths",), ("offset", "causal")]
)
@pytest.mark.parametrize("head_dim", DIMS)
def test_other_masks_beside_packed_segments(options, head_dim):
    inputs = gpu_case("segments", *options, length=577, head_dim=head_dim).inputs()
    check_families(with_ids(inputs, *PACKED["ids that lack"]), str(options))


@pytest.mark.parametrize("length", [1024, 1025, 4100])
@pytest.mark.parametrize("head_dim", DIMS)
def test_long_packed_sequences(length, head_dim):
    """More than one block of the kernel that looks at the ids."""
    case = gpu_case("segments", "causal", length=length, head_dim=head_dim, heads=2)
    ids = runs(length // 3, length // 5, 130, length // 4, length=length)
    for key in (None, ids):
        check_families(with_ids(case.inputs(), ids, key))


@pytest.mark.skipif(not HOPPER, reason="other GPUs have one family of kernels")
@pytest.mark.parametrize("head_dim", DIMS)
def test_the_family_that_does_the_work(head_dim):
    """Where ids are mixed the bytes are those of the other family, else they are not."""
    plain = gpu_case("segments", length=577, head_dim=head_dim).inputs()
    for name, ids in (PACKED | MIXED).items():
        inputs = with_ids(plain, *ids)
        ours, others = (forward(inputs, family)["lse"] for family in ("cuda", FORCED))
        same = bool((ours == others).all())
        if name != "each alone":  # one key a row: no order of sums
            assert same == (name in MIXED), name


@pytest.mark.skipif(not HOPPER, reason="other GPUs have one family of kernels")
def test_one_mixed_entry_is_enough():
    inputs = gpu_case("segments", length=577).inputs()
    packed, mixed = PACKED["padded behind"][0], MIXED["drawn"][0]
    ids = jnp.asarray(np.stack([packed, mixed, packed]))
    inputs = inputs.replace(query_segment_ids=ids, key_value_segment_ids=ids)
    ours, others = evaluate(inputs, "cuda"), evaluate(inputs, FORCED)
    assert (ours["out"] == others["out"]).all()
    check_families(inputs)


@pytest.mark.parametrize("head_dim", DIMS)
def test_more_mixed_tiles_than_blocks(head_dim):
    """On Hopper those kernels have few blocks, which then take several tiles each."""
    case = gpu_case("segments", length=577, heads=16, batch=(9,), head_dim=head_dim)
    check_families(case.inputs())
