"""A pickle is read as data: its values come out equal, and nothing that it names is ever run."""

from __future__ import annotations

import ast
import builtins
import copyreg
import datetime as dt
import decimal
import os
import pickle
import pickletools
import struct
import subprocess
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from migration_pipelines import pickled, pickled_values
from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.pickled import Built, Global, read_pickle

PROTOCOLS = range(6)
ALLOWED = frozenset({f"{__name__}.Plain", f"{__name__}.Slotted"})


class Plain:
    """An object of its attributes."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class Slotted:
    """An object that is pickled by arguments and a state of its own."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __reduce__(self) -> Any:
        return Slotted, self.args, {"state": 1}


def read(data: bytes) -> Any:
    return read_pickle(data, source="index.pkl", allowed=ALLOWED)


def refusal(data: bytes) -> str:
    with pytest.raises(StoreRefusedError) as caught:
        read(data)
    assert str(caught.value).startswith("index.pkl: ")
    return str(caught.value)


VALUES = [
    None,
    True,
    False,
    0,
    255,
    65_536,
    -1,
    2**31,
    -(2**63),
    2**2100,
    1.5,
    -0.0,
    float("inf"),
    "",
    "naïve 漢字 🦜\n\0",
    "x" * 300,
    b"",
    b"\x00\xff" * 200,
    [],
    [1, [2, [3]]],
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 4),
    {"a": {"b": [None, True]}, 1: "int", (1, "x"): 2},
    {1, 2, 3},
    frozenset({"a"}),
    set(),
    OrderedDict(a=1, b=2),
    dt.datetime.fromisoformat("2024-02-29T23:59:58.123456"),
    dt.datetime(2024, 2, 29, tzinfo=dt.UTC),
    dt.datetime(2024, 2, 29, tzinfo=dt.timezone(dt.timedelta(hours=-3, minutes=30))),
    dt.date(1, 1, 1),
    dt.time(1, 2, 3, 4),
    dt.timedelta(-1, 2, 3),
    uuid.UUID("12345678-1234-5678-1234-567812345678"),
    decimal.Decimal("1.10"),
    [[float(i) for i in range(5000)], 1.0],
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_plain_values_come_out_equal_from_every_protocol(value: Any, protocol: int) -> None:
    found = read(pickle.dumps(value, protocol))
    assert found == value
    assert repr(found) == repr(dict(value) if isinstance(value, OrderedDict) else value)


