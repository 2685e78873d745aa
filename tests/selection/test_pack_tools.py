import pytest

from sglang_amd_quant.selection.pack_csv import PackError, load_file
from sglang_amd_quant.selection.pack_tools import diff, lint, merge, planned_shapes
from sglang_amd_quant.selection.packs import shipped_dir

REAL = {"op": "linear", "scheme": "mxfp8", "N": 2304, "K": 6144, "M": 64, "kernel": "triton_gemm_mx"}
TILE = {"block_m": 64, "block_n": 128, "block_k": 128, "num_warps": 8, "num_stages": 2}
MEASURED = {"source": "measured", "us": 9.5, "err": 0.001, "device": "d", "versions": "v", "date": "2026-11-21"}


def kinds(*places):
    return [(finding.kind, finding.text) for finding in lint(places)[0]]


def test_the_shipped_packs_are_clean():
    findings, count = lint([shipped_dir()])
    assert findings == []
    assert count > 30


@pytest.mark.parametrize(
    ("row", "kind", "text"),
    [
        ({"block_k": 64}, "illegal", "needs BLOCK_K >= 128"),
        ({"num_warps": 1}, "illegal", "num_warps=1"),
        ({"params": "depth=2"}, "illegal", "no parameter depth"),
        ({"layout": "preshuffle"}, "illegal", "reads strided weights"),
        ({"K": 6160}, "illegal", "K must be whole groups"),
        ({"scheme": "int4_w4a16", "group": 48}, "illegal", "no such problem"),
        ({"kernel": "flydsl_gemm"}, "stale", "no kernel is named flydsl_gemm"),
        ({"N": 1152}, "unplanned", "N=1152"),
        ({"kernel": "hip_moe_w4a16_wmma"}, "illegal", "not mxfp8 linear gfx950"),
    ],
)
def test_lint_finds(write_pack, row, kind, text):
    found = kinds(write_pack("own.csv", {**REAL, **TILE, **row}))
    assert any(k == kind and text in t for k, t in found), found


def test_an_entry_over_the_lds_estimate_is_no_finding(write_pack):
    """It was measured: the estimate is conservative."""
    assert kinds(write_pack("own.csv", {**REAL, **TILE, "block_m": 128, "block_n": 256, "block_k": 256})) == []


def test_lint_finds_duplicates_within_and_across_files(write_pack):
    a = write_pack("a.csv", {**REAL, **TILE}, {**REAL, **TILE, "M": 32})
    b = write_pack("b.csv", {**REAL, **TILE, "block_n": 64, "tp": 4}, {**REAL, **TILE, "cu_num": 128})
    assert kinds(a, b) == [("duplicate", f"this shape is owned by {a}:3")]
    twice = write_pack("c.csv", {**REAL, **TILE}, {**REAL, **TILE})
    assert kinds(twice) == [("duplicate", f"this shape is owned by {twice}:3")]


def test_lint_goes_on_after_an_unreadable_file(write_pack, tmp_path):
    (tmp_path / "a.csv").write_text("arch\n")
    write_pack("b.csv", {**REAL, **TILE, "kernel": "gone"})
    findings, count = lint([tmp_path])
    assert [finding.kind for finding in findings] == ["unreadable", "stale"]
    assert findings[0].place.endswith("a.csv:1")
    assert count == 1
    with pytest.raises(PackError):
        lint([tmp_path / "nowhere"])


def test_lint_finds_entries_in_another_archs_folder(write_pack):
    path = write_pack("gfx942/mxfp8/own.csv", {**REAL, **TILE})
    assert kinds(path) == [("misfiled", "arch gfx950 in a folder named gfx942")]


def test_planned_shapes_hold_real_ones_as_they_are_and_padded():
    shapes = planned_shapes("w4a8")
    assert {("moe_gate_up", 1472, 2880), ("moe_gate_up", 1536, 3072), ("moe_down", 2880, 384)} <= shapes
    assert ("moe_down", 2880, 360) not in shapes  # what aiter's file assumes at TP8


def test_diff(write_pack):
    before = write_pack("a.csv", {**REAL, **TILE, **MEASURED}, {**REAL, **TILE, "M": 32})
    after = write_pack("b.csv", {**REAL, **TILE, **MEASURED, "us": 7.6, "block_n": 64}, {**REAL, **TILE, "M": 16})
    a, b = load_file(before), load_file(after)
    assert diff(a, a) == []
    changed, removed, added = diff(a, b)
    assert (changed.kind, removed.kind, added.kind) == ("changed", "removed", "added")
    assert "us 9.5 -> 7.6" in str(changed)
    assert "-20.0 % time" in str(changed)
    assert "M=32" in str(removed)
    assert "M=16" in str(added)


def test_merge(write_pack):
    published = load_file(write_pack("a.csv", {**REAL, **TILE}, {**REAL, **TILE, "M": 32}))
    mine = load_file(write_pack("b.csv", {**REAL, **TILE, **MEASURED}))
    other = load_file(write_pack("c.csv", {**REAL, **TILE, **MEASURED, "us": 7.6, "block_n": 64}))
    merged, conflicts = merge([published, mine])
    assert [(row.m, row.source) for row in merged] == [(32, "published"), (64, "measured")]
    assert conflicts == []
    assert merge([mine, mine])[0] == mine
    assert [len(rows) for rows in merge([mine, other])[1]] == [2]
    for prefer, us in (("first", 9.5), ("last", 7.6), ("faster", 7.6)):
        merged, conflicts = merge([mine, other], prefer)
        assert (merged[0].us, conflicts) == (us, [])
    elsewhere = load_file(write_pack("d.csv", {**REAL, **TILE, **MEASURED, "us": 7.6, "device": "another"}))
    assert merge([mine, elsewhere], "faster")[1], "times of two devices cannot be compared"
