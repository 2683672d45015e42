"""A pickle read as a list of opcodes, into symbols; nothing is imported, called or executed.

Goal: find the tensors that a pickle describes, whatever else stands in it.
Rule 1: every opcode makes at most one object, and at most ``MAX_OPCODES`` are read; text is kept up to
``MAX_TEXT_NBYTES`` in all; longer strings, and bytes of any length, are passed over.
Rule 2: no recursion: nesting costs a list, not a stack frame.
Rule 3: a pickle that breaks the rules of its opcodes is a ``BadModel``.
Source: Lib/pickletools.py (the opcodes of protocols 0 to 5), torch/serialization.py (persistent ids).
"""

from __future__ import annotations

from collections.abc import Callable

from hydrafs.containers.cursor import Cursor
from hydrafs.containers.symbols import Blob, Global, Storage, Thing, persistent, reduced
from hydrafs.errors import BadModel

MAX_OPCODES = 4_000_000
MAX_STRING_NBYTES = 4096
MAX_TEXT_NBYTES = 1 << 26
MAX_INT_NBYTES = 32

# Stands for every value that no tensor's place or name depends on: floats, bytes, long strings, huge integers.
UNKNOWN = Thing()


def walk(cursor: Cursor, storages: dict[str, Storage], *, imports: set[str] | None = None) -> object:
    """Read one pickle and give the symbol of what it describes.

    Args:
        cursor: stands at the first opcode; left behind the last.
        storages: filled with every storage that the pickle names, by key.
        imports: filled with every name that the pickle would import. With it, bytes in the pickle become ``Blob``s, so
            that storages which are pickled in line are found; without it, they are passed over.

    Raises:
        BadModel: no valid pickle, or one beyond the limits.
    """
    machine = _Machine(cursor, storages, imports)
    try:
        return machine.run()
    except (IndexError, KeyError, ValueError) as error:
        raise BadModel("a pickle is damaged", detail=f"near byte {cursor.position}: {error}"[:200]) from error


class _Machine:
    def __init__(self, cursor: Cursor, storages: dict[str, Storage], imports: set[str] | None) -> None:
        self.cursor = cursor
        self.storages = storages
        self.imports = imports
        self.stack: list[object] = []
        self.outer: list[list[object]] = []  # the stacks below each mark
        self.memo: dict[int, object] = {}
        self.text_nbytes = 0

    def run(self) -> object:
        read = self.cursor.read
        for _ in range(MAX_OPCODES):
            code = read(1)
            if code == b".":
                return self.stack.pop()
            action = _ACTIONS.get(code)
            if action is None:
                raise BadModel("a pickle has an unknown opcode", detail=f"{code!r} at byte {self.cursor.position - 1}")
            action(self)
        raise BadModel("a pickle is too long to be read", detail=f"over {MAX_OPCODES} opcodes")

    # --- reading ---

    def number(self, nbytes: int, signed: bool = False) -> int:
        return int.from_bytes(self.cursor.read(nbytes), "little", signed=signed)

    def text(self, nbytes: int) -> object:
        """A string of ``nbytes`` bytes; ``UNKNOWN`` if it is too long to be a name."""
        if nbytes > MAX_STRING_NBYTES:
            self.cursor.skip(nbytes)
            return UNKNOWN
        return self.keep(self.cursor.read(nbytes))

    def keep(self, raw: bytes) -> str:
        self.text_nbytes += len(raw)
        if self.text_nbytes > MAX_TEXT_NBYTES:
            raise BadModel("a pickle has too much text to be read", detail=f"over {MAX_TEXT_NBYTES} bytes")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw.decode("latin-1")

    def line(self) -> str:
        return self.keep(self.cursor.line(MAX_STRING_NBYTES))

    def integer_line(self) -> object:
        digits = self.line().removesuffix("L")
        return int(digits) if len(digits) <= 2 * MAX_INT_NBYTES else UNKNOWN

    def long(self, nbytes: int) -> object:
        if nbytes <= MAX_INT_NBYTES:
            return self.number(nbytes, signed=True)
        self.cursor.skip(nbytes)
        return UNKNOWN

    def unknown(self, nbytes: int) -> object:
        self.cursor.skip(nbytes)
        return UNKNOWN

    def blob(self, nbytes: int) -> object:
        blob = UNKNOWN if self.imports is None else Blob(self.cursor.position, nbytes)
        self.cursor.skip(nbytes)
        return blob

    # --- the stack ---

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def above_mark(self) -> list[object]:
        above, self.stack = self.stack, self.outer.pop()
        return above

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.above_mark()

    def push_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise BadModel("a pickle takes more than it has")
        items = tuple(self.stack[-count:])
        self.stack[-count:] = [items]

    def pop_name(self) -> str:
        value = self.stack.pop()
        if not isinstance(value, str):
            raise BadModel("a pickle names a global by no string")
        return value

    # --- building ---

    def named(self, module: str, name: str) -> Global:
        symbol = Global(module, name)
        if self.imports is not None:
            self.imports.add(symbol.path)
        return symbol

    def push_global(self, module: str, name: str) -> None:
        self.stack.append(self.named(module, name))

    def stack_global(self) -> None:
        name = self.pop_name()
        self.push_global(self.pop_name(), name)

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = reduced(self.stack[-1], args)

    def instance(self, cls: object, args: list[object]) -> None:
        self.stack.append(reduced(cls, tuple(args)))

    def new_with_keywords(self) -> None:
        keywords, args = self.stack.pop(), self.stack.pop()
        self.stack[-1] = Thing((args, keywords))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Thing) and target is not UNKNOWN:
            target.state = state if target.state is None else (target.state, state)

    def mapping(self, pairs: list[object]) -> None:
        if len(pairs) % 2:
            raise BadModel("a pickle has a key without a value")
        thing = Thing()
        thing.pairs = pairs or None
        self.stack.append(thing)

    def set_items(self, pairs: list[object]) -> None:
        target = self.stack[-1]
        if len(pairs) % 2:
            raise BadModel("a pickle has a key without a value")
        if isinstance(target, Thing) and target is not UNKNOWN and pairs:
            target.pairs = target.pairs or []
            target.pairs.extend(pairs)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Thing) and target is not UNKNOWN and items:
            target.items = target.items or []
            target.items.extend(items)

    def instance_of_marked(self) -> None:
        args = self.above_mark()
        self.instance(args[0], args[1:])

    def instance_of_named(self) -> None:
        module, name = self.line(), self.line()
        args = self.above_mark()
        self.instance(self.named(module, name), args)

    def quoted(self) -> None:
        line = self.cursor.line(MAX_STRING_NBYTES).strip()
        if len(line) < 2 or line[:1] not in b"'\"" or line[-1:] != line[:1]:
            raise BadModel("a pickle has a string without quotes")
        self.stack.append(UNKNOWN if b"\\" in line else self.keep(line[1:-1]))


