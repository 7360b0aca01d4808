"""What a run is: its presets, and every setting that decides its losses."""

import dataclasses
from pathlib import Path

ATTENTION = {
    "flash2": "jax_flash2.Flash2Attention (the default)",
    "reference": "the same module on its dense definition of right",
    "cudnn": "flax's module with jax.nn.dot_product_attention on cuDNN",
    "xla": "flax's module with jax.nn.dot_product_attention on XLA",
}
REMAT = {
    "none": "keep every activation",
    "flash2": "recompute all but attention's output and logsumexp",
    "full": "recompute all",
}
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings that decide the losses; two runs with equal ones are the same run."""

    preset: str
    layers: int
    width: int
    heads: int
    vocab: int  # rows of the embedding; bytes use the first 256
    length: int
    batch: int
    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float
    eval_every: int
    eval_batches: int
    seed: int
    dtype: str
    attention: str
    data: str
    data_sha256: str

    def __post_init__(self):
        for name in ("layers", "width", "heads", "length", "batch", "steps"):
            require(getattr(self, name) >= 1, name, "must be at least 1", self)
        for name in ("eval_every", "eval_batches"):
            require(getattr(self, name) >= 1, name, "must be at least 1", self)
        require(self.vocab >= 256, "vocab", "must be at least 256", self)
        require(
            self.width % (2 * self.heads) == 0,
            "width",
            f"must be a multiple of 2 * heads = {2 * self.heads}, so that rotary "
            "embedding can turn pairs",
            self,
        )
        require(self.learning_rate > 0, "learning_rate", "must be above 0", self)
        require(self.weight_decay >= 0, "weight_decay", "must not be negative", self)
        require(self.clip > 0, "clip", "must be above 0", self)
        require(0 <= self.seed < 2**32, "seed", "must be in [0, 2**32)", self)
        require(
            0 <= self.warmup < self.steps,
            "warmup",
            f"must be at least 0 and below steps = {self.steps}",
            self,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length


def require(condition: bool, name: str, rule: str, config: Config) -> None:
    if not condition:
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag} {rule}; got {getattr(config, name)}")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model's shape with training settings that suit it."""

    note: str
    layers: int
    width: int
    heads: int
    vocab: int
    length: int
    batch: int
    steps: int
    learning_rate: float
    remat: str = "none"
    scan: bool = False


# The GPT-3 shapes are those of Brown et al. (2020), table 2.1, with their learning
# rates and GPT-2's vocabulary, padded to a multiple of 128, so that sizes and speeds
# compare with published ones. Heads of 1.3B and 2.7B are 128 wide, as FlashAttention's
# own training benchmarks have them. Batch sizes fit one GPU with 80 GB.
PRESETS = {
    "smoke": Preset("seconds on a CPU", 2, 64, 2, 256, 64, 8, 60, 5e-3),
    "tiny": Preset("three minutes on 2 CPU cores", 4, 128, 4, 256, 256, 8, 800, 3e-3),
    "gpt3-125m": Preset("one GPU", 12, 768, 12, 50304, 2048, 16, 1000, 6e-4),
    "gpt3-350m": Preset("one GPU", 24, 1024, 16, 50304, 2048, 8, 1000, 3e-4),
    "gpt3-1.3b": Preset(
        "80 GB GPU", 24, 2048, 16, 50304, 2048, 8, 1000, 2e-4, "flash2", True
    ),
    "gpt3-2.7b": Preset(
        "80 GB GPU", 32, 2560, 20, 50304, 2048, 4, 1000, 1.6e-4, "flash2", True
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings that leave the losses alone and may change when a run is resumed."""

    out: Path
    checkpoint_every: int
    resume: bool
    overwrite: bool
    mesh: str
    remat: str
    scan: bool
    prompt: str
    sample: int
    temperature: float

    def __post_init__(self):
        rules = (
            ("--checkpoint-every", self.checkpoint_every, 1),
            ("--sample", self.sample, 0),
            ("--temperature", self.temperature, 0),
        )
        for flag, value, least in rules:
            if not value >= least:  # nan is refused
                raise ValueError(f"{flag} must be at least {least}; got {value}")
        if not self.prompt:
            raise ValueError("--prompt must hold at least one character; got ''")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other; got both")
