"""Result files: ``{"meta": {...}, "rows": [...]}``, merged by row."""

import datetime
import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import _device

FOLDER = Path(__file__).with_name("results")
PASSES = {"fwd": "forward", "bwd": "backward"}
# What makes two rows the same measurement: the newer replaces the older.
KEY = (
    "impl",
    "pass",
    "dtype",
    "head_dim",
    "causal",
    "window",
    "seq",
    "batch",
    "heads",
    "heads_kv",
    "documents",
    "deterministic",
    "soft_cap",
)
PACKAGES = (
    "jax",
    "jaxlib",
    "jax_flash2",
    "torch",
    "nvidia-cudnn-cu13",
    "tokamax",
    "flash-attn-4",
    "dew-flash-attn-cu13",
)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) or None for name in KEY)  # False as if it were not said


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"meta": {}, "rows": []}


def merge(path: Path, meta: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Adds ``rows`` to the file; those of the same measurement give way."""
    old = read(path)
    merged = {key(row): row for row in [*old["rows"], *rows]}
    known = [*old["rows"], *rows]  # keeps the order in which rows first came
    order = list(dict.fromkeys(key(row) for row in known))
    lines = ",\n".join("  " + json.dumps(merged[k]) for k in order)
    facts = json.dumps({**old["meta"], **meta}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"meta": {facts},\n"rows": [\n{lines}\n]}}\n')


def merge_file(new: Path, out: Path | None, name: str) -> None:
    """Adds a file from a GPU machine to ``out``, or to the file ``name`` of its GPU."""
    found = read(new)
    path = out or FOLDER / _device.folder(found["meta"]["gpu"]) / name
    merge(path, found["meta"], found["rows"])


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commit() -> str:
    """The source's commit, with a + where the tree differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
