"""The hazard check of bench/sass.py, on a real listing in which hazards are planted."""

import pytest
import sass

# From the solve kernel for sm_90 (Triton 3.9): the product of the loop, whose A operand is in R88..R103.
LISTING = """
	code for sm_90a
		Function : _solve_fwd_kernel
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*2ed0*/    F2FP.F16.F32.PACK_AB R103, R5, R4 ;   /* 0x000000040567723e */
   /* 0x000fe200000000ff */
        /*2ee0*/    R2UR UR16, R20 ;   /* 0x00000000141072ca */
        /*2ef0*/    UMOV UR17, 0x40000040 ;   /* 0x4000004000117882 */
        /*2f00*/    WARPGROUP.ARRIVE ;   /* 0x00000000000079c5 */
        /*2f10*/    HGMMA.64x64x16.F32 R24, R88, gdesc[UR16], R24 ;   /* 0x00e00000581879f0 */
        /*2f20*/    UIADD3 UR8, UR4, 0x2, URZ ;   /* 0x0000000204087890 */
        /*2f30*/    IADD3 R4, P0, R2, 0x10, RZ ;   /* 0x0000001002047810 */
        /*2f40*/    HGMMA.64x64x16.F32 R24, R92, gdesc[UR8], R24 ;   /* 0x00e000005c1879f0 */
        /*2f50*/    HGMMA.64x64x16.F32 R24, R96, gdesc[UR4], R24 ;   /* 0x00e00000601879f0 */
        /*2f60*/    HGMMA.64x64x16.F32 R24, R100, gdesc[UR16], R24, gsb0 ;   /* 0x00e00000641879f0 */
        /*2f70*/    WARPGROUP.DEPBAR.LE gsb0, 0x0 ;   /* 0x00008000000079c5 */
        /*2f80*/    FMUL R88, R24, 0.5 ;   /* 0x3f00000018587820 */
        /*2f90*/    SHFL.BFLY PT, R5, R88, 0x1, 0x1f ;   /* 0x0c201f0058057f89 */
        /*2fa0*/    @!P0 BRA 0x2ed0 ;   /* 0xffffffd000d08947 */
        /*2fb0*/    STG.E.128 desc[UR6][R2.64], R88 ;   /* 0x0000005802007986 */
        /*2fc0*/    EXIT ;   /* 0x000000000000794d */
        /*2fd0*/    BRA 0x2fd0;   /* 0xfffffffc00fc7947 */
"""


def planted(instruction: str, at: str = "2f20") -> str:
    """The listing with the harmless instruction at an address replaced."""
    lines = LISTING.splitlines()
    (number,) = (i for i, line in enumerate(lines) if f"/*{at}*/" in line)
    lines[number] = f"        /*{at}*/                   {instruction} ;      /* 0x0 */"
    return "\n".join(lines)


def test_the_listing_itself_has_no_hazard():
    assert sass.hazards(LISTING) == []
    code = sass.parse(LISTING)
    assert [sorted(sass.register_a(i)) for i in code if sass.register_a(i)] == [
        [88, 89, 90, 91], [92, 93, 94, 95], [96, 97, 98, 99], [100, 101, 102, 103]
    ]  # fmt: skip
    assert sass.tensor_instructions(code) == {"HGMMA": 4} and sass.spills(code) == (0, 0)
    code = sass.parse(planted("STL.64 [R1+0x8], R88") + planted("LDL R5, [R1+0x8]"))
    assert sass.spills(code) == (1, 1)


