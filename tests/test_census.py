"""The machine-code census: its reading of cuobjdump's output, and, where the kernels were built, the census itself."""

import dataclasses
from collections import Counter

import pytest
from programs import ROOT, load

census = load("tools/census.py")

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
        (dict(extra="        /*0050*/                   STL [R1+0x4], R16 ;"), "spills: 1 local loads and stores, a stack frame of 0 bytes"),
        (dict(stack=16), "spills: 0 local loads and stores, a stack frame of 16 bytes"),
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


@pytest.mark.parametrize("arch, wanted", [("89", False), ("90a", True), ("120a", True)])
def test_kernels_that_start_early_wait_for_the_grid_before(arch, wanted):
    for name in ("combine_splits<DecodeConfig E4m3 128>", "combine_splits<DecodeConfig 128>", "attention_decode<DecodeConfig 128>"):
        found = census.expected(census.Kernel(arch, name))
        assert ("ACQBULK" in dict(found)) == wanted


DECODE_MANGLED = "_ZN4sage4sm9016attention_decodeINS0_12DecodeConfigILi128EEEEEvNS0_10DecodeCallE"
COMBINE_MANGLED = "_ZN4sage4sm8014combine_splitsINS_4sm9012DecodeConfigILi128EEEEEvNS0_10DecodeCallE"


def test_decode_multiplies_by_warpgroups_and_hands_no_registers_over():
    decode = census.Kernel(
        "90a", census.short_name(DECODE_MANGLED), 93,
        instructions=Counter({"IGMMA": 8, "QGMMA": 8, "UTMALDG": 3, "WARPGROUP.DEPBAR": 2, "ACQBULK": 1}),
    )  # fmt: skip
    combine = census.Kernel("90a", census.short_name(COMBINE_MANGLED), 64, instructions=Counter({"ACQBULK": 1}))
    assert decode.warpgroups and not combine.warpgroups
    assert census.violations([decode, combine]) == []
    for kernel, opcode in ((decode, "ACQBULK"), (combine, "ACQBULK"), (decode, "QGMMA")):
        count = kernel.instructions.pop(opcode)
        (sentence,) = census.violations([kernel])
        assert opcode in sentence
        kernel.instructions[opcode] = count
    combine.registers = 96
    assert "uses 96 registers" in census.violations([combine])[0]


DELTA_MANGLED = "_ZN4sage4sm9014backward_deltaINS0_11DeltaConfigILi128EEEEEvNS0_6DqCallE"


def test_d_takes_integer_products_of_warpgroups_and_no_others():
    instructions = Counter({"IGMMA": 8, "UTMALDG": 4, "USETMAXREG": 2, "WARPGROUP.DEPBAR": 1})
    delta = census.Kernel("90a", census.short_name(DELTA_MANGLED), 96, instructions=instructions, lowered={64}, raised={104})
    assert delta.warpgroups and census.violations([delta]) == []
    for opcode in ("IGMMA", "UTMALDG"):
        without = Counter({name: count for name, count in instructions.items() if name != opcode})
        sentences = census.violations([dataclasses.replace(delta, instructions=without)])
        assert any(f"has no {opcode}" in sentence for sentence in sentences)
    (sentence,) = census.violations([dataclasses.replace(delta, raised={112})])
    assert "leaves a consumer 112 registers, not 104" in sentence


def test_counts_stores_by_the_copy_engine():
    found = {}
    text = f"arch = sm_90a\n\t\tFunction : {WGMMA_MANGLED}\n        /*0000*/  @P1 UTMASTG.3D [UR4], [UR8] ;\n"
    census.parse_sass(text.splitlines(), found)
    (kernel,) = found.values()
    assert kernel.instructions["UTMASTG"] == 1


WGMMA_MANGLED = "_ZN4sage4sm9013attention_fwdINS0_13ForwardConfigINS0_10E4m3ValuesELi128ELb1EEEEEvNS0_11ForwardCallE"
HALF_MANGLED = (
    "_ZN4sage4sm9013attention_fwdINS0_13ForwardConfigINS0_10HalfValuesILNS_8PvFormatE2EEELi64ELb0EEEEEvNS0_11ForwardCallE"
)


