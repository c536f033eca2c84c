"""The static model counts instructions, trips and bounds as counted by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from scripts.benchmark import static
from scripts.benchmark.kernel_model import latency, opcodes, sass, weights
from scripts.benchmark.kernel_model.gpus import GPUS, programs_per_sm
from scripts.benchmark.kernel_model.trip_counts import Counts, counting, spread

ROOT = Path(__file__).parents[2]

SOURCE = """\
def helper(x):
    for inner in range(x):
        work(inner)


def kernel(n, m):
    start()
    for outer in range(n):
        helper(m)
        if outer:
            rare()
        for i in static_range(2):
            work(i)
"""

# `inner` is unrolled by 2, with a loop for the rest. `rare` is a branch. An instruction of `inner`
# is moved to the loop around it, and the call of a label is a branch.
SASS = """
.text.kernel:
{start}
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   IADD3 R1, R0, 0x1, RZ ;
.L_x_0:
{inner}
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
{outer}
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;
.L_x_1:
{inner}
        /*0040*/                   FFMA R8, R4, R5, R8 ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/                   FFMA R8, R4, R5, R8 ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   FFMA R8, R4, R5, R8 ;
        /*00a0*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*00b0*/               @P1 BRA `(.L_x_2) ;
{outer}
        /*00c0*/              @!P2 BRA `(.L_x_3) ;
{rare}
        /*00d0*/                   STG.E [R2.64], R8 ;
        /*00e0*/                   MUFU.EX2 R9, R8 ;
.L_x_3:
{static}
        /*00f0*/                   LOP3.LUT R9, R8, R9, RZ, 0xc0, !PT ;
        /*0100*/              @!P3 CALL.REL.NOINC `(.L_x_4) ;
        /*0110*/                   BRA `(.L_x_0) ;
.L_x_4:
{start}
        /*0120*/                   EXIT ;
