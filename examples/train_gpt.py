#!/usr/bin/env python3
"""Train a GPT with jax_flash2's attention on the sources of Python's standard library.

  python examples/train_gpt.py              three minutes on two CPU cores
  python examples/train_gpt.py --resume     go on after an interruption
  python examples/train_gpt.py --preset gpt3-125m --out runs/125m        on a GPU
  python examples/train_gpt.py --data my/texts --out runs/mine --steps 3000
  python examples/train_gpt.py --mesh data=2,tensor=4         on 8 GPUs, or to try it
                                                              out on one CPU
  python examples/train_gpt.py --mesh data=2,seq=4            long sequences, split too
  python examples/train_gpt.py --mesh seq=16 --hosts host0:1234,2,0       on host0, and
  python examples/train_gpt.py --mesh seq=16 --hosts host0:1234,2,1       on the other

It reads text as bytes and predicts each byte from those before it. DIR gets
checkpoints, the losses (history.json, loss.png) and a sample of generated text.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from gpt import cli
    from gpt.config import Config, Options
    from gpt.data import START, Corpus
    from gpt.mesh import check, make_mesh, parse_hosts, place
    from gpt.model import generate
    from gpt.report import Progress, loss_curves
    from gpt.rundir import Checkpoints, History, prepare, write
    from gpt.training import Metrics, Trainer, abstract_model, peak_flops
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
except ModuleNotFoundError as error:
    sys.exit(f'{error}. The examples need: pip install ".[examples]"')


def main(arguments: list[str] | None = None) -> int:
    args = cli.parse(__doc__, arguments)
    try:
        mesh = make_mesh(args.mesh, parse_hosts(args.hosts))
        device = mesh.devices.flat[0]
        default_dtype = "bfloat16" if device.platform == "gpu" else "float32"
        config, options, corpus = cli.settle(args, default_dtype)
        check_device(config, device)
        check(config, mesh)
        by_first_process(
            lambda: prepare(
                options.out,
                dataclasses.asdict(config),
                resume=options.resume,
                overwrite=options.overwrite,
            )
        )
    except ValueError as error:
        sys.exit(f"train_gpt.py: {error}")
    # float32 means float32: left alone, a GPU would multiply in TensorFloat-32.
    exact = jax.default_matmul_precision("highest")
    with contextlib.ExitStack() as stack:
        if config.dtype == "float32":
            stack.enter_context(exact)
        if jax.process_index():  # one process speaks for all
            quiet = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
            stack.enter_context(contextlib.redirect_stderr(quiet))
        try:
            return run(config, options, corpus, mesh)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


def by_first_process(function: Callable[[], None]) -> None:
    """Runs it on the first process; where it raises ValueError, all processes do."""
    problem = None
    if jax.process_index() == 0:
        try:
            function()
        except ValueError as error:
            problem = error
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(problem is not None))
        if failed and problem is None:
            problem = ValueError("the first process says why")
    if problem is not None:
        raise problem


def check_device(config: Config, device: Any) -> None:
    if config.attention == "cudnn" and device.platform != "gpu":
        raise ValueError(
            f"--attention cudnn needs a GPU; got the platform {device.platform}"
        )
    if config.attention == "cudnn" and config.dtype == "float32":
        raise ValueError("--attention cudnn needs --dtype bfloat16; got float32")


def run(config: Config, options: Options, corpus: Corpus, mesh: Mesh) -> int:
    """Trains from the last checkpoint, or the beginning, to the end."""
    trainer = Trainer(config, options.remat, options.scan, mesh)
    device = mesh.devices.flat[0]
    peak = peak_flops(device, config.dtype)
    several = f"{mesh.size} devices ({options.mesh}), each " if mesh.size > 1 else ""
    checkpoints = Checkpoints(options.out)
    first = checkpoints.latest() or 0
    if first:
        state, history = checkpoints.restore(first, trainer.abstract_state())
    else:
        state, history = trainer.init(jax.random.key(config.seed)), History()
    print(
        f"{config.layers} layers of width {config.width}, {trainer.num_params:,} "
        f"parameters, {config.dtype}, {config.attention} attention, on "
        f"{several}{device.device_kind}\n"
        f"{corpus.files} files of {config.data}: {len(corpus.train):,} bytes to train "
        f"on, {len(corpus.validation):,} to validate\n"
        f"step {first} of {config.steps}, {config.tokens_per_step:,} tokens each, "
        f"into {options.out}",
        flush=True,
    )

    def train_batch(step: int) -> jax.Array:
        batch = corpus.train_batch(config.seed, step, config.batch, config.length)
        return place(batch, mesh)

    began = time.perf_counter()
    train_step = trainer.step.lower(state, train_batch(first)).compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)

    progress = Progress(
        steps=config.steps,
        first=first,
        tokens_per_step=config.tokens_per_step,
        flops_per_token=trainer.flops_per_token(),
        peak=None if peak is None else peak * mesh.size,
        terminal=sys.stderr.isatty(),
    )
    validation = corpus.validation_batches(
        config.eval_batches, config.batch, config.length
    )

    def record(step: int, metrics: Metrics) -> None:
        loss = float(metrics.loss)
        if not math.isfinite(loss):
            sys.exit(
                f"train_gpt.py: the loss must be finite; got {loss} at step {step}. "
                "Try a lower --learning-rate."
            )
        history.loss.append(loss)
        history.grad_norm.append(float(metrics.grad_norm))
        progress.step(step, loss)

    def validate(step: int) -> None:
        with progress.paused():
            batches = (place(batch, mesh) for batch in validation)
            losses = [float(trainer.loss(state.params, batch)) for batch in batches]
        history.validation_step.append(step)
        history.validation_loss.append(sum(losses) / len(losses))
        progress.validated(step, history.validation_loss[-1])

    def checkpoint(step: int) -> None:
        with progress.paused():
            checkpoints.save(step, state, history)
            report(config, history, options.out)

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(progress),
        Interrupt() as interrupt,
    ):
        if first == 0:
            validate(0)
        # Metrics are read one step late: the device has its next step already.
        unread = None
        for step in range(first + 1, config.steps + 1):
            state, metrics = train_step(state, train_batch(step))
            if unread is not None:
                record(*unread)
            unread = (step, metrics)

            last = step == config.steps
            to_validate = step % config.eval_every == 0 or last
            to_save = step % options.checkpoint_every == 0 or last
            stop = interrupt.agreed(to_validate or to_save)
            to_save = to_save or stop
            if to_validate or to_save:
                record(*unread)
                unread = None
            if to_validate:
                validate(step)
            if to_save:
                checkpoint(step)
            if stop and not last:
                print(
                    f"stopped at step {step} of {config.steps}; "
                    f"go on with --out {options.out} --resume"
                )
                return 128 + stop

    print(
        f"validation loss {history.validation_loss[0]:.3f} -> "
        f"{history.validation_loss[-1]:.3f}; losses in {options.out / 'loss.png'} and "
        f"{options.out / 'history.json'}"
    )
    if first == config.steps:  # it may have been killed before it wrote them
        report(config, history, options.out)
    if options.sample:
        text = sample(config, options, state.params, mesh)
        if jax.process_index() == 0:
            write(options.out / "sample.txt", text)
        print(f"a sample, after the prompt {options.prompt!r}:\n\n{text}")
    return 0


def report(config: Config, history: History, out: Path) -> None:
    """Writes history.json and loss.png."""
    if jax.process_index():
        return
    write(out / "history.json", json.dumps(dataclasses.asdict(history)) + "\n")
    title = f"{config.preset}, {config.attention} attention, {config.dtype}"
    write(out / "loss.png", loss_curves(history, title))


def sample(config: Config, options: Options, params: Any, mesh: Mesh) -> str:
    """The prompt and what the model makes of it, as printable text."""
    # Flash2Attention has the cache; the other choices have the same parameters.
    graph, _ = abstract_model(dataclasses.replace(config, attention="flash2"))

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def generated(params, prompt, key):
        model = nnx.merge(graph, params)
        return generate(model, prompt, options.sample, key, options.temperature)

    prompt = START + options.prompt.encode()
    tokens = jnp.array([list(prompt)], jnp.int32)
    more = generated(params, tokens, jax.random.key(config.seed))
    text = options.prompt + bytes(np.asarray(more)[0].tolist()).decode(errors="replace")
    text = text.replace(START.decode(), "\n[end of file]\n")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Interrupt:
    """Makes the first Ctrl-C or SIGTERM a request; the second one stops at once."""

    received: int = 0

    def agreed(self, now: bool) -> int:
        """The request, if there is one. Of several processes one may have received it:
        they ask each other only `now` and then, since that waits for the device."""
        if jax.process_count() == 1:
            return self.received
        if not now:
            return 0
        return int(multihost_utils.process_allgather(np.int32(self.received)).max())

    def __enter__(self) -> "Interrupt":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {s: signal.signal(s, self._receive) for s in signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        print("\nstopping after this step; again to stop at once", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
