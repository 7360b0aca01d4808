"""The compiled module without a GPU: what it says of itself, and what it refuses."""

import importlib
import re
import types

import jax
import jax.export
import jax.numpy as jnp
import pytest

from jax_flash2 import _ffi, _kernels
from jax_flash2._spec import AttentionSpec, Operands

needs_module = pytest.mark.skipif(
    _ffi.build_info() is None, reason="this install has no CUDA kernels"
)


def operands(head_dim=64, dtype=jnp.bfloat16, **sides):
    query = jax.ShapeDtypeStruct((2, 128, 8, head_dim), dtype)
    key = jax.ShapeDtypeStruct((2, 96, 2, head_dim), dtype)
    return Operands(query=query, key=key, value=key, **sides)


def lowered(spec, x):
    names = [name for name, a in x._asdict().items() if a is not None]

    def run(*arrays):
        return _kernels.forward(spec, Operands(**dict(zip(names, arrays, strict=True))))

    arrays = [getattr(x, name) for name in names]
    return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@needs_module
def test_build_info_tells_compiler_architectures_and_versions():
    info = _ffi.build_info()
    assert re.fullmatch(r"nvcc \d+\.\d+\.\d+", info["compiler"])
    assert {"80-real", "90-real", "90a-real", "80-virtual"} <= set(
        info["architectures"].split()
    )
    assert info["cuda"] >= (12, 4)
    # Of the oldest jaxlib that is supported, whatever is installed here.
    assert info["ffi"] == (0, 3)


@needs_module
def test_every_target_of_the_module_is_known_here():
    assert set(_ffi.module.registrations()) == set(_ffi.TARGETS)


@needs_module
def test_kernels_are_available_for_lowering_where_there_is_no_gpu():
    assert _ffi.unavailable() is None


def test_newer_ffi_than_jaxlib_is_refused_and_older_is_not():
    assert _ffi.ffi_problem((0, 3), (0, 3)) is None
    assert _ffi.ffi_problem((0, 3), (0, 5)) is None
    assert _ffi.ffi_problem((0, 3), None) is None
    message = _ffi.ffi_problem((0, 5), (0, 4))
    assert "XLA FFI 0.5" in message
    assert "jaxlib has 0.4" in message


def test_installed_ffi_version_is_read_from_jaxlib():
    assert (0, 3) <= _ffi._installed_ffi() < (1, 0)


@pytest.mark.parametrize("driver", [(0, 0), (13, 0), (13, 2), (14, 0)])
def test_driver_serves_its_own_and_older_cuda(driver):
    assert _ffi.driver_problem((13, 0), driver) is None


def test_old_driver_is_refused_with_the_number_to_update_to():
    message = _ffi.driver_problem((13, 0), (12, 8))
    assert "driver 580 or newer" in message
    assert "CUDA up to 12.8" in message


def test_old_gpu_is_refused_by_its_compute_capability():
    assert _ffi.gpu_problem(["8.0", "8.6", "8.9", "9.0", "12.0"]) is None
    assert _ffi.gpu_problem([]) is None
    assert "got 7.5" in _ffi.gpu_problem(["9.0", "7.5"])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("No module named '_cuda'"), "has no CUDA kernels"),
        (ImportError("libfoo.so.6: cannot open"), "failed to load (libfoo.so.6"),
    ],
)
def test_missing_module_is_a_sentence_with_a_remedy(monkeypatch, error, says):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    module, message = _ffi._load()
    assert module is None
    assert says in message
    assert "JAX_FLASH2_CUDA=pypi" in message


