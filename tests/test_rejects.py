"""Wrong calls are refused before anything runs: argument, rule and value in the message."""

import ast
import inspect
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_flash2 import _checks, _operand_checks, flash_attention

Q, K = (2, 5, 4, 8), (2, 7, 2, 8)


def a(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


q, k = a(*Q), a(*K)
key = jax.random.key(0)

# Arguments beside query, key and value (which are replaced if given), and the message.
REJECTS = [
    # query, key and value
    ({"query": [[1.0]]}, "query must be an array; got list"),
    ({"key": 3.0}, "key must be an array; got float"),
    ({"value": None}, "value must be an array; got NoneType"),
    ({"query": a(5, 8)}, r"query must have shape (batch..., length, heads, head_dim); "
     "got float32[5, 8]"),
    ({"key": a(8)}, r"key must have shape (batch..., length, heads, head_dim); "
     "got float32[8]"),
    ({"value": a()}, "value must have shape (batch..., length, heads, head_dim); "
     "got float32[]"),
    *(
        ({name: jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)},
         f"{name} must have heads and head_dim that are numbers (batch and length may be "
         f"symbolic); got float32[{shape}]")
        for name, shape in (("query", "2, 5, h, 8"), ("key", "2, 7, 2, d"))
    ),
    ({"key": a(*K, dtype="bfloat16")},
     "key must have query's dtype, float32; got bfloat16[2, 7, 2, 8]"),
    ({"value": a(*K, dtype="float16")},
     "value must have query's dtype, float32; got float16[2, 7, 2, 8]"),
    ({"key": a(3, 7, 2, 8)},
     "key must have query's batch axes, [2]; got float32[3, 7, 2, 8]"),
    ({"value": a(7, 2, 8)}, "value must have query's batch axes, [2]; got float32[7, 2, 8]"),
    ({"key": a(1, 7, 2, 8)},
     "key must have query's batch axes, [2]; got float32[1, 7, 2, 8]"),
    *(
        ({n: a(*s, dtype=dtype) for n, s in (("query", Q), ("key", K), ("value", K))},
         "query must be one of float16, bfloat16, float32; got "
         f"{dtype}[2, 5, 4, 8]")
        for dtype in ("int32", "bool", "complex64", "float8_e4m3fn")
    ),
    ({"query": a(*Q, dtype="int8"), "key": a(*K, dtype="int8"),
      "value": a(*K, dtype="int8"), "implementation": "reference"},
     "query must be one of float16, bfloat16, float32, float64; got int8[2, 5, 4, 8]"),
    *(
        ({"query": np.zeros(Q), "key": np.zeros(K), "value": np.zeros(K),
          "implementation": implementation},
         "query may be float64 only where jax_enable_x64 is True, else it becomes "
         "float32; got float64[2, 5, 4, 8]")
        for implementation in ("blockwise", "reference")
    ),
    ({"key": a(2, 7, 2, 16)},
     "key must have query's head_dim, 8; got float32[2, 7, 2, 16]"),
    ({"query": a(2, 5, 4, 0), "key": a(2, 7, 2, 0)},
     "head_dim must be positive; got query float32[2, 5, 4, 0] and value "
     "float32[2, 7, 2, 8]"),
    ({"value": a(2, 7, 2, 0)},
     "head_dim must be positive; got query float32[2, 5, 4, 8] and value "
     "float32[2, 7, 2, 0]"),
    ({"value": a(2, 6, 2, 8)},
     "value must have key's length and heads, [7, 2]; got float32[2, 6, 2, 8]"),
    ({"value": a(2, 7, 1, 8)},
     "value must have key's length and heads, [7, 2]; got float32[2, 7, 1, 8]"),
    ({"key": a(2, 7, 3, 8), "value": a(2, 7, 3, 8)},
     "key's heads must divide query's heads, 4; got 3"),
    ({"key": a(2, 7, 8, 8), "value": a(2, 7, 8, 8)},
     "key's heads must divide query's heads, 4; got 8"),
    ({"key": a(2, 7, 0, 8), "value": a(2, 7, 0, 8)},
     "key's heads must divide query's heads, 4; got 0"),
    # static facts
    ({"implementation": "xla"}, "implementation must be one of None, 'cuda', 'cuda_sm80', "
     "'blockwise', 'reference'; got 'xla'"),
    ({"implementation": True}, "implementation must be one of None, 'cuda', 'cuda_sm80', "
     "'blockwise', 'reference'; got True"),
    ({"is_causal": 1}, "is_causal must be a bool; got 1"),
    ({"is_causal": "yes"}, "is_causal must be a bool; got 'yes'"),
    ({"return_residual": 0}, "return_residual must be a bool; got 0"),
    ({"deterministic_backward": None}, "deterministic_backward must be a bool; got None"),
    ({"forward_mode": "no"}, "forward_mode must be a bool; got 'no'"),
    ({"return_max_logit": 2.0}, "return_max_logit must be a bool; got 2.0"),
    ({"chunk_size": 0}, "chunk_size must be an int in [1, 2147483647]; got 0"),
    ({"chunk_size": -4}, "chunk_size must be an int in [1, 2147483647]; got -4"),
    ({"chunk_size": 4.0}, "chunk_size must be an int in [1, 2147483647]; got 4.0"),
    ({"chunk_size": 2**31}, "chunk_size must be an int in [1, 2147483647]; got 2147483648"),
    ({"chunk_size": True}, "chunk_size must be an int in [1, 2147483647]; got True"),
    *(
        ({"logits_soft_cap": cap},
         f"logits_soft_cap must be a positive finite Python float; got {cap!r}")
        for cap in (0.0, -1.0, float("nan"), float("inf"), "30", True)
    ),
    *(
        ({"dropout_rate": rate, "dropout_key": key},
         f"dropout_rate must be a Python float in [0, 1); got {rate!r}")
        for rate in (1.0, -0.1, float("nan"), None, False)
    ),
    ({"dropout_rate": 0.5},
     "dropout_key must be given where dropout_rate is not 0; got dropout_rate=0.5"),
    ({"dropout_rate": 0.5, "dropout_key": a(2, dtype="int32")},
     "dropout_key must be one key of jax.random.key or jax.random.PRNGKey; got "),
    ({"dropout_rate": 0.5, "dropout_key": 7},
     "dropout_key must be one key of jax.random.key or jax.random.PRNGKey; got 7"),
    ({"dropout_rate": 0.5, "dropout_key": a(3, 2, dtype="uint32")},
     "dropout_key must be one key of jax.random.key or jax.random.PRNGKey; got "
     "uint32[3, 2]"),
    ({"dropout_rate": 0.5, "dropout_key": a(3, dtype="uint32")},
     "dropout_key must be one key of jax.random.key or jax.random.PRNGKey; got uint32[3]"),
    ({"dropout_rate": 0.5, "dropout_key": jax.random.split(key, 3)},
     "dropout_key must be one key of jax.random.key or jax.random.PRNGKey; got key<fry>[3]"),
    ({"prefix_lengths": np.int32([1, 2])}, "prefix_lengths needs is_causal=True (keys before "
     "the prefix's end are visible beside the causal ones); got is_causal=False"),
    *(
        ({"local_window_size": window}, "local_window_size must be an int or a pair (left, "
         f"right) of ints or None; got {window!r}")
        for window in (1.5, (1,), (1, 2, 3), "ab", (1.0, 2), (True, 1))
    ),
    ({"local_window_size": -1}, "local_window_size must lie in [0, 2147483647]; got -1"),
    ({"local_window_size": (3, -2)}, "local_window_size must lie in [0, 2147483647]; got (3, -2)"),
    ({"local_window_size": (2**31, 0)},
     "local_window_size must lie in [0, 2147483647]; got (2147483648, 0)"),
    # scale
    ({"scale": float("inf")}, "scale must be finite; got inf"),
    ({"scale": float("nan")}, "scale must be finite; got nan"),
    ({"scale": True}, "scale must be finite; got True"),
    ({"scale": "big"}, "scale must be a float or a floating scalar; got 'big'"),
    ({"scale": a(dtype="int32")}, "scale must be a float or a floating scalar; got int32[]"),
    ({"scale": a(2)}, "scale must be a scalar; got float32[2]"),
    # integer operands
    *(
        ({name: a(2)}, f"{name} must be an int or an integer array; got float32[2]")
        for name in ("query_seq_lengths", "key_value_seq_lengths", "query_offset")
    ),
    ({"query_seq_lengths": 2.0},
     "query_seq_lengths must be an int or an integer array; got 2.0"),
    ({"query_offset": True}, "query_offset must be an int or an integer array; got True"),
    ({"query_offset": False}, "query_offset must be an int or an integer array; got False"),
    ({"query_seq_lengths": [6, 5]}, "query_seq_lengths must lie in [0, 5]; got [6]"),
    ({"query_seq_lengths": np.int8([-1, 5])}, "query_seq_lengths must lie in [0, 5]; got [-1]"),
    ({"key_value_seq_lengths": np.int64([7, 8])},
     "key_value_seq_lengths must lie in [0, 7]; got [8]"),
    ({"key_value_seq_lengths": 8}, "key_value_seq_lengths must lie in [0, 7]; got [8]"),
    ({"prefix_lengths": [0, -3], "is_causal": True},
     "prefix_lengths must lie in [0, 7]; got [-3]"),
    ({"query_offset": 2**31},
     "query_offset must lie in [-2147483648, 2147483642]; got [2147483648]"),
    ({"query_offset": 2**31 - 5},
     "query_offset must lie in [-2147483648, 2147483642]; got [2147483643]"),
    ({"query_seq_lengths": [[1], [2, 3]]},
     "query_seq_lengths must be an int or an integer array; got [[1], [2, 3]]"),
    ({"query_seq_lengths": a(2, dtype="uint32")},
     "query_seq_lengths must be int32 or narrower; got uint32[2]"),
    ({"query_offset": a(3, dtype="int32")},
     "query_offset must broadcast to (batch...) = [2]; got int32[3]"),
    ({"query_offset": a(1, 2, dtype="int32")},
     "query_offset must broadcast to (batch...) = [2]; got int32[1, 2]"),
    # segment ids
    ({"query_segment_ids": a(2, 5, dtype="int32")}, "key_value_segment_ids must be given "
     "where query's length is not key's; got lengths 5 and 7"),
    ({"key_value_segment_ids": a(2, 7, dtype="int32")},
     "query_segment_ids must be given with key_value_segment_ids; got None"),
    ({"query_segment_ids": a(2, 5, dtype="int32"),
      "key_value_segment_ids": a(2, 5, dtype="int32")}, "key_value_segment_ids must broadcast "
     "to (batch..., key length) = [2, 7]; got int32[2, 5]"),
    ({"query_segment_ids": a(2, 5), "key_value_segment_ids": a(2, 7, dtype="int32")},
     "query_segment_ids must be an int or an integer array; got float32[2, 5]"),
    # mask, bias, slopes, sinks
    ({"mask": a(2, 4, 5, 7)}, "mask must be a boolean array, True where a key is visible (an "
     "additive one is a bias); got float32[2, 4, 5, 7]"),
    ({"mask": True}, "mask must be a boolean array, True where a key is visible (an "
     "additive one is a bias); got True"),
    ({"mask": a(2, 2, 5, 7, dtype=bool)}, "mask must broadcast to (batch..., heads, query "
     "length, key length) = [2, 4, 5, 7]; got bool[2, 2, 5, 7]"),
    ({"bias": a(7, 5)}, "bias must broadcast to (batch..., heads, query length, key "
     "length) = [2, 4, 5, 7]; got float32[7, 5]"),
    ({"bias": a(1, 2, 4, 5, 7)}, "bias must broadcast to (batch..., heads, "
     "query length, key length) = [2, 4, 5, 7]; got float32[1, 2, 4, 5, 7]"),
    ({"bias": 1.0}, "bias must be an array; got float"),
    ({"bias": a(5, 7, dtype="float16")},
     "bias must be float32 or query's float32; got float16[5, 7]"),
    ({"bias": a(5, 7, dtype="int32")},
     "bias must be float32 or query's float32; got int32[5, 7]"),
    ({"alibi_slopes": [0.5] * 4}, "alibi_slopes must be an array; got list"),
    ({"alibi_slopes": a(2)},
     "alibi_slopes must broadcast to (batch..., heads) = [2, 4]; got float32[2]"),
    ({"sinks": a(4, 1)}, "sinks must broadcast to (batch..., heads) = [2, 4]; got float32[4, 1]"),
    ({"sinks": a(4, dtype="bfloat16")},
     "sinks must be float32 or query's float32; got bfloat16[4]"),
]  # fmt: skip


