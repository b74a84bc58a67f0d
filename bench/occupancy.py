"""What each CUDA kernel takes of a multiprocessor, and how wide its accesses are. Needs no GPU.

    python bench/occupancy.py [--arch sm_90] [--out kernels.csv] [SOURCES...]

Compiles csrc/*.cu with nvcc, reads registers, shared memory and block sizes off the binary, and the
width of loads and stores off the disassembly. ``cuobjdump`` is the CUDA toolkit's, or that which
ships inside the triton wheel (``pip install triton``).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Of compute capability 8.0 and 9.0 alike.
WARPS, BLOCKS, REGISTERS = 64, 32, 65536  # of a multiprocessor
REGISTER_UNIT = 256  # of which a warp is given whole ones
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10}
RESERVED = 1 << 10  # of shared memory, for each block


@dataclass(frozen=True)
class Kernel:
    source: str
    name: str
    threads: int  # of the largest block that it may be launched with
    registers: int
    stack: int  # bytes: spills, or an array that is indexed
    shared: int  # bytes, static
    blocks: int  # resident at once
    occupancy: int  # per cent of the warps that there is room for
    loads: str  # of global memory: bits of an access, and how many there are in the code
    stores: str


def resident(threads: int, registers: int, shared: int, arch: str) -> int:
    """How many blocks a multiprocessor has room for.

    >>> resident(256, 64, 0, "sm_90")  # 64 x 32 registers a warp, 32 warps
    4
    """
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // (of_warp * warps) if registers else BLOCKS
    return min(BLOCKS, WARPS // warps, by_registers, SHARED[arch] // (shared + RESERVED))


def widths(code: str, instruction: str) -> str:
    """``"128: 4, 32: 1"``: how many accesses of how many bits a kernel's code has."""
    found: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        width = re.search(r"\.(?:[US](8|16)|(64|128))\b", modifiers)
        found[int(width[1] or width[2]) if width else 32] += 1
    return ", ".join(f"{bits}: {n}" for bits, n in sorted(found.items(), reverse=True))


def sections(text: str, header: str) -> Iterator[tuple[str, str]]:
    """The parts of a dump that begin with a line ``header NAME``."""
    parts = re.split(rf"^\s*{header}(\S+?):?\s*$", text, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


def tool(name: str) -> str:
    if found := shutil.which(name):
        return found
    if spec := importlib.util.find_spec("triton"):
        inside = Path(spec.origin or "").parent / "backends" / "nvidia" / "bin" / name
        if inside.exists():
            return str(inside)
    sys.exit(f"occupancy: there is no {name}; install the CUDA toolkit, or triton for cuobjdump")


def inspect(source: Path, arch: str) -> list[Kernel]:
    """The kernels of a source, compiled for ``arch``."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.cubin"
        flags = ["-std=c++20", "-O3", f"-arch={arch}", "-cubin"]
        subprocess.run([tool("nvcc"), *flags, str(source), "-o", str(binary)], check=True)

        def dump(what: str) -> str:
            command = [tool("cuobjdump"), f"--dump-{what}", str(binary)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, elf = dump("resource-usage"), dump("elf")
        code = dict(sections(dump("sass"), "Function : "))
    threads = {}
    for name, info in sections(elf, r"\.nv\.info\."):
        sizes = re.search(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s+((?:0x\w+ ?)+)", info)
        if sizes:
            x, y, z = (int(n, 16) for n in sizes[1].split())
            threads[name] = x * y * z
    plain = subprocess.run(
        ["c++filt"], input="\n".join(code), check=True, capture_output=True, text=True
    ).stdout.splitlines()
    found = []
    for name, readable in zip(code, plain, strict=True):
        line = re.search(
            rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
        )
        if line is None or name not in threads:
            sys.exit(f"occupancy: cuobjdump says nothing of {readable}")
        registers, stack, shared = (int(n) for n in line.groups())
        blocks = resident(threads[name], registers, shared, arch)
        readable = re.sub(r"^void |fastvae::(cuda::)?", "", readable)
        found.append(
            Kernel(
                source=source.name,
                name=re.sub(r"\([^()]*\)$", "", readable),
                threads=threads[name],
                registers=registers,
                stack=stack,
                shared=shared,
                blocks=blocks,
                occupancy=round(100 * blocks * -(-threads[name] // 32) / WARPS),
                loads=widths(code[name], "LDG"),
                stores=widths(code[name], "STG"),
            )
        )
    return sorted(found, key=lambda kernel: kernel.name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("sources", nargs="*", type=Path, help="default: all of csrc")
    parser.add_argument("--arch", choices=list(SHARED), default="sm_90")
    parser.add_argument("--out", type=Path, help="a CSV of all; default: the table alone")
    args = parser.parse_args(argv)
    kernels = []
    for source in args.sources or sorted((ROOT / "csrc").glob("*.cu")):
        some = inspect(source, args.arch)
        kernels += some
        shown = [k for k in some if "double" not in k.name and "Float16" not in k.name]
        print(f"\n{source.name}: {len(some)} kernels, those of float:")
        for k in shown:
            print(
                f"  {k.name[:76]:<76} {k.threads:4} threads {k.registers:3} registers "
                f"{k.shared:6} B shared {k.occupancy:3} %  loads {k.loads or '-'}; "
                f"stores {k.stores or '-'}" + ("  STACK" if k.stack else "")
            )
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Kernel)])
            writer.writeheader()
            writer.writerows(asdict(k) for k in kernels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
