"""Pin everything that *.in asks for, with hashes: ``make requirements``.

runtime.txt  for every machine
cuda.txt     what torch's CUDA build wants besides; its CPU build does not
dev.txt      for tests and checks, on top of runtime.txt
flower-1.41.txt  laid over them for the oldest Flower that is supported

What is pinned already stays, unless an .in file asks for another version. torch's CPU build is not
on PyPI, so it is pinned by hand, in torch-cpu.txt.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CUDA = re.compile(r"(nvidia|cuda|triton)\b")
HEADER = "# Made by `make requirements` from {source}; do not edit.\n"

Blocks = dict[str, str]


def main() -> None:
    """Write every .txt file of this folder."""
    known = "".join((HERE / f"{name}.txt").read_text() for name in ("runtime", "cuda", "dev"))
    runtime = compiled("runtime.in", known)
    cuda = {name: runtime.pop(name) for name in list(runtime) if CUDA.match(name)}
    runtime["torch"] = with_cpu_build(runtime["torch"])
    dev = {
        name: block
        for name, block in compiled("dev.in", known).items()
        if name not in runtime and name not in cuda
    }
    write("runtime.txt", "runtime.in", runtime)
    write("cuda.txt", "runtime.in", cuda)
    write("dev.txt", "dev.in", dev)
    write("flower-1.41.txt", "flower-1.41.in", compiled("flower-1.41.in", "", "--no-deps"))


def with_cpu_build(torch: str) -> str:
    """The lines of torch, with the hashes of its CPU build among them."""
    version = torch.split(maxsplit=1)[0].partition("==")[2]
    text = (HERE / "torch-cpu.txt").read_text()
    if f"torch=={version}+cpu " not in text:
        raise SystemExit(
            f"error: expected the CPU build of torch {version} in torch-cpu.txt, found another\n"
            f"hint: pip download --no-deps torch=={version} where pip finds CPU builds, "
            "then pip hash"
        )
    hashes = re.findall(r"--hash=\S+", text)
    # uv keeps the hashes that it finds
    return " \\\n    ".join([torch, *(one for one in hashes if one not in torch)])


def compiled(source: str, known: str, *options: str) -> Blocks:
    """What uv makes of an .in file: name → its line and its hashes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.txt"
        out.write_text(known)  # uv keeps the versions that it finds there
        command = [
            *(str(Path(sys.executable).parent / "uv"), "pip", "compile", "--quiet"),
            *("--generate-hashes", "--no-header", "--no-annotate"),
            *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"),
            *("--output-file", str(out), *options, source),
        ]
        subprocess.run(command, cwd=HERE, check=True)
        text = out.read_text()
    blocks = re.split(r"\n(?=[a-zA-Z0-9])", text.strip())
    return {re.split(r"[=\[ ;]", block, maxsplit=1)[0]: block for block in blocks}


def write(name: str, source: str, blocks: Blocks) -> None:
    """Write one .txt file, sorted by name."""
    lines = "\n".join(blocks[package] for package in sorted(blocks))
    (HERE / name).write_text(f"{HEADER.format(source=source)}{lines}\n")


if __name__ == "__main__":
    main()
