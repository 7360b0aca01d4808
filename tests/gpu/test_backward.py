"""What is the backward's alone: determinism, one cotangent at a time, and what it lacks."""

import jax
import jax.numpy as jnp
import pytest
from harness import (
    FORCED,
    check_command_buffers,
    check_families,
    each_family,
    evaluate,
    gpu_case,
)

from cases import Inputs, results
from compare import assert_bitwise_equal, assert_follows_the_rule
from jax_flash2 import _ffi, flash_attention

DIMS = (64, 128, 256)
GRADIENTS = ("dquery", "dkey", "dvalue")


def gradients(inputs, family):
    found = evaluate(inputs, family)
    return {name: found[name] for name in GRADIENTS}


@pytest.mark.parametrize("head_dim", DIMS)
def test_only_the_logsumexp_has_a_cotangent(head_dim):
    inputs = gpu_case("causal", "sinks", head_dim=head_dim, length=100).inputs()
    out, lse = inputs.cotangents
    some = Inputs(inputs.wrt, inputs.fixed, inputs.static, (jnp.zeros_like(out), lse))
    for family, ours in check_families(some).items():
        assert (ours["dvalue"] == 0).all(), family
        assert (ours["dquery"] != 0).any(), family


# On Hopper key tiles of such calls begin their walks apart, where there are as many as query
# heads to a key head; steps are of 80 rows at head_dim 128 from 1024 rows on.
WHOLE_KEY_TILES = ((512, 512), (300, 1024), (1100, 640), (70, 2048), (1024, 1024))
# At head_dim 64 with several query heads to a key head long ones do too.
MANY_KEY_TILES = ((300, 4096), (70, 16384))


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_whole_key_tiles_without_masks(head_dim, kv_heads):
    lengths = WHOLE_KEY_TILES + (MANY_KEY_TILES if head_dim == 64 else ())
    for number, (q_length, kv_length) in enumerate(lengths):
        case = gpu_case(
            q_length=q_length,
            kv_length=kv_length,
            heads=8,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=("bfloat16", "float16")[number % 2],
        )
        check_families(case.inputs(seed=number), str(case))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ((), dict(head_dim=64)),
        (("causal",), dict(head_dim=64)),
        (("causal",), dict(head_dim=128)),
        (("window",), dict(head_dim=128, dtype="float16")),
        ((), dict(head_dim=256)),
        (("causal", "offset", "key_lengths"), dict(head_dim=256)),
        (("segments", "alibi", "soft_cap"), dict(head_dim=64)),
        (("causal", "soft_cap"), dict(head_dim=128)),
        (("causal", "soft_cap"), dict(head_dim=256)),
    ],
)
@each_family
def test_deterministic_gradients_repeat(options, shape, family, facts):
    """1,000 runs, which other work disturbs, give the bytes of the first."""
    runs = 1000
    case = gpu_case(
        *(*options, "deterministic"),
        **dict(length=1100, batch=(2,), heads=8, kv_heads=4),
        **shape,
    )
    inputs = case.inputs()
    want = gradients(inputs, family)
    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), a, b))
    noise = jax.jit(lambda x: jnp.tanh(x @ x))
    x, equal = jnp.ones((1024, 1024)), []
    for run in range(runs):
        if run % 3 == 0:
            x = noise(x)
        equal.append(same(gradients(inputs, family), want))
    assert all(map(bool, jax.tree.leaves(jax.device_get(equal))))
    facts("deterministic", family, str(case), runs)


@each_family
@pytest.mark.parametrize("head_dim", DIMS)
def test_key_and_value_gradients_repeat_anyway(head_dim, family):
    inputs = gpu_case("causal", length=1500, head_dim=head_dim).inputs()
    want = gradients(inputs, family)
    for _ in range(50):
        ours = gradients(inputs, family)
        for name in ("dkey", "dvalue"):
            assert_bitwise_equal(ours[name], want[name])


def test_a_gradient_that_the_kernels_lack_runs_in_plain_jax(monkeypatch):
    monkeypatch.setattr(_ffi, "_warned", set())
    inputs = gpu_case("causal", "alibi", length=100).inputs()
    with pytest.warns(UserWarning, match="no gradient of alibi_slopes"):
        ours = results(inputs, None)
    assert_follows_the_rule(inputs, ours)


# ------------------------------------------------------------------- what XLA makes of it


@pytest.mark.parametrize("head_dim", [64, 72, 256])
def test_no_copies_of_what_the_backward_takes_and_gives(head_dim):
    inputs = gpu_case(head_dim=head_dim).inputs()
    call = lambda *x: flash_attention(*x, is_causal=True, implementation=FORCED)  # noqa: E731
    arrays = [inputs.wrt[name] for name in ("query", "key", "value")]
    _, pullback = jax.jit(lambda *x: jax.vjp(call, *x))(*arrays)
    run = jax.jit(lambda pullback, dout: pullback(dout))
    text = run.lower(pullback, inputs.cotangents[0]).compile().as_text()
    assert f'custom_call_target="{_ffi.BACKWARD}"' in text
    for word in (" copy(", " transpose(", " broadcast(", " pad(", "fusion("):
        assert word not in text, text


COMMAND_BUFFERS = """
import hashlib, jax, jax.numpy as jnp
from jax_flash2 import flash_attention
def chain(q, k, v):
    for window in (None, 5, 64, 100, None, 7, 9, 50):
        q = flash_attention(q, k, v, is_causal=True, local_window_size=window,
                            implementation="cuda_sm80", deterministic_backward=True)
    return q
@jax.jit
def gradients(q, k, v):
    return jax.vjp(chain, q, k, v)[1](q)
ks = jax.random.split(jax.random.key(0), 3)
total = hashlib.sha256()
for i in range(10):
    x = [jax.random.normal(jax.random.fold_in(k, i), (2, 333, 4, 64), jnp.bfloat16)
         for k in ks]
    for g in jax.device_get(gradients(*x)):
        total.update(g.tobytes())
print(total.hexdigest())
"""


def test_command_buffers_give_the_same_gradients():
    check_command_buffers(COMMAND_BUFFERS)
