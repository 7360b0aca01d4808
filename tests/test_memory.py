"""Memory grows with the length, never with its square."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from cases import quick_compilation
from jax_flash2 import flash_attention

HEAD_DIM = 64
ARGUMENTS = {
    "causal": {"is_causal": True},
    "all that is structured": {
        "is_causal": True,
        "local_window_size": (300, None),
        "chunk_size": 1000,
        "query_offset": jnp.int32(3),
        "prefix_lengths": jnp.int32(40),
        "query_seq_lengths": jnp.int32(2000),
        "key_value_seq_lengths": jnp.int32(1900),
        "query_segment_ids": jnp.int32([1]),
        "key_value_segment_ids": jnp.int32([1]),
        "alibi_slopes": jnp.float32([0.1]),
        "sinks": jnp.float32([0.1]),
        "logits_soft_cap": 20.0,
        "dropout_rate": 0.1,
        "dropout_key": jax.random.key(0),
    },
}


@pytest.fixture(scope="module", autouse=True)
def fully_compiled():
    """It is the program that users run whose memory counts."""
    with quick_compilation(False):
        yield


@functools.cache
def compiled(length, name="causal", implementation="blockwise"):
    """A training step's attention: value and gradients, compiled and not run."""

    def loss(q, k, v):
        out = flash_attention(q, k, v, **ARGUMENTS[name], implementation=implementation)
        return (out**2).sum()

    x = jax.ShapeDtypeStruct((1, length, 1, HEAD_DIM), jnp.float32)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, x, x).compile()


def largest_array(program):
    """Elements of the largest array in the optimised program."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_optimised_program_holds_no_array_of_length_by_length(name):
    length = 2048
    assert largest_array(compiled(length, name)) <= 2 * length * HEAD_DIM


def test_the_dense_path_does_hold_one():
    """So the search above finds what it looks for."""
    assert largest_array(compiled(2048, implementation="reference")) >= 2048**2


def test_temporary_memory_grows_linearly():
    lengths = [1024, 2048, 4096, 8192]
    temporary = [
        compiled(length).memory_analysis().temp_size_in_bytes for length in lengths
    ]
    for length, size in zip(lengths, temporary, strict=True):
        # A few arrays like query, and some blocks of 256 by 256.
        assert size < 12 * length * HEAD_DIM * 4 + 16 * 256 * 256 * 4, temporary
    for size, twice in itertools.pairwise(temporary):
        assert twice < 2.1 * size, temporary


def test_a_training_step_at_length_32768_needs_less_than_a_gibibyte():
    analysis = compiled(32768).memory_analysis()
    assert analysis.temp_size_in_bytes + analysis.argument_size_in_bytes < 2**30


def derivative(name, length):
    """A derivative of causal attention of one head, compiled and not run."""
    every = (0, 1, 2)
    x = [jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)] * 3

    def f(*x, forward_mode=False):
        how = dict(implementation="blockwise", forward_mode=forward_mode)
        return flash_attention(*x, is_causal=True, **how)

    gradient = jax.grad(lambda *x: (f(*x) ** 2).sum(), every)

    def jvp(*x):
        return jax.jvp(functools.partial(f, forward_mode=True), x, x)[1]

    def along(*x):
        return sum((g * a).sum() for g, a in zip(gradient(*x), x, strict=True))

    run = {
        "jvp": jvp,
        "grad of jvp": jax.grad(lambda *x: (jvp(*x) ** 2).sum(), every),
        "jvp of grad": lambda *x: jax.jvp(gradient, x, x),
        "grad of grad": jax.grad(along, every),
    }[name]
    return jax.jit(run).lower(*x).compile()


@pytest.mark.parametrize("name", ["jvp", "grad of jvp", "jvp of grad", "grad of grad"])
def test_memory_of_derivatives_grows_with_the_length_alone(name):
    lengths = [2048, 8192, 32768]
    programs = [derivative(name, length) for length in lengths]
    for length, program in zip(lengths, programs, strict=True):
        assert largest_array(program) < length * 256
    temporary = [p.memory_analysis().temp_size_in_bytes for p in programs]
    first, second = temporary[1] - temporary[0], temporary[2] - temporary[1]
    # Four times the length adds at most four times what the length before added.
    assert second <= 4.2 * first, temporary
