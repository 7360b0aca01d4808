"""The training example learns, resumes exactly, survives kills, refuses clearly."""

import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_flash2
from cases import quick_compilation

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_gpt  # noqa: E402
from gpt import cli, data, report, rundir  # noqa: E402
from gpt.config import PRESETS, Config  # noqa: E402
from gpt.mesh import make_mesh  # noqa: E402
from gpt.model import generate  # noqa: E402
from gpt.training import State, Trainer, abstract_model, peak_flops  # noqa: E402

SMALL = shlex.split(
    "--layers 1 --width 32 --heads 2 --length 32 --batch 4 --steps 12 --eval-every 6 "
    "--eval-batches 2 --sample 0"
)


def config(**changes) -> Config:
    args = cli.parse(None, SMALL)
    settings, _, _ = cli.settle(args, "float32")
    return dataclasses.replace(settings, **changes)


def history(out: pathlib.Path) -> dict:
    return json.loads((out / "history.json").read_text())


def assert_same_history(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance)


def spawn(*arguments) -> subprocess.Popen:
    """The command of the README, with the jax_flash2 that this process tests."""
    package = pathlib.Path(jax_flash2.__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, EXAMPLES / "train_gpt.py", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(package), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(run: subprocess.Popen, out: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while not (out / "checkpoints" / str(step)).exists():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, f"no checkpoint {step} after 180 s"
        time.sleep(0.02)


def interrupt_at_step_5(arguments: list[str]) -> None:
    """Runs the example, with Ctrl-C as step 5 begins."""
    train_batch = data.Corpus.train_batch

    def interrupting(self, seed, step, *shape):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return train_batch(self, seed, step, *shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Corpus, "train_batch", interrupting)
        assert train_gpt.main(arguments) == 128 + signal.SIGINT


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train_gpt.main([*SMALL, "--out", str(out)]) == 0
    return out


def test_smoke_preset_learns_and_leaves_its_results(tmp_path):
    out = tmp_path / "run"
    run = spawn("--preset", "smoke", "--out", out)
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0, text

    losses = history(out)
    assert len(losses["loss"]) == len(losses["grad_norm"]) == 60
    assert losses["validation_step"] == list(range(0, 61, 6))
    first, *_, last = losses["validation_loss"]
    assert first == pytest.approx(np.log(256), abs=0.5)
    assert last < first - 2

    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    sample = (out / "sample.txt").read_text()
    assert sample.startswith("def ")
    assert sample in text
    assert "step 60/60" in text
    assert "\r" not in text, "a progress bar, where output is no terminal"


def test_interrupted_run_continues_with_the_same_losses(tmp_path, uninterrupted):
    """Ctrl-C after step 5: the checkpoint is of step 5, and all else follows."""
    out = str(tmp_path / "run")
    interrupt_at_step_5([*SMALL, "--out", out])
    assert len(history(tmp_path / "run")["loss"]) == 5
    assert train_gpt.main(["--resume", "--out", out, "--sample", "0"]) == 0
    assert_same_history(history(tmp_path / "run"), history(uninterrupted), 1e-6)


def test_killed_run_loses_at_most_the_steps_since_its_checkpoint(tmp_path):
    """SIGKILL, then --resume: the losses are those of a run that was never killed."""
    settings = [*SMALL, "--steps", "60", "--eval-every", "30"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run = spawn(*settings, "--out", out, "--checkpoint-every", "5")
    wait_for_checkpoint(run, out, 15)
    run.kill()
    run.communicate()
    steps = [int(f.name) for f in (out / "checkpoints").iterdir() if f.name.isdigit()]
    assert 15 <= max(steps) < 60
    assert train_gpt.main([*settings, "--out", str(whole)]) == 0
    assert train_gpt.main([*settings, "--out", str(out), "--resume"]) == 0
    assert_same_history(history(out), history(whole), 1e-6)


def test_resuming_a_finished_run_changes_nothing(uninterrupted):
    before = history(uninterrupted)
    assert train_gpt.main(["--resume", "--out", str(uninterrupted)]) == 0
    assert history(uninterrupted) == before
    assert (uninterrupted / "sample.txt").exists()


def test_overwrite_starts_again(tmp_path, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    flags = [*SMALL, "--seed", "1", "--overwrite", "--out", str(out)]
    assert train_gpt.main(flags) == 0
    assert len(history(out)["loss"]) == 12
    assert history(out)["loss"] != history(uninterrupted)["loss"]


@pytest.mark.parametrize(
    ("changes", "memory"),
    [
        ({"attention": "xla"}, {}),
        ({"attention": "reference"}, {}),
        ({}, {"remat": "flash2", "scan": True}),
        ({}, {"remat": "full"}),
    ],
    ids=["xla", "reference", "remat-flash2-scan", "remat-full"],
)
def test_choices_that_leave_the_losses_alone(changes, memory, uninterrupted):
    trainer = Trainer(config(**changes), **memory)
    corpus = data.load(data.STANDARD_LIBRARY, 32)
    state = trainer.init(jax.random.key(0))
    losses = []
    for step in range(1, 13):
        state, metrics = trainer.step(state, corpus.train_batch(0, step, 4, 32))
        losses.append(metrics.loss)
    expected = history(uninterrupted)["loss"]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)


def test_bfloat16_keeps_float32_parameters_and_learns_alike(uninterrupted):
    trainer = Trainer(config(dtype="bfloat16"))
    corpus = data.load(data.STANDARD_LIBRARY, 32)
    state = trainer.init(jax.random.key(0))
    for step in range(1, 13):
        state, metrics = trainer.step(state, corpus.train_batch(0, step, 4, 32))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert metrics.loss == pytest.approx(history(uninterrupted)["loss"][-1], abs=0.05)


def test_generation_through_the_cache_equals_generation_without():
    trainer = Trainer(config(layers=2))
    params = trainer.init(jax.random.key(3)).params
    # Larger weights than a fresh model has: else it repeats one byte for ever.
    params = jax.tree.map(lambda p: 6 * p, params)
    prompt = jax.random.randint(jax.random.key(4), (2, 5), 0, 256, jnp.int32)

    @jax.jit
    def cached(params, prompt):
        model = nnx.merge(trainer.graph, params)
        return generate(model, prompt, 20, jax.random.key(0), temperature=0)

    @jax.jit
    def best_next(params, tokens):
        logits = nnx.merge(trainer.graph, params)(tokens)
        return jnp.argmax(logits[:, :, :256], axis=-1)

    # If each byte is the best after those before it, generation without a cache would
    # have come to the same text.
    generated = cached(params, prompt)
    tokens = jnp.concatenate([prompt, generated], axis=1)
    np.testing.assert_array_equal(generated, best_next(params, tokens)[:, 4:-1])
    assert len(np.unique(generated)) > 5


def test_weight_decay_spares_the_norms():
    trainer = Trainer(config(warmup=0, weight_decay=1e3))
    state = trainer.init(jax.random.key(0))
    after, _ = trainer.step(
        state._replace(params=jax.tree.map(jnp.copy, state.params)),
        np.zeros((4, 33), np.int32),
    )
    norms, kernels = after.params["norm"], after.params["blocks"]["mlp_in"]
    assert jnp.all(jnp.abs(norms["scale"] - 1) < 0.01)
    assert jnp.std(kernels["kernel"]) > 0.2


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("gpt3-125m", 125), ("gpt3-350m", 350), ("gpt3-1.3b", 1300), ("gpt3-2.7b", 2700)],
)
def test_presets_have_the_size_of_their_name(preset, millions):
    shape = dataclasses.asdict(PRESETS[preset])
    shape = {k: shape[k] for k in ("layers", "width", "heads", "vocab", "length")}
    _, params = abstract_model(config(**shape))
    count = sum(p.size for p in jax.tree.leaves(params))
    assert count == pytest.approx(millions * 1e6, rel=0.03)


def test_utilisation_is_of_known_gpus_in_bfloat16():
    gpu = lambda kind: dataclasses.make_dataclass("Gpu", ["device_kind"])(kind)  # noqa: E731
    assert peak_flops(gpu("NVIDIA H100 80GB HBM3"), "bfloat16") == 989e12
    assert peak_flops(gpu("NVIDIA A100-SXM4-40GB"), "bfloat16") == 312e12
    assert peak_flops(gpu("NVIDIA H100 80GB HBM3"), "float32") is None
    assert peak_flops(gpu("cpu"), "bfloat16") is None


def test_progress_shows_speed_and_utilisation(capsys, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(report.time, "perf_counter", lambda: float(next(clock)))
    progress = report.Progress(
        steps=9,
        first=0,
        tokens_per_step=1000,
        flops_per_token=1e6,
        peak=1e9,
        terminal=False,
    )
    progress.step(1, 2.5)
    progress.validated(1, 3.5)
    line = capsys.readouterr().out
    assert line.startswith("step 1/9  loss 2.500  validation 3.500  ")
    assert "tokens/s  MFU " in line


def test_data_is_split_by_files(tmp_path):
    names = [f"{i:02}.txt" for i in range(40)]
    for name in names:
        (tmp_path / name).write_text(name * 20)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("hidden" * 100)
    corpus = data.load(str(tmp_path), 64)
    train, validation = bytes(corpus.train), bytes(corpus.validation)
    assert corpus.files == 40
    assert validation == b"".join(b"\0" + n.encode() * 20 for n in ("19.txt", "39.txt"))
    assert all((n.encode() in train) == (n[:2] not in ("19", "39")) for n in names)
    assert b"hidden" not in train


def test_one_file_gives_its_end_for_validation(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(range(1, 201)) * 10)
    corpus = data.load(str(file), 16)
    assert bytes(corpus.train) + bytes(corpus.validation) == b"\0" + file.read_bytes()
    assert len(corpus.validation) == 100


def test_batches_depend_on_seed_and_step_alone():
    corpus = data.load(data.STANDARD_LIBRARY, 32)
    batch = corpus.train_batch(0, 7, 4, 32)
    assert batch.shape == (4, 33)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, corpus.train_batch(0, 7, 4, 32))
    assert (batch != corpus.train_batch(0, 8, 4, 32)).any()
    assert (batch != corpus.train_batch(1, 7, 4, 32)).any()
    text = bytes(corpus.train)
    assert all(bytes(row.astype(np.uint8)) in text for row in batch)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "--steps must be at least 1; got 0"),
        ("--batch -1", "--batch must be at least 1; got -1"),
        ("--vocab 100", "--vocab must be at least 256; got 100"),
        ("--width 33", "--width must be a multiple of 2 * heads = 4"),
        ("--learning-rate 0", "--learning-rate must be above 0; got 0.0"),
        ("--learning-rate nan", "--learning-rate must be above 0; got nan"),
        ("--warmup 12", "--warmup must be at least 0 and below steps = 12; got 12"),
        ("--clip 0", "--clip must be above 0; got 0.0"),
        ("--eval-every 0", "--eval-every must be at least 1; got 0"),
        ("--checkpoint-every 0", "--checkpoint-every must be at least 1; got 0"),
        ("--sample -1", "--sample must be at least 0; got -1"),
        ("--temperature -1", "--temperature must be at least 0; got -1.0"),
        ("--resume --overwrite", "--resume and --overwrite exclude each other"),
        ("--data no/such", "--data must name a file or directory; got /"),
        ("--length 500000000", "--length must be below the training text's"),
        ("--attention cudnn", "--attention cudnn needs a GPU; got the platform cpu"),
        ("--mesh 4", "like data=2,tensor=4: each of data, fsdp, tensor and seq at"),
        ("--mesh data=2,model=2", "with a size of at least 1; got data=2,model=2"),
        ("--mesh data=2,data=2", "with a size of at least 1; got data=2,data=2"),
        ("--mesh fsdp=0", "with a size of at least 1; got fsdp=0"),
        ("--mesh data=3", "divides the 8 devices of the platform cpu; got data=3, 3"),
        ("--mesh fsdp=2,data=4", "--batch must be a multiple of data * fsdp = 8 of"),
        ("--mesh tensor=4", "--heads must be a multiple of tensor = 4 of --mesh; got"),
        (
            "--width 36 --batch 8 --mesh fsdp=8",
            "--width must be a multiple of fsdp = 8",
        ),
        (
            "--length 36 --mesh seq=8",
            "--length must be a multiple of 2 * seq = 16 of --mesh; got 36",
        ),
        (
            "--attention xla --mesh seq=2",
            "--attention must be flash2 where --mesh has a seq axis",
        ),
        ("--hosts here", "--hosts must be like host0:1234,2,0: address and port"),
        ("--hosts here:1,2,2", "one's index, below that; got here:1,2,2"),
    ],
)
def test_bad_arguments_are_refused_by_message(flags, message, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        train_gpt.main([*SMALL, "--out", str(out), *flags.split()])
    assert message in str(error.value)
    assert not out.exists()


def test_empty_data_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--data must hold text"):
        train_gpt.main(["--data", str(tmp_path), "--out", str(tmp_path / "run")])


def test_another_run_is_never_overwritten(uninterrupted):
    out = str(uninterrupted)
    before = {f: f.read_bytes() for f in uninterrupted.iterdir() if f.is_file()}
    with pytest.raises(SystemExit, match=r"--out must not hold a run already; got"):
        train_gpt.main([*SMALL, "--out", out])
    with pytest.raises(SystemExit, match=r"seed must be 0, as in .*; got 5"):
        train_gpt.main(["--out", out, "--resume", "--seed", "5"])
    assert before == {f: f.read_bytes() for f in uninterrupted.iterdir() if f.is_file()}


def test_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for flags in ([], ["--overwrite"], ["--resume"]):
        with pytest.raises(SystemExit, match="which holds other files"):
            train_gpt.main([*SMALL, "--out", str(tmp_path), *flags])
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_changed_text_is_noticed(tmp_path):
    file, out = tmp_path / "text", tmp_path / "run"
    file.write_text("to be or not to be\n" * 200)
    digest = data.load(str(file), 32).sha256
    settings = config(data=str(file.resolve()), data_sha256=digest)
    rundir.prepare(out, dataclasses.asdict(settings), resume=False, overwrite=False)
    file.write_text("to be or not to bee\n" * 200)
    with pytest.raises(SystemExit, match=f"data_sha256 must be {digest}, as in"):
        train_gpt.main(["--out", str(out), "--resume"])


def test_diverging_run_stops_with_advice(tmp_path):
    flags = [*SMALL, "--learning-rate", "1e30", "--warmup", "0", "--out"]
    with pytest.raises(SystemExit, match="the loss must be finite; got nan at step"):
        train_gpt.main([*flags, str(tmp_path / "run")])


COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
ON_MESH = {"layers": 2, "heads": 4, "batch": 8, "steps": 20}


def train(trainer: Trainer, state: State) -> tuple[list, str]:
    """The losses of 20 steps, and the compiled step."""
    corpus = data.load(data.STANDARD_LIBRARY, 32)
    batches = [corpus.train_batch(0, step, 8, 32) for step in range(1, 21)]
    with quick_compilation():
        step = trainer.step.lower(state, batches[0]).compile()
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(metrics.loss)
    return losses, step.as_text()


def bytes_on_a_device(tree, mesh) -> int:
    arrays = jax.tree.leaves(tree)
    return max(
        sum(x.addressable_data(i).nbytes for x in arrays) for i in range(mesh.size)
    )


@pytest.fixture(scope="module")
def one_device_losses() -> list:
    trainer = Trainer(config(**ON_MESH))
    return train(trainer, trainer.init(jax.random.key(0)))[0]


@pytest.mark.parametrize(
    ("axes", "memory", "changes"),
    [
        ("data=2,tensor=4", {}, {}),
        ("fsdp=4", {"remat": "flash2", "scan": True}, {}),
        ("tensor=2,data=2,fsdp=2", {"scan": True}, {"attention": "xla"}),
        ("data=2,seq=4", {"remat": "flash2"}, {}),
        ("fsdp=2,seq=2,tensor=2", {"scan": True}, {}),
    ],
    ids=[
        "mesh-data-tensor",
        "mesh-fsdp-remat-flash2-scan",
        "mesh-of-all-xla-scan",
        "mesh-data-seq-remat-flash2",
        "mesh-fsdp-seq-tensor-scan",
    ],
)
def test_meshes_split_the_state_and_leave_the_losses_alone(
    axes, memory, changes, one_device_losses
):
    mesh = make_mesh(axes)
    trainer = Trainer(config(**ON_MESH, **changes), **memory, mesh=mesh)
    state = trainer.init(jax.random.key(0))
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for part in state:
        whole = sum(x.nbytes for x in jax.tree.leaves(part))
        assert bytes_on_a_device(part, mesh) < 1.03 * whole / split

    losses, step = train(trainer, state)
    np.testing.assert_allclose(losses, one_device_losses, rtol=1e-5)

    shapes = {kind: [] for kind in COLLECTIVES.split("|")}
    for result, kind in re.findall(rf" = (.*) ({COLLECTIVES})(?:-start)?\(", step):
        # Tokens and indices, which are integers, are put in order.
        integers = "" if "seq" in axes else "su"
        found = re.findall(rf"[bf{integers}]\d+\[([\d,]*)\]", result)
        shapes[kind] += [[int(n) for n in s.split(",") if n] for s in found]
    if "seq" in axes:  # keys and values around the ring, and their gradients home
        size = mesh.shape
        batch = 8 // (size["data"] * size["fsdp"])
        local = [batch, 32 // size["seq"], 4 // size["tensor"], 8]
        assert shapes["collective-permute"]
        assert all(s == local for s in shapes.pop("collective-permute"))
        shapes["collective-permute"] = []
    if "fsdp" in axes:
        # No activations: the embedding once, the loop's one layer forward and backward.
        gathered = sum(math.prod(shape) for shape in shapes["all-gather"])
        assert 0 < gathered < 1.5 * trainer.num_params
        assert not shapes["all-to-all"] + shapes["collective-permute"]
    else:
        # Sums of the residual stream and of gradients; q, k and v have four axes.
        assert [kind for kind in shapes if shapes[kind]] == ["all-reduce"]
        if "tensor" in axes:
            assert [4, 32, 32] in shapes["all-reduce"]
        assert max(map(len, shapes["all-reduce"])) == 3


def test_mesh_may_change_on_resuming(tmp_path, uninterrupted):
    """Also: a CPU becomes several devices, and a sharded model generates."""
    out = tmp_path / "run"
    interrupt_at_step_5([*SMALL, "--out", str(out), "--mesh", "fsdp=4"])
    flags = ["--resume", "--out", out, "--mesh", "tensor=2,data=2", "--sample", "9"]
    run = spawn(*flags)
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0, text
    assert "on 4 devices (tensor=2,data=2), each cpu" in text
    assert (out / "sample.txt").read_text() in text
    assert_same_history(history(out), history(uninterrupted), 5e-5)
