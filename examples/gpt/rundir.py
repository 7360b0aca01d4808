"""A run's directory: settings, checkpoints, history. Every write is all or nothing."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
FILES = (CONFIG, "history.json", "loss.png", "sample.txt")
KEPT_CHECKPOINTS = 2


@dataclasses.dataclass
class History:
    """Loss and gradient norm of steps 1, 2, ...; validation loss of some of them."""

    loss: list[float] = dataclasses.field(default_factory=list)
    grad_norm: list[float] = dataclasses.field(default_factory=list)
    validation_step: list[int] = dataclasses.field(default_factory=list)
    validation_loss: list[float] = dataclasses.field(default_factory=list)


def stored_config(out: Path) -> dict[str, Any] | None:
    """The settings of the run in `out`, if there is one."""
    file = out / CONFIG
    return json.loads(file.read_text()) if file.exists() else None


def prepare(out: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Makes `out` this run's directory, or says why it cannot be."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a directory; got {out}, a file")
    stored = stored_config(out)
    if stored is None:
        if out.exists() and any(out.iterdir()):
            raise ValueError(
                f"--out must be new, empty, or the directory of an earlier run; got "
                f"{out}, which holds other files"
            )
    elif overwrite:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    elif not resume:
        raise ValueError(
            f"--out must not hold a run already; got {out}, which does. Continue that "
            "run with --resume, replace it with --overwrite, or choose another --out"
        )
    else:
        for name, value in config.items():
            if stored.get(name) != value:
                raise ValueError(
                    f"--resume continues a run with its own settings: {name} must be "
                    f"{stored.get(name)}, as in {out / CONFIG}; got {value}"
                )
    out.mkdir(parents=True, exist_ok=True)
    write(out / CONFIG, json.dumps(config, indent=2) + "\n")


def write(file: Path, content: str | bytes) -> None:
    """Replaces a file in one step: a killed run leaves the old one or the new one."""
    content = content.encode() if isinstance(content, str) else content
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


class Checkpoints:
    """State and history together, saved at once or not at all."""

    def __init__(self, out: Path):
        self._manager = ocp.CheckpointManager(
            (out / CHECKPOINTS).absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT_CHECKPOINTS,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, history: History) -> None:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            history=ocp.args.JsonSave(dataclasses.asdict(history)),
        )
        self._manager.save(step, args=arguments)

    def restore(self, step: int, like: Any) -> tuple[Any, History]:
        """State and history of a step; `like` has shapes, dtypes and shardings."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore()
        )
        restored: Any = self._manager.restore(step, args=arguments)
        return restored.state, History(**restored.history)

    def close(self) -> None:
        self._manager.close()
