"""Reading old `pytorch_model.bin` files without ever unpickling.

Such a file is a zip: `NAME/data.pkl` describes the tensors, `NAME/data/KEY` holds the raw bytes of each storage,
uncompressed. The description is a pickle program. Here a small interpreter walks its instructions as data: it knows
dictionaries, tuples, numbers, strings, and the one record that rebuilds a tensor from a storage. Any other global is
refused by name, and nothing is ever called.
"""

from __future__ import annotations

import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anychip.errors import InputError
from anychip.interchange.source import TensorEntry, checked_shape, open_regular

_MAX_PICKLE_BYTES = 64 << 20
_LOCAL_HEADER_BYTES = 30
_STORAGES = {
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
}
_ORDERED_DICT = ("collections", "OrderedDict")
_REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
_KNOWN_GLOBALS = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER, *_STORAGES}
# How a file of torch.save began when it was not a zip yet: the pickled number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")


@dataclass(frozen=True)
class _Global:
    module: str
    name: str

    @property
    def key(self) -> tuple[str, str]:
        return self.module, self.name


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    elements: int


@dataclass(frozen=True)
class _TensorRecord:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    """The stack marker of pickle programs."""


class _Refused(Exception):
    """The program does something that a description of tensors does not need."""


class TorchBinFile:
    """The checked directory of one `.bin` file. Raises InputError naming what is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with os.fdopen(open_regular(path), "rb") as handle:
                self._size = os.fstat(handle.fileno()).st_size
                if handle.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
                    raise self._bad("is in PyTorch's format from before 1.6, which cannot be read without unpickling")
                archive = zipfile.ZipFile(handle)
                infos = {info.filename: info for info in archive.infolist()}
                if len(infos) != len(archive.infolist()):
                    raise self._bad("is a zip file in which a name stands twice")
                program_names = [name for name in infos if name.endswith("/data.pkl") and name.count("/") == 1]
                if len(program_names) != 1:
                    raise self._bad("is a zip file without tensors in it")
                program = infos[program_names[0]]
                if program.file_size > _MAX_PICKLE_BYTES or program.compress_type != zipfile.ZIP_STORED:
                    raise self._bad("has a description that is compressed or too large")
                text = archive.read(program)
                byte_order = infos.get(program_names[0].removesuffix("data.pkl") + "byteorder")
                if byte_order is not None and (byte_order.file_size > 16 or archive.read(byte_order) != b"little"):
                    raise self._bad("was not written on a little-endian machine")
        except OSError as error:
            raise self._bad(f"cannot be read ({error.strerror})") from None
        except (
            zipfile.BadZipFile,
            zipfile.LargeZipFile,
            zlib.error,
            struct.error,
            NotImplementedError,
            RuntimeError,
            EOFError,
            ValueError,
            OverflowError,
        ) as error:
            raise self._bad(f"is not a torch zip file or is truncated ({str(error)[:80]})") from None
        prefix = program_names[0].removesuffix("data.pkl")
        try:
            records = _Interpreter().run(text)
        except _Refused as error:
            raise self._bad(str(error)) from None
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self._bad(f"has a description that makes no sense ({type(error).__name__})") from None
        self.entries = {name: self._entry(name, record, prefix, infos) for name, record in records.items()}

    def _bad(self, what: str) -> InputError:
        return InputError(f"{what}.", where=self.path, do="Use a safetensors copy of the weights.")

    def _entry(self, name: str, record: _TensorRecord, prefix: str, infos: dict[str, zipfile.ZipInfo]) -> TensorEntry:
        storage, item = record.storage, record.storage.dtype.itemsize
        info = infos.get(f"{prefix}data/{storage.key}")
        shape = checked_shape(record.shape, ascii(name[:80]), self.path)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise self._bad(f"lacks the bytes of {name[:80]!a}, or has them compressed")
        stride = 1
        for length, given in zip(reversed(shape), reversed(record.stride), strict=True):
            if length > 1 and given != stride:
                raise self._bad(f"stores {name[:80]!a} not row by row")
            stride *= length
        if info.file_size != storage.elements * item or not 0 <= record.offset <= storage.elements - stride:
            raise self._bad(f"holds another number of bytes than {name[:80]!a} needs")
        start = _data_start(self.path, info) + record.offset * item
        if start + stride * item > self._size:
            raise self._bad(f"is truncated inside {name[:80]!a}")
        return TensorEntry(storage.dtype, shape, start)


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: behind its local header, whose two lengths stand at byte 26."""
    descriptor = open_regular(path)
    try:
        header = os.pread(descriptor, _LOCAL_HEADER_BYTES, info.header_offset)
    except (OSError, OverflowError):
        header = b""
    finally:
        os.close(descriptor)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise InputError("has a damaged zip directory.", where=path, do="Download the file again.")
    return (
        info.header_offset
        + _LOCAL_HEADER_BYTES
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )


