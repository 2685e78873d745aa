"""Disassembled text to instruction records: looks up the row of each mnemonic and fills in its operands."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, cached_property, lru_cache

import numpy as np

from .disassembler import Line, disassemble
from .errors import UnknownInstruction
from .instruction import (
    INSTRUCTION,
    LOWER_HALVES,
    OPERAND_FIELDS,
    REGISTER_WORDS,
    SOURCES,
    VCC,
    VGPRS,
    Element,
    Kind,
    Select,
    Space,
    Width,
)
from .operands import Operand, bits_of, parse_operand, split
from .semantics import TYPES, Row, rows

_ENCODINGS = re.compile(r"_(e32|e64|sdwa|dpp|e64_dpp|dpp8|e64_dpp8)$")
_CACHE_POLICY = {"sc0", "sc1", "nt", "glc", "slc", "dlc", "gds"}  # no meaning without caches
_DPP_BASE = {
    "row_shl": 0x100,
    "row_shr": 0x110,
    "row_ror": 0x120,
    "row_newbcast": 0x150,
    "row_share": 0x150,
    "row_xmask": 0x160,
}
_DPP_FIXED = {
    "wave_shl": 0x130,
    "wave_rol": 0x134,
    "wave_shr": 0x138,
    "wave_ror": 0x13C,
    "row_mirror": 0x140,
    "row_half_mirror": 0x141,
}
_DPP_BROADCAST = {"15": 0x142, "31": 0x143}
_F8F6F4 = (Element.FP8, Element.BF8, Element.FP6, Element.BF6, Element.FP4)  # by cbsz, blgp
_SLOT = {"vaddr": 0, "saddr": 1, "resource": 1, "soffset": 2, "vdata": 3, "vdata1": 1, "vdata2": 2, "sbase": 0}


class Program:
    """The decoded kernel: `records` for the interpreter, `lines` for people, `rows` for the counters."""

    def __init__(self, records: np.ndarray, lines: list[Line], rows_: list[Row], index: dict[int, int]):
        self.records, self.lines, self.rows, self.index = records, lines, rows_, index

    @cached_property
    def narrow_lds(self) -> bool:
        """Whether it accesses less of LDS at once than a word, so that bytes have to be told apart."""
        in_lds = np.array([row.category in ("lds", "load_to_lds") for row in self.rows])
        return bool((in_lds & (0 < self.records["bytes"]) & (self.records["bytes"] < 4)).any())

    @cached_property
    def vgprs_used(self) -> int:
        """One more than the highest vector register that it names."""
        touched = np.bitwise_or.reduce(self.records["touches"] | self.records["fills"], axis=0)
        halves = int.from_bytes(touched.tobytes(), "little") >> LOWER_HALVES
        return max((halves >> VGPRS).bit_length(), (halves & ((1 << VGPRS) - 1)).bit_length(), 1)


@cache
def _numbers() -> dict[str, int]:
    return {name: number for number, name in enumerate(rows())}


@lru_cache(maxsize=256)
def decode(code: bytes, address: int, arch: str, wave_size: int) -> Program:
    """Raises UnknownInstruction, naming mnemonic, address and arch, on anything the tables do not cover."""
    made, lines, found, branches, dual = [], [], [], [], []
    index: dict[int, int] = {}
    try:
        for line in disassemble(code, address, arch, wave_size):
            number = index[line.address] = len(lines)
            for text in map(str.strip, line.text.split("::")):  # a VOPD pair: two records, with the line of the first
                record, row = _decoded(text, arch, wave_size)
                if row.sources == ("target",):
                    branches.append((number, line, text))
                elif len(lines) == number and text.startswith("v_dual_"):
                    dual.append(number)
                made.append(record)
                lines.append(line)
                found.append(row)
        records = np.frombuffer(bytearray(b"".join(made)), INSTRUCTION)
        for number, line, text in branches:
            records["target"][number] = _target(line, text, index)
    except (ValueError, KeyError, IndexError) as error:
        raise UnknownInstruction(arch, line.address, text, f"{type(error).__name__}: {error}") from error
    records["dual"][dual] = 1
    records["address"] = [line.address for line in lines]
    records["next_address"] = [line.address + line.size for line in lines]
    return Program(records, lines, found, index)


@lru_cache(maxsize=1 << 17)
def _decoded(text: str, arch: str, wave_size: int) -> tuple[bytes, Row]:
    """What does not depend on where the instruction lies, which is nearly all: kernels repeat most of their lines, and
    so do the kernels of one source."""
    record = np.zeros((), INSTRUCTION)
    decoder = _Decoder(record, text, arch, wave_size)
    decoder.run()
    return record.tobytes(), decoder.row


def _target(line: Line, text: str, index: dict[int, int]) -> int:
    """Number of the instruction that a branch goes to."""
    offset = int(text.split()[1], 0)
    offset -= 0x10000 if offset >= 0x8000 else 0
    target = line.address + 4 + 4 * offset
    _require(target in index, f"branch target {target:#x} lies outside the kernel")
    return index[target]


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


@cache
def _fields(operand: Operand, kind: str, packed: bool) -> tuple[int, ...]:
    """The operand as an OPERAND record, for the type that its instruction's row gives it."""
    kind = kind.removesuffix(".keep").removesuffix("x2") if kind not in ("s32", "carry") else kind
    bits = {"s32": 32, "carry": 1}.get(kind) or TYPES[kind].bits
    width = {16: Width.B16, 64: Width.B64}.get(bits, Width.B32)
    if packed:  # pairs of registers, or two halves of one
        width = Width.B64 if bits == 32 else Width.B32
    value = 0
    if operand.kind == Kind.CONST:
        constant = Width.B32 if packed and bits == 32 else width
        if packed and kind == "f16" and "." in operand.text:
            constant = Width.B16  # 1.0 as a half; a packed integer instruction gets the bits of the fp32 number
        value = operand.value(constant, is_float=kind == "f64")
    modified = operand.negate or operand.absolute or operand.sign_extend or operand.select != 0
    fields = {
        "kind": Kind.MASK if bits == 1 and operand.kind == Kind.SGPR else operand.kind,
        "width": width,
        "select": operand.select,
        "negate": operand.negate,
        "absolute": operand.absolute,
        "sign_extend": operand.sign_extend,
        "modified": modified,
        "index": operand.index,
        "count": operand.count,
        "value": value,
    }
    return tuple(int(fields.get(name, 0)) for name, *_ in OPERAND_FIELDS)


