"""The training comparison of benchmarks/parity.py, on a model that a CPU can try."""

import itertools
import json
import math
import os
import runpy
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
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": paths,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the time here
    }
    first, second = ["flash2", "xla"], ["reference", "xla", "--untimed"]
    third = ["flash2", "--replace", "--untimed"]
    for more in (first, second, third):
        more = ["--impls", *more]
        subprocess.run([*command, *more], check=True, env=environment, timeout=300)
    other = [*command, "--impls", "xla", "--seed", "1"]
    refused = subprocess.run(other, env=environment, capture_output=True, text=True)
    assert "another setting (seed: 0, not 1)" in refused.stderr
    runs = json.loads(out.read_text())["runs"]
    timed = {name: ["step_ms" in run for run in of] for name, of in runs.items()}
    assert timed == {"flash2": [False], "xla": [True, False], "reference": [False]}
    for name in ("loss", "grad_norm"):
        exact = runs["reference"][0][name]
        for run in itertools.chain(*runs.values()):
            assert len(run[name]) == 8
            assert math.isclose(run[name][0], exact[0], rel_tol=0.01)
            assert math.isclose(run[name][-1], exact[-1], rel_tol=0.2)


def test_the_report_says_whether_the_rule_is_kept(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report = runpy.run_path(str(ROOT / "benchmarks" / "_parity_report.py"))

    def said(*ours, others=([1, 0.5, 0, 2],)):
        """Ours is off by these; another run by 1, then by less, and 2 in the end."""
        runs = {"reference": [[0, 0, 0, 0]], "flash2": ours, "xla": others}
        norm = {"grad_norm": [0, 1, 1, 1]}
        named = {
            n: [{"loss": x} | norm for x in several] for n, several in runs.items()
        }
        return report["rule"](named)

    kept = "1.50 (step 3) | 0.00 (step 1) |"
    assert kept in said([0, -1, 1.5, 0])
    assert "it is kept; of 1 pairs of single runs 0 break it" in said([0, -1, 1.5, 0])
    assert "of its own" not in said([0, -1, 1.5, 0])
    broken = "1.60 (step 2; above 1.5 at 2 of 4) | 0.00 (step 1) |"
    assert broken in said([1, 1.6, 0, 0])
    assert "**not kept**" in said([1, 1.6, 0, 0])
    # On average ours is off by 1, 1.3, 1.3, 1.3; single runs are not averaged.
    two = said([1, 1.6, 0, 0], [1, -1, 0, 0])
    assert "1.30 (step 2) |" in two
    assert "it is kept; of 2 pairs of single runs 1 break it" in two
    assert "one of jax_flash2's beyond one of XLA's | 1.60 | 0.00 |" in two
    assert "one of jax_flash2's beyond another of its own | 1.60 | 0.00 |" in two
    assert report["rule"]({"flash2": [{}], "xla": [{}]}) == ""
