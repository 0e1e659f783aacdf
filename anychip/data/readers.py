"""From a source of the recipe to documents: what files it has, and what is in each, one document at a time.

Memory stays bounded whatever the files' sizes: text is cut into documents of at most a million characters, lines of
JSON have a size limit, Parquet is read batch by batch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from anychip.data import formats, python_sources
from anychip.data.documents import Document
from anychip.data.indexed import is_packed
from anychip.errors import InputError
from anychip.files import sha256_json
from anychip.recipe.schema import SourceConfig

FileKind = Literal["text", "jsonl", "parquet", "builtins", "topics"]

_TEXT_SUFFIXES = {
    ".txt", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp",
    ".cxx", ".hpp", ".hh", ".cu", ".java", ".kt", ".scala", ".go", ".rs", ".js", ".mjs", ".jsx", ".ts", ".tsx",
    ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".swift", ".m", ".cs", ".fs", ".hs", ".ml", ".ex", ".erl", ".clj",
    ".lisp", ".scm", ".el", ".vim", ".sh", ".bash", ".zsh", ".ps1", ".sql", ".html", ".htm", ".xml", ".css",
    ".scss", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".cmake", ".mk", ".proto", ".log",
}  # fmt: skip
_TEXT_NAMES = {"README", "LICENSE", "COPYING", "CHANGELOG", "AUTHORS", "NEWS", "Makefile", "Dockerfile", "Kconfig"}
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages"}

_LONE_TEXT_CHARACTERS = 32 << 10

Skip = Callable[[str, str], None]


def ignore_skips(_reason: str, _where: str) -> None:
    """The `on_skip` of a caller who does not count."""


@dataclass(frozen=True)
class InputFile:
    """One file of a source, or one of the two pages that Python itself provides (`path` is then the interpreter)."""

    source: str
    relative: str
    path: Path
    kind: FileKind
    size: int
    mtime_ns: int
    alone: bool = False


def list_files(source: SourceConfig) -> list[InputFile]:
    """Every file of a source, sorted by relative path, so that the same corpus gives the same list anywhere."""
    if is_packed(source):
        raise InputError(f"source {source.name} is packed already and has no documents to read.", where=source.path)
    if source.path == "python:stdlib":
        return _stdlib_inputs(source)
    root = _source_root(source)
    if root.is_file():
        return [_input_file(source, root.name, root, alone=True)]
    if not root.is_dir():
        raise InputError(
            "does not exist or is not a file or folder.", where=root, do=f"Correct the path of source {source.name}."
        )
    found = [
        _input_file(source, path.relative_to(root).as_posix(), path)
        for path in _walk(root)
        if _is_wanted(source, path.relative_to(root).as_posix())
    ]
    if not found:
        patterns = f" that match {', '.join(source.include)}" if source.include else ""
        raise InputError(
            f"holds no readable files{patterns}.",
            where=root,
            do=f"Give source {source.name} a folder of text, source code, .jsonl or .parquet files.",
        )
    return sorted(found, key=lambda file: file.relative)


def fingerprint(files: list[InputFile]) -> str:
    """Changes when a file is added, removed or rewritten; reads no contents."""
    return sha256_json([[file.source, file.relative, str(file.path), file.size, file.mtime_ns] for file in files])


def read_file(source: SourceConfig, file: InputFile, on_skip: Skip = ignore_skips) -> Iterator[Document]:
    """Documents of one file. What cannot be read is an InputError, except a lone bad text file inside a folder,
    which is reported to `on_skip(reason, where)` and left out.
    """
    # A file name need not be UTF-8; a document's id is.
    name = f"{source.name}:{file.relative}".encode("utf-8", "backslashreplace").decode()
    if file.kind in ("builtins", "topics"):
        pages = python_sources.builtin_pages() if file.kind == "builtins" else python_sources.language_topics()
        for page, text in pages:
            yield Document(f"{name}#{page}", text, source.name)
        return
    if file.size == 0:
        if file.alone:
            raise InputError("is empty.", where=file.path, do=f"Give source {source.name} a file with text.")
        on_skip("empty", str(file.path))
        return
    if file.kind == "text":
        yield from _text_documents(name, source, file, on_skip)
        return
    read_rows = formats.read_jsonl if file.kind == "jsonl" else formats.read_parquet
    for row, text in read_rows(file.path, source.text_field):
        if text:
            yield Document(f"{name}#{row}", text, source.name)
        else:
            on_skip("empty", f"{file.path}#{row}")


def read_documents(source: SourceConfig, on_skip: Skip = ignore_skips) -> Iterator[Document]:
    """Every document of a source, in the order of `list_files`. InputError when nothing is left."""
    skipped: Counter[str] = Counter()

    def count(reason: str, where: str) -> None:
        skipped[reason] += 1
        on_skip(reason, where)

    found = False
    for file in list_files(source):
        for document in read_file(source, file, count):
            found = True
            yield document
    if not found:
        raise nothing_left(source, skipped)


def nothing_left(source: SourceConfig, dropped: Counter[str]) -> InputError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "no files"
    return InputError(
        f"source {source.name} has no document left ({reasons}).",
        where=source.path,
        do="Check the path, and data.cleaning where documents were dropped.",
    )


def _text_documents(name: str, source: SourceConfig, file: InputFile, on_skip: Skip) -> Iterator[Document]:
    try:
        # A book in one file is many documents, so that some can be held out; a source file stays whole.
        piece = _LONE_TEXT_CHARACTERS if file.alone else formats.MAX_TEXT_DOCUMENT_CHARACTERS
        for row, text in enumerate(formats.read_text(file.path, piece)):
            if text.strip():
                yield Document(f"{name}#{row}" if row else name, text, source.name)
    except formats.NotTextError as error:
        if file.alone:
            raise InputError(
                f"is not text ({error}).", where=file.path, do="Give UTF-8 text, .jsonl or .parquet."
            ) from None
        on_skip("not text", str(file.path))


def _source_root(source: SourceConfig) -> Path:
    scheme, colon, package = source.path.partition(":")
    if colon and scheme == "python":
        return python_sources.package_folder(package)
    return Path(source.path).expanduser()


def _stdlib_inputs(source: SourceConfig) -> list[InputFile]:
    files = [
        _input_file(source, relative, path)
        for relative, path in python_sources.stdlib_files()
        if not source.include or _matches(relative, source.include)
    ]
    interpreter = python_sources.stdlib_folder() / "os.py"
    state = interpreter.stat()
    pages: tuple[tuple[str, FileKind], ...] = ((python_sources.BUILTINS, "builtins"), (python_sources.TOPICS, "topics"))
    for name, kind in pages:
        if not source.include or _matches(name, source.include):
            files.append(InputFile(source.name, name, interpreter, kind, state.st_size, state.st_mtime_ns))
    return sorted(files, key=lambda file: file.relative)


def _input_file(source: SourceConfig, relative: str, path: Path, alone: bool = False) -> InputFile:
    state = path.stat()
    return InputFile(source.name, relative, path, _kind(source, path), state.st_size, state.st_mtime_ns, alone)


def _kind(source: SourceConfig, path: Path) -> FileKind:
    if source.format in ("text", "jsonl", "parquet"):
        return source.format
    suffix = _suffix(path.name)
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    return "parquet" if suffix == ".parquet" else "text"


def _suffix(name: str) -> str:
    stem = name.lower().removesuffix(".gz").removesuffix(".zst")
    return Path(stem).suffix


def _is_wanted(source: SourceConfig, relative: str) -> bool:
    if source.include:
        return _matches(relative, source.include)
    name = relative.rpartition("/")[2]
    suffix = _suffix(name)
    if source.format == "jsonl":
        return suffix in (".jsonl", ".ndjson", ".json")
    if source.format == "parquet":
        return suffix == ".parquet"
    rows = source.format == "auto" and suffix in (".jsonl", ".ndjson", ".parquet")
    return rows or suffix in _TEXT_SUFFIXES or name in _TEXT_NAMES


def _matches(relative: str, patterns: list[str]) -> bool:
    name = relative.rpartition("/")[2]
    return any(fnmatch(name, pattern) or fnmatch(relative, pattern) for pattern in patterns)


def _walk(root: Path) -> Iterator[Path]:
    """Files below `root`, hidden and cache folders left out. A folder reached twice by links is read once."""
    seen: set[tuple[int, int]] = set()
    pending: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(root, ())]
    while pending:
        folder, above = pending.pop()
        try:
            state = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror}).", where=folder, do="Check its permissions.") from None
        identity = (state.st_dev, state.st_ino)
        if identity in above:
            raise InputError(
                "is a symbolic link to a folder that contains it, an endless loop.", where=folder, do="Remove the link."
            )
        if identity in seen:
            continue
        seen.add(identity)
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _SKIPPED_FOLDERS:
                continue
            path = Path(entry.path)
            try:
                if entry.is_dir():
                    pending.append((path, (*above, identity)))
                elif entry.is_file():
                    yield path
                elif entry.is_symlink() and not path.exists():
                    path.resolve(strict=True)
            except (OSError, RuntimeError) as error:
                if isinstance(error, FileNotFoundError):
                    continue  # a dangling link has nothing to read
                raise InputError(
                    "is a symbolic link that leads to itself.", where=path, do="Remove the link."
                ) from None
