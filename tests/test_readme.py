"""The README's Python runs as it stands, from top to bottom, and gives what it says."""

import re
from pathlib import Path

import jax

README = Path(__file__).resolve().parents[1] / "README.md"


def test_python_blocks_run_in_order() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["y"].shape == (2, 256, 512)
    # One block shards batch over all devices; its result lies as its query does.
    assert names["out"].sharding.is_equivalent_to(names["q"].sharding, 4)
    assert len(names["out"].sharding.device_set) == jax.device_count()