def call(arguments):
    return flash_attention(**({"query": q, "key": k, "value": k} | arguments))


def name_of(case):
    text = ", ".join(f"{n}={getattr(v, 'shape', v)}" for n, v in case[0].items())
    return re.sub(r"[^\w=,. ()-]", "", text)


@pytest.mark.parametrize(("arguments", "message"), REJECTS, ids=map(name_of, REJECTS))
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"flash_attention: {message}")):
        call(arguments)


@pytest.mark.parametrize(("arguments", "message"), REJECTS, ids=map(name_of, REJECTS))
def test_refusal_comes_before_anything_runs(arguments, message):
    """Also while tracing, so a wrong call never becomes part of a program."""
    del message
    arrays = {n: x for n, x in arguments.items() if isinstance(x, jax.Array)}
    rest = {n: x for n, x in arguments.items() if n not in arrays}
    with pytest.raises(ValueError, match="flash_attention: "):
        jax.eval_shape(lambda arrays: call(arrays | rest), arrays)


@pytest.mark.parametrize("implementation", [None, "cuda", "cuda_sm80"])
def test_float64_is_refused_but_for_the_implementations_that_take_it(implementation):
    with jax.enable_x64(True):
        x = a(2, 7, 2, 8, dtype="float64")
        rule = (
            "query may be float64 only with implementation='blockwise' or 'reference'; "
        )
        got = f"got float64[2, 7, 2, 8] with {implementation=}"
        with pytest.raises(ValueError, match=re.escape(rule + got)):
            flash_attention(x, x, x, implementation=implementation)
        with pytest.raises(
            ValueError, match=re.escape("int32 or narrower; got int64[2]")
        ):
            flash_attention(q, k, k, query_offset=a(2, dtype="int64"))


