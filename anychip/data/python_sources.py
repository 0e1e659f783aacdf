"""Text that is on any machine with Python: the standard library, its documentation, installed packages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.machinery import BuiltinImporter, ExtensionFileLoader
from pathlib import Path

from anychip.errors import InputError

# Test suites, tables and bundled archives teach a model little and would fill a third of the corpus.
_SKIPPED_FOLDERS = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "_bundled", "lib2to3", "lib-dynload",
}  # fmt: skip
_SKIPPED_FILES = ("encodings/cp*", "encodings/iso*", "encodings/mac_*", "encodings/koi8*", "encodings/*jis*",
                  "encodings/kz*", "encodings/ptcp*", "encodings/tis*", "encodings/gb*", "encodings/euc*",
                  "encodings/hp*", "encodings/big5*", "pydoc_data/topics.py", "config-*", "__phello__*",
                  "_sysconfigdata*")  # fmt: skip
# Extension modules whose documentation is already in the sources of a pure Python twin, and modules that act on import.
_SKIPPED_MODULES = {
    "_bisect", "_collections_abc", "_csv", "_curses", "_curses_panel", "_datetime", "_decimal", "_elementtree",
    "_heapq", "_io", "_json", "_operator", "_pickle", "_tkinter", "_warnings", "_zoneinfo", "readline",
}  # fmt: skip

# A class documented at less length than this stands on its module's page.
_OWN_PAGE_CHARACTERS = 800

BUILTINS = "builtin-objects"
TOPICS = "language-topics"


def stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files() -> list[tuple[str, Path]]:
    """(relative path, path) of the standard library's own sources, sorted."""
    root = stdlib_folder()
    found = []
    for path in _walk_python(root):
        relative = path.relative_to(root).as_posix()
        if not any(fnmatch(relative, pattern) for pattern in _SKIPPED_FILES):
            found.append((relative, path))
    return sorted(found)


def package_folder(name: str) -> Path:
    """The folder (or single file) of an installed package, found without importing it."""
    if not name.replace("_", "a").replace(".", "a").isidentifier():
        raise InputError(f"python:{name} does not name a package.", do="Write python:stdlib or python:PACKAGE.")
    try:
        spec = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin in (None, "built-in", "frozen"):
        locations = list(spec.submodule_search_locations or []) if spec else []
        if not locations:
            raise InputError(f"python:{name}: no installed package of this name has sources.", do="Install it first.")
        root = Path(locations[0])
    else:
        origin = Path(str(spec.origin))
        root = origin.parent if origin.name == "__init__.py" else origin
    return root.joinpath(*name.split(".")[1:])


def _walk_python(root: Path) -> Iterator[Path]:
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if entry.name not in _SKIPPED_FOLDERS:
                yield from _walk_python(entry)
        elif entry.suffix == ".py" and entry.is_file():
            yield entry


def language_topics() -> Iterator[tuple[str, str]]:
    """(name, text) of the language reference that `help()` shows, read from pydoc's table without running it."""
    path = stdlib_folder() / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield str(name), inspect.cleandoc(str(text))


def extension_modules() -> Iterator[types.ModuleType]:
    """The standard library's modules written in C, which have no source to read."""
    for name in sorted(sys.stdlib_module_names):
        if name in _SKIPPED_MODULES or name.startswith(("_test", "_xx", "xx", "_ctypes_test")):
            continue
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is None or not (spec.loader is BuiltinImporter or isinstance(spec.loader, ExtensionFileLoader)):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                module = importlib.import_module(name)
        except Exception:  # a module that this build cannot load is simply not documented
            continue
        yield module


def documented_members(owner: object, prefix: str) -> Iterator[tuple[str, object, str]]:
    """(qualified name, object, documentation) of the public callables and classes of a C module or class."""
    for name, member in sorted(vars(owner).items()):
        if name.startswith("_") or isinstance(member, types.ModuleType):
            continue
        text = getattr(member, "__doc__", None)
        if isinstance(text, str) and text.strip() and (callable(member) or inspect.isdatadescriptor(member)):
            yield f"{prefix}.{name}" if prefix else name, member, inspect.cleandoc(text)


def builtin_pages() -> Iterator[tuple[str, str]]:
    """(name, text) of one page per C module and per built-in class, in the style of `help()`."""
    for module in extension_modules():
        prefix = "" if module.__name__ == "builtins" else module.__name__
        heading = f"Documentation of the Python module {module.__name__}\n\n"
        page = [heading + inspect.cleandoc(module.__doc__ or "")]
        classes = []
        for name, member, text in documented_members(module, prefix):
            if not isinstance(member, type):
                page.append(_entry(name, member, text))
            elif member.__module__ == module.__name__ and member.__name__ == name.rpartition(".")[2]:
                entries = [_entry(name, member, text)]
                entries += [_entry(*method) for method in documented_members(member, name)]
                classes.append((name, "\n\n".join(entries)))
        for name, entry in classes:
            if len(entry) < _OWN_PAGE_CHARACTERS:
                page.append(entry)
            else:
                yield f"class {name}", f"Documentation of the Python class {name}\n\n{entry}\n"
        if len(page) > 1:
            yield module.__name__, "\n\n".join(page) + "\n"


def _entry(name: str, member: object, text: str) -> str:
    try:
        signature = str(inspect.signature(member)) if callable(member) else ""
    except (ValueError, TypeError):
        signature = ""
    body = "\n".join("    " + line if line else "" for line in text.splitlines())
    return f"{name}{signature}\n{body}"
