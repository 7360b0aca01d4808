"""The MeanFlow example trains, with and without the gradient through its target."""

import json
import pathlib
import shlex
import sys

import jax
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import meanflow  # noqa: E402

SMALL = "--steps 30 --batch 8 --width 16 --heads 2 --layers 1 --learning-rate 3e-3"


@pytest.mark.parametrize("more", ["", "--through-target"])
def test_meanflow_learns_and_draws(tmp_path, more):
    arguments = [*shlex.split(f"{SMALL} {more}"), "--out", str(tmp_path)]
    with jax.numpy_dtype_promotion("standard"):  # as users run it; optax promotes
        result = meanflow.main(arguments)
    error = json.loads((tmp_path / "history.json").read_text())["error"]
    assert len(error) == 30
    assert np.mean(error[-10:]) < 0.95 * np.mean(error[:10])
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    for drawn in result["samples"].values():
        assert drawn.shape == (8, meanflow.POINTS, 2)
        assert np.isfinite(drawn).all()


def test_meanflow_refuses_clearly(capsys):
    for arguments, message in (
        (["--steps", "0"], "--steps must be positive; got 0"),
        (["--width", "20"], "--width must be a multiple of 2 * --heads; got 20"),
    ):
        with pytest.raises(SystemExit):
            meanflow.parse(arguments)
        assert message in capsys.readouterr().err
