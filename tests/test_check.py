"""The static gate: it reads machine code right, every rule trips and passes, and the command says what it found."""

import ast
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import triton_device  # noqa: F401  (before anything under kernels.gpu)

from kernels.check import __main__ as command
from kernels.check import compile, gate, mutations, rules, sass, table
from kernels.check.rules import Kernel, Spec
from kernels.check.sass import Body

ROOT = Path(__file__).resolve().parents[1]

SM_80 = """
        /*0280*/                   LDGSTS.E.BYPASS.128 [R3+0x400], [R4.64+0x40], P0 ;
        /*02a0*/                   LDGDEPBAR ;
        /*02f0*/              @!P1 BRA 0x850 ;
        /*0300*/                   LOP3.LUT R5, R2, 0x30, RZ, 0xc0, !PT ;
        /*0530*/                   DEPBAR.LE SB0, 0x2 ;
        /*0560*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0600*/                   LDSM.16.M88.4 R24, [R24] ;
        /*0610*/                   LDSM.16.M88.4 R4, [R39+0x800] ;
        /*0620*/                   LDSM.16.MT88.2 R8, [R39+0xa00] ;
        /*0640*/                   HMMA.16816.F32.BF16 R16, R24.reuse, R4, R16 ;
        /*0670*/                   HMMA.16816.F32.BF16 R20, R24, R8, R20 ;
        /*0740*/              @!PT LDS RZ, [RZ] ;
        /*0770*/                   LDGSTS.E.BYPASS.128 [R13], [R4.64], !P1 ;
        /*0790*/              @!P6 LDGSTS.E.64 [R13+0x200], [R6.64], P2 ;
        /*07b0*/                   LDGDEPBAR ;
        /*07d0*/                   LDG.E.U16 R10, [R10.64] ;
        /*07f0*/                   LDGDEPBAR ;
        /*0800*/              @!P1 BRA 0x530 ;
        /*0810*/                   F2FP.BF16.PACK_AB R22, R23, R22 ;
        /*0850*/                   DEPBAR.LE SB0, 0x0 ;
        /*0ab0*/                   STG.E.128 [R2.64], R8 ;
        /*0ac0*/                   EXIT ;
        /*0ad0*/                   BRA 0xad0;
        /*0ae0*/                   NOP;
"""
"""A product of 16 x 16 x 32 by one warp, three stages; most address arithmetic is cut out and two loads are put in."""

SM_90 = """
        /*0030*/                   ELECT P0, URZ, PT ;
        /*0840*/              @!P0 BRA 0x10d0 ;
        /*0b80*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11+0x7800], R14 ;
        /*0b90*/              @!P0 BRA 0x13b0 ;
        /*0d00*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0e50*/                   HGMMA.64x16x16.F32 R24, R8, gdesc[UR12], R24, gsb0 ;
        /*0ec0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*10a0*/                   @UP1 UTMALDG.2D [UR12], [UR6] ;
        /*10b0*/               @P3 CALL.REL.NOINC 0x10d0 ;
        /*10c0*/                   BRA 0xb80 ;
        /*10d0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*1380*/                   STG.E.128 desc[UR20][R2.64], R8 ;
        /*1390*/              @!P0 BRA P1, 0x840 ;
        /*13a0*/                   EXIT ;
        /*13b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR11+0x7800], R14 ;
        /*13c0*/              @!P0 BRA 0x13b0 ;
        /*13d0*/                   BRA 0xd00 ;
"""
"""A persistent kernel's shape: tiles around steps, in which a thread may wait for a barrier; ptxas leaves by a call."""


def test_one_trip_through_a_loop_of_sm_80():
    body = sass.product_loops(sass.parse(SM_80))[0]
    assert body == Body(
        instructions=13, flops=2 * 4096, mma=frozenset({"HMMA"}), dtypes=frozenset({"BF16"}), loads={2: 1},
        copies={16: 1, 8: 1}, tma=0, stores={}, tma_stores=0, commits=2, wait=2, mma_wait=None,
        shared_bytes=512 + 512 + 256, others=body.others,
    )  # fmt: skip
    assert body.others["LDSM"] == 3
    assert "LDS" not in body.others, "filler that is never run counts for nothing"