class _Decoder:
    """Fills one record. `modifiers` loses each modifier as it is understood; what is left over is an error."""

    def __init__(self, record: np.ndarray, text: str, arch: str, wave_size: int):
        self.record, self.text = record, text
        self.gfx, self.wave_size = int(arch[3:]), wave_size
        self.registers = 0

    def run(self) -> None:
        mnemonic, texts, self.modifiers = split(self.text)
        name = mnemonic.replace("v_dual_", "v_", 1)
        encoding = _ENCODINGS.search(name)
        self.encoding = encoding[1] if encoding else ""
        self.select_row(name[: encoding.start()] if encoding else name)
        row, record = self.row, self.record
        if row.sources in (("ignored",), ("target",)):
            return None
        if row.sources == ("waits",):
            return self.waits()
        if row.sources == ("setreg",):
            return self.set_mode()
        operands = [parse_operand(text) for text in texts]
        for name, value in row.parameters.items():
            if name.endswith("_type"):
                record[name] = Element[value.upper()]
            else:
                record[name] = Space[value.upper()] if name == "space" else int(value)
        for policy in _CACHE_POLICY:
            self.modifiers.pop(policy, None)
        if row.table in ("memory", "atomic"):
            self.memory(operands)
        else:
            for operand in operands:
                self.registers |= operand.registers
            self.matrix(operands) if row.table == "matrix" else self.compute(operands)
        _require(not self.modifiers, f"modifier {', '.join(self.modifiers)} is not modelled here")
        record["touches"] = _words(self.registers)
        return None

    def select_row(self, name: str) -> None:
        for flag in ("clamp", "lds"):
            if flag in self.modifiers and f"{name}.{flag}" in rows():
                del self.modifiers[flag]
                name = f"{name}.{flag}"
        _require(name in rows(), "no row in the tables")
        self.row = rows()[name]
        self.record["op"] = _numbers()[name]

    # ---- control ----

    def waits(self) -> None:
        record = self.record
        record["wait_load"] = record["wait_lds"] = record["wait_store"] = 255
        single = {"s_waitcnt_vscnt": "wait_store", "s_waitcnt_vmcnt": "wait_load", "s_waitcnt_lgkmcnt": "wait_lds"}
        if self.row.name in single:
            record[single[self.row.name]] = int(self.text.split(",")[1], 0)
        for name, count in re.findall(r"(vmcnt|lgkmcnt|expcnt)\((\d+)\)", self.text):
            if name != "expcnt":
                record["wait_load" if name == "vmcnt" else "wait_lds"] = int(count)
        if self.row.name == "s_waitcnt" and "cnt(" not in self.text:  # a raw number: every counter at zero
            _require(int(self.text.split()[1], 0) == 0, "raw s_waitcnt other than 0")
            record["wait_load"] = record["wait_lds"] = 0

    def set_mode(self) -> None:
        fp16_ovfl = re.fullmatch(r"\S+ hwreg\(HW_REG_MODE, 23, 1\), (\w+)", self.text)
        _require(fp16_ovfl is not None, "only MODE.FP16_OVFL is modelled")
        self.record["imm"] = int(fp16_ovfl[1], 0) & 1

    # ---- vector and scalar computation ----

    def compute(self, operands: list[Operand]) -> None:
        row, record = self.row, self.record
        sources = list(row.source_types)
        if sources == ["none"]:
            return
        results = [r for r in row.results if r != "scc"]
        written = operands[: len(operands) - len(sources)]
        if row.category == "compare":
            record["flag"] = row.name.startswith("v_cmpx")
        elif "mask" in sources and len(operands) == len(results) + len(sources) - 1:  # v_dual_cndmask: VCC unwritten
            written = operands[: len(results)]
            operands = [*operands, parse_operand("vcc" if self.wave_size == 64 else "vcc_lo")]
            self.registers |= operands[-1].registers
        _require(
            len(written) == len(results) or (not written and bool(record["flag"])),
            f"{len(operands)} operands do not fit {row.results} = {row.sources}",
        )
        values = operands[len(written) :]
        for field, operand, kind in zip(("dst", "dst2"), written, results, strict=False):
            record[field] = self.fields(operand, kind)
        for position, (operand, kind) in enumerate(zip(values, sources, strict=True)):
            record["src"][position] = self.fields(operand, kind)
        if "old" in row.sources:
            record["src"][SOURCES - 1] = self.fields(Operand(written[0].kind, written[0].index), results[0])
            if written[0].select == Select.WORD_1:
                record["src"][SOURCES - 1]["select"] = Select.WORD_1
                record["src"][SOURCES - 1]["modified"] = 1
        if "vcc" in row.sources:
            record["src"][len(sources)] = self.fields(Operand(Kind.SGPR, VCC), "mask")
            self.registers |= 3 << VCC
        if row.table != "salu":
            self.vector_modifiers(len(sources))
            self.half_destination()

    def fields(self, operand: Operand, kind: str) -> tuple[int, ...]:
        return _fields(operand, kind, self.row.packed)

    def vector_modifiers(self, sources: int) -> None:
        record, modifiers, row = self.record, self.modifiers, self.row
        record["row_mask"] = record["bank_mask"] = 15
        if "bitop3" in modifiers:
            record["imm"] = int(modifiers.pop("bitop3"), 0)
        if "mul" in modifiers:
            record["omod"] = {"2": 1, "4": 2}[modifiers.pop("mul")]
        if "div" in modifiers:
            modifiers.pop("div")
            record["omod"] = 3
        floats = row.result in ("f16", "f32", "f64") and not row.packed
        if "clamp" in modifiers and floats:
            modifiers.pop("clamp")
            record["clamp"] = 1
        _require(not record["omod"] or floats, "output modifier on something that is no float")
        self.op_sel(sources)
        if self.encoding == "sdwa":
            self.sdwa()
        if "dpp" in self.encoding:
            self.dpp()

    def op_sel(self, sources: int) -> None:
        record, modifiers, row = self.record, self.modifiers, self.row
        select = bits_of(modifiers.pop("op_sel", "[0]"))
        vop3p = row.category in ("packed", "dot")
        mix = "mix(" in row.expression
        record["op_sel_hi"] = bits_of(modifiers.pop("op_sel_hi", "[1,1,1]" if vop3p and not mix else "[0]"))
        record["neg_lo"], record["neg_hi"] = (bits_of(modifiers.pop(n, "[0]")) for n in ("neg_lo", "neg_hi"))
        if "byte_sel" in modifiers:
            byte = int(modifiers.pop("byte_sel"))
            select |= (byte >> 1 & 1) | (byte & 1) << 1
        if mix:  # modifiers act after the choice of half: see helpers.h
            for name, flag in (("neg_lo", "negate"), ("neg_hi", "absolute")):
                record[name] = sum(int(record["src"][k][flag]) << k for k in range(3))
            for k in range(3):
                record["src"][k]["modified"] = 0
        if vop3p or row.reads_op_sel or row.category == "lanes":
            record["op_sel"] = select
            plain = select == 0 and record["op_sel_hi"] & 3 == 3
            _require(row.packed or row.reads_op_sel or plain or row.category == "lanes", "op_sel on a dot product")
            return
        for position in range(sources):
            if select >> position & 1:
                record["src"][position]["select"] = Select.WORD_1
                record["src"][position]["modified"] = 1
                select &= ~(1 << position)
        if select:
            _require(select == 1 << sources and record["dst"]["width"] == Width.B16, "op_sel selects no 16-bit operand")
            record["dst"]["select"], record["dst"]["preserve"] = Select.WORD_1, 1

    def half_destination(self) -> None:
        """What becomes of the other half of a register whose 16-bit half is the result."""
        dst = self.record["dst"]
        if dst["width"] != Width.B16 or dst["kind"] != Kind.VGPR or self.encoding == "sdwa":
            return
        if dst["select"] or self.gfx >= 1100 or self.row.keeps_upper_half:
            dst["select"] = dst["select"] or Select.WORD_0
            dst["preserve"] = 1

    def sdwa(self) -> None:
        record, modifiers = self.record, self.modifiers
        for position in (0, 1):
            select = Select[modifiers.pop(f"src{position}_sel", "DWORD")]
            source = record["src"][position]
            source["select"] = select
            source["modified"] = source["modified"] or select != 0
        record["dst"]["select"] = Select[modifiers.pop("dst_sel", "DWORD")]
        unused = modifiers.pop("dst_unused", "UNUSED_PAD")
        _require(unused in ("UNUSED_PAD", "UNUSED_PRESERVE"), f"dst_unused:{unused}")
        record["dst"]["preserve"] = unused == "UNUSED_PRESERVE"

    def dpp(self) -> None:
        record, modifiers = self.record, self.modifiers
        record["dpp"] = 1
        record["row_mask"] = int(modifiers.pop("row_mask", "0xf"), 0)
        record["bank_mask"] = int(modifiers.pop("bank_mask", "0xf"), 0)
        record["bound_ctrl"] = modifiers.pop("bound_ctrl", None) is not None
        record["fetch_inactive"] = modifiers.pop("fi", "0") == "1"
        controls = []
        for name in list(modifiers):
            value = modifiers[name]
            if name == "quad_perm":
                controls.append(sum(int(x) << 2 * n for n, x in enumerate(value.strip("[]").split(","))))
            elif name == "dpp8":
                controls.append(1 << 24 | sum(int(x) << 3 * n for n, x in enumerate(value.strip("[]").split(","))))
            elif name == "row_bcast":
                controls.append(_DPP_BROADCAST[value])
            elif name in _DPP_BASE:
                controls.append(_DPP_BASE[name] + int(value))
            elif name in _DPP_FIXED:
                controls.append(_DPP_FIXED[name])
            else:
                continue
            del modifiers[name]
        _require(len(controls) == 1, "no DPP control")
        record["dpp_ctrl"] = controls[0]

    # ---- memory ----

    def memory(self, operands: list[Operand]) -> None:
        row, record = self.row, self.record
        words = list(row.sources)
        if row.category == "atomic" and self.returns(operands, words):
            record["returns"] = 1
            words.insert(0, "vdst")
            if record["space"] == Space.BUFFER:  # what memory held replaces the data in their register
                operands.insert(0, replace(operands[0], count=int(record["bytes"]) // 4))
        elif "returns" in row.parameters:
            record["returns"] = 1
        if words[-1] == "saddr" and len(operands) == len(words) - 1:  # flat instructions have none
            words.pop()
        self.offsets(words, operands)
        filled = Operand()
        for word, operand in zip(words, operands, strict=True):
            if operand.select == Select.WORD_1:
                _require(int(record["bytes"]) <= 2, "half of a register")
                record["half"] = 2
            if word in ("vdst", "sdst"):
                field, filled = record["dst"], self.part(operand, stored=False)
            else:
                field = record["src"][_SLOT[word]]
                self.registers |= (self.part(operand, stored=True) if "vdata" in word else operand).registers
            field["kind"], field["index"], field["count"] = operand.kind, operand.index, operand.count
            if operand.kind == Kind.CONST:
                field["value"] = operand.value(Width.B32, is_float=False)
        for flag in ("offen", "idxen"):
            record[flag] = self.modifiers.pop(flag, None) is not None
        in_order = row.category in ("load", "lds") and record["space"] != Space.FLAT
        record["fills"] = _words(filled.registers)
        if not in_order:  # nothing orders this load after an earlier one of the same register
            self.registers |= filled.registers

    def part(self, operand: Operand, stored: bool) -> Operand:
        """The half of a register that a narrow access moves, if it leaves the other alone."""
        upper, lower = self.record["half"] == 2, self.record["half"] == 1 or (stored and 0 < self.record["bytes"] <= 2)
        return replace(operand, select=Select.WORD_1 if upper else Select.WORD_0) if upper or lower else operand

    def returns(self, operands: list[Operand], words: list[str]) -> bool:
        if self.record["space"] == Space.BUFFER:
            return "sc0" in self.text or "glc" in self.text
        return len(operands) == len(words) + 1 or (self.record["space"] == Space.FLAT and len(operands) == len(words))

    def offsets(self, words: list[str], operands: list[Operand]) -> None:
        record, modifiers = self.record, self.modifiers
        if words[-1] == "simm":
            operand = operands.pop() if len(operands) == len(words) else Operand()
            words.pop()
            if operand.kind == Kind.CONST:
                record["offset"] = int(operand.text, 0)
            elif operand.kind == Kind.SGPR:
                words.append("saddr")
                operands.append(operand)
        record["offset2"] = int(modifiers.pop("offset1", "0"), 0)
        record["offset"] += int(modifiers.pop("offset0", "0"), 0)
        offset = modifiers.pop("offset", "0")
        record["offset"] += _swizzle(offset) if offset.startswith("swizzle") else int(offset, 0)

    # ---- matrix ----

    def matrix(self, operands: list[Operand]) -> None:
        row, record, modifiers = self.row, self.record, self.modifiers
        record["blocks"] = record["blocks"] or 1
        if "d_type" not in row.parameters:
            record["d_type"] = Element.F32
        formats = [int(modifiers.pop(name, "0")) for name in ("cbsz", "blgp")]
        if row.name.endswith("f8f6f4"):
            record["a_type"], record["b_type"] = (_F8F6F4[f] for f in formats)
        else:
            _require(formats == [0, 0] and int(modifiers.get("abid", "0")) == 0, "broadcast (cbsz, abid, blgp)")
        modifiers.pop("abid", None)
        record["op_sel"] = bits_of(modifiers.pop("op_sel", "[0]"))
        record["op_sel_hi"] = bits_of(modifiers.pop("op_sel_hi", "[1,1,1]"))
        record["neg_lo"] = bits_of(modifiers.pop("neg_lo", "[0]"))
        integer = record["d_type"] == Element.I32
        _require(integer or record["neg_lo"] == 0, "negated matrix operand")
        fields = [record["dst"], *(record["src"][k] for k in range(len(operands) - 1))]
        for position, (field, operand) in enumerate(zip(fields, operands, strict=True)):
            field["kind"], field["index"], field["count"] = operand.kind, operand.index, operand.count
            _require(not (operand.negate or operand.absolute), "negated matrix operand")
            _require(operand.kind == Kind.VGPR or position > 2, "matrix operand that is no vector register")
            if operand.kind == Kind.CONST:
                kind = Element(record["d_type"])
                width = {Element.F64: Width.B64, Element.F16: Width.B16}.get(kind, Width.B32)
                field["value"] = operand.value(width, is_float=kind == Element.F64)


def _words(registers: int) -> np.ndarray:
    return np.frombuffer(registers.to_bytes(8 * REGISTER_WORDS, "little"), np.uint64)


def _swizzle(text: str) -> int:
    """The offset field that `swizzle(KIND, ...)` stands for. RDNA3 ISA, DS_SWIZZLE_B32."""
    kind, *arguments = text.removeprefix("swizzle(").removesuffix(")").split(",")
    if kind == "QUAD_PERM":
        return 0x8000 | sum(int(x) << 2 * n for n, x in enumerate(arguments))
    if kind == "BITMASK_PERM":
        mask = arguments[0].strip('"')  # one letter per bit, highest first: 0, 1, p(reserve), i(nvert)
        bit = {name: sum(1 << 4 - n for n, c in enumerate(mask) if c in letters) for name, letters in
               (("and", "pi"), ("or", "1"), ("xor", "i"))}  # fmt: skip
        return bit["and"] | bit["or"] << 5 | bit["xor"] << 10
    size = int(arguments[0])
    if kind == "SWAP":
        return 0x1F | size << 10
    if kind == "REVERSE":
        return 0x1F | (size - 1) << 10
    if kind == "BROADCAST":
        return (0x1F & ~(size - 1)) | int(arguments[1]) << 5
    raise ValueError(text)