def rules():
    """Where ``require`` is called in the modules of rules: file and line."""
    paths = [pathlib.Path(inspect.getsourcefile(m)) for m in (_checks, _operand_checks)]
    return {
        (path.name, node.lineno)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "require"
    }


def rule_that_raised(arguments):
    try:
        call(arguments)
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        calls = [f for f in frames if f.name != "require"]
        assert frames[-1].name == "require", frames
        return pathlib.Path(calls[-1].filename).name, calls[-1].lineno
    raise AssertionError("the call was not refused")


def test_every_rule_has_a_call_that_it_refuses():
    assert len(REJECTS) >= 60
    reached = {rule_that_raised(arguments) for arguments, _ in REJECTS}
    with jax.enable_x64(True):
        x = a(*K, dtype="float64")
        reached.add(rule_that_raised({"query": x, "key": x, "value": x}))
    assert reached == rules()


def test_every_message_names_an_argument_and_what_was_got():
    names = inspect.signature(flash_attention).parameters
    for arguments, message in REJECTS:
        first = re.match(r"\w+", message)[0]
        assert first in {*names, "head_dim"}, message
        assert "; got " in message, message
        given = (
            {*arguments, "head_dim"} if {"key", "value"} & {*arguments} else arguments
        )
        assert first in given or "must be given" in message or first == "query"