def test_one_trip_through_a_loop_of_sm_90():
    body = sass.product_loops(sass.parse(SM_90))[0]
    assert body.instructions == 8, "neither the tile around it nor the wait for a barrier belongs to a step"
    assert body.flops == 2 * 2 * 64 * 16 * 16 // 4
    assert (body.mma, body.dtypes) == ({"HGMMA"}, {"BF16", "F16"})
    assert (body.tma, body.copies, body.commits, body.wait, body.mma_wait) == (1, {}, 0, None, 1)
    assert body.shared_bytes == (64 + 16) * 32 // 4 + 16 * 32 // 4, "the second left operand comes from registers"


def test_loops_are_found_by_dominators():
    flow = sass.parse(SM_90)
    heads = {flow.blocks[loop.header][0].operands for loop in sass.natural_loops(flow)}
    assert len(sass.natural_loops(flow)) == 3, "tiles, steps, and the wait"
    assert "0x10d0" in heads
    steps = next(loop for loop in sass.natural_loops(flow) if flow.blocks[loop.header][0].base == "SYNCS"
                 and len(loop.blocks) > 1)  # fmt: skip
    for block, above in sass.dominators(flow).items():
        assert block in above
        if block in steps.blocks:
            assert steps.header in above


def test_code_without_products_has_no_main_loop():
    assert sass.product_loops(sass.parse(SM_80.replace("HMMA.16816.F32.BF16", "FFMA"))) == []
    assert sass.product_loops(sass.parse("")) == []


def body(**changes):
    """A main loop that no rule minds: 128 x 256 x 64 with 8 warps on sm_80."""
    good = Body(
        instructions=250, flops=128 * 4096, mma=frozenset({"HMMA"}), dtypes=frozenset({"BF16"}), loads={},
        copies={16: 12}, tma=0, stores={16: 16}, tma_stores=0, commits=2, wait=2, mma_wait=None,
        shared_bytes=32 * 512, others={"HMMA": 128},
    )  # fmt: skip
    return good._replace(**changes)


HOPPER = {"mma": frozenset({"HGMMA"}), "mma_wait": 1, "shared_bytes": 10240, "instructions": 110}
"""What differs on sm_90."""


def kernel(kind="gemm", arch=80, dtype="bfloat16", loop=None, **changes):
    spec = Spec(kind, 2 * 128 * 256 * 64, (128 + 256) * 64 * 2, rows=128, programs=1)
    loop = loop or (body() if arch == 80 else body(**HOPPER))
    good = Kernel("k", arch, dtype, 8, spec, 255, 96 * 1024, 0, 0, False, loop, [loop])
    return good._replace(**changes)


def spec(**changes):
    return kernel().spec._replace(**changes)


