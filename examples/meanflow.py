#!/usr/bin/env python3
"""Train a MeanFlow generator through the gradient of a jvp of jax_flash2's attention.

  python examples/meanflow.py                    minutes on two CPU cores
  python examples/meanflow.py --steps 20000 --batch 512 --out runs/longer
  python examples/meanflow.py --through-target

MeanFlow (Geng et al. 2025, arXiv 2505.13447) learns the average velocity u(z, r, t) of a
flow between two times, so that one evaluation makes a sample of noise. Its loss needs
du/dt along the flow, a jvp, inside a function that is differentiated: what
`flash_attention(..., forward_mode=True)` is for. The paper stops the gradient at the
target, which holds du/dt; with --through-target it flows through that too.

The data need no download: closed lines with two to five lobes, of random depth and
turned at random, as 32 points in the plane. The model is a transformer over the points,
in which attention has to make them agree on one line. DIR gets the losses
(history.json) and a picture of lines made in one and in four steps (samples.png).
"""

import argparse
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

try:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tqdm import tqdm

    import jax_flash2
except ModuleNotFoundError as error:
    sys.exit(f'{error}. The examples need: pip install ".[examples]"')

POINTS = 32
Array = jax.Array


# --------------------------------------------------------------------------------- data


def drawings(key: Array, batch: int) -> Array:
    """``(batch, POINTS, 2)``: once around a line with two to five lobes."""
    kind, depth, turn = jax.random.split(key, 3)
    lobes = jax.random.randint(kind, (batch, 1), 2, 6).astype(jnp.float32)
    depth = jax.random.uniform(depth, (batch, 1), minval=0.3, maxval=0.6)
    turn = jax.random.uniform(turn, (batch, 1), maxval=2 * math.pi)
    angle = 2 * math.pi * jnp.arange(POINTS) / POINTS
    radius = 1.3 * (1 + depth * jnp.cos(lobes * angle[None] + turn))
    circle = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return radius[..., None] * circle[None]


# -------------------------------------------------------------------------------- model