@pytest.mark.parametrize(
    "instruction, registers",
    [
        ("MOV R90, R4", (90,)),
        ("@P1 FADD R91, R4, R5", (91,)),
        ("F2FP.F16.F32.PACK_AB R88, R5, R4", (88,)),
        ("IMAD.WIDE R90, R4, 0x4, R6", (90, 91)),
        ("IMAD.WIDE.U32 R86, R4, 0x4, R6", None),
        ("LDS.64 R88, [R5+UR4]", (88, 89)),
        ("LDG.E.128 R88, desc[UR6][R2.64]", (88, 89, 90, 91)),
        ("LDG.E.128 R84, desc[UR6][R2.64]", None),
        ("LDSM.16.M88.4 R88, [R5+0x400]", (88, 89, 90, 91)),
        ("LDSM.16.MT88.2 R90, [R5]", (90, 91)),
        ("LDC.64 R90, c[0x0][0x210]", (90, 91)),
        ("CS2R R88, SRZ", (88, 89)),
        ("SHFL.BFLY PT, R89, R4, 0x1, 0x1f", (89,)),
        ("LOP3.LUT P0, R89, R4, 0x1, RZ, 0xc0, !PT", (89,)),
        ("ATOMG.E.ADD.STRONG.GPU PT, R89, desc[UR6][R2.64], R5", (89,)),
        ("HGMMA.64x8x16.F32 R88, gdesc[UR8], R88", (88, 89, 90, 91)),
        ("HMMA.16816.F32 R88, R4, R6, R8", (88, 89, 90, 91)),
        ("P2R R89, PR, RZ, 0x7f", (89,)),
        # Reads, addresses, predicates and instructions that never run write none of them.
        ("FADD R4, R88, R89", None),
        ("ISETP.GT.AND P1, PT, R88, R89, PT", None),
        ("STS.128 [R88], R88", None),
        ("STG.E desc[UR6][R88.64], R90", None),
        ("LDGSTS.E.BYPASS.128 [R88], desc[UR6][R90.64]", None),
        ("R2UR UR16, R88", None),
        ("@!PT LDS R88, [RZ]", None),
        ("RED.E.ADD.STRONG.GPU desc[UR6][R2.64], R88", None),
        ("LOP3.LUT P0, RZ, R88, 0x1, RZ, 0xc0, !PT", None),
    ],
)
def test_a_planted_write_before_the_wait_is_caught(instruction, registers):
    found = sass.hazards(planted(instruction))
    if registers is None:
        assert found == []
    else:
        (hazard,) = found
        assert hazard.registers == registers
        assert hazard.reader.address == 0x2F10 and hazard.writer.address == 0x2F20
        assert "before the wait for" in str(hazard) and f"R{registers[0]}" in str(hazard)


def test_between_later_products_and_over_operands_in_flight():
    """A write just before its own product is no hazard, though others are in flight by then."""
    assert sass.hazards(planted("MOV R94, R4", "2f30")) == []
    (hazard,) = sass.hazards(planted("MOV R89, R4", "2f30"))
    assert hazard.reader.address == 0x2F10
    text = LISTING.replace("HGMMA.64x64x16.F32 R24, R96,", "HGMMA.64x64x16.F32 R64, R96,")
    assert {h.registers for h in sass.hazards(text)} == {(88, 89, 90, 91), (92, 93, 94, 95)}


def test_no_wait_at_all():
    assert {h.registers for h in sass.hazards(planted("MOV R101, R4", "2f70"))} >= {(101,), (88,)}


def test_a_wait_for_all_but_one_group_leaves_the_last_in_flight():
    """The next pass of the loop overwrites what is still read: seen in a real kernel of Triton 3.6."""
    pipelined = LISTING.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    found = sass.hazards(pipelined)
    assert {(h.writer.address, h.registers) for h in found} == {(0x2ED0, (103,)), (0x2F80, (88,))}
    once = LISTING.replace("@!P0 BRA 0x2ed0", "NOP").replace("FMUL R88, R24", "FMUL R89, R24")
    assert sass.hazards(once) == []
    assert sass.hazards(once.replace("gsb0, 0x0", "gsb0, 0x1"))[0].registers == (89,)


def test_a_wait_that_is_skipped_does_not_count():
    lines = planted("@P2 BRA 0x2f80", "2f20")
    assert {h.writer.address for h in sass.hazards(lines)} == {0x2F80}
    predicated = LISTING.replace("    WARPGROUP.DEPBAR", "    @P2 WARPGROUP.DEPBAR")
    assert 0x2F80 in {h.writer.address for h in sass.hazards(predicated)}


def test_functions_are_apart_and_empty_text_is_refused():
    assert len(sass.hazards(LISTING + planted("MOV R90, R4").replace("_solve_fwd", "_other"))) == 1
    with pytest.raises(ValueError, match="no SASS instructions"):
        sass.hazards("cuobjdump error: cannot open file")
