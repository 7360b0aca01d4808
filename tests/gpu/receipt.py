"""The GPU receipt: that these kernels and bindings passed their tests on a GPU.

CI has no GPU. `pytest tests/gpu` writes ``receipt.json`` beside this file; CI checks that
its hash is that of the sources. By hand: ``receipt.py --check``, or
``receipt.py --excuse "why no GPU run was possible"``.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECEIPT = Path(__file__).with_name("receipt.json")
BINDINGS = ("_ffi.py", "_kernels.py")  # all that reaches the kernels, in jax_flash2/


def sources() -> list[Path]:
    """What the receipt stands for: kernels, host code, their build, and the bindings."""
    cuda = (p for p in (ROOT / "cuda").rglob("*") if p.is_file() and p.suffix != ".md")
    return sorted([*cuda, *(ROOT / "jax_flash2" / name for name in BINDINGS)])


def digest() -> str:
    total = hashlib.sha256()
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{name} {content}\n".encode())
    return total.hexdigest()


def read() -> dict[str, Any]:
    return json.loads(RECEIPT.read_text()) if RECEIPT.exists() else {}


def write(facts: dict[str, Any]) -> None:
    RECEIPT.write_text(json.dumps({"sources": digest(), **facts}, indent=2) + "\n")


def check() -> str | None:
    """What is wrong with the receipt, or None."""
    receipt = read()
    if not receipt:
        return f"there is no {RECEIPT.relative_to(ROOT)}"
    if receipt.get("sources") != digest():
        return (
            f"cuda/ or {' or '.join(BINDINGS)} in jax_flash2/ changed since the receipt "
            "was written: run "
            "`JAX_FLASH2_TEST_GPU=1 pytest tests/gpu` on a machine with a GPU"
        )
    if receipt.get("excuse"):
        return None
    if receipt.get("failed", 1) or not receipt.get("passed"):
        return (
            f"the GPU tests did not pass: {receipt.get('passed')} passed, "
            f"{receipt.get('failed')} failed"
        )
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--check", action="store_true")
    group.add_argument("--excuse", metavar="WHY")
    arguments = parser.parse_args()
    if arguments.excuse:
        last = read()
        write({"excuse": arguments.excuse, "last_run": last.get("last_run", last)})
    problem = check()
    if problem:
        sys.exit(f"GPU receipt: {problem}")
    receipt = read()
    print(f"GPU receipt: {receipt.get('excuse') or json.dumps(receipt)}")


if __name__ == "__main__":
    main()
