"""Each check of compiled kernels finds what it is for, in fragments as the tools print them, and nothing beside it."""
from __future__ import annotations

import pytest
from hazards import hazards, repeated

LOOP = """
#mma = #ttg.nvidia_mma<{{versionMajor = 3, versionMinor = 0, warpsPerCTA = [{warps}, 1], instrShape = [16, 64, 16]}}>
%S = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x64xbf16, #shared, #smem, mutable> loc(#loc1)
scf.for %i = %c0 to %n step %c1 : i32 {{
  %S_1 = ttg.memdesc_index %S[%stage] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16> loc(#loc2)
  %S_2 = ttg.memdesc_trans %S_1 {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x64xbf16> -> !ttg.memdesc<64x64xbf16>
  %a = ttng.warp_group_dot %q, %S_2, %zero {{isAsync = true}} : tensor<64x64xbf16, #ttg.dot_op<{{opIdx = 0}}>> * \
!ttg.memdesc<64x64xbf16, #shared, #smem, mutable> -> tensor<64x64xf32, #mma> loc(#loc3)
  %b:3 = ttng.warp_group_dot_wait %a, %other, %S_2 {{pendings = {pendings} : i32}} : tensor<64x64xf32, #mma>
}}
"""


def loop(warps: int = 4, buffers: int = 1, pendings: int = 1) -> str:
    return LOOP.format(warps=warps, buffers=buffers, pendings=pendings)


def test_the_one_buffer_of_what_products_may_still_read_is_found() -> None:
    (one,) = hazards(2 * loop(), "")
    assert one.startswith("%S has one buffer")


@pytest.mark.parametrize("kept", [{"buffers": 2}, {"pendings": 0}])
def test_buffers_that_are_enough_or_waited_for_are_no_hazard(kept: dict[str, int]) -> None:
    assert hazards(loop(**kept), "") == []


def test_products_with_more_warps_than_rows_are_counted() -> None:
    assert [repeated(loop(warps=n)) for n in (4, 8)] == [0, 1]


def sass(*lines: str) -> str:
    """As cuobjdump prints it, an instruction every 16 bytes, each with its code in two more lines."""
    return "\n".join(f"        /*{16 * n:04x}*/  {line} ;   /* 0x00000a00ff017b82 */\n    /* 0x000e620000000800 */"
                     for n, line in enumerate(lines))


PRODUCT = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4].tnspB, R24, gsb0"
BASE = ["S2R R0, SR_TID.X", "SHF.R.U32.HI R0, RZ, 0x5, R0", "S2UR UR6, SR_CgaCtaId", "UMOV UR4, 0x400",
        "ULEA UR4, UR6, UR4, 0x18", "UMOV UR5, 0x40000040", "UIADD3.64 UR6, UR4, 0x2, URZ", "R2UR UR4, R0"]


def test_operands_that_lie_where_constants_and_the_thread_say_are_no_hazard() -> None:
    assert hazards("", sass(*BASE, PRODUCT, "EXIT")) == []


def test_code_in_a_form_that_is_not_understood_is_not_taken_for_right() -> None:
    with pytest.raises(AssertionError, match="another form"):
        hazards("", sass(PRODUCT).replace("/*0000*/", "0000:"))


@pytest.mark.parametrize(("made", "on"), [
    (["S2R R0, SR_CTAID.X", "@P0 EXIT", "R2UR UR4, R0"], "a block's number"),
    (["S2R R8, SR_CTAID.Y", "IMAD.SHL.U32 R9, R8, 0x20, RZ", "R2UR UR4, R9"], "a block's number"),
    (["ULDC UR9, c[0x0][0x238]", "UIADD3 UR5, UP0, UR9, 0x2, URZ"], "an argument"),
    (["IMAD.WIDE R8, R0, 0x2, c[0x0][0x230]", "R2UR UR7, R9"], "an argument"),
    (["LDC.64 R8, c[0x0][0x238]", "R2UR UR7, R9"], "an argument"),
    (["ULDC UR9, c[0x0][0x238]", "UIADD3.64 UR6, UR8, 0x2, URZ"], "an argument"),
    (["LDG.E.128 R8, desc[UR48][R2.64]", "R2UR UR6, R11"], "data"),
    (["LDG.E.64.CONSTANT R8, desc[UR48][R2.64]", "R2UR UR6, R9"], "data"),
    (["LDSM.16.M88.2 R8, [R2]", "R2UR UR6, R9"], "data"),
    (["LDSM.16.M88.4 R8, [R2+UR5+0x400]", "R2UR UR6, R11"], "data"),
    (["SHFL.IDX PT, R9, R0, RZ, 0x1f", "LDS R8, [R2]", "SHFL.IDX PT, R9, R8, RZ, 0x1f", "R2UR UR4, R9"], "data"),
    (["LDG.E R0, desc[UR48][R2.64]", "@P0 UMOV UR4, 0x400", "@P1 R2UR UR4, R0", "@!P1 UMOV UR4, 0x800"], "data"),
])
def test_an_operand_that_lies_where_anything_else_says_is_found(made: list[str], on: str) -> None:
    (one,) = hazards("", sass(*BASE, *made, PRODUCT))
    assert one == f"where an operand lies depends on {on}, for products at {16 * len(BASE + made):x}"


