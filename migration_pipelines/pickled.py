"""Reading of pickle streams that runs no code.

A pickle is a program, and Python's own reader runs it: whoever writes the file says what is imported and
called. Some stores keep their records in pickles nevertheless. Here the program's instructions are walked by
a machine that knows data only: it imports nothing, looks no name up and calls nothing that the stream
names. Where a pickle would import and call, the machine notes down what would be called with what, as a
`Built`, if the caller allows the name, and refuses the whole stream if not.

A few harmless values of the standard library and of NumPy are understood by name and come out as themselves:
sets, bytes, ordered dictionaries, dates, UUIDs, decimals, arrays and numbers (`VALUES`).
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NoReturn

from migration_pipelines.errors import StoreRefusedError
from migration_pipelines.pickled_values import ATOMS, MADE_AT_ONCE, MADE_WHEN_WHOLE, NotAValueError

VALUES = frozenset(MADE_AT_ONCE) | frozenset(MADE_WHEN_WHOLE)
# Streams of before Python 3 name the same things otherwise.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# What else such streams call to make a plain object; each becomes the `Built` of the class it is given.
_MAKERS = frozenset({"copyreg._reconstructor", "copyreg.__newobj__", "builtins.object"})
# No store nests deeper than this; what does would exhaust the stack of whoever walks it.
MAX_DEPTH = 100
# A stream can point at one list many times, in lists that are pointed at many times: small to hold, endless
# to write out. What it would be written out may exceed the stream's size by this factor.
_MAX_GROWTH = 64
_ALWAYS_ALLOWED_NODES = 1_000_000
_FLOAT_BYTES = 9  # a code and a double
_FLOATS_AT_ONCE = 4096

_PUSHED_AS_THEY_ARE = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CONTAINERS: Mapping[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_IGNORED = "FRAME"
_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
_FLOAT_CODE = bytes([_CODES["BINFLOAT"]])
_STOP, _FLOAT, _KEEP, _TEXT = map(_CODES.get, ("STOP", "BINFLOAT", "MEMOIZE", "SHORT_BINUNICODE"))


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the stream would have imported; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Built:
    """An object as its pickle describes it.

    Parameters
    ----------
    module, name
        What the pickle would have called.
    args, kwargs
        With what.
    state
        What it would have handed to the object after; None without.
    """

    module: str
    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    state: Any = None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _RefusalError(Exception):
    """Why a stream isn't read; becomes an error that names the file."""


def read_pickle(data: bytes, *, source: str, allowed: Collection[str]) -> Any:
    """Return the data of a pickle stream of any protocol, without running any of it.

    Parameters
    ----------
    data
        The whole stream. Time and memory are linear in its length.
    source
        How the file or row is called in errors.
    allowed
        Names (`module.name`) that may stand in the stream, beside `VALUES`: they become `Global` or `Built`.

    Returns
    -------
    None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset, `Global`, `Built`, and what
    `VALUES` names: datetime, date, time, timedelta, timezone, UUID, Decimal, ndarray.

    Raises
    ------
    StoreRefusedError
        The stream names something else, is cut or malformed, nests too deeply, holds itself, or would be
        endless if written out.
    """
    machine = _Machine(frozenset(allowed) | VALUES | _MAKERS)
    try:
        value = machine.run(data)
        return _Settler(_ALWAYS_ALLOWED_NODES + _MAX_GROWTH * len(data)).settle(value)
    except (_RefusalError, NotAValueError) as error:
        reason = str(error)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        reason = f"it is cut or malformed ({error})"
    raise StoreRefusedError(
        f"{source}: this pickle is not read, near byte {machine.position:,} of {len(data):,}: {reason}. "
        "Pickles are read as data and nothing in them is run; use no file whose writer you don't know",
        source=source,
        position=machine.position,
    )