def test_module_newer_than_jaxlib_is_not_registered(monkeypatch):
    """XLA would refuse the handlers, and with them the whole CUDA backend."""

    def registrations():
        raise AssertionError("must not be asked for")

    module = types.SimpleNamespace(
        build_info=lambda: {"ffi": (0, 99)}, registrations=registrations
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    assert "XLA FFI 0.99" in _ffi._load()[1]


LENGTHS = jax.ShapeDtypeStruct((2,), jnp.int32)


@pytest.mark.parametrize(
    ("spec", "x", "says"),
    [
        (AttentionSpec(), operands(dtype=jnp.float32), "got float32"),
        (AttentionSpec(), operands(head_dim=264), "head_dim up to 256; got 264"),
        (AttentionSpec(), operands(bias=LENGTHS), "no dense bias"),
        (AttentionSpec(), operands(mask=LENGTHS), "no dense mask"),
        (AttentionSpec(dropout_rate=0.5), operands(), "no dropout"),
        (AttentionSpec(return_max_logit=True), operands(), "return_max_logit"),
    ],
)
def test_what_the_forward_kernels_lack_is_named(spec, x, says):
    assert says in _kernels.forward_lack(spec, x)


def test_forward_kernels_lack_nothing_else():
    spec = AttentionSpec(
        scale=0.5, is_causal=True, window=(3, None), chunk_size=7, soft_cap=5.0
    )
    x = operands(key_value_seq_lengths=LENGTHS, query_offset=LENGTHS)
    assert _kernels.forward_lack(spec, x) is None


def test_forced_kernels_raise_with_the_reason(monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    spec = AttentionSpec(implementation="cuda")
    assert _ffi.use_kernels(spec, None)
    with pytest.raises(NotImplementedError, match="implementation='cuda': the reason"):
        _ffi.use_kernels(spec, "the reason")


def test_fallback_warns_once_for_each_reason(monkeypatch):
    monkeypatch.setattr(_ffi, "unavailable", lambda: None)
    monkeypatch.setattr(_ffi, "_warned", set())
    with pytest.warns(UserWarning, match="first reason"):
        assert not _ffi.use_kernels(AttentionSpec(), "first reason")
    assert not _ffi.use_kernels(AttentionSpec(), "first reason")
    with pytest.warns(UserWarning, match="second reason"):
        assert not _ffi.use_kernels(AttentionSpec(), "second reason")


def test_call_passes_operands_as_they_are():
    spec = AttentionSpec(scale=0.5, is_causal=True, window=(3, None))
    x = operands(
        key_value_seq_lengths=LENGTHS,
        sinks=jax.ShapeDtypeStruct((1, 8), jnp.float32),
        alibi_slopes=jax.ShapeDtypeStruct((2, 1), jnp.float32),
    )
    text = lowered(spec, x)
    assert text.count("stablehlo.custom_call") == 1
    assert f"@{_ffi.FORWARD}" in text
    assert 'operands = "key_value_seq_lengths,alibi_slopes,sinks"' in text
    assert "window_left = 3 : i32, window_right = -1 : i32" in text
    for word in ("transpose", "pad", "reshape", "broadcast", "convert"):
        assert f"stablehlo.{word}" not in text


@pytest.mark.parametrize("head_dim", [1, 60, 100])
def test_head_dims_that_are_no_multiple_of_8_are_padded(head_dim):
    text = lowered(AttentionSpec(scale=0.5), operands(head_dim=head_dim))
    padded = head_dim + -head_dim % 8
    assert f"tensor<2x128x8x{padded}xbf16>, tensor<2x96x2x{padded}xbf16>" in text


def test_window_wider_than_any_length_is_unbounded():
    text = lowered(AttentionSpec(scale=1.0, window=(2**31 - 1, 0)), operands())
    assert "window_left = -1 : i32, window_right = 0 : i32" in text


def test_sides_are_given_in_the_handlers_dtypes():
    x = operands(
        scale=jax.ShapeDtypeStruct((2,), jnp.bfloat16),
        sinks=jax.ShapeDtypeStruct((1, 8), jnp.bfloat16),
    )
    call = re.search(r"custom_call.*", lowered(AttentionSpec(), x))[0]
    assert "tensor<2xf32>, tensor<1x8xf32>)" in call
    assert "scale = 1.000000e+00" in call


# ------------------------------------------------------------------------- the backward


def lowered_backward(spec, x, wrt=(), **more):
    names = [name for name, a in x._asdict().items() if a is not None]
    rows = {
        "out": jax.ShapeDtypeStruct(x.query.shape, x.query.dtype),
        "dout": jax.ShapeDtypeStruct(x.query.shape, x.query.dtype),
        "lse": jax.ShapeDtypeStruct((2, 8, 128), jnp.float32),
    } | more

    def run(arrays, rows):
        return _kernels.backward(spec, Operands(**arrays), rows, wrt)

    arrays = {name: getattr(x, name) for name in names}
    trace = jax.jit(run).trace(arrays, rows)
    return trace.lower(lowering_platforms=("cuda",)).as_text(), trace.out_info


@needs_module
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_passes_operands_as_they_are(deterministic):
    spec = AttentionSpec(
        scale=0.5, is_causal=True, deterministic_backward=deterministic
    )
    lse = jax.ShapeDtypeStruct((2, 8, 128), jnp.float32)
    x = operands(
        key_value_seq_lengths=LENGTHS, sinks=jax.ShapeDtypeStruct((1, 8), jnp.float32)
    )
    text, grads = lowered_backward(spec, x, dlse=lse)
    assert text.count("stablehlo.custom_call") == 1
    assert f"@{_ffi.BACKWARD}" in text
    # The logsumexp holds the sinks already.
    assert 'operands = "key_value_seq_lengths,dlse"' in text
    assert f"deterministic = {str(deterministic).lower()}" in text
    for word in ("transpose", "pad", "reshape", "broadcast", "convert"):
        assert f"stablehlo.{word}" not in text
    assert [g.shape for g in grads] == [(2, 128, 8, 64), (2, 96, 2, 64), (2, 96, 2, 64)]


@needs_module
@pytest.mark.parametrize(
    ("batch", "heads", "length", "rows"),
    [(1, 1, 1, 128), (2, 8, 128, 128), (3, 5, 129, 256), (1, 2, 8193, 8320)],
)
def test_backward_workspace_is_linear_in_the_rows(batch, heads, length, rows):
    """Per padded row: float32 sums of dQ, logsumexp and delta; a turn per 16; counters."""
    counters = -(-batch * heads * 4 // 16) * 16 + 16
    expected = batch * heads * (rows * (4 * 72 + 8) + rows // 4) + counters
    size = _ffi.module.backward_workspace_bytes
    assert size(batch, heads, length, 72, 100, False) == expected


@needs_module
@pytest.mark.parametrize(("batch", "length", "keys"), [(1, 1, 1), (3, 1025, 300)])
def test_packed_segments_take_8_bytes_a_row_and_a_key(batch, length, keys):
    """And 4 bytes per 1024 of the longer of the two."""
    blocks = -(-batch * -(-max(length, keys) // 1024) * 4 // 16) * 16
    expected = blocks + 8 * batch * (length + keys)
    forward = _ffi.module.forward_workspace_bytes
    assert forward(batch, length, keys, False) == 16
    assert forward(batch, length, keys, True) == 16 + expected
    backward = _ffi.module.backward_workspace_bytes
    sizes = [backward(batch, 2, length, 64, keys, s) for s in (False, True)]
    assert sizes[1] - sizes[0] == expected


@needs_module
def test_gradient_of_a_traced_scale_comes_by_rows():
    x = operands(scale=jax.ShapeDtypeStruct((1,), jnp.bfloat16))
    text, grads = lowered_backward(AttentionSpec(), x, wrt=("scale",))
    assert re.search(r"tensor<\d+xui8>, tensor<2x8x128xf32>\)", text)
    assert (grads[3].shape, grads[3].dtype) == ((1,), jnp.bfloat16)


@pytest.mark.parametrize("name", ["bias", "alibi_slopes"])
def test_backward_says_which_gradient_it_lacks(name):
    lack = _kernels.backward_lack(AttentionSpec(), operands(), ("scale", name))
    assert lack == (
        f"the CUDA kernels have no gradient of {name}, and jax.lax.stop_gradient of it "
        "asks for none"
    )
    assert _kernels.backward_lack(AttentionSpec(), operands(), ("scale",)) is None


def test_backward_lacks_what_the_forward_lacks_but_for_the_largest_logit():
    spec = AttentionSpec(return_max_logit=True)
    assert _kernels.forward_lack(spec, operands()) is not None
    assert _kernels.backward_lack(spec, operands(), ()) is None
    spec = AttentionSpec(dropout_rate=0.5)
    assert "dropout" in _kernels.backward_lack(spec, operands(), ())


@needs_module
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_workspace_of_a_symbolic_batch_is_enough(batch):
    (symbol,) = jax.export.symbolic_shape("batch")
    module = _ffi.module
    for segments in (False, True):
        sizes = (
            lambda n, s=segments: module.forward_workspace_bytes(n, 129, 1500, s),
            lambda n, s=segments: module.backward_workspace_bytes(
                n, 5, 129, 72, 1500, s
            ),
        )
        for size in sizes:
            assert _kernels._of_batch(symbol, size) == symbol * size(1)
            assert _kernels._of_batch(batch, size) == size(batch)
            assert batch * size(1) >= size(batch)
