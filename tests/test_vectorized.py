"""The hot loops are vector code: one that gcc gave up on is ten times slower, and still right."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fastvae

ROOT = Path(__file__).resolve().parent.parent
REGISTER = {"x86-64-v4": "zmm", "x86-64-v3": "ymm"}
FORMULAS = [
    f"{name}::{direction}"
    for header in sorted((ROOT / "csrc").glob("*.h"))
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", header.read_text(), re.M | re.S)
    for direction in re.findall(r"struct ((?:Forward|Backward)\w*)", body)
]
LOOPS = [
    *(f"evaluate<fastvae::{formula}, float>" for formula in FORMULAS),
    "box_muller<float>",
    "sum<float>",
    "gather<fastvae::BFloat16, float>",
    "gather<fastvae::Float16, float>",
    "scatter<fastvae::BFloat16, float>",
    "scatter<fastvae::Float16, float>",
]


@pytest.fixture(scope="module")
def functions() -> dict[str, str]:
    """The disassembly of each function of the module."""
    if fastvae._load.module is None:
        pytest.skip("no compiled module to look at")
    if shutil.which("objdump") is None:
        pytest.skip("no objdump (binutils) to look with")
    command = ["objdump", "-d", "--no-show-raw-insn", "-C", fastvae._load.module.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", text, flags=re.M)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    if not any("[clone .arch_x86_64_v4]" in name for name in found):
        pytest.skip("this build has one instruction set only (FASTVAE_ISA), or is no x86-64 one")
    return found


@pytest.mark.parametrize("level", REGISTER)
@pytest.mark.parametrize("loop", LOOPS)
def test_hot_loop_is_vector_code(functions, loop, level):
    clone = f"[clone .arch_{level.replace('-', '_')}]"
    bodies = [b for name, b in functions.items() if f"::{loop}(" in name and clone in name]
    assert bodies, f"no {level} version of {loop}"
    for body in bodies:
        lines = body.splitlines()
        # arithmetic on whole registers, as the formula has it; a scalar loop has none of it
        packed = [
            x for x in lines if REGISTER[level] in x and re.search(r"\tv\w+(ps|d|q|w|dq)\b", x)
        ]
        assert len(packed) >= 4, f"{loop} has {len(packed)} {REGISTER[level]} instructions"
        calls = [x for x in lines if re.search(r"call.*<(exp|log|sin|cos|tanh)", x)]
        assert not calls, f"{loop} calls libm: {calls[:1]}"


def test_every_formula_was_found():
    assert {f.split("::")[0] for f in FORMULAS} >= {"GaussianKl", "ReparameterizeKl"}
    assert len(FORMULAS) >= 12
