"""The built-in dataset: docstrings of the standard library and of the installed Python packages.

It is tens of megabytes of English and needs no network. A shard is a package, or a part of a large one. Shards are
sorted by a hash of their names: the first documents then come from a mixture of packages and not from those whose names
begin with "a".
"""

import ast
import contextlib
import dataclasses
import functools
import gc
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator

import pyarrow as pa

# Shorter docstrings, such as "Returns self.", are mostly repetitions.
_MIN_CHARACTERS = 40
# Few files, so that a shuffle window covers many packages.
_FILES_PER_SHARD = 8
# Docstrings of tests repeat the names of the tests; the other folders contain copies or no source code.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "idlelib", "lib2to3", "__pycache__", "node_modules"})
# Parsing a generated file of many megabytes would take minutes.
_MAX_FILE_BYTES = 1 << 20
# The text of this many files is a few megabytes.
_CACHED_FILES = 2048
# The file name in the parser's warnings.
_PARSER_FILENAME = "<docstrings>"
_NODES_WITH_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Statements such as `if` and `try` may contain definitions: node type -> fields with statements, the last one first.
_NODES: list[type[ast.AST]] = [ast.Module, ast.ExceptHandler, ast.match_case, *ast.stmt.__subclasses__()]
_BLOCKS = {
    kind: tuple(field for field in ("finalbody", "orelse", "handlers", "cases", "body") if field in kind._fields)
    for kind in _NODES
    if {"body", "cases"}.intersection(kind._fields)
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """Source files of one package, sorted by path."""

    name: str
    paths: tuple[str, ...]


def find_shards(roots: tuple[str, ...] | None = None) -> list[Shard]:
    """Returns the shards of all packages in the folders `roots` (default: the standard library and site-packages)."""
    if roots is None:
        paths = sysconfig.get_paths()
        roots = tuple(dict.fromkeys(os.path.realpath(paths[k]) for k in ("stdlib", "purelib", "platlib")))
    shards = []
    for root in roots:
        # A root may be inside another one: site-packages is in the standard library's folder.
        inner = {other for other in roots if other != root}
        packages: dict[str, list[str]] = {}
        for name in sorted(os.listdir(root)) if os.path.isdir(root) else ():
            path = os.path.join(root, name)
            # All modules that are single files form one package.
            package = name if os.path.isdir(path) else f"{os.path.basename(root)}/*.py"
            packages.setdefault(package, []).extend(_python_files(path, inner))
        for package, files in packages.items():
            for part, start in enumerate(range(0, len(files), _FILES_PER_SHARD)):
                shards.append(Shard(f"{package}[{part}]", tuple(files[start : start + _FILES_PER_SHARD])))
    return sorted(shards, key=lambda shard: (hashlib.sha256(shard.name.encode()).digest(), shard.name))


def _python_files(path: str, inner: set[str]) -> list[str]:
    if os.path.isfile(path):
        return [path] if path.endswith(".py") else []
    files = []
    for folder, folders, names in os.walk(path):
        if folder in inner or os.path.basename(folder) == "site-packages":
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS)
        files += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
    return files if os.path.basename(path) not in _SKIPPED_FOLDERS else []


def read_shard(shard: Shard) -> Iterator[pa.Array]:
    """Yields the docstrings of a shard, one array per file."""
    for path in shard.paths:
        yield _read_file(path)


# Some documents are read three times at the start of a run: to train the tokenizer, for the evaluation set and for the
# first shuffle window.
@functools.lru_cache(maxsize=_CACHED_FILES)
def _read_file(path: str) -> pa.Array:
    return pa.array(read_docstrings(path), pa.large_string())


def read_docstrings(path: str) -> list[str]:
    """Returns the docstrings of a source file from top to bottom, or an empty list if it cannot be parsed."""
    try:
        with open(path, "rb") as file:
            code = file.read(_MAX_FILE_BYTES + 1)
        if len(code) > _MAX_FILE_BYTES:
            return []
        # Other people's code has invalid escapes in strings. `catch_warnings` would not be thread-safe.
        warnings.filterwarnings("ignore", module=_PARSER_FILENAME)
        with _garbage_collection_disabled():
            return _find_docstrings(ast.parse(code, filename=_PARSER_FILENAME))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


@contextlib.contextmanager
def _garbage_collection_disabled() -> Iterator[None]:
    """A syntax tree has many objects and no cycles: collections while it exists would take half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _find_docstrings(module: ast.Module) -> list[str]:
    docstrings = []
    nodes: list[ast.AST] = [module]
    while nodes:
        node = nodes.pop()
        if isinstance(node, _NODES_WITH_DOCSTRINGS):
            text = _docstring(node)
            if len(text) >= _MIN_CHARACTERS:
                docstrings.append(text)
        for field in _BLOCKS[type(node)]:
            nodes.extend(child for child in reversed(getattr(node, field)) if type(child) in _BLOCKS)
    return docstrings


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    first = node.body[0] if node.body else None
    if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
        return ""
    text = first.value.value
    if not isinstance(text, str):
        return ""
    # "\\ud800" in the source is a lone surrogate, which UTF-8 cannot encode.
    return inspect.cleandoc(text.encode("utf-8", "ignore").decode("utf-8")).strip()