class _Machine:
    """The stack machine of a pickle, data only."""

    def __init__(self, allowed: frozenset[str]) -> None:
        self.position = 0
        self._allowed = allowed
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Walk the whole stream and return what it leaves."""
        stream, at, end = io.BytesIO(data), 0, len(data)
        memo = self._memo
        while at < end:
            self.position = at
            code = data[at]
            # Nearly all of a record's stream is these three, which are worth a way of their own.
            if code == _TEXT:
                at = self._push_text(data, at)
            elif code == _KEEP:
                memo[len(memo)] = self._stack[-1]
                at += 1
            elif code == _FLOAT:
                at = self._push_floats(data, at)
            elif code == _STOP:
                return self._result(end)
            else:
                at = self._step(code, stream, at + 1)
        raise _RefusalError("it is cut: it ends before its STOP")

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def _step(self, code: int, stream: io.BytesIO, at: int) -> int:
        """Do the instruction whose argument begins at `at`; return where the next one begins."""
        found = _INSTRUCTIONS.get(code)
        if found is None:
            raise _RefusalError(f"{bytes([code])!r} is no instruction of a pickle: it is cut or not a pickle")
        read, do = found
        if read is None:
            do(self, None)
            return at
        stream.seek(at)
        argument = read(stream)
        do(self, argument)
        return stream.tell()

    def _push_text(self, data: bytes, start: int) -> int:
        """Push the short text that begins at `start`; return where it ends."""
        stop = start + 2 + data[start + 1]
        if stop > len(data):
            raise _RefusalError("it is cut within a text")
        self._stack.append(str(data[start + 2 : stop], "utf-8", "surrogatepass"))
        return stop

    def _push_floats(self, data: bytes, start: int) -> int:
        """Push the run of floats that begins at `start`; return where it ends."""
        codes = data[start : start + _FLOAT_BYTES * _FLOATS_AT_ONCE : _FLOAT_BYTES]
        run = len(codes) - len(codes.lstrip(_FLOAT_CODE))
        length = min(run, (len(data) - start) // _FLOAT_BYTES)
        if not length:
            raise _RefusalError("it is cut within a number")
        self._stack.extend(_floats(length).unpack_from(data, start))
        return start + length * _FLOAT_BYTES

    def _result(self, length: int) -> Any:
        if self._marks or len(self._stack) != 1:
            raise _RefusalError("it is malformed: it leaves more or less than one object")
        if self.position + 1 != length:
            raise _RefusalError("bytes follow its end")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    # ── instructions: named for those of pickletools ─────────────────────────────────────────────────

    def _op_PROTO(self, version: int) -> None:  # noqa: N802 - the instruction's own name, as in all below
        if version > 5:
            raise _RefusalError(f"it has the protocol {version}; 0 to 5 are known")

    def _op_BINSTRING(self, text: str) -> None:  # noqa: N802
        if not text.isascii():
            raise _RefusalError("a text of before Python 3 isn't ASCII, and its encoding isn't told")
        self._stack.append(text)

    _op_SHORT_BINSTRING = _op_BINSTRING  # noqa: N815

    def _op_BYTEARRAY8(self, data: bytearray) -> None:  # noqa: N802
        self._stack.append(bytes(data))

    def _op_MARK(self, _: None) -> None:  # noqa: N802
        self._marks.append(self._stack)
        self._stack = []

    def _op_POP(self, _: None) -> None:  # noqa: N802
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _op_POP_MARK(self, _: None) -> None:  # noqa: N802
        self._pop_mark()

    def _op_DUP(self, _: None) -> None:  # noqa: N802
        self._stack.append(self._stack[-1])

    def _op_PUT(self, key: int) -> None:  # noqa: N802
        self._memo[key] = self._stack[-1]

    _op_BINPUT = _op_LONG_BINPUT = _op_PUT  # noqa: N815

    def _op_GET(self, key: int) -> None:  # noqa: N802
        if key not in self._memo:
            raise _RefusalError(f"it recalls the object {key}, which it never kept")
        self._stack.append(self._memo[key])

    _op_BINGET = _op_LONG_BINGET = _op_GET  # noqa: N815

    def _op_TUPLE(self, _: None) -> None:  # noqa: N802
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def _op_TUPLE1(self, _: None) -> None:  # noqa: N802
        self._last_as_tuple(1)

    def _op_TUPLE2(self, _: None) -> None:  # noqa: N802
        self._last_as_tuple(2)

    def _op_TUPLE3(self, _: None) -> None:  # noqa: N802
        self._last_as_tuple(3)

    def _last_as_tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise _RefusalError("it is malformed: a tuple lacks items")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _op_LIST(self, _: None) -> None:  # noqa: N802
        items = self._pop_mark()
        self._stack.append(items)

    def _op_DICT(self, _: None) -> None:  # noqa: N802
        items = self._pop_mark()
        self._stack.append({})
        self._set_items(items)

    def _op_FROZENSET(self, _: None) -> None:  # noqa: N802
        items = self._pop_mark()
        self._stack.append(frozenset(map(_hashable, items)))

    def _op_APPEND(self, _: None) -> None:  # noqa: N802
        item = self._stack.pop()
        self._top(list).append(item)

    def _op_APPENDS(self, _: None) -> None:  # noqa: N802
        items = self._pop_mark()
        self._top(list).extend(items)

    def _op_ADDITEMS(self, _: None) -> None:  # noqa: N802
        items = self._pop_mark()
        self._top(set).update(map(_hashable, items))

    def _op_SETITEM(self, _: None) -> None:  # noqa: N802
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _op_SETITEMS(self, _: None) -> None:  # noqa: N802
        self._set_items(self._pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_hashable(key)] = value

    def _top(self, kind: type) -> Any:
        """Return what lies on top, which has to be a plain container: nothing else takes items as data."""
        found = self._stack[-1]
        if type(found) is not kind:
            raise _RefusalError(f"it adds items to {_shown(found)} as to a {kind.__name__}")
        return found

    # ── what would import and call ───────────────────────────────────────────────────────────────────

    def _op_GLOBAL(self, pair: str) -> None:  # noqa: N802
        module, _, name = pair.partition(" ")
        self._push_global(module, name)

    def _op_STACK_GLOBAL(self, _: None) -> None:  # noqa: N802
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise _RefusalError("it is malformed: it imports by a name that isn't text")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        self._stack.append(self._global(module, name))

    def _global(self, module: str, name: str) -> Global:
        found = Global(_RENAMED.get(module, module), name)
        if str(found) not in self._allowed:
            raise _RefusalError(f"it would import and run {module}.{name}, which is no part of this format")
        return found

    def _op_REDUCE(self, _: None) -> None:  # noqa: N802
        args, called = self._stack.pop(), self._stack.pop()
        self._stack.append(_called(called, args))

    def _op_NEWOBJ(self, _: None) -> None:  # noqa: N802
        self._op_REDUCE(None)

    def _op_NEWOBJ_EX(self, _: None) -> None:  # noqa: N802
        kwargs, args, called = self._stack.pop(), self._stack.pop(), self._stack.pop()
        if type(kwargs) is not dict:
            raise _RefusalError("it is malformed: named arguments that are no dictionary")
        made = _called(called, args)
        if kwargs and not isinstance(made, Built):
            raise _RefusalError(f"it calls {_shown(called)} with arguments that it doesn't take")
        if kwargs:
            made.kwargs = kwargs
        self._stack.append(made)

    def _op_INST(self, pair: str) -> None:  # noqa: N802
        module, _, name = pair.partition(" ")
        args = tuple(self._pop_mark())
        self._stack.append(_called(self._global(module, name), args))

    def _op_OBJ(self, _: None) -> None:  # noqa: N802
        called, *args = self._pop_mark()
        self._stack.append(_called(called, tuple(args)))

    def _op_BUILD(self, _: None) -> None:  # noqa: N802
        state = self._stack.pop()
        made = self._stack[-1]
        if not isinstance(made, Built):
            raise _RefusalError(f"it changes the state of {_shown(made)}, which has none")
        if made.state is not None:
            raise _RefusalError(f"it sets the state of {made} twice")
        made.state = state


_Step = Callable[[_Machine, Any], None]


def _instructions() -> Iterator[tuple[int, tuple[Callable[[Any], Any] | None, _Step]]]:
    """Yield the code of each instruction, the reader of its argument, and what it does."""
    for opcode in pickletools.opcodes:
        reader = None if opcode.arg is None else opcode.arg.reader
        yield ord(opcode.code), (reader, _step_named(opcode.name))


def _step_named(name: str) -> _Step:
    if name in _PUSHED_AS_THEY_ARE:
        return _Machine.push
    if name in _CONTAINERS:
        make = _CONTAINERS[name]
        return lambda machine, _: machine.push(make())
    if name in _CONSTANTS:
        constant = _CONSTANTS[name]
        return lambda machine, _: machine.push(constant)
    if name == _IGNORED:
        return lambda _, __: None
    found: _Step | None = getattr(_Machine, f"_op_{name}", None)
    return found or partial(_refuse_instruction, name)


def _refuse_instruction(name: str, _: _Machine, __: Any) -> NoReturn:
    raise _RefusalError(f"it uses the instruction {name}, which no store's records need")


_INSTRUCTIONS = dict(_instructions())


def _called(called: Any, args: Any) -> Any:
    """Return what a call comes to as data."""
    if not isinstance(called, Global):
        raise _RefusalError(f"it would call {_shown(called)}, which is no name")
    if type(args) is not tuple:
        raise _RefusalError(f"it is malformed: it calls {called} with arguments that are no tuple")
    name = str(called)
    if name in _MAKERS:
        return _made(name, args)
    if name in MADE_AT_ONCE:
        return MADE_AT_ONCE[name](*_of_values(args))
    return Built(called.module, called.name, args)


def _made(maker: str, args: tuple[Any, ...]) -> Built:
    """Return the plain object that a stream of an old protocol makes by a helper."""
    of_class = args[0] if args else None
    plain = {
        "copyreg._reconstructor": args[1:] == (Global("builtins", "object"), None),
        "copyreg.__newobj__": True,
    }
    if not isinstance(of_class, Global) or str(of_class) in _MAKERS or not plain.get(maker):
        _refuse_maker(maker, args)
    return Built(of_class.module, of_class.name, () if maker.endswith("_reconstructor") else args[1:])


def _refuse_maker(maker: str, args: tuple[Any, ...]) -> NoReturn:
    raise _RefusalError(f"it would call {maker} with {', '.join(map(_shown, args)) or 'nothing'}")


def _of_values(args: tuple[Any, ...]) -> tuple[Any, ...]:
    for arg in args:
        if isinstance(arg, (Global, Built)):
            raise _RefusalError(f"it hands {_shown(arg)} to a plain value")
    return args


def _hashable(value: Any) -> Any:
    """Return a key or a set's item, a scalar or a flat tuple: a nested one is hashed on the C stack."""
    flat = value if type(value) is tuple else (value,)
    for item in flat:
        if type(item) not in ATOMS and not isinstance(item, (Global, Built)):
            raise _RefusalError(f"it uses {_shown(value)} as a key")
    return value


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, (Global, Built)) else f"a {type(value).__name__}"


