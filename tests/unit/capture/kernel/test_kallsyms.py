"""kallsyms: symbols of real kernels and of tables made by hand, in every way that kernels write them; and damage."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.kernel import kallsyms
from capture.kernel.address import KernelMemory
from capture.kernel.kallsyms import find_symbols
from capture.memory.image import UnreadableMemory
from capture.notes import vmcoreinfo
from capture.notes.vmcoreinfo import VmcoreInfo
from capture.vmcore import open_vmcore

BASE = 0xFFFF_FFFF_8100_0000
AT = {"names": 0x10_0000, "num_syms": 0x1000, "token_table": 0x2000, "token_index": 0x3000, "offsets": 0x80_0000,
      "relative_base": 0x4000}  # fmt: skip


class Memory:
    """Kernel memory that is a dictionary; KernelMemory to those who only read."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}

    def read(self, address: int, length: int) -> bytes:
        for start, data in self.parts.items():
            if start <= address < start + len(data):
                return data[address - start :].ljust(length, b"\0")[:length]
        raise UnreadableMemory(f"virtual address {address:#x}")

    def read_unsigned(self, address: int, size: int) -> int:
        return int.from_bytes(self.read(address, size), "little")


def table(symbols: dict[str, int], *, absolute: bool, base_key: bool = True) -> tuple[Memory, VmcoreInfo]:
    """Compress names with a few tokens of more than a letter, as scripts/kallsyms.c would."""
    tokens = [bytes([code]) for code in range(256)]
    tokens[0x80], tokens[0x81], tokens[0x82] = b"__", b"per_cpu", b"Tstart"
    memory = Memory()
    names = b""
    for name in symbols:
        text = b"T" + name.encode()
        code = b""
        while text:
            token = max((token for token in tokens if token and text.startswith(token)), key=len)
            code += bytes([tokens.index(token)])
            text = text[len(token) :]
        names += bytes([len(code)]) if len(code) < 128 else bytes([0x80 | len(code) & 0x7F, len(code) >> 7])
        names += code
    text_table, index = b"", []
    for token in tokens:
        index.append(len(text_table))
        text_table += token + b"\0"
    offsets = [
        (address if address < 1 << 31 else BASE - 1 - address) if absolute else (address - BASE) % (1 << 32)
        for address in symbols.values()
    ]
    memory.parts = {
        AT["names"]: names,
        AT["num_syms"]: struct.pack("<I", len(symbols)),
        AT["token_table"]: text_table,
        AT["token_index"]: struct.pack("<256H", *index),
        AT["offsets"]: np.array(offsets, dtype=np.int64).astype("<u4").tobytes(),
        AT["relative_base"]: struct.pack("<Q", BASE),
    }
    keys = "".join(
        f"SYMBOL(kallsyms_{name})={at:x}\n" for name, at in AT.items() if base_key or name != "relative_base"
    )
    return memory, vmcoreinfo.parse(f"{keys}SYMBOL(_stext)={symbols['_stext']:x}\n".encode())


SYMBOLS = {
    "__per_cpu_start": 0, "__per_cpu_end": 0x34000, "_text": BASE, "_stext": BASE, "x" * 300: BASE + 16,
    "start_kernel": BASE + 0x100, "__per_cpu_offset": BASE + 0x7000, "_end": BASE + 0x200_0000,
}  # fmt: skip


def found(memory: Memory, info: VmcoreInfo, *names: str) -> dict[str, int]:
    return find_symbols(cast("KernelMemory", memory), info, names)  # (it only reads)


@pytest.mark.parametrize("absolute", [True, False], ids=["with absolute per-CPU symbols", "all relative"])
def test_symbols_are_found_in_both_kinds_of_table(absolute: bool) -> None:
    symbols = {name: at for name, at in SYMBOLS.items() if absolute or at >= BASE}
    memory, info = table(symbols, absolute=absolute)
    assert found(memory, info, *symbols, "nobody") == symbols
    assert found(memory, info, "_end") == {"_end": SYMBOLS["_end"]}


@pytest.mark.parametrize("read", [*range(1, 12), 63, 64, 65, 331])
def test_wherever_a_read_ends_no_name_is_lost_or_counted_twice(read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kallsyms, "_READ", read)
    memory, info = table(SYMBOLS, absolute=True)
    memory.parts[AT["names"]] += bytes([2]) + b"Tz" * 400  # what follows the table is none of its names
    assert found(memory, info, *SYMBOLS, "z") == SYMBOLS


def test_a_table_without_a_base_begins_at_the_text() -> None:
    memory, info = table({name: at for name, at in SYMBOLS.items() if at >= BASE}, absolute=False, base_key=False)
    assert found(memory, info, "_end", "_text") == {"_end": SYMBOLS["_end"], "_text": BASE}


def test_a_table_that_does_not_agree_with_vmcoreinfo_is_not_believed() -> None:
    memory, info = table(SYMBOLS, absolute=True)
    info.keys["SYMBOL(_stext)"] = f"{BASE + 0x1000:x}"
    assert found(memory, info, "_end") == {}


@pytest.mark.parametrize(
    "missing", [*(f"SYMBOL(kallsyms_{name})" for name in AT if name != "relative_base"), "SYMBOL(_stext)"]
)
def test_without_a_key_nothing_is_found(missing: str) -> None:
    memory, info = table(SYMBOLS, absolute=True)
    del info.keys[missing]
    assert found(memory, info, "_end") == {}


@pytest.mark.parametrize("part", AT.values())
def test_what_cannot_be_read_is_an_answer(part: int) -> None:
    memory, info = table(SYMBOLS, absolute=True)
    del memory.parts[part]
    assert found(memory, info, "_end") == {}


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 30))
def test_damaged_tables_never_raise(seed: int, hits: int) -> None:
    memory, info = table(SYMBOLS, absolute=True)
    random = np.random.default_rng(seed)
    for _ in range(hits):
        place = int(random.choice(list(memory.parts)))
        data = bytearray(memory.parts[place])
        data[int(random.integers(len(data)))] = int(random.integers(256))
        memory.parts[place] = bytes(data)
    assert set(found(memory, info, *SYMBOLS)) <= set(SYMBOLS)


@pytest.mark.parametrize("name", ["linux-6.1-la57", "linux-6.12"])
def test_symbols_of_a_real_kernel_are_those_of_its_vmcoreinfo(name: str, corpus_file: Callable[[str], Path]) -> None:
    with open_vmcore(str(corpus_file(name))) as vmcore:
        memory = KernelMemory(vmcore.image, vmcore.info, "x86_64")
        known = ("init_uts_ns", "_stext", "node_data", "init_top_pgt")
        symbols = find_symbols(memory, vmcore.info, [*known, "__bss_stop", "no_such_symbol"])
        assert {key: symbols[key] for key in known} == {key: vmcore.info.symbol(key) for key in known}
        assert set(symbols) == {*known, "__bss_stop"}
