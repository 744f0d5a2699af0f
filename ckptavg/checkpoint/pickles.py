"""A reader of the pickles inside torch files that cannot run code, whatever the file says.

The opcodes of a pickle describe a program for a stack machine. This machine builds only inert
values: numbers, strings, containers, and descriptions of tensors. A name such as ``os.system`` is
never looked up anywhere; a name that ``pickle_names`` does not list ends the reading with an error.

Mappings become lists of pairs, so nothing from the file is ever hashed but short scalars; nothing
is copied, so the size of the pickle bounds the memory.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ckptavg.checkpoint.limits import (
    MAX_DCP_OPERATIONS,
    MAX_PICKLE_OPERATIONS,
    MAX_PICKLE_VALUES,
    no_garbage_collection,
)
from ckptavg.checkpoint.pickle_names import called, instance, is_known, storage
from ckptavg.checkpoint.pickle_values import Inert, Name, Pairs, Storage, TensorView, Unsupported
from ckptavg.errors import CheckpointError, IncompleteCheckpointError

_MAX_INTEGER_BYTES = 64
_UINT1, _UINT2, _UINT4, _UINT8, _INT4, _DOUBLE = map(
    struct.Struct, ("<B", "<H", "<I", "<Q", "<i", ">d")
)


class PickleLimits(NamedTuple):
    """How much a pickle may do: operations, and values that take room of their own."""

    operations: int
    values: int


FILE_LIMITS = PickleLimits(MAX_PICKLE_OPERATIONS, MAX_PICKLE_VALUES)
DCP_LIMITS = PickleLimits(MAX_DCP_OPERATIONS, MAX_DCP_OPERATIONS)


class FoundPickle(NamedTuple):
    """One of several pickles that follow each other.

    Attributes:
        value: What it describes; see ``read_pickle``.
        end: Position of the first byte behind it.
        storages: Every storage that it refers to, by key, as its first reference states it.
    """

    value: Any
    end: int
    storages: Mapping[str, Storage | Unsupported]


class _EndOfBytesError(ValueError):
    """The bytes end before the pickle does."""


class _Mark:
    """The marker that opens a group of stack items."""


_MARK = _Mark()


def read_pickle(raw: bytes, label: str, limits: PickleLimits = FILE_LIMITS) -> Any:
    """Return the inert value that a pickle describes.

    Args:
        raw: The whole pickle.
        label: What messages call the file.
        limits: How much it may make.

    Returns:
        Numbers, strings, bytes, None, lists, tuples, ``Pairs``, ``TensorView``, ``Storage``,
        ``Unsupported``, ``Name`` or ``Inert`` values, nested. Nesting may be deep or cyclic.

    Raises:
        CheckpointError: If the pickle is damaged, or needs anything beyond describing data.
    """
    found = read_pickle_at(raw, 0, label, limits)
    if found is None:
        raise IncompleteCheckpointError(f"{label}: its pickle is damaged (it ends early)")
    return found.value


def read_pickle_at(
    raw: bytes, start: int, label: str, limits: PickleLimits = FILE_LIMITS
) -> FoundPickle | None:
    """Read the pickle that begins somewhere in ``raw``; None if its end is not there.

    Raises:
        CheckpointError: As ``read_pickle`` does, for what comes before the end of ``raw``.
    """
    machine = _Machine(raw, start, label, limits)
    try:
        with no_garbage_collection():
            value = machine.run()
        return FoundPickle(value, machine.at, machine.storages)
    except _EndOfBytesError:
        return None
    except (IndexError, KeyError, ValueError, TypeError, struct.error, OverflowError) as error:
        # every malformed program ends here: an empty stack, a missing memo entry, a cut argument
        raise CheckpointError(f"{label}: its pickle is damaged ({type(error).__name__})") from error


class _Machine:
    def __init__(self, raw: bytes, start: int, label: str, limits: PickleLimits) -> None:
        self.at = start
        self.storages: dict[str, Storage | Unsupported] = {}
        self._raw = raw
        self._label = label
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._lines: dict[bytes, Name] = {}  # of names that were found to be known
        self._limits = limits
        self._values_left = limits.values

    def run(self) -> Any:
        raw, operations, end = self._raw, _OPERATIONS, len(self._raw)
        for _ in range(self._limits.operations):
            if self.at >= end:
                raise _EndOfBytesError
            code = raw[self.at]
            self.at += 1
            if code == _STOP:
                value = self.pop()
                if self._stack:
                    raise ValueError("values left over")
                return value
            operation = operations.get(code)
            if operation is None:
                raise self._refuse(
                    f"uses the pickle operation 0x{code:02x}, which torch never writes"
                )
            operation(self)
        raise self._refuse(f"its pickle has more than {self._limits.operations} operations")

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._label}: {what}")

    # -- arguments in the byte stream

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self._raw):
            raise _EndOfBytesError
        value = self._raw[self.at : end]
        self.at = end
        return value

    def number(self, layout: struct.Struct) -> Any:
        start = self.at
        self.at += layout.size
        if self.at > len(self._raw):
            raise _EndOfBytesError
        return layout.unpack_from(self._raw, start)[0]

    def line(self, encoding: str = "utf-8") -> str:
        end = self._raw.find(b"\n", self.at)
        if end < 0:
            raise _EndOfBytesError
        value = self._raw[self.at : end].decode(encoding)
        self.at = end + 1
        return value

    def quoted_line(self) -> str:
        text = self.line("ascii")
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or "\\" in text:
            raise ValueError("a text that is not quoted, or needs unescaping")
        return text[1:-1]

    def old_text(self, layout: struct.Struct) -> str:
        """Take a text of Python 2, whose encoding nothing tells; torch takes it for UTF-8."""
        return self.take(self.number(layout)).decode("utf-8", "surrogateescape")

    # -- the stack

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def make(self, value: Any, size: int = 1) -> None:
        """Push a value that takes room of its own."""
        self._values_left -= size
        if self._values_left < 0:
            raise self._refuse(f"its pickle makes more than {self._limits.values} values")
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value is expected")
        return value

    def pop_group(self) -> list[Any]:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        group = stack[at + 1 :]
        del stack[at:]
        return group

    def top(self) -> Any:
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError("a mark where a value is expected")
        return value

    # -- operations with a meaning of their own

    def mark(self) -> None:
        self._stack.append(_MARK)

    def store(self, index: int) -> None:
        self._memo[index] = self.top()

    def load(self, index: int) -> None:
        self.push(self._memo[index])

    def integer(self, nbytes: int) -> None:
        if nbytes > _MAX_INTEGER_BYTES:
            raise self._refuse(f"its pickle holds an integer of {nbytes} bytes")
        self.make(int.from_bytes(self.take(nbytes), "little", signed=True))

    def integer_line(self) -> None:
        text = self.line().removesuffix("L")
        if len(text) > 3 * _MAX_INTEGER_BYTES:
            raise self._refuse("its pickle holds an integer that is too long")
        self.make({"00": False, "01": True}.get(text) if text in ("00", "01") else int(text))

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(values)
        elif type(target) is not Inert:  # content of sets and other harmless containers is dropped
            raise TypeError("appends to a value that is not a list")

    def set_items(self, flat: list[Any]) -> None:
        target = self.top()
        if type(target) is Inert:
            return
        if type(target) is not Pairs or len(flat) % 2:
            raise TypeError("sets items of a value that is not a mapping")
        target.items.extend(zip(flat[::2], flat[1::2], strict=True))

    def mapping(self) -> None:
        flat = self.pop_group()
        self.make(Pairs(), 2)
        self.set_items(flat)

    def inert_group(self) -> None:
        self.pop_group()
        self.make(Inert("frozenset"))

    def global_name(self) -> None:
        middle = self._raw.find(b"\n", self.at)
        end = self._raw.find(b"\n", middle + 1)
        name = self._lines.get(self._raw[self.at : end]) if 0 <= middle < end else None
        if name is None:
            start = self.at
            self.find_name(self.line(), self.line())
            self._lines[self._raw[start:end]] = self.top()
        else:
            self.at = end + 1
            self.push(name)

    def find_name(self, module: str, attribute: str) -> None:
        name = Name(module, attribute)
        if not is_known(name):
            raise self._refuse(
                f"needs Python code '{name}', which is never run; save the weights alone "
                "(torch.save(model.state_dict(), ...)) and average those files"
            )
        self.push(name)

    def stack_name(self) -> None:
        attribute, module = self.pop(), self.pop()
        if type(module) is not str or type(attribute) is not str:
            raise TypeError("a name that is not a string")
        self.find_name(module, attribute)
        self._values_left -= 1

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise TypeError("calls a value that is not a name")
        self.make(called(function, arguments), 2)

    def new_object(self) -> None:
        _arguments, cls = self.pop(), self.pop()
        self.make(instance(cls), 2)

    def new_object_with_keywords(self) -> None:
        self.pop()
        self.new_object()

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is Inert:
            target.state = state
        elif not isinstance(target, (Pairs, TensorView, Unsupported)):
            raise TypeError("sets the state of a plain value")

    def persistent(self) -> None:
        identity = self.pop()
        if type(identity) is not tuple or len(identity) < 5 or identity[0] != "storage":
            raise TypeError("an unknown persistent reference")
        _, kind, key, _location, numel = identity[:5]
        if len(identity) > 5 and identity[5] is not None:
            raise self._refuse(
                "holds views of storages (view_metadata), which torch no longer writes; load it "
                "once with torch.load(..., weights_only=True) and save it again with torch.save"
            )
        stored = storage(kind, key, numel)
        if self.storages.setdefault(key, stored) != stored:
            raise self._refuse(f"refers to the storage '{key}' in two ways")
        self.make(stored)


_STOP = ord(".")
_OPERATIONS: dict[int, Callable[[_Machine], object]] = {
    ord(code): operation
    for code, operation in {
        "\x80": lambda m: m.take(1),  # PROTO
        "\x95": lambda m: m.take(8),  # FRAME
        "(": _Machine.mark,  # MARK
        "0": lambda m: m._stack.pop(),  # POP: a value or a mark
        "1": lambda m: m.pop_group(),  # POP_MARK
        "2": lambda m: m.push(m.top()),  # DUP
        "N": lambda m: m.push(None),  # NONE
        "\x88": lambda m: m.push(True),  # NEWTRUE
        "\x89": lambda m: m.push(False),  # NEWFALSE
        "I": _Machine.integer_line,  # INT
        "L": _Machine.integer_line,  # LONG
        "J": lambda m: m.make(m.number(_INT4)),  # BININT
        "K": lambda m: m.push(m.number(_UINT1)),  # BININT1
        "M": lambda m: m.make(m.number(_UINT2)),  # BININT2
        "\x8a": lambda m: m.integer(m.number(_UINT1)),  # LONG1
        "\x8b": lambda m: m.integer(m.number(_UINT4)),  # LONG4
        "F": lambda m: m.make(float(m.line())),  # FLOAT
        "G": lambda m: m.make(m.number(_DOUBLE)),  # BINFLOAT
        "V": lambda m: m.make(m.line("raw-unicode-escape")),  # UNICODE
        "X": lambda m: m.make(m.take(m.number(_UINT4)).decode("utf-8", "surrogatepass")),
        "\x8c": lambda m: m.make(m.take(m.number(_UINT1)).decode("utf-8", "surrogatepass")),
        "\x8d": lambda m: m.make(m.take(m.number(_UINT8)).decode("utf-8", "surrogatepass")),
        "S": lambda m: m.make(m.quoted_line()),  # STRING
        "T": lambda m: m.make(
            m.take(m.number(_UINT4)).decode("utf-8", "surrogateescape")
        ),  # BINSTRING
        "U": lambda m: m.make(
            m.take(m.number(_UINT1)).decode("utf-8", "surrogateescape")
        ),  # SHORT_BINSTRING
        "B": lambda m: m.make(m.take(m.number(_UINT4))),  # BINBYTES
        "C": lambda m: m.make(m.take(m.number(_UINT1))),  # SHORT_BINBYTES
        "\x8e": lambda m: m.make(m.take(m.number(_UINT8))),  # BINBYTES8
        "\x96": lambda m: m.push(m.take(m.number(_UINT8))),  # BYTEARRAY8
        "]": lambda m: m.make([]),  # EMPTY_LIST
        "l": lambda m: m.push(m.pop_group()),  # LIST
        "a": lambda m: m.append([m.pop()]),  # APPEND
        "e": lambda m: m.append(m.pop_group()),  # APPENDS
        ")": lambda m: m.push(()),  # EMPTY_TUPLE
        "t": lambda m: m.push(tuple(m.pop_group())),  # TUPLE
        "\x85": lambda m: m.push((m.pop(),)),  # TUPLE1
        "\x86": lambda m: m.push((m.pop(), m.pop())[::-1]),  # TUPLE2
        "\x87": lambda m: m.push((m.pop(), m.pop(), m.pop())[::-1]),  # TUPLE3
        "}": lambda m: m.make(Pairs(), 2),  # EMPTY_DICT
        "d": _Machine.mapping,  # DICT
        "s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),  # SETITEM
        "u": lambda m: m.set_items(m.pop_group()),  # SETITEMS
        "\x8f": lambda m: m.make(Inert("set")),  # EMPTY_SET
        "\x90": lambda m: m.append(m.pop_group()),  # ADDITEMS
        "\x91": _Machine.inert_group,  # FROZENSET
        "g": lambda m: m.load(int(m.line())),  # GET
        "h": lambda m: m.load(m.number(_UINT1)),  # BINGET
        "j": lambda m: m.load(m.number(_UINT4)),  # LONG_BINGET
        "p": lambda m: m.store(int(m.line())),  # PUT
        "q": lambda m: m.store(m.number(_UINT1)),  # BINPUT
        "r": lambda m: m.store(m.number(_UINT4)),  # LONG_BINPUT
        "\x94": lambda m: m.store(len(m._memo)),  # MEMOIZE
        "c": _Machine.global_name,  # GLOBAL
        "\x93": _Machine.stack_name,  # STACK_GLOBAL
        "R": _Machine.call,  # REDUCE
        "b": _Machine.build,  # BUILD
        "\x81": _Machine.new_object,  # NEWOBJ
        "\x92": _Machine.new_object_with_keywords,  # NEWOBJ_EX
        "Q": _Machine.persistent,  # BINPERSID
    }.items()
}
