"""Judges the build: ``check_build.py LOG``, in the environment that was installed into.

Fails where ptxas says that a kernel lost its asynchronous matrix products or spills
registers, and where the compiled module is missing or too large.
"""

import re
import sys
from pathlib import Path

# Serialised wgmma (C7510 to C7512, C7514, C7515, C7520), injected waits (C7517, C7519), an ignored
# setmaxnreg (C7508).
BAD = re.compile(r"C75(08|10|11|12|14|15|17|19|20)\b")
KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
MAX_BYTES = 30 * 2**20
# Bytes. A few words may wait in local memory, outside of the main loops, which sass.py judges.
MAX_SPILL = 96
# More has the backward with soft cap, ALiBi and segment ids at head_dim 256 (its step's place),
# and Hopper's with masks at 64 and with soft caps at 128.
EXCEPTIONS = {
    r"sm80\d+backward_rolesILi4E\w*Lb1E": 600,
    r"sm90\d+backwardILi1E": 128,
    r"sm90\d+backwardILi13E": 104,
}


def judge(log: str) -> tuple[int, list[str]]:
    """Number of kernels, and everything wrong with them."""
    problems, kernels, kernel = [], 0, "?"
    for line in log.splitlines():
        if BAD.search(line):
            problems.append(line.strip())
        if found := KERNEL.search(line):
            kernel = f"{found[1]} for {found[2]}"
            kernels += 1
        found = SPILL.search(line)
        limits = [
            limit for name, limit in EXCEPTIONS.items() if re.search(name, kernel)
        ]
        if found and max(map(int, found.groups())) > max(limits, default=MAX_SPILL):
            problems.append(f"{kernel}: {found[0]}")
    return kernels, problems


def main() -> None:
    import jax_flash2
    from jax_flash2 import _ffi

    kernels, problems = judge(Path(sys.argv[1]).read_text(errors="replace"))
    if kernels == 0:
        problems.append("the log names no kernel: did nvcc run, with -Xptxas=-v?")
    (module,) = Path(jax_flash2.__file__).parent.glob("_cuda*.so")
    if module.stat().st_size > MAX_BYTES:
        problems.append(
            f"{module.name} has {module.stat().st_size} bytes; {MAX_BYTES} allowed"
        )
    print(
        f"{kernels} kernels, {module.stat().st_size / 2**20:.1f} MiB, {_ffi.build_info()}"
    )
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
