"""The jitted pieces of a training run: initial state, step, validation loss."""

from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gpt.config import Config
from gpt.mesh import batch_sharding, make_mesh, state_sharding
from gpt.model import GPT
from jax_flash2 import zigzag


class State(NamedTuple):
    """All that a step changes, as plain pytrees."""

    params: Any
    optimizer: Any


class Metrics(NamedTuple):
    loss: jax.Array
    grad_norm: jax.Array


class Trainer:
    """The functions of one configuration, compiled when first called.

    All run on `mesh`, by default of one device.
    """

    def __init__(
        self,
        config: Config,
        remat: str = "none",
        scan: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config = config
        self.optimizer = make_optimizer(config)
        self.mesh = make_mesh("") if mesh is None else mesh
        batch = batch_sharding(self.mesh)
        self.graph, params = abstract_model(config, remat, scan, self.mesh)
        self.num_params = sum(p.size for p in jax.tree.leaves(params))
        state = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        rows, *_ = state.params["embedding"]["embedding"].spec
        self.table = NamedSharding(self.mesh, PartitionSpec(rows))
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.init = jax.jit(self._init, out_shardings=state)
        self.step = jax.jit(
            self._step,
            in_shardings=(state, batch),
            out_shardings=(state, everywhere),
            donate_argnums=0,
        )
        self.loss = jax.jit(
            self._loss,
            in_shardings=(state.params, batch),
            out_shardings=everywhere,
        )

    def abstract_state(self) -> State:
        """Shapes, dtypes and placement of the state."""
        state = jax.eval_shape(self._init, jax.random.key(0))
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            state,
            state_sharding(state, self.mesh),
        )

    def _init(self, key) -> State:
        model = GPT(self.config, nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return State(params, self.optimizer.init(params))

    def _loss(self, params, tokens) -> jax.Array:
        """Mean cross entropy of each token given those before it, in nats."""
        # A lookup needs rows of full width: else XLA would redistribute activations.
        table = jax.lax.with_sharding_constraint(params["embedding"], self.table)
        params = params | {"embedding": table}
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        ways = self.mesh.shape["seq"]
        if ways > 1:  # so that every device has the same causal work
            inputs, targets = (zigzag(x, ways) for x in (inputs, targets))
        logits = nnx.merge(self.graph, params)(inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean()

    def _step(self, state: State, tokens) -> tuple[State, Metrics]:
        loss, grads = jax.value_and_grad(self._loss)(state.params, tokens)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to int steps
            updates, optimizer = self.optimizer.update(
                grads, state.optimizer, state.params
            )
        params = optax.apply_updates(state.params, updates)
        return State(params, optimizer), Metrics(loss, optax.tree.norm(grads))

    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward, by the usual convention.

        6 per parameter, and 12 * layers * length * width for attention's products,
        not halved for causality, as FlashAttention, Megatron-LM and PaLM report it.
        Recomputation under remat does not count.
        """
        c = self.config
        return 6 * self.num_params + 12 * c.layers * c.length * c.width


def abstract_model(
    config: Config, remat: str = "none", scan: bool = False, mesh: Any = None
):
    """The model's graph, to merge with parameters, and those as shapes and dtypes."""
    model = nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0), remat, scan, mesh))
    return nnx.split(model, nnx.Param)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW, linear warm-up, cosine decay to a tenth, clipped by global norm."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup,
        decay_steps=config.steps,
        end_value=config.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule, b2=0.95, weight_decay=config.weight_decay, mask=is_decayed
        ),
    )


def is_decayed(params) -> Any:
    """Weight decay is for matrices; stacking gives the norms' scales two axes too."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params)


# Dense bfloat16 TFLOP/s by jax.Device.device_kind; the first part that matches counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_flops(device: Any, dtype: str) -> float | None:
    """Dense FLOP/s of a jax.Device, if it is a known one."""
    if dtype != "bfloat16":
        return None
    kind = device.device_kind
    return next((t * 1e12 for name, t in PEAK_TFLOPS.items() if name in kind), None)
