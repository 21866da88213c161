"""The machine-code census: its reading of cuobjdump's output, and, where the kernels were built, the census itself."""

import importlib.util
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("census", ROOT / "tools" / "census.py")
census = sys.modules["census"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(census)

MANGLED = (
    "_ZN4sage4sm8011backward_dqINS0_8DqConfigINS0_6Train8INS0_6DpInt8ENS0_10E4m3NativeEEELi128EEEEE"
    "vNS_12BackwardCallE"
)
SASS = f"""
arch = sm_89
\t\tFunction : {MANGLED}
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R7], [R2.64], P0 ;
        /*0020*/              @!P2 LDSM.16.M88.4 R24, [R5+0x9780] ;
        /*0030*/                   IMMA.16832.S8.S8 R4, R4.ROW, R12.COL, RZ ;
        /*0040*/                   QMMA.16832.F32.E4M3.E4M3 R8, R4.ROW, R12.COL, RZ ;
{{extra}}
""".splitlines()
RESOURCES = f"""
arch = sm_89
 Function {MANGLED}:
  REG:227 STACK:{{stack}} SHARED:0 LOCAL:0 CONSTANT[0]:368 TEXTURE:0 SURFACE:0 SAMPLER:0
""".splitlines()


def kernels(extra="", stack=0):
    found = {}
    census.parse_sass([line.replace("{extra}", extra) for line in SASS], found)
    census.parse_resources([line.replace("{stack}", str(stack)) for line in RESOURCES], found)
    return list(found.values())


def test_reads_what_cuobjdump_prints():
    (kernel,) = kernels()
    assert kernel.name == "backward_dq<DqConfig Train8 DpInt8 E4m3Native 128>"
    assert (kernel.arch, kernel.registers, kernel.stack) == ("89", 227, 0)
    assert dict(kernel.instructions) == {"LDGSTS": 1, "LDSM": 1, "IMMA": 1, "QMMA": 1}
    assert census.violations([kernel]) == []


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(extra="        /*0050*/                   STL [R1+0x4], R16 ;"), "spills"),
        (dict(stack=16), "spills"),
    ],
)
def test_complains_about_spills(change, complaint):
    (sentence,) = census.violations(kernels(**change))
    assert complaint in sentence


@pytest.mark.parametrize("opcode", ["LDGSTS", "LDSM", "IMMA", "QMMA"])
def test_complains_about_a_missing_instruction(opcode):
    (kernel,) = kernels()
    del kernel.instructions[opcode]
    (sentence,) = census.violations([kernel])
    assert opcode in sentence


def test_census_of_the_library_built_here():
    library = ROOT / "build" / "census" / "libsage_jax_kernels.so"
    if not library.exists():
        pytest.skip("no kernels were built here; tools/census.py builds them and takes their census")
    assert census.violations(census.take(library)) == []
