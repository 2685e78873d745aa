import random
from pathlib import Path

import pytest

from sglang_amd_quant.selection import Config, Selector
from sglang_amd_quant.selection.pack_csv import COLUMNS, VERSION_LINE, PackError, load_file, write_file
from sglang_amd_quant.selection.packs import Packs, installed_packs, load_packs, pack_files, shipped_dir

HEADER = ",".join(COLUMNS)
LINEAR = {"op": "linear", "scheme": "mxfp8", "N": 2048, "K": 4096, "M": 64, "kernel": "triton_gemm_mx", "block_m": 64}
MOE = {"op": "moe_down", "scheme": "w4a8", "N": 2880, "K": 2880, "M": 64, "kernel": "triton_moe_a8w4"}
MEASURED = {"source": "measured", "us": 9.5, "err": 0.001, "device": "d", "versions": "v", "date": "2026-11-21"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**LINEAR, "arch": "gfx900"}, "arch 'gfx900' is none of"),
        ({**LINEAR, "op": "conv"}, "op 'conv' is none of"),
        ({**LINEAR, "scheme": "fp8"}, "scheme 'fp8' is none of"),
        ({**LINEAR, "N": ""}, "N '' must not be empty"),
        ({**LINEAR, "N": -1}, "N '-1' is no whole number"),
        ({**LINEAR, "K": "4e3"}, "K '4e3' is no whole number"),
        ({**LINEAR, "K": 0}, "K '0' is no whole number of at least 1"),
        ({**LINEAR, "E": 0}, "E '0'"),
        ({**LINEAR, "block_n": "x"}, "block_n 'x'"),
        ({**LINEAR, "params": "n_sub"}, "params 'n_sub' is not of the form"),
        ({**LINEAR, "params": "a=1;a=2"}, "twice"),
        ({**LINEAR, "us": "fast"}, "us 'fast' is no finite number"),
        ({**LINEAR, "us": "nan"}, "us 'nan'"),
        ({**LINEAR, "us": -2}, "us '-2'"),
        ({**LINEAR, "us": 0}, "us '0' is no time above 0"),
        ({**LINEAR, "layout": "swizzled"}, "layout 'swizzled'"),
        ({**LINEAR, "kernel": ""}, "kernel '' is no kernel name"),
        ({**LINEAR, "date": "21.11.2026"}, "date '21.11.2026'"),
        ({**LINEAR, "date": "20260101"}, "date '20260101' is no date of the form YYYY-MM-DD"),
        ({**LINEAR, "date": "2026-W01-1"}, "date '2026-W01-1'"),
        ({**LINEAR, "note": "x" * 200_000}, "no CSV (field larger than field limit (131072))"),
        ({**LINEAR, "source": "guessed"}, "source 'guessed'"),
        ({**LINEAR, "M": ""}, "a linear entry states M"),
        ({**LINEAR, "E": 8}, "a linear entry has no E"),
        ({**MOE, "M_routed": 256}, "states both M and M_routed"),
        ({**MOE, "M": ""}, "neither M nor M_routed nor block_m"),
        ({**LINEAR, "note": ""}, "names its origin"),
        ({**LINEAR, **MEASURED, "err": ""}, "a measured entry states"),
        ({**LINEAR, **MEASURED, "versions": ""}, "a measured entry states"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(write_pack, row, reason):
    path = write_pack("bad.csv", LINEAR, {**LINEAR, "M": 32}, row)
    with pytest.raises(PackError) as caught:
        load_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:5: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", ":1: begins with ''"),
        ("arch,op\n", ":1: begins with 'arch,op'"),
        ("# amd-mx pack 2\n", "a pack of this version begins with"),
        (VERSION_LINE, "wrong header"),
        (f"{VERSION_LINE}\n# a remark\n\n{HEADER.replace('cu_num,', '')}\n", ":4: wrong header"),
        (f"{VERSION_LINE}\n{HEADER}\n# a remark\n\ngfx950,1\n", f":5: 2 columns; write {len(COLUMNS)}"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, reason):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(PackError) as caught:
        load_file(path)
    assert reason in str(caught.value)


def test_unreadable_places_are_said(tmp_path, monkeypatch):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PackError, match="cannot be read"):
        load_file(tmp_path / "binary.csv")
    monkeypatch.setenv("SGLANG_AMD_MX_PACKS", str(tmp_path / "nowhere"))
    with pytest.raises(PackError, match="no such file or folder"):
        installed_packs()