@lru_cache(maxsize=128)
def _floats(count: int) -> struct.Struct:
    return struct.Struct(">" + "xd" * count)


class _Settler:
    """Bounds what a stream left, and makes its values whole, in place."""

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes
        # By identity; the original is kept beside, so that its identity isn't given to another object.
        self._settled: dict[int, tuple[Any, Any, int]] = {}
        self._open: set[int] = set()

    def settle(self, value: Any) -> Any:
        """Return the value with what `MADE_WHEN_WHOLE` names as itself."""
        settled, _ = self._settle(value, 0)
        return settled

    def _settle(self, value: Any, depth: int) -> tuple[Any, int]:
        if type(value) in ATOMS or isinstance(value, Global):
            return value, 1
        key = id(value)
        if key in self._open:
            raise _RefusalError("an object in it holds itself")
        if depth > MAX_DEPTH:
            raise _RefusalError(f"it nests more than {MAX_DEPTH} deep")
        known = self._settled.get(key)
        if known is None:
            self._open.add(key)
            settled, nodes = self._settle_parts(value, depth + 1)
            self._open.remove(key)
            known = self._settled[key] = (value, settled, nodes)
        if known[2] > self._max_nodes:
            raise _RefusalError(
                "it repeats its parts without end: written out it would be far larger than it is"
            )
        return known[1], known[2]

    def _settle_parts(self, value: Any, depth: int) -> tuple[Any, int]:
        flat = _flat_nodes(value)
        if flat is not None:
            return value, flat
        if isinstance(value, Built):
            parts, nodes = self._settle_all([value.args, value.kwargs, value.state], depth)
            value.args, value.kwargs, value.state = parts
            maker = MADE_WHEN_WHOLE.get(str(value))
            return (value if maker is None else maker(value.args, value.state)), nodes
        if type(value) is dict:
            keys, key_nodes = self._settle_all(value, depth)
            parts, nodes = self._settle_all(value.values(), depth)
            value.clear()
            value.update(zip(keys, parts, strict=True))
            return value, key_nodes + nodes
        if type(value) is list:
            value[:], nodes = self._settle_all(value, depth)
            return value, nodes
        if type(value) in (tuple, set, frozenset):
            parts, nodes = self._settle_all(value, depth)
            return type(value)(parts), nodes
        return value, 1  # made at once, and whole

    def _settle_all(self, values: Collection[Any], depth: int) -> tuple[list[Any], int]:
        settled, nodes = list(values), 1 + len(values)
        for at, value in enumerate(settled):
            if type(value) not in ATOMS:
                settled[at], inner = self._settle(value, depth)
                nodes += inner - 1
        return settled, nodes


def _flat_nodes(value: Any) -> int | None:
    """Return how many nodes a container of atoms has, as most are; None for what may hold more."""
    kind = type(value)
    if kind is dict:
        is_flat = ATOMS.issuperset(map(type, value)) and ATOMS.issuperset(map(type, value.values()))
        return 2 + 2 * len(value) if is_flat else None
    if kind in (list, tuple, set, frozenset):
        return 1 + len(value) if ATOMS.issuperset(map(type, value)) else None
    return None