def test_the_second_turn_of_an_hour_is_kept() -> None:
    for value in (dt.datetime(2024, 10, 27, 2, 30, tzinfo=dt.UTC, fold=1), dt.time(2, 30, fold=1)):
        assert read(pickle.dumps(value)).fold == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
        np.arange(4, dtype=">i8"),
        np.array([True, False]),
        np.empty((0, 7), np.float16),
        np.array(3, np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_come_out_bit_for_bit(array: np.ndarray, protocol: int) -> None:
    found = read(pickle.dumps(array, protocol))
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numbers_of_numpy_are_numbers(protocol: int) -> None:
    value = [np.float32(0.1), np.int64(-7), np.bool_(True)]
    found = read(pickle.dumps(value, protocol))
    assert found == [float(np.float32(0.1)), -7, True]
    assert [type(item) for item in found] == [float, int, bool]


def test_arrays_of_objects_are_refused() -> None:
    assert "arrays of plain numbers" in refusal(pickle.dumps(np.array([{}], object)))


def test_arrays_that_claim_more_than_they_hold_are_refused() -> None:
    honest = pickle.dumps(np.zeros(4, np.float32), 4)
    claimed = honest.replace(b"K\x04\x85", b"K\x05\x85")
    assert claimed != honest
    assert "ndarray" in refusal(claimed)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_allowed_classes_come_out_as_records_of_what_they_are(protocol: int) -> None:
    plain, slotted = read(pickle.dumps([Plain(a=1, b=[2]), Slotted(3, "x")], protocol))
    assert isinstance(plain, Built)
    assert (str(plain), plain.args, plain.state) == (f"{__name__}.Plain", (), {"a": 1, "b": [2]})
    assert (str(slotted), slotted.args, slotted.state) == (f"{__name__}.Slotted", (3, "x"), {"state": 1})


def test_an_allowed_class_itself_is_a_name() -> None:
    assert read(pickle.dumps(Plain)) == Global(__name__, "Plain")


def test_named_arguments_are_kept() -> None:
    stream = (
        b"\x80\x04\x8c"
        + bytes([len(__name__)])
        + __name__.encode()
        + b"\x8c\x05Plain\x93)}\x8c\x01kK\x01s\x92."
    )
    assert read(stream).kwargs == {"k": 1}


def test_what_is_shared_stays_shared() -> None:
    shared = ["x"]
    found = read(pickle.dumps({"a": shared, "b": shared}))
    assert found["a"] is found["b"]


# ── crafted streams ──────────────────────────────────────────────────────────────────────────────────


class Runs:
    """Pickled as a call."""

    def __init__(self, called: Any, *args: Any) -> None:
        self.call = called, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fail where a test's payload leaves its mark, or anything is imported or looked up on the way."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


MARK = "open('ran', 'w').close()"
PAYLOADS = {
    "posix.system": Runs(os.system, "touch ran"),
    "builtins.eval": Runs(eval, MARK),
    "builtins.exec": Runs(exec, MARK),
    "builtins.getattr": Runs(getattr, {}, "clear"),
    ".open": Runs(open, "ran", "w"),
    "builtins.__import__": Runs(__import__, "antigravity"),
    ".Popen": Runs(subprocess.Popen, ["touch", "ran"]),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_is_named_and_never_run(name: str, protocol: int) -> None:
    message = refusal(pickle.dumps([1, {"deep": PAYLOADS[name]}], protocol))
    assert name in message.replace("__builtin__", "builtins")


def test_a_payload_that_would_be_dropped_again_is_refused() -> None:
    assert "os.system" in refusal(b"cos\nsystem\n(S'touch ran'\ntR0N.")


@pytest.mark.parametrize(
    ("stream", "named"),
    [
        (b"(S'touch ran'\nios\nsystem\n.", "os.system"),  # INST
        (b"(cos\nsystem\nS'touch ran'\no.", "os.system"),  # OBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.", "os.system"),  # STACK_GLOBAL
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.", "os.system"),  # names from the memo
        (b"\x80\x02\x82\x01.", "EXT1"),  # a name registered with copyreg
        (b"Pos.system\n.", "PERSID"),
        (b"\x80\x02N\x51.", "BINPERSID"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.", "os.system"),
        (b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR.", "copyreg._reconstructor"),
        (b"ccopyreg\n_reconstructor\n(cbuiltins\nset\ncbuiltins\nset\n(lp0\ntR.", "copyreg._reconstructor"),
        (b"ccopyreg\n__newobj__\n(ccopyreg\n__newobj__\ncbuiltins\nset\ntR.", "copyreg.__newobj__"),
        (b"ccopyreg\nadd_extension\n(S'os'\nS'system'\nI1\ntR.", "copyreg.add_extension"),
        (b"cbuiltins\nobject\n(tR.", "builtins.object"),
        (b"cbuiltins\nbytes\n(I1000000000000\ntR.", "bytes"),  # would fill the memory
        (b"cbuiltins\nbytearray\n(I1000000000000\ntR.", "bytes"),
        (b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.", "bytes"),
        (b"I5\n(tR.", "call a int"),
        (b"cdecimal\nDecimal\nN\x81.", "decimal.Decimal"),
        (b"cdecimal\nDecimal\n(S'x'\ntR.", "Decimal"),
        (b"]}b.", "a list"),  # BUILD of what has no state
        (b"\x80\x04cbuiltins\nset\nK\x01a.", "builtins.set"),  # APPEND to what is no list
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_way_to_call_is_refused_by_name(stream: bytes, named: str) -> None:
    assert named in refusal(stream)


def test_the_state_of_an_object_is_data_even_where_it_names_its_hooks() -> None:
    """`__setstate__` and friends in a state are keys like any other: nothing is set on anything."""
    found = read(pickle.dumps(Plain(__setstate__="os.system", __class__="x")))
    assert found.state == {"__setstate__": "os.system", "__class__": "x"}


def test_a_state_is_set_once() -> None:
    stream = pickle.dumps(Plain(a=1), 2)
    assert "twice" in refusal(stream[:-1] + b"}X\x01\x00\x00\x00aK\x02sb.")


@pytest.mark.parametrize("key", ["g9\n", "h\x09", "j\x09\x00\x00\x00"])
def test_recalling_what_was_never_kept_is_refused(key: str) -> None:
    assert "never kept" in refusal(b"(" + key.encode("latin-1") + b"t.")


def test_a_huge_place_in_the_memo_costs_nothing() -> None:
    assert read(b"]r\xff\xff\xff\xff0j\xff\xff\xff\xff.") == []


def test_an_object_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append({"again": (loop,)})
    assert "holds itself" in refusal(pickle.dumps(loop))


@pytest.mark.parametrize(
    "stream", [b"]" * 200_000 + b"a" * 199_999 + b".", b"K\x01" + b"\x85" * 200_000 + b"."]
)
def test_endless_nesting_is_refused(stream: bytes) -> None:
    assert "deep" in refusal(stream)


@pytest.mark.parametrize("innermost", [[], {}, {"a": 1.5}, [1.5]], ids=repr)
def test_nesting_is_bounded_whatever_lies_innermost(innermost: Any) -> None:
    deepest = innermost
    for _ in range(pickled.MAX_DEPTH):
        deepest = [deepest]
    assert read(pickle.dumps(deepest)) == deepest
    assert "deep" in refusal(pickle.dumps([deepest]))


def test_a_part_that_is_repeated_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a short stream would take the time of all that it could be written out to."""
    looked, flat_nodes = [], pickled._flat_nodes

    def counting(value: Any) -> int | None:
        looked.append(len(value))
        return flat_nodes(value)

    monkeypatch.setattr(pickled, "_flat_nodes", counting)
    long = [0.5] * 1_000
    assert read(pickle.dumps([long] * 1_000)) == [long] * 1_000
    assert sum(looked) == 2_000


def test_a_nested_tuple_is_no_key() -> None:
    """Its hash would be computed on the C stack, which ends the process instead of raising."""
    assert "as a key" in refusal(b"}K\x01" + b"\x85" * 300_000 + b"K\x01s.")


def test_parts_that_are_repeated_without_end_are_refused() -> None:
    bomb: Any = "x"
    for _ in range(60):
        bomb = [bomb] * 10
    assert "without end" in refusal(pickle.dumps(bomb))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stream_cut_anywhere_is_refused(protocol: int) -> None:
    whole = pickle.dumps([Plain(a=1.5, b={"x": (1, 2**70, "text", b"bytes")}), 1.0, np.arange(3)], protocol)
    read(whole)
    for end in range(len(whole)):
        refusal(whole[:end])


def test_bytes_after_the_end_are_refused() -> None:
    assert "follow" in refusal(pickle.dumps(1) + b"x")


def test_lengths_that_lie_are_refused() -> None:
    for stream in (b"\x8d" + struct.pack("<Q", 2**62) + b"x.", b"B" + struct.pack("<I", 2**31) + b"x."):
        assert "malformed" in refusal(stream)


def test_any_single_wrong_byte_is_read_as_data_or_refused() -> None:
    """No byte makes the machine fail otherwise, or do anything but read."""
    whole = pickle.dumps({"a": [Plain(a=1), 1.5, "x", (1, 2, 3)], "b": {1, 2}, "c": np.arange(2)}, 4)
    codes = {0, 255, *(ord(opcode.code) for opcode in pickletools.opcodes)}
    for at in range(len(whole)):
        for byte in codes:
            try:
                read(whole[:at] + bytes([byte]) + whole[at + 1 :])
            except StoreRefusedError:
                continue


def test_texts_of_unknown_encoding_are_refused() -> None:
    assert "ASCII" in refusal(b"U\x01\xe9.")


def test_an_unknown_protocol_is_refused() -> None:
    assert "protocol 6" in refusal(b"\x80\x06N.")


def test_instructions_that_point_out_of_the_stream_are_refused_by_name_and_no_others() -> None:
    refused = set()
    for opcode in pickletools.opcodes:
        with pytest.raises(StoreRefusedError) as caught:
            read(opcode.code.encode("latin-1") + b"00000000\n\n" + bytes(8))
        if f"the instruction {opcode.name}," in str(caught.value):
            refused.add(opcode.name)
    assert refused == {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"}


def test_the_reader_neither_imports_nor_looks_up() -> None:
    """Its source has no unpickler, and no way from a text to code."""
    for module in (pickled, pickled_values):
        tree = ast.parse(Path(module.__file__ or "").read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        imported = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        } | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {"eval", "exec", "__import__", "import_module", "find_class", "Unpickler", "loads"} & names
        assert not {"pickle", "copyreg", "importlib", "_pickle", "marshal"} & imported


def test_the_tests_payloads_would_have_run() -> None:
    """Python's own reader runs them: that is what is being kept out."""
    assert pickle.loads(pickle.dumps(Runs(len, "abc"))) == 3
    assert builtins.eval is PAYLOADS["builtins.eval"].call[0]
    assert copyreg.dispatch_table is not None