def test_a_list_of_traced_lengths_is_refused_by_name():
    message = "key_value_seq_lengths must be an int or an integer array; got [JitTracer"
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.jit(lambda n: call({"key_value_seq_lengths": [n, n]}))(3)


def test_an_empty_list_has_the_lengths_of_an_empty_batch():
    x = a(0, 7, 2, 8)
    assert flash_attention(x, x, x, key_value_seq_lengths=[]).shape == x.shape


@pytest.mark.parametrize("implementation", ["cuda", "cuda_sm80"])
def test_kernels_are_refused_where_the_program_is_not_for_a_gpu(implementation):
    with pytest.raises(NotImplementedError) as error:
        jax.jit(lambda: call({"implementation": implementation})).lower()
    assert str(error.value) == (
        f"flash_attention: implementation={implementation!r} runs on NVIDIA GPUs only, and "
        "this call is compiled for another platform"
    )


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="window"):
        call({"window": 3})
    with pytest.raises(TypeError, match="positional"):
        flash_attention(q, k, k, None, None, 0.5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": np.True_},
        {"chunk_size": np.int64(3)},
        {"local_window_size": np.int32(2)},
        {"local_window_size": [None, 2]},
        {"scale": 1},
        {"scale": np.float32(0.5)},
        {"query_seq_lengths": 5},
        {"query_seq_lengths": np.int64([0, 5])},
        {"key_value_seq_lengths": [7, 0]},
        {"key_value_seq_lengths": np.uint8(3)},
        {"query_offset": -(2**31)},
        {"query_offset": 2**31 - 6},
        {"query_seq_lengths": [jnp.int32(1), 2]},
        {"logits_soft_cap": 30},
        {"dropout_rate": 0, "dropout_key": None},
        {"dropout_rate": 0.0, "dropout_key": "not looked at"},
        {"dropout_rate": 0.5, "dropout_key": jax.random.PRNGKey(0)},
        {
            "query_segment_ids": [[1], [2]],
            "key_value_segment_ids": np.zeros(7, np.int8),
        },
    ],
    ids=str,
)
def test_kinds_of_values_that_are_right(arguments):
    jax.eval_shape(lambda: call(arguments | {"implementation": "blockwise"}))