@pytest.mark.parametrize("more", [
    ["LDG.E R9, desc[UR48][R2.64]", "CS2R R8, SRZ", "R2UR UR4, R9"],             # written anew, as one of two
    ["LDG.E R9, desc[UR48][R2.64]", "ISETP.GE.AND P0, PT, R0, R9, PT", "@P0 R2UR UR4, R0"],
    ["ULDC.64 UR6, c[0x0][0x208]"],                                              # nothing of the kernel's own
    ["LDL R8, [R1]", "R2UR UR4, R8"],                                            # what was spilled
    ["LDSM.16.M88 R2, [R2]", "R2UR UR4, R3"],                                    # beside what is written
])
def test_what_is_made_of_anything_else_may_have_been_in_the_registers_before(more: list[str]) -> None:
    assert hazards("", sass(*BASE, *more, PRODUCT)) == []


def test_an_operand_in_registers_has_no_place() -> None:
    code = [*BASE, "LDG.E.64 R4, desc[UR48][R2.64]", "R2UR UR4, R4", PRODUCT.replace("gdesc", "R4, gdesc")]
    assert hazards("", sass(*code)) == []
    assert hazards("", sass(*code[:-2], "R2UR UR6, R4", code[-1])) != []


def test_a_product_of_no_address_strays_nowhere() -> None:
    assert hazards("", sass(*BASE, PRODUCT, "HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0", "EXIT")) == []


def test_what_a_loop_leaves_in_registers_is_known_where_it_begins_again() -> None:
    begin = f"{16 * len(BASE):x}"
    code = [*BASE, PRODUCT, "S2R R0, SR_CTAID.X", "R2UR UR4, R0", f"@P0 BRA 0x{begin}"]
    assert hazards("", sass(*code)) == [f"where an operand lies depends on a block's number, for products at {begin}"]
    assert hazards("", sass(*code[:-1], "EXIT", code[-1])) == []


def test_of_two_branches_each_has_its_own_registers() -> None:
    other, beyond = (f"0x{16 * (len(BASE) + n):x}" for n in (4, 5))
    code = [*BASE, f"@P0 BRA {other}", "S2R R0, SR_CTAID.X", "R2UR UR4, R0", f"BRA {beyond}", PRODUCT]
    assert hazards("", sass(*code)) == []
    assert hazards("", sass(*code[:-2], f"BRA {other}", PRODUCT)) != []


@pytest.mark.parametrize(("high", "found"), [("R0", True), ("R1", False), ("RZ", False)])
def test_an_address_whose_halves_come_from_one_register_is_found(high: str, found: bool) -> None:
    said = hazards("", sass(*BASE, "IADD3 R4, P3, R0.reuse, 0x40, RZ", "R2UR UR34, R4",
                            f"IADD3.X R17, {high}, -0x7fffffe0, RZ, P3, !PT", PRODUCT))
    assert said == (["both halves of an address are formed from R0, at a0"] if found else [])


def test_sums_that_carry_to_others_are_none_of_an_address() -> None:
    """A pointer's halves; a carry that another sum has taken since; a register that holds something else since."""
    assert hazards("", sass("IADD3 R4, P3, R0, R2, RZ", "IADD3.X R5, R0, R3, RZ, P3, !PT", "IADD3 R6, P1, R8, 0x40, RZ",
                            "IADD3 R7, P1, R9, 0x40, RZ", "IADD3.X R8, R8, 0x40000040, RZ, P1, !PT",
                            "UIADD3 UR6, UP1, UR4, 0x40, URZ", "UMOV UR4, URZ",
                            "UIADD3.X UR9, UR4, -0x7fffffe0, URZ, UP1, !UPT", PRODUCT)) == []
