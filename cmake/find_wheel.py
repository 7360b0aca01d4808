"""Prints where a wheel of the build environment keeps what CMake needs.

``find_wheel.py nvcc``: the CUDA compiler of the nvidia-cuda-nvcc wheel.
``find_wheel.py ffi-headers``: the XLA FFI headers of jaxlib, without importing it.
"""

import importlib.util
import pathlib
import sys


def folders(package: str) -> list[pathlib.Path]:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return []
    return [pathlib.Path(p) for p in (spec and spec.submodule_search_locations) or []]


def find(what: str) -> pathlib.Path:
    if what == "nvcc":
        packages, path = ("nvidia.cu13", "nvidia.cuda_nvcc"), "bin/nvcc"
    else:
        packages, path = ("jaxlib",), "include"
    for package in packages:
        for folder in folders(package):
            if (folder / path).exists():
                return folder / path
    sys.exit(f"find_wheel.py: {what} is in none of the packages {', '.join(packages)}")


if __name__ == "__main__":
    print(find(sys.argv[1]))
