"""The training comparison of benchmarks/parity.py, on a model that a CPU can try."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("flax")
pytest.importorskip("optax")


def test_runs_of_two_calls_start_alike_and_stay_together(tmp_path):
    out = tmp_path / "parity.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "parity.py"),
        "--out",
        str(out),
    ]
    command += ["--preset", "smoke", "--steps", "8", "--batch", "2", "--commit", "none"]
    paths = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    for more in (["--impls", "flash2", "xla"], ["--impls", "reference", "--untimed"]):
        subprocess.run([*command, *more], check=True, env=environment, timeout=300)
    runs = json.loads(out.read_text())["runs"]
    assert list(runs) == ["flash2", "xla", "reference"]
    assert [name for name in runs if "step_ms" in runs[name]] == ["flash2", "xla"]
    for name in ("loss", "grad_norm"):
        exact = runs["reference"][name]
        for run in runs.values():
            assert len(run[name]) == 8
            assert math.isclose(run[name][0], exact[0], rel_tol=0.01)
            assert math.isclose(run[name][-1], exact[-1], rel_tol=0.2)