def warpgroup_kernel(mangled=WGMMA_MANGLED, registers=None, **changes):
    values, launch, consumer = ("HGMMA", 168, 224) if "Half" in mangled else ("QGMMA", 128, 152)
    instructions = {"IGMMA": 12, values: 8, "UTMALDG": 6, "USETMAXREG": 2, "WARPGROUP.DEPBAR": 3, **changes}
    return census.Kernel(
        "90a", census.short_name(mangled), registers or launch, instructions=Counter(instructions), lowered={56}, raised={consumer}
    )  # fmt: skip


@pytest.mark.parametrize(
    "mangled, name",
    [
        (WGMMA_MANGLED, "attention_fwd<ForwardConfig E4m3Values 128 1>"),
        (HALF_MANGLED, "attention_fwd<ForwardConfig HalfValues PvFormat 2 64 0>"),
        ("_ZN4sage12clear_maximaENS_12BackwardCallE", "clear_maxima"),
        ("not_mangled", "not_mangled"),
    ],
)
def test_names_kernels_by_their_configuration(mangled, name):
    assert census.short_name(mangled) == name


@pytest.mark.parametrize("mangled", [WGMMA_MANGLED, HALF_MANGLED])
def test_accepts_a_warpgroup_kernel(mangled):
    kernel = warpgroup_kernel(mangled)
    assert kernel.warpgroups and census.violations([kernel]) == []


@pytest.mark.parametrize(
    "mangled, changes, complaint",
    [
        (WGMMA_MANGLED, {"IGMMA": 0}, "has no IGMMA"),
        (WGMMA_MANGLED, {"QGMMA": 0, "HGMMA": 8}, "has no QGMMA"),
        (HALF_MANGLED, {"HGMMA": 0, "QGMMA": 8}, "has no HGMMA"),
        (WGMMA_MANGLED, {"UTMALDG": 0}, "has no UTMALDG"),
        (WGMMA_MANGLED, {"USETMAXREG": 0}, "has no USETMAXREG"),
        (WGMMA_MANGLED, {"registers": 152}, "starts with 152 registers"),
        (WGMMA_MANGLED, {"WARPGROUP.DEPBAR": 20}, "serialised"),
        (WGMMA_MANGLED, {"STL": 1}, "spills"),
    ],
)
def test_complains_about_a_warpgroup_kernel(mangled, changes, complaint):
    (sentence,) = census.violations([warpgroup_kernel(mangled, **changes)])
    assert complaint in sentence


FP4_MANGLED = "_ZN4sage5sm12017attention_fwd_fp4INS0_13ForwardConfigILi64ELi12EEEEEvNS0_11ForwardCallE"
MOVES = """
arch = sm_120a
\t\tFunction : {name}
        /*0000*/              @!P1 LDSM.16.M88.4 R24, [R5+0x9780] ;
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.128 [R7], desc[UR4][R2.64], P0 ;
        /*0020*/                   UTMALDG.2D [UR8], [UR6], desc[UR10] ;
        /*0030*/                   USETMAXREG.DEALLOC.CTAPOOL {loader} ;
        /*0040*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, {consumer} ;
        /*0050*/                   OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X R4, R4, R8, R4, R9, R10 ;
"""


def moving_kernel(loader="0x38", consumer="0x98", registers=128, mangled=FP4_MANGLED):
    found = {}
    text = MOVES.format(name=mangled, loader=loader, consumer=consumer)
    census.parse_sass(text.splitlines(), found)
    (kernel,) = found.values()
    kernel.registers = registers
    return kernel


@pytest.fixture
def no_loops(monkeypatch):
    monkeypatch.setattr(census, "LOOPS", {})


