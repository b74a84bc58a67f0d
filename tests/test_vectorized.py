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
REALS = ("float", "double")
MAPS = ("LogVar", "LogScale", "Scale", "Softplus")
# Formulas that move numbers and hardly compute.
MOVES = r"fastvae::Total|AffineCoupling<fastvae::Exp, \w+, false>::BackwardOfLogDet"
PIXELS = ("add_channel", "lean")
LOOPS = [
    *(
        f"{loop}<{real}>"
        for loop in ("box_muller", "gumbels", "sum", "add_rows", "weigh_rows", "scale_rows")
        for real in REALS
    ),
    *(
        f"{loop}<{prior}, {real}>"
        for loop in ("add_kl_rows", "kl_gradient_rows")
        for prior in ("true", "false")
        for real in REALS
    ),
    "raise_rows<fastvae::cpu::Plain, float>",
    "raise_rows<fastvae::GumbelOneHot, float>",
    "gather<fastvae::BFloat16, float>",
    "gather<fastvae::Float16, float>",
    "scatter<fastvae::BFloat16, float>",
    "scatter<fastvae::Float16, float>",
    "raise_lanes<fastvae::LogMeanExp, float>",
    "add_lanes<fastvae::LogMeanExp, float>",
    "scale_lanes<fastvae::LogMeanExp, float>",
    *(
        f"{loop}<fastvae::{scale}, float>"
        for loop in ("prepare_components", "chain_scales")
        for scale in MAPS
    ),
    "absorb<float>",
    "absorb_marginals<float>",
    "add_weights<float>",
    *(f"add_lines<{real}>" for real in REALS),
    *(f"gradient_lines<{real}, {sets}, true>" for real in REALS for sets in ("true", "false")),
    *(
        f"find_scales<fastvae::{scale}, {real}, {grad}>"
        for scale in MAPS
        for real in REALS
        for grad in ("true", "false")
    ),
    *(f"{loop}<{real}, {grad}>" for loop in PIXELS for real in REALS for grad in ("true", "false")),
    *(
        f"{loop}<{real}>"
        for loop in ("begin_terms", "fold", "add_terms", "normalise", "weigh_terms", "weigh_slopes")
        for real in REALS
    ),
    *(
        f"{loop}<fastvae::{flow}, {real}, {shared}, true{inverse}>"
        for loop, inverse in (("advance", ""), ("retreat", ", false"), ("retreat", ", true"))
        for flow in ("Planar", "Radial", "Householder")
        for real in REALS
        for shared in ("true", "false")
        if (flow, inverse) != ("Radial", ", true")  # is the same one
    ),
    *(
        f"{loop}<fastvae::{flow}, {real}, {inverse}{log_det}>"
        for loop, log_det in (("take_steps", ", true"), ("take_steps_back", ""))
        for flow in ("Planar", "Radial", "Householder")
        for real in REALS
        for inverse in ("true", "false")
    ),
    *(
        f"{loop}<{real}>"
        for loop in (
            "bend_rows",
            "bend_again",
            "unbend_rows",
            "solve_rows",
            "unsolve_rows",
            "constrain_diagonals",
            "pull_diagonals",
        )
        for real in REALS
    ),
    *(
        f"activate<fastvae::{activation}, {real}>"
        for activation in ("LeakyRelu", "Elu", "Silu", "Logistic", "HyperbolicTangent")
        for real in REALS
    ),
    *(f"share_out<{real}>" for real in REALS),
    *(
        f"{loop}_pieces<{real}, {inverse}>"
        for loop in ("find", "follow", "differentiate")
        for real in REALS
        for inverse in ("true", "false")
    ),
    *(f"{loop}<{real}>" for loop in ("spread_terms", "spread_slopes") for real in REALS),
    "sum_line<fastvae::Planar, float>",
    "finish_line<fastvae::Planar, float>",
    *(f"weigh<float, (fastvae::Owner){owner}>" for owner in (0, 1)),
    *(
        f"score_pairs<float, (fastvae::Owner){owner}, {marginals}>"
        for owner in (0, 1)
        for marginals in ("true", "false")
    ),
    *(
        f"add_gradients<float, (fastvae::Owner){owner}, {marginals}, {infinite}>"
        for owner in (0, 1)
        for marginals in ("true", "false")
        for infinite in ("true", "false")
    ),
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
    # gcc folds identical functions into one and a jump to it
    return {name: body for name, body in found.items() if not re.match(r"\s*\S+\s+jmp", body)}


def check(name: str, body: str, register: str) -> None:
    """Arithmetic on whole registers, as the formula has it; a scalar loop has none of it."""
    lines = body.splitlines()
    packed = [x for x in lines if register in x and re.search(r"\tv\w+(ps|pd|d|q|w|dq)\b", x)]
    assert len(packed) >= 3, f"{name} has {len(packed)} {register} instructions"
    calls = [x for x in lines if re.search(r"call.*<(exp|log|sin|cos|tanh)", x)]
    assert not calls, f"{name} calls libm: {calls[:1]}"


@pytest.mark.parametrize("level", REGISTER)
@pytest.mark.parametrize("loop", LOOPS)
def test_hot_loop_is_vector_code(functions, loop, level):
    clone = f"[clone .arch_{level.replace('-', '_')}]"
    bodies = {name: b for name, b in functions.items() if f"::{loop}(" in name and clone in name}
    assert bodies, f"no {level} version of {loop}"
    for name, body in bodies.items():
        check(name, body, REGISTER[level])


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize(("level", "register"), [("v4", "zmm"), ("v3", "ymm")])
def test_products_keep_their_sums_in_registers(functions, level, register, real):
    """No clones: each instruction set has vectors of its own (products.h)."""
    bodies = [b for n, b in functions.items() if f"multiply_{level}<{real}>(" in n]
    assert len(bodies) == 1
    check(f"multiply_{level}", bodies[0], register)
    fused = re.findall(rf"vfmadd\S+ .*{register}", bodies[0])
    assert len(fused) >= 8 + 4 + 2
    spilled = re.findall(rf"vmov\S+ +%{register}\d+,-?\w*\(%rsp", bodies[0])
    assert not spilled


@pytest.mark.parametrize("level", REGISTER)
@pytest.mark.parametrize("real", REALS)
def test_every_formula_is_vector_code(functions, real, level):
    clone = f"[clone .arch_{level.replace('-', '_')}]"
    bodies = {
        name: body
        for name, body in functions.items()
        if clone in name
        and re.search(rf"::(evaluate|any_needs_noise)<fastvae::.*, {real}>\(", name)
    }
    for name, body in bodies.items():
        if not re.search(MOVES, name):
            check(name, body, REGISTER[level])
    headers = " ".join(path.read_text() for path in (ROOT / "csrc").glob("*.cpp"))
    used = set(re.findall(r"(?:run|define_row_sum)<([A-Z]\w+)", headers))
    used |= set(re.findall(r"typename ([A-Z]\w+)<S\b", headers))  # of every map to a scale
    assert len(used) >= 8
    terms = {re.sub(r"LogProb$", "", name) for name in used}
    missing = [t for t in terms if not any(t in name for name in bodies)]
    assert not missing, f"no {level} version of {missing}"