_Action = Callable[[_Machine], None]


def _push(value: Callable[[_Machine], object]) -> _Action:
    def action(m: _Machine) -> None:
        item = value(m)  # first: it may put another stack in place
        m.stack.append(item)

    return action


def _drop(value: Callable[[_Machine], object]) -> _Action:
    def action(m: _Machine) -> None:
        value(m)

    return action


def _integer_or_bool(m: _Machine) -> object:
    value = m.line()
    if value in ("00", "01"):
        return value == "01"
    return int(value) if len(value) <= 2 * MAX_INT_NBYTES else UNKNOWN


def _remember(key: Callable[[_Machine], int]) -> _Action:
    def action(m: _Machine) -> None:
        m.memo[key(m)] = m.stack[-1]

    return action


def _recall(key: Callable[[_Machine], int]) -> _Action:
    return lambda m: m.stack.append(m.memo[key(m)])


def _memo_line(m: _Machine) -> int:
    index = int(m.cursor.line(20))
    if not 0 <= index < 1 << 32:
        raise BadModel("a pickle has a memo index out of range")
    return index


_ACTIONS: dict[bytes, _Action] = {
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": _drop(_Machine.above_mark),
    b"2": lambda m: m.stack.append(m.stack[-1]),
    b"F": _push(lambda m: (m.line(), UNKNOWN)[1]),
    b"I": _push(_integer_or_bool),
    b"J": _push(lambda m: m.number(4, signed=True)),
    b"K": _push(lambda m: m.number(1)),
    b"L": _push(_Machine.integer_line),
    b"M": _push(lambda m: m.number(2)),
    b"N": _push(lambda m: None),
    b"P": _push(lambda m: (m.line(), UNKNOWN)[1]),
    b"Q": lambda m: m.stack.append(persistent(m.storages, m.stack.pop())),
    b"R": _Machine.reduce,
    b"S": _Machine.quoted,
    b"T": _push(lambda m: m.text(m.number(4))),
    b"U": _push(lambda m: m.text(m.number(1))),
    b"V": _push(_Machine.line),
    b"X": _push(lambda m: m.text(m.number(4))),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"b": _Machine.build,
    b"c": lambda m: m.push_global(m.line(), m.line()),
    b"d": lambda m: m.mapping(m.above_mark()),
    b"}": _push(lambda m: Thing()),
    b"e": lambda m: m.extend(m.above_mark()),
    b"g": _recall(_memo_line),
    b"h": _recall(lambda m: m.number(1)),
    b"i": _Machine.instance_of_named,
    b"j": _recall(lambda m: m.number(4)),
    b"l": _push(_Machine.above_mark),
    b"]": _push(lambda m: []),
    b"o": _Machine.instance_of_marked,
    b"p": _remember(_memo_line),
    b"q": _remember(lambda m: m.number(1)),
    b"r": _remember(lambda m: m.number(4)),
    b"s": _Machine.set_item,
    b"t": _push(lambda m: tuple(m.above_mark())),
    b")": _push(lambda m: ()),
    b"u": lambda m: m.set_items(m.above_mark()),
    b"G": _push(lambda m: m.unknown(8)),
    b"\x80": lambda m: m.cursor.skip(1),
    b"\x81": _Machine.reduce,
    b"\x82": _push(lambda m: m.unknown(1)),
    b"\x83": _push(lambda m: m.unknown(2)),
    b"\x84": _push(lambda m: m.unknown(4)),
    b"\x85": lambda m: m.push_tuple(1),
    b"\x86": lambda m: m.push_tuple(2),
    b"\x87": lambda m: m.push_tuple(3),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"\x8a": _push(lambda m: m.long(m.number(1))),
    b"\x8b": _push(lambda m: m.long(m.number(4))),
    b"B": _push(lambda m: m.blob(m.number(4))),
    b"C": _push(lambda m: m.blob(m.number(1))),
    b"\x8c": _push(lambda m: m.text(m.number(1))),
    b"\x8d": _push(lambda m: m.text(m.number(8))),
    b"\x8e": _push(lambda m: m.blob(m.number(8))),
    b"\x8f": _push(lambda m: []),
    b"\x90": lambda m: m.extend(m.above_mark()),
    b"\x91": _push(_Machine.above_mark),
    b"\x92": _Machine.new_with_keywords,
    b"\x93": _Machine.stack_global,
    b"\x94": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    b"\x95": lambda m: m.cursor.skip(8),
    b"\x96": _push(lambda m: m.unknown(m.number(8))),
    b"\x97": _push(lambda m: UNKNOWN),
    b"\x98": lambda m: None,
}
