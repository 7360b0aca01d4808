"""The GPU tests: what they need, and the receipt that a whole run of them leaves.

A run without a selection (no -k, -m, file or single test) writes ``receipt.json``, or the path
in JAX_FLASH2_RECEIPT.
"""

import datetime
import os
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import pytest
import receipt

from jax_flash2 import _ffi

# XLA would time candidates for each product of the references: four fifths of the tests' time.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
)

# A kernel that hangs holds the main thread inside the runtime: only another thread can end
# the process, and with pytest-xdist the other tests go on in a new one.
_HANGS_AFTER_S = 150

_FACTS = pytest.StashKey[dict[str, Any]]()
_PREFIX = "receipt"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FACTS] = {}
    config.addinivalue_line("markers", "first: begins before the others")
    if jax.default_backend() != "gpu":
        raise pytest.UsageError("tests/gpu needs an NVIDIA GPU and jax for CUDA")
    if reason := _ffi.unavailable():
        raise pytest.UsageError(f"tests/gpu needs the kernels: {reason}")


@pytest.fixture
def facts(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """What a test adds to the receipt: ``facts(tool, name, value)``."""
    return lambda *keys_and_value: record_property(_PREFIX, keys_and_value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What is long, or wants much memory: the processes of the others keep what they have taken.
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_HANGS_AFTER_S, method="thread"))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Collector(session.config.stash[_FACTS]))


class _Collector:
    """Gathers the facts of all tests, also of those that ran in other processes."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, keys_and_value in report.user_properties:
            if name != _PREFIX:
                continue
            *keys, last, value = list(keys_and_value)  # pyright: ignore
            place = self.facts
            for key in keys:
                place = place.setdefault(key, {})
            place[last] = value


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    option = config.option
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return  # cut short: not a whole run
    whole = not (option.keyword or option.markexpr or option.collectonly)
    whole = whole and all(Path(a).is_dir() for a in config.args)
    whole = whole and session.testscollected
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not whole or reporter is None or hasattr(config, "workerinput"):
        return
    counts = {k: len(reporter.stats.get(k, [])) for k in ("passed", "skipped")}
    failed = len(reporter.stats.get("failed", []) + reporter.stats.get("error", []))
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=True)
    gpu, driver = (part.strip() for part in done.stdout.splitlines()[0].split(","))
    info = _ffi.build_info() or {}
    path = os.environ.get("JAX_FLASH2_RECEIPT")
    if path:
        receipt.RECEIPT = Path(path)
    receipt.write(
        {
            "gpu": gpu,
            "driver": driver,
            "compiler": info.get("compiler"),
            "architectures": info.get("architectures"),
            "versions": {n: metadata.version(n) for n in ("jax", "jaxlib", "numpy")},
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "passed": counts["passed"],
            "failed": failed,
            "skipped": counts["skipped"],
            **config.stash[_FACTS],
        }
    )