BREACHES = [
    ("SPILL", kernel(stack=8)),
    ("SPILL", kernel(dtype="float32", local=8)),
    ("SPILL", kernel(whole=body(others={"STL": 1}))),
    ("SMEM", kernel(shared=164 * 1024)),
    ("SMEM", kernel(spec=Spec("small"), whole=None, loops=[], shared=164 * 1024)),
    ("OCC", kernel(spec=spec(programs=2))),
    ("NO_LOOP", kernel(loops=[])),
    ("MMA_KIND", kernel(loop=body(mma=frozenset({"HMMA", "IMMA"})))),
    ("MMA_KIND", kernel(arch=90, loop=body())),
    ("MMA_DTYPE", kernel(loop=body(dtypes=frozenset({"TF32"})))),
    ("MMA_DTYPE", kernel(dtype="float16")),
    ("LOOP_FLOPS", kernel(loop=body(flops=192 * 4096))),
    ("LOOP_FLOPS", kernel(loop=body(flops=64 * 4096))),
    ("SYNC_LDG", kernel(loop=body(loads={16: 1}))),
    ("NO_ASYNC", kernel(loop=body(copies={}))),
    ("LOAD_WIDTH", kernel(loop=body(copies={16: 11, 8: 1}))),
    ("LOAD_WIDTH", kernel(spec=Spec("stream"), whole=body(loads={4: 1}), loops=[])),
    ("STORE_WIDTH", kernel(whole=body(stores={16: 16, 2: 1}))),
    ("DEPTH", kernel(loop=body(wait=1))),
    ("DEPTH", kernel(arch=90, loop=body(**HOPPER, tma=2, commits=0, copies={}), shared=48 * 1024)),
    ("WGMMA_SYNC", kernel(arch=90, loop=body(**HOPPER | {"mma_wait": 0}))),
    ("ISSUE", kernel(loop=body(instructions=340))),
    ("SMEM_BW", kernel(loop=body(shared_bytes=54 * 512))),
    ("LOOP_JUNK", kernel(loop=body(others={"SHFL": 2}))),
    ("WS_DROPPED", kernel(specialised=True)),
    ("INFLIGHT_KB", kernel("decode", spec=spec(kind="decode", bytes=16 * 1024))),
]


@pytest.mark.parametrize(("rule", "broken"), BREACHES, ids=[rule for rule, _ in BREACHES])
def test_a_rule_trips(rule, broken):
    assert rule in rules.breaches(broken)
    assert rules.breaches(broken)[rule].rstrip(".") == rules.breaches(broken)[rule], "the table ends the sentence"


@pytest.mark.parametrize(
    "good",
    [
        kernel(),
        kernel(arch=90),
        kernel("wgrad", loop=body(instructions=365)),
        kernel(arch=90, loop=body(**HOPPER, tma=1, commits=1, wait=1, copies={16: 4}), shared=144 * 1024),
        kernel(dtype="float16", loop=body(dtypes=frozenset({"F16"}))),
        kernel(dtype="float32", whole=None, loops=[]),
        kernel("attention", 90, loop=body(others={"SHFL": 16, "MUFU": 10}), spec=spec(kind="attention", rows=32)),
        kernel(loop=body(loads={8: 1}), spec=spec(narrow_loads=1)),
        kernel(loop=body(flops=256 * 4096, commits=4, wait=4, instructions=500, shared_bytes=64 * 512)),
        kernel("decode", loop=body(instructions=1000), spec=spec(kind="decode")),
        kernel(spec=Spec("small"), whole=None, loops=[]),
        kernel(spec=Spec("stream", narrow_loads=1), whole=body(loads={4: 1, 16: 2}, copies={}), loops=[]),
        kernel(specialised=True, loop=body(others={"USETMAXREG": 2})),
    ],
)
def test_good_kernels_pass(good):
    assert rules.breaches(good) == {}


HALF = body(flops=64 * 4096, copies={16: 8}, instructions=160)


def test_the_loop_of_half_tiles_is_held_to_rules_of_its_own():
    """Those that show a mistake; with the reuse of a whole tile's operands go the limits on issue and shared memory."""
    assert rules.breaches(kernel(loops=[body(), HALF], spec=spec(halves=True))) == {}
    found = rules.breaches(kernel(loops=[body(), HALF._replace(wait=1)], spec=spec(halves=True)))
    assert found == {"DEPTH": "in the last round, no step is copied while another is computed"}
    assert "NO_LOOP" in rules.breaches(kernel(spec=spec(halves=True)))
    both = kernel(loop=body(loads={16: 1}), spec=spec(halves=True))
    assert not rules.breaches(both._replace(loops=[both.body, HALF]))["SYNC_LDG"].startswith("in the last round")