def test_comments_blank_lines_and_quotes(tmp_path):
    values = {**dict.fromkeys(COLUMNS, ""), "arch": "gfx950", **LINEAR, "source": "published", "note": '"a, b"'}
    line = ",".join(str(value) for value in values.values())
    path = tmp_path / "own.csv"
    path.write_text(f"{VERSION_LINE}\n# remark\n{HEADER}\n\n# another\n{line}\n")
    (row,) = load_file(path)
    assert (row.note, row.line, row.place) == ("a, b", 6, f"{path}:6")
    assert row.config == Config(block_m=64)
    path.write_text(f"{VERSION_LINE}\n{HEADER}\n")
    assert load_file(path) == []


def test_write_and_read_back(tmp_path):
    rows = [row for path in pack_files([shipped_dir()]) for row in load_file(path)]
    rows[0] = rows[0]._replace(
        us=1.25, err=0.0, config=Config(16, params=(("depth", 2), ("n_sub", 1))), layout="cdna4_scale"
    )
    copy = tmp_path / "copy.csv"
    write_file(copy, rows)
    assert [row._replace(file="", line=0) for row in load_file(copy)] == [r._replace(file="", line=0) for r in rows]
    assert list(tmp_path.iterdir()) == [copy]


def test_folders_are_read_in_order_and_files_once(write_pack, tmp_path):
    paths = [write_pack(name, {**LINEAR, "M": m}) for name, m in (("b/2.csv", 2), ("b/1.csv", 1), ("a/3.csv", 3))]
    assert pack_files([tmp_path / "b", paths[2]]) == [paths[1], paths[0], paths[2]]
    assert [row.m for row in load_packs((str(paths[2]), str(tmp_path))).rows] == [3, 1, 2]


def test_precedence_is_fixed_by_source_then_order_then_file_then_line(write_pack):
    rows = [
        row
        for name, source in (("a.csv", {}), ("b.csv", MEASURED), ("c.csv", MEASURED))
        for row in load_file(write_pack(name, {**LINEAR, **source}))
    ]
    owners = [Path(row.file).stem for row in Packs(rows).shape(("gfx950", "linear", "mxfp8", 2048, 4096))[("M", 64)]]
    assert owners == ["b", "c", "a"]


def test_shipped_packs_hold_what_the_seeds_publish_and_what_was_measured_on_hopper():
    everything = installed_packs().rows
    rows = [row for row in everything if row.source == "published"]
    measured = [row for row in everything if row.source == "measured"]
    assert {row.arch for row in measured} == {"sm_90"}
    assert {row.op for row in measured} == {"moe_gate_up", "moe_down"}
    assert len(rows) + len(measured) == len(everything)
    assert all("#" in row.note or ".json" in row.note for row in rows)
    a8w4 = [row for row in rows if row.note == "aiter #3580"]
    keys = {(row.config.block_m, row.n, row.k) for row in a8w4}
    shapes = ((1536, 3072), (3072, 1536), (3072, 3072), (3072, 768), (6144, 3072))
    assert keys == {(block_m, n, k) for block_m in (32, 64, 128) for n, k in shapes}
    assert len(keys) == 15
    tile = Config(None, 128, 256, num_warps=4, num_stages=2, waves_per_eu=0, nonkdim=16)
    assert {row.config._replace(block_m=None) for row in a8w4} == {tile}
    stated = {(row.n, row.k, row.m): (row.us, row.peer_us) for row in rows if row.us}
    assert stated == {
        (2304, 6144, 1): (7.20, 26.21),
        (1536, 6144, 1): (7.82, 26.13),
        (6144, 2048, 1): (7.65, 16.05),
        (2304, 6144, 64): (21.97, 37.80),
    }
    use_hip_0 = {(row.k, row.n, row.m) for row in rows if row.op == "linear" and row.kernel.startswith("triton")}
    assert use_hip_0 == {(6144, 9216, 64), (4096, 6144, 64), (3072, 6144, 64)}


def test_every_shipped_entry_is_chosen_for_its_own_problem():
    from sglang_amd_quant.selection.pack_tools import problem_of_row

    select = Selector()
    for row in installed_packs().rows:
        choice = select(problem_of_row(row))
        assert (choice.source, choice.kernel) == ("exact", row.kernel), row.place
        assert f"{Path(row.file).name}:{row.line}" in choice.why[0]


def test_columns_are_read_alike_whatever_stands_in_other_rows(write_pack):
    """Texts are parsed once per column: a row's values are its own, for any mixture of rows."""
    rng = random.Random(0)
    rows = [
        {**LINEAR, "N": rng.choice((64, 128)), "M": i + 1, "block_n": rng.choice((16, 32)), "us": rng.choice((1.5, 2))}
        for i in range(200)
    ]
    loaded = load_file(write_pack("many.csv", *rows))
    assert [(r.n, r.m, r.config.block_n, r.us) for r in loaded] == [
        (row["N"], row["M"], row["block_n"], row["us"]) for row in rows
    ]
    assert [r.line for r in loaded] == list(range(3, 203))