.L_x_5:
        /*0130*/                   BRA `(.L_x_5);
"""


@pytest.fixture
def walked(tmp_path: Path) -> tuple[sass.Program, weights.Weights]:
    """The machine code above and how often its blocks run; 4 outer trips of 5 inner ones."""
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)

    def comment(*lines: int) -> str:
        """Write the lines of a place as the disassembler does, innermost first."""
        names = [f'"{path}", line {line}' for line in reversed(lines)]
        pairs = zip(names, [*names[1:], ""], strict=True)
        return "\n".join(f"\t//## File {a}{f' inlined at {b}' if b else ''}" for a, b in pairs)

    lines = {"start": (7,), "inner": (9, 3), "outer": (9,), "rare": (11,), "static": (13,)}
    text = SASS.format(**{name: comment(*place) for name, place in lines.items()})
    outer, inner = ((str(path), 8),), ((str(path), 9), (str(path), 2))
    # Two programs were counted, each with 4 outer trips, of which one enters the branch.
    counts = Counts("kernel", 2, {outer: {4: 2}, inner: {5: 8}}, {((str(path), 11),): 2}, 0)
    program = sass.parse(text)
    return program, weights.weigh(program, counts)


def test_loops_of_the_machine_code_run_as_often_as_those_of_the_source(walked):
    _, runs = walked
    assert runs.warnings == []
    trips = {x.address: (x.source[-1][1], x.source_trips, x.copies, x.trips) for x in runs.loops}
    assert trips == {0x20: (8, 4, 1, 4), 0x40: (2, 20, 2, 8), 0x90: (2, 20, 1, 4)}


def test_instructions_are_counted_by_kind(walked):
    program, runs = walked
    counted = dict.fromkeys(opcodes.KINDS, 0.0)
    for b, block in program.blocks.items():
        for x in block.instructions:
            counted[x.kind] += runs.blocks[b]
    expected = {
        "tensor": 2 * 8 + 4,
        "FP32": 2 * 8 + 4,
        # Once per outer trip, and once in the single program that enters the branch.
        "global": 4 + 1,
        "MUFU": 1,
        "integer": 1 + 4 + 4,
        "other": 1,
        # Branches of the inner loops, three in the outer one, and the end.
        "control": 8 + 4 + 3 * 4 + 1,
    }
    assert counted == dict.fromkeys(opcodes.KINDS, 0.0) | expected


def test_a_loop_without_a_loop_in_the_source_is_reported(walked):
    program, _ = walked
    runs = weights.weigh(program, Counts("kernel", 1, {}, {}, 0))
    assert [x.trips for x in runs.loops] == [1, 1, 1]
    assert "loop at 0x20: no loop of the source, counted once" in runs.warnings


def test_a_warp_waits_for_its_operands(walked):
    program, runs = walked
    cycles = latency.warp_cycles(program, runs)
    load, ffma, mma = (latency.LATENCY[kind] for kind in ("global", "FP32", "tensor"))
    # A trip of the unrolled loop is a chain of 4, as every instruction needs the one before.
    chain = 8 * (2 * (ffma + mma + 2)) + 4 * (ffma + mma + 2)
    assert chain <= cycles <= chain + 4 * load


@triton.jit
def _row(p_x, row, n, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], tl.float32)
    for column in range(row, n):
        b_sum += tl.load(p_x + column * BLOCK + tl.arange(0, BLOCK))
    return b_sum


@triton.jit
def _triangle(p_x, p_out, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    b_sum = tl.zeros([BLOCK], tl.float32)
    row = pid * 0
    while row < n:
        if row > 1:
            b_sum += _row(p_x, row, n, BLOCK)
        row += 1
    b_square = tl.broadcast_to(b_sum[:, None], [BLOCK, BLOCK])
    b_square = tl.dot(b_square, b_square)
    tl.store(p_out + pid * BLOCK + tl.arange(0, BLOCK), tl.sum(b_square, 0))


def lines_of(function: object) -> dict[str, int]:
    """Return the line of every statement of a kernel by its text."""
    code = function.fn.__code__
    lines = Path(code.co_filename).read_text().splitlines()
    return {lines[n].strip(): n + 1 for n in range(code.co_firstlineno, len(lines))}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
def test_trips_are_counted_by_the_calls_that_lead_to_a_loop():
    x, out = torch.zeros(4, 16), torch.zeros(8, 16)
    with counting(100) as found:
        _triangle[(8,)](x, out, 4, BLOCK=16)
    (counts,) = found
    name, inside, outside = _triangle.fn.__code__.co_filename, lines_of(_row), lines_of(_triangle)
    call = (name, outside["b_sum += _row(p_x, row, n, BLOCK)"])
    assert counts.programs == 8
    assert counts.macs == 8 * 16**3
    assert counts.entered == {
        ((name, outside["while row < n:"]),): {4: 8},
        # Rows 2 and 3 of a triangle.
        (call, (name, inside["for column in range(row, n):"])): {2: 8, 1: 8},
    }
    assert counts.branches == {(call,): 16}


@pytest.mark.parametrize(("total", "kinds"), [(11520, 15), (8 * 75, 75), (1536, 2), (7, 7)])
def test_every_kind_of_program_is_counted_equally_often(total, kinds):
    programs = spread(total, kinds)
    assert sorted(program % kinds for program in programs) == list(range(kinds))
    assert max(programs) < total


@pytest.mark.parametrize(
    ("opcode", "kind", "units"),
    [
        ("HMMA.16816.F32.BF16", "tensor", {"tensor": 8.0}),
        ("FFMA.FTZ", "FP32", {"FMA": 2.0}),
        ("IMAD.WIDE.U32", "integer", {"FMA integer": 2.0, "FMA": 2.0}),
        ("LOP3.LUT", "integer", {"ALU": 2.0}),
        ("UIADD3", "integer", {}),
        ("MUFU.EX2", "MUFU", {"XU": 8.0}),
        ("F2FP.BF16.F32.PACK_AB", "convert", {"ALU": 2.0}),
        ("LDSM.16.MT88.4", "shared", {"LSU": 16.0}),
        ("LDGSTS.E.BYPASS.128", "global", {"LSU": 16.0}),
        ("LDG.E.U16", "global", {"LSU": 4.0}),
        ("SHFL.BFLY", "shuffle", {"LSU": 4.0}),
        ("STL.64", "local", {"LSU": 8.0}),
        ("LDGDEPBAR", "control", {}),
        ("WARPGROUP.DEPBAR.LE", "control", {}),
        ("LDC.64", "other", {}),
    ],
)
def test_an_opcode_has_its_kind_and_units(opcode, kind, units):
    assert opcodes.kind_of(opcode) == kind
    assert opcodes.unit_cycles(opcode, GPUS[80]) == units


def test_tensor_core_instructions_multiply_by_their_shape():
    assert opcodes.mma_macs("HMMA.16816.F32.BF16") == 16 * 8 * 16
    assert opcodes.mma_macs("HMMA.1688.F32.TF32") == 16 * 8 * 8
    assert opcodes.mma_macs("HGMMA.64x128x16.F32.BF16") == 64 * 128 * 16 / 4
    with pytest.raises(ValueError, match="must name its shape, got HMMA"):
        opcodes.mma_macs("HMMA.F32")


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(32, 0, 4, 16), (64, 0, 4, 8), (255, 0, 4, 2), (132, 0, 2, 6), (32, 0, 1, 32)],
)
def test_occupancy_is_limited_by_registers_and_programs(registers, shared, warps, programs):
    assert programs_per_sm(GPUS[90], registers, shared, warps) == programs


def test_occupancy_is_limited_by_shared_memory():
    # CUDA keeps 1 KB per program: 4 × 41 = 164, and 5 × 41 = 205.
    assert programs_per_sm(GPUS[80], 32, 40 * 1024, 1) == 4
    assert programs_per_sm(GPUS[90], 32, 40 * 1024, 1) == 5


def test_the_model_refuses_to_run_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET must not be 1"):
        static.main([])


@pytest.mark.parametrize(
    ("option", "value"), [("--recipe", "Swin"), ("--recipe", "float32"), ("--arch", "70")]
)
def test_an_unknown_choice_is_refused(option, value, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as leaving:
        static.main([option, value])
    assert leaving.value.code not in (0, None)
    assert value in str(leaving.value.code) + capsys.readouterr().err


@pytest.mark.slow
def test_a_recipe_is_estimated_from_end_to_end(tmp_path):
    output = tmp_path / "static.json"
    command = ["static", "--quick", "--recipe", "DeiT-S/B k", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, "-m", "scripts.benchmark", *command],
        cwd=ROOT,
        env={name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(output.read_text())
    kernels = [row for row in report["kernels"] if row["kernel"] != "torch"]
    assert {row["step"] for row in kernels} == {"forward", "backward"}
    for row in kernels:
        assert row["warnings"] == []
        assert row["mma_over_dot"] == 1
        assert row["spill_instructions"] == 0
        assert row["kernel"] in run.stdout
    assert {layer["gpu"] for layer in report["layers_us"]} == {"A100 SXM 80 GB", "H100 SXM"}
    assert all(layer["issue"] > 0 for layer in report["layers_us"])