def test_figures_of_a_kernel():
    """Against the arithmetic by hand: 2048 operations and 128 bytes of shared memory a clock, 4 instructions."""
    k = kernel()
    assert (k.steps, k.tensor_clocks, k.depth, k.occupancy) == (1, 2048, 1, 1)
    assert k.issue == pytest.approx(250 * 8 / 4 / 2048)
    assert k.shared_ratio == pytest.approx((32 * 512 * 8 + 48 * 1024) / 128 / 2048)
    assert k.in_flight_kb == 48
    assert kernel(registers=72, warps=4, shared=70 * 1024).occupancy == 2
    assert kernel(registers=128, warps=4, shared=0).occupancy == 4, "registers bind"
    assert kernel(registers=130, warps=4, shared=0).occupancy == 3, "a warp gets registers in pieces of 256"


def launched_kernels():
    """`module.function` of every first argument of a call of `launch` in kernels/gpu."""
    for path in sorted((ROOT / "kernels" / "gpu").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
                yield f"{path.stem}.{ast.unparse(node.args[0])}"


def test_every_kernel_is_in_the_table():
    assert set(launched_kernels()) == set(table.KERNELS)


def test_every_rule_has_a_mistake():
    known = {**rules.ALWAYS, **rules.WIDTHS, **rules.LOOPS, "NO_LOOP": rules.no_loop}
    assert {rule for mutation in mutations.MUTATIONS for rule in mutation.rules.values()} == set(known)
    assert len(mutations.MUTATIONS) >= 20


def run(*arguments, **environment):
    """The command in a process of its own, in which Triton compiles."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "kernels.check", *arguments], cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_a_quick_kernel_as_json():
    done = run("--arch", "sm_90", "--only", "rms norm, 8192 x 512", "--json")
    assert done.returncode == 0, done.stderr
    forward, backward = json.loads(done.stdout)
    assert (forward["kernel"], backward["kernel"]) == ("rms_norm.forward_kernel", "rms_norm.backward_kernel")
    assert forward["arch"] == "sm_90"
    assert forward["cases"] == ["rms norm, 8192 x 512"]
    assert forward["breaches"] == {}
    assert 16 <= forward["registers"] <= 64
    assert set(forward) == set(gate.Row._fields)


def test_a_mistake_as_table():
    done = run("--arch", "sm_80", "--only", "odd width", "--self-test")
    assert done.returncode == 0, done.stdout + done.stderr
    gate, _, text = done.stdout.partition("\n\nmistake ")
    assert gate.endswith("\n\n0 of 0 kernels break a rule."), "no configuration has that in its name"
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["arch", "kernel", "rule"]
    assert any("rms_norm.forward_kernel" in line and "STORE_WIDTH" in line and "noticed" in line for line in lines)
    assert lines[-1] == f"{len(lines) - 3} of {len(lines) - 3} mistakes break the rule that they should."


ROW = gate.Row("m.k", "sm_80", "bfloat16", "16x16 w4", {}, ["a case"], 32, 0.5, 4)._asdict()
SPILLING = ROW | {"breaches": {"SPILL": "8 bytes"}}
RESULT = mutations.Result("a mistake", "sm_80", "m.k", "SPILL", ["SPILL"], True)._asdict()


def test_status_and_table_of_the_gate(monkeypatch):
    monkeypatch.setattr(command, "run", lambda args: ([ROW, SPILLING], []))
    text, status = command.main([])
    assert status == 1
    assert [line.split()[-1] for line in text.splitlines()[1:3]] == ["ok", "SPILL"]
    assert text.splitlines()[-2:] == ["m.k, sm_80, 16x16 w4 (a case): SPILL: 8 bytes.", "1 of 2 kernels break a rule."]
    text, status = command.main(["--json"])
    assert status == 1
    assert json.loads(text)[1]["breaches"] == {"SPILL": "8 bytes"}
    monkeypatch.setattr(command, "run", lambda args: ([ROW], []))
    assert command.main([])[1] == 0


def test_status_of_the_self_test(monkeypatch):
    missed = RESULT | {"noticed": False}
    monkeypatch.setattr(command, "run", lambda args: ([ROW], [RESULT, missed]))
    text, status = command.main(["--self-test"])
    assert status == 1
    assert "0 of 1 kernels break a rule." in text
    assert "MISSED" in text
    text, status = command.main(["--self-test", "--json"])
    assert (json.loads(text), status) == ({"kernels": [ROW], "mistakes": [RESULT, missed]}, 1)
    monkeypatch.setattr(command, "run", lambda args: ([ROW], [RESULT]))
    assert command.main(["--self-test"])[1] == 0
    monkeypatch.setattr(command, "run", lambda args: ([SPILLING], [RESULT]))
    assert command.main(["--self-test"])[1] == 1, "what is shipped is checked before the mistakes"


@pytest.mark.parametrize("arguments", [["--arch", "sm_70"], ["--arch", "sm_80,"], ["--arch"], ["--self"], ["kernel"]])
def test_arguments_that_mean_nothing(arguments):
    text, status = command.main(arguments)
    assert status == 2
    assert "\n" not in text
    assert text.endswith(".")


class NoTools:
    @property
    def nvdisasm(self):
        raise RuntimeError("Cannot find nvdisasm")


def test_it_says_what_keeps_it_from_checking(monkeypatch):
    done = run(TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().startswith("TRITON_INTERPRET=1")
    assert len(done.stderr.strip().splitlines()) == 1

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.10.1")
    assert command.main([]) == ("triton 3.10.1 is not known to this check, which reads 3.6 up to below 3.10.", 2)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.7.1")
    monkeypatch.setattr(compile.triton.knobs, "nvidia", NoTools())
    assert command.main([]) == (
        "nvdisasm is missing, which triton's wheel for Linux brings; set TRITON_NVDISASM_PATH to it.", 2
    )  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main([])[0].startswith("triton is not installed")


def test_nothing_chosen_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    text, status = command.main(["--only", "one stage"])
    assert (status, "rms norm" in text, "mistake" in text) == (2, True, False)
    text, status = command.main(["--only", "no such name", "--self-test"])
    assert (status, "rms norm" in text, "No mistake" in text, "one stage" in text) == (2, True, True, True)


def elf(sections):
    """A 64-bit ELF file of these sections by name, with the table of section names as the last."""
    sections = sections | {".shstrtab": b"\0".join([b"", *(name.encode() for name in sections), b".shstrtab", b""])}
    names, start, headers = sections[".shstrtab"], 64, b""
    for name, content in sections.items():
        at = names.index(b"\0" + name.encode() + b"\0") + 1
        headers += struct.pack("<IIQQQQIIQQ", at, 1, 0, 0, start, len(content), 0, 0, 0, 0)
        start += len(content)
    front = bytearray(64)
    struct.pack_into("<Q", front, 0x28, start)
    struct.pack_into("<HHH", front, 0x3A, 64, len(sections), len(sections) - 1)
    return bytes(front) + b"".join(sections.values()) + headers


def test_the_machine_code_in_a_cubin():
    assert compile.text_section(elf({".debug": b"d" * 5, ".text.k": b"code", ".rela.text.k": b"r"})) == b"code"
    with pytest.raises(AssertionError, match="2 functions"):
        compile.text_section(elf({".text.k": b"code", ".text.other": b"code"}))


def test_the_code_of_several_cubins_is_read_at_once_and_told_apart(monkeypatch):
    cubins = [elf({".text.a": bytes(48)}), elf({".text.b": bytes(range(16))})]
    asked = []

    def disassemble(tool, code, *options):
        asked.append((code, options[-1]))
        return "  .headerflags @x\n" + "".join(f"/*{address:04x}*/ I{address} ;\n" for address in range(0, 64, 16))

    monkeypatch.setattr(compile, "_run", disassemble)
    found = compile.machine_code(cubins, 90)
    assert asked == [(bytes(48) + bytes(range(16)), "SM90")]
    assert [text.split()[1::3] for text in found.values()] == [["I0", "I16", "I32"], ["I48"]]
    assert list(found) == cubins
    assert compile.machine_code([], 80) == {}
