"""Judges the machine code: ``sass.py CUOBJDUMP MODULE``.

ptxas reports spills of a whole kernel; what matters is where they are, and which products
of a warpgroup wait for their descriptors. A loop is what lies
between a backward branch and its target; a main loop is an innermost one with matrix
products, and of those the shortest, since the others also mask.

A barrier's place in shared memory may serve nothing else: on Hopper its state is kept
elsewhere and may come back over what was stored there.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

FUNCTION = re.compile(r"^\s*Function : (\S+)")
ARCHITECTURE = re.compile(r"^arch = (\S+)")
LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_]*)(\S*)\s*(.*?);"
)
PRODUCTS = ("HMMA", "HGMMA")
LOCAL = ("LDL", "STL")
SHARED = ("LDS", "STS", "ATOMS")
PLACE = re.compile(r"\[[^]]*\+0x([0-9a-f]+)\]")
BACKWARD = re.compile(r"sm80\d+backward_")
GENERAL_BACKWARD = re.compile(r"sm80\d+backward_\w+ELb1E")


@dataclass
class Kernel:
    name: str
    architecture: str
    code: list[tuple[int, str, str]]  # address, operation, operands

    def main_loop(self) -> list[tuple[int, str, str]]:
        """Its instructions; empty where no loop multiplies."""
        found = []
        for end, (address, operation, operands) in enumerate(self.code):
            target = re.search(r"0x([0-9a-f]+)", operands)
            if operation != "BRA" or target is None or int(target[1], 16) > address:
                continue
            body = [x for x in self.code[: end + 1] if x[0] >= int(target[1], 16)]
            if any(operation in PRODUCTS for _, operation, _ in body):
                found.append(body)
        inner = [
            a
            for a in found
            if not any(
                b is not a and a[0][0] <= b[0][0] and b[-1][0] <= a[-1][0]
                for b in found
            )
        ]
        return min(inner, key=len, default=[])

    def accesses_to_barriers(self) -> list[str]:
        """Plain accesses at the offset of a barrier, of 8 bytes."""

        def places(operations: tuple[str, ...]) -> Iterator[tuple[int, str]]:
            for _, operation, operands in self.code:
                found = PLACE.search(operands)
                if operation in operations and found:
                    yield int(found[1], 16), f"{operation} {operands}"

        # They lie behind all the rest: a small offset is one from some other base.
        barriers = {place // 8 for place, _ in places(("SYNCS",)) if place >= 4096}
        return [text for place, text in places(SHARED) if place // 8 in barriers]


def kernels(text: str) -> Iterator[Kernel]:
    architecture, kernel = "", None
    for line in text.splitlines():
        if found := ARCHITECTURE.match(line):
            architecture = found[1]
        elif found := FUNCTION.match(line):
            if kernel:
                yield kernel
            kernel = Kernel(found[1], architecture, [])
        elif kernel and (found := LINE.match(line)):
            kernel.code.append((int(found[1], 16), found[2], found[4]))
    if kernel:
        yield kernel


def judge(text: str) -> tuple[int, list[str]]:
    """Number of main loops, and what is wrong in them, of a disassembly."""
    loops, problems = 0, []
    for kernel in kernels(text):
        problems += [
            f"{kernel.name} for {kernel.architecture}: a barrier's place is used by {x}"
            for x in kernel.accesses_to_barriers()
        ]
        operations = [operation for _, operation, _ in kernel.main_loop()]
        loops += bool(operations)
        spills = sum(operation in LOCAL for operation in operations)
        # A descriptor on its way from a vector register: the next product waits for it. Asked
        # of the forward; the backward's kernel of two blocks has two or three.
        where = [i for i, x in enumerate(operations) if x == "HGMMA"]
        between = operations[where[0] : where[-1]] if where else []
        moves = between.count("R2UR")
        if moves and "forward" in kernel.name:
            problems.append(
                f"{kernel.name} for {kernel.architecture}: {moves} R2UR between the "
                "products of its main loop"
            )
        # A kernel that masks everywhere has one loop of some thousand instructions. The
        # backward's with soft cap, ALiBi and segment ids may keep a step's place there:
        # its tile and head, read once or twice a step. sm_80's other backward keeps 4 words
        # of some 1,200 instructions there, which is more than a forward may.
        share = 240 if BACKWARD.search(kernel.name) else 350
        allowed = len(operations) // share if len(operations) >= 1100 else 0
        if GENERAL_BACKWARD.search(kernel.name):
            allowed = len(operations) // 35
        if spills > allowed:
            problems.append(
                f"{kernel.name} for {kernel.architecture}: {spills} accesses to local "
                f"memory among the {len(operations)} instructions of its main loop"
            )
    return loops, problems


def main() -> None:
    cuobjdump, module = sys.argv[1:]
    done = subprocess.run(
        [cuobjdump, "-sass", module], capture_output=True, text=True, check=True
    )
    loops, problems = judge(done.stdout)
    if loops == 0:
        problems.append(f"{module}: no loop with matrix products was found")
    print(f"{loops} main loops")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