def test_reads_how_many_registers_move(no_loops):
    kernel = moving_kernel()
    assert kernel.name == "attention_fwd_fp4<ForwardConfig 64 12>"
    assert (kernel.lowered, kernel.raised) == ({56}, {152})
    assert census.violations([kernel]) == []


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(consumer="0xa0"), "leaves a consumer 160 registers, not 152"),
        (dict(loader="0x20"), "leaves a loader 32 registers, not 56"),
        (dict(registers=168), "starts with 168 registers, but setmaxnreg reckons with 128"),
        (dict(mangled=FP4_MANGLED.replace("ELi12E", "ELi11E")), "say in HANDED how many"),
    ],
)
def test_complains_about_moved_registers(no_loops, changes, complaint):
    (sentence,) = census.violations([moving_kernel(**changes)])
    assert complaint in sentence


def test_complains_about_registers_that_stay(no_loops):
    kernel = moving_kernel()
    kernel.instructions["USETMAXREG"] = 0  # as where ptxas ignores setmaxnreg
    (sentence,) = census.violations([kernel])
    assert "has no USETMAXREG" in sentence


def whole_library(*archs):
    """A kernel for every entry of the tables, by name alone."""
    named = [census.Kernel(arch, name) for arch, name in {*census.LOOPS, *census.HANDED} if arch in archs]
    return named + [census.Kernel(archs[0], pattern.replace("*", "<128>")) for pattern, *_ in census.BUDGETS]


def test_nothing_is_absent_from_a_whole_library_or_one_of_fewer_architectures():
    assert census.absences(whole_library("80", "89", "90a", "120a")) == []
    assert census.absences(whole_library("80")) == []


@pytest.mark.parametrize("table", ["LOOPS", "HANDED"])
@pytest.mark.parametrize("change", ["removed", "renamed"])
def test_complains_about_an_absent_kernel_of_the_tables(table, change):
    for arch, name in getattr(census, table):
        kernels = [k for k in whole_library(arch) if k.name != name]
        kernels += [census.Kernel(arch, name.replace("<", "_v2<"))] if change == "renamed" else []
        found = census.absences(kernels)
        assert f"the library holds no {name} for sm_{arch}, which {table} names." in found
        assert all(name in sentence for sentence in found)


def test_complains_about_a_budget_of_no_kernel():
    kernels = [k for k in whole_library("80") if k.name != "dense_states"]
    assert census.absences(kernels) == ["the library holds no dense_states, which BUDGETS names."]


def test_the_registers_handed_out_fit_the_file():
    for launch, loaders, each in census.HANDED.values():
        consumers = {96: 4, 128: 3, 168: 2}[launch]
        for loader, consumer in zip(sorted(loaders), sorted(each, reverse=True), strict=True):
            assert loader + consumers * consumer <= (consumers + 1) * launch <= 65536 // 128


def test_the_census_fails_on_an_absent_kernel(monkeypatch, tmp_path, capsys):
    """Exit status and sentence of the program, on a library that lacks what LOOPS names."""
    library = tmp_path / "library.so"
    library.touch()
    renamed = census.Kernel("120a", "attention_fwd_fp4_v2<ForwardConfig 128 12>")
    monkeypatch.setattr(census, "take", lambda path: [renamed])
    assert census.main(["--library", str(library)]) == 1
    assert "holds no attention_fwd_fp4<ForwardConfig 128 12> for sm_120a, which LOOPS names" in capsys.readouterr().out


@pytest.mark.parametrize("registers, complaint", [(129, "uses 129 registers, more than 128"), (128, None)])
def test_budgets_of_registers(registers, complaint):
    found = census.violations([census.Kernel("80", "write_codes<128 AnyPiece>", registers)])
    assert len(found) == (complaint is not None) and all(complaint in sentence for sentence in found)


def test_complains_about_a_kernel_without_a_budget():
    (sentence,) = census.violations([census.Kernel("80", "unheard_of", 8)])
    assert "no budget" in sentence


def test_census_of_the_library_built_here():
    """Of sm_120a, which all tables name; tools/census.py takes the whole census when it has built the library."""
    library = ROOT / "build" / "census" / "libsage_jax_kernels.so"
    sources = [path for path in (ROOT / "cuda").rglob("*") if path.is_file()]
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        pytest.skip("no kernels were built here from these sources; tools/census.py builds them and takes their census")
    kernels = census.take(library, "120a")
    assert {k.arch for k in kernels} == {"120a"}
    assert census.violations(kernels) + census.absences(kernels) == []