class Block(nnx.Module):
    """Attention and MLP, modulated by the times (adaLN-Zero, Peebles & Xie 2022)."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.modulation = nnx.Linear(
            width, 6 * width, kernel_init=nnx.initializers.zeros, rngs=rngs
        )
        self.norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Array, condition: Array) -> Array:
        parts = self.modulation(nnx.silu(condition))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(parts, 6, -1)
        h = self.norm(x) * (1 + scale1) + shift1
        qkv = self.qkv(h).reshape(*h.shape[:-1], 3 * self.heads, -1)
        attended: Any = jax_flash2.flash_attention(
            *jnp.split(qkv, 3, -2), forward_mode=True
        )
        x += gate1 * self.out(attended.reshape(x.shape))
        h = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(nnx.gelu(self.up(h)))


class Velocity(nnx.Module):
    """u(z, r, t): the average velocity, from time t back to r, of every point."""

    def __init__(self, width: int, heads: int, layers: int, rngs: nnx.Rngs):
        self.width = width
        self.enter = nnx.Linear(2, width, rngs=rngs)
        self.place = nnx.Embed(POINTS, width, rngs=rngs)
        self.times = nnx.Linear(2 * width, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.leave = nnx.Linear(width, 2, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, z: Array, r: Array, t: Array) -> Array:
        # Frequencies are low: the loss sees their derivative with respect to t.
        frequencies = jnp.exp(jnp.linspace(0, math.log(20), self.width // 2))

        def waves(time: Array) -> Array:
            angle = time[:, None] * frequencies[None]
            return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)

        condition = self.times(jnp.concatenate([waves(t), waves(t - r)], -1))
        x = self.enter(z) + self.place(jnp.arange(POINTS))[None]
        for block in self.blocks:
            x = block(x, condition)
        return self.leave(self.norm(x))


# ----------------------------------------------------------------------------- MeanFlow


def loss(
    model: Velocity, x: Array, key: Array, equal: float, through_target: bool
) -> tuple[Array, Array]:
    """The MeanFlow identity ``u = v - (t - r) du/dt``, as a regression: the loss, and the
    mean squared error.

    Times go from the data, at 0, to the noise, at 1. A share of the batch has r = t, for
    which it is flow matching.
    """
    noise_key, time_key, equal_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, x.shape)
    # Logit-normal times, the later one t.
    times = nnx.sigmoid(jax.random.normal(time_key, (2, x.shape[0])) - 0.4)
    r, t = times.min(0), times.max(0)
    r = jnp.where(jax.random.uniform(equal_key, t.shape) < equal, t, r)

    at, since = t[:, None, None], (t - r)[:, None, None]
    z, v = (1 - at) * x + at * noise, noise - x
    # du/dt along the flow, which moves z by v.
    tangents = (v, jnp.zeros_like(r), jnp.ones_like(t))
    u, du_dt = jax.jvp(model, (z, r, t), tangents)
    target = v - since * du_dt
    if not through_target:  # as in the paper
        target = jax.lax.stop_gradient(target)
    error = ((u - target) ** 2).mean((1, 2))
    # Large errors count less (the paper's adaptive weight, with p = 1).
    weight = jax.lax.stop_gradient(1 / (error + 1e-2))
    return (weight * error).mean(), error.mean()


def sample(model: Velocity, noise: Array, steps: int) -> Array:
    """Drawings of noise, in so many evaluations."""
    z, times = noise, [1 - i / steps for i in range(steps + 1)]
    for t, r in itertools.pairwise(times):
        now = jnp.full(noise.shape[0], t)
        z -= (t - r) * model(z, jnp.full_like(now, r), now)
    return z


# ------------------------------------------------------------------------------- program


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, meaning in (
        ("steps", 4000, "updates"),
        ("batch", 64, "lines in an update"),
        ("width", 64, "of the model, a multiple of heads"),
        ("heads", 4, "of attention"),
        ("layers", 3, "of the model"),
        ("seed", 0, "of data, model and samples"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--equal", type=float, default=0.75, help="share of the batch with r = t"
    )
    parser.add_argument(
        "--through-target", action="store_true", help="differentiate the target as well"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/meanflow"), metavar="DIR"
    )
    args = parser.parse_args(arguments)
    for name in ("steps", "batch", "width", "heads", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be positive; got {getattr(args, name)}")
    if args.width % (2 * args.heads):
        parser.error(f"--width must be a multiple of 2 * --heads; got {args.width}")
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    model = Velocity(args.width, args.heads, args.layers, nnx.Rngs(args.seed))
    graph, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(
        0, args.learning_rate, min(100, args.steps), max(args.steps, 101)
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.95)
    )
    objective = functools.partial(
        loss, equal=args.equal, through_target=args.through_target
    )
    decay = 1 - 1 / max(10, min(500, args.steps // 10))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, step: Array) -> Any:
        params, average, moments = state
        data, noise = jax.random.split(
            jax.random.fold_in(jax.random.key(args.seed), step)
        )
        x = drawings(data, args.batch)

        def of_params(params: Any) -> Any:
            return objective(nnx.merge(graph, params), x, noise)

        (value, error), grads = jax.value_and_grad(of_params, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(
            lambda a, p: decay * a + (1 - decay) * p, average, params
        )
        return (params, average, moments), (value, error)

    state = params, jax.tree.map(jnp.copy, params), optimizer.init(params)
    compiled = update.lower(state, jnp.int32(0)).compile()
    history: dict[str, list[float]] = {"loss": [], "error": []}
    began = time.perf_counter()
    with tqdm(total=args.steps, unit="step", disable=None) as progress:
        for step in range(args.steps):
            state, (value, error) = compiled(state, jnp.int32(step))
            history["loss"].append(float(value))
            history["error"].append(float(error))
            if not math.isfinite(history["error"][-1]):
                sys.exit(
                    f"meanflow.py: the error must be finite; got {history['error'][-1]} "
                    f"at step {step}. Try a lower --learning-rate."
                )
            if step % 20 == 0:
                progress.set_postfix(error=f"{history['error'][-1]:.3f}")
            progress.update()
    seconds = time.perf_counter() - began

    def recent(values: list[float]) -> float:
        last = values[-max(1, len(values) // 10) :]
        return sum(last) / len(last)

    print(
        f"{args.steps} steps in {seconds:.0f} s; mean squared error "
        f"{history['error'][0]:.3f} -> {recent(history['error']):.3f}"
    )
    (args.out / "history.json").write_text(json.dumps(history) + "\n")
    key = jax.random.key(args.seed + 1)
    noise = jax.random.normal(key, (8, POINTS, 2))
    make = jax.jit(sample, static_argnums=2)
    average = nnx.merge(graph, state[1])
    rows = {
        "data": drawings(key, 8),
        "one step": make(average, noise, 1),
        "four steps": make(average, noise, 4),
    }
    picture(rows, args.out / "samples.png")
    print(
        f"drawings in {args.out / 'samples.png'}, losses in {args.out / 'history.json'}"
    )
    return {"history": history, "samples": rows}


def picture(rows: dict[str, Array], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = len(next(iter(rows.values())))
    figure, axes = pyplot.subplots(
        len(rows), columns, figsize=(1.4 * columns, 1.5 * len(rows)), squeeze=False
    )
    for (name, drawn), line in zip(rows.items(), axes, strict=True):
        for points, ax in zip(jax.device_get(drawn), line, strict=True):
            ax.plot(*points.T, ".-", markersize=3, linewidth=0.5)
            ax.set(
                xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xticks=[], yticks=[], aspect="equal"
            )
        line[0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