class _Interpreter:
    """A stack machine over the pickle instructions that torch.save writes for a dictionary of tensors."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> dict[str, _TensorRecord]:
        result: Any = None
        for instruction, argument, _ in pickletools.genops(program):
            name = instruction.name
            if name == "STOP":
                result = self.stack.pop()
                break
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _LITERALS:
                self.stack.append(argument)
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise _Refused(f"uses the pickle instruction {name}, which a file of weights does not need")
        if not isinstance(result, dict):
            raise _Refused("does not hold a dictionary of tensors")
        records = {}
        for key, value in result.items():
            if not isinstance(key, str):
                raise _Refused("has a tensor whose name is not text")
            if isinstance(value, _TensorRecord):
                records[key] = value
        return records

    def pop_to_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while self.stack[position] is not _Mark:  # IndexError at the bottom: a program without its mark
            position -= 1
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def mark(self, _: object) -> None:
        self.stack.append(_Mark)

    def tuple_of(self, count: int | None) -> None:
        if count is None:
            self.stack.append(tuple(self.pop_to_mark()))
        else:
            items = tuple(self.stack[len(self.stack) - count :])
            del self.stack[len(self.stack) - count :]
            self.stack.append(items)

    def set_items(self, _: object) -> None:
        items = self.pop_to_mark()
        if len(items) % 2:
            raise _Refused("fills a dictionary with a key that has no value")
        self.fill(items[::2], items[1::2])

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key], [value])

    def fill(self, keys: list[Any], values: list[Any]) -> None:
        target = self.stack[-1]
        # Only plain keys: a tuple nested through the memo takes forever to hash.
        if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in keys):
            raise _Refused("fills something that is not a dictionary of names")
        target.update(zip(keys, values, strict=True))

    def build(self, _: object) -> None:
        """The attributes of a state dictionary (its versions) are dropped."""
        self.stack.pop()

    def find_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push_global(module, name)

    def stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_global(module, name)

    def push_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Refused("asks for something that has no name")
        if (module, name) not in _KNOWN_GLOBALS:
            asked = ascii(f"{module}.{name}")[1:-1]
            raise _Refused(f"asks for {asked[:120]}, which weights do not need; it was not run")
        self.stack.append(_Global(module, name))

    def persistent_id(self, _: object) -> None:
        kind, storage, key, _device, elements = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Global) or storage.key not in _STORAGES:
            raise _Refused("refers to something that is not a storage")
        if not isinstance(key, str) or type(elements) is not int:
            raise _Refused("refers to a storage wrongly")
        self.stack.append(_Storage(_STORAGES[storage.key], key, elements))

    def reduce(self, _: object) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        key = function.key if isinstance(function, _Global) else None
        if key == _ORDERED_DICT and arguments == ():
            self.stack.append({})
        elif key == _REBUILD_TENSOR:
            storage, offset, shape, stride = arguments[:4]
            lengths = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
            if not isinstance(storage, _Storage) or type(offset) is not int or not lengths:
                raise _Refused("rebuilds a tensor wrongly")
            self.stack.append(_TensorRecord(storage, offset, shape, stride))
        elif key == _REBUILD_PARAMETER and isinstance(arguments[0], _TensorRecord):
            self.stack.append(arguments[0])
        else:
            raise _Refused("calls something that is not the rebuilding of a tensor; it was not run")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT"}
_ACTIONS: dict[str, Callable[[_Interpreter, Any], None]] = {
    "MARK": _Interpreter.mark,
    "MEMOIZE": _Interpreter.memoize,
    "BINPUT": _Interpreter.put,
    "LONG_BINPUT": _Interpreter.put,
    "BINGET": _Interpreter.get,
    "LONG_BINGET": _Interpreter.get,
    "TUPLE": lambda machine, _: machine.tuple_of(None),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "SETITEMS": _Interpreter.set_items,
    "SETITEM": _Interpreter.set_item,
    "BUILD": _Interpreter.build,
    "GLOBAL": _Interpreter.find_global,
    "STACK_GLOBAL": _Interpreter.stack_global,
    "BINPERSID": _Interpreter.persistent_id,
    "REDUCE": _Interpreter.reduce,
}
