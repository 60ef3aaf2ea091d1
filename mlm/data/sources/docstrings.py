"""The embedded data set: the docstrings of the Python packages installed beside the interpreter.

Tens of megabytes of English that need no network. A shard is a package (a large one: a part of it); shards
stand in the order of a hash of their names, so that the head of the source, which is held out and trains the
tokenizer, is a mixture and not what begins with "a".
"""

import ast
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

# Shorter docstrings ("Returns self.") say little, and many times.
_MIN_CHARACTERS = 40
# A package of more files than this is several shards: few, so that a shuffle window holds many packages.
_FILES_PER_SHARD = 8
# Docstrings of tests restate their names; the others are not the packages' own text.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "idlelib", "lib2to3", "__pycache__", "node_modules"})
# Generated or hostile files of many megabytes would stall a shard.
_MAX_FILE_BYTES = 1 << 20
# A few megabytes of text.
_REMEMBERED_FILES = 2048
_PARSED_AS = "<docstrings>"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some source files of one package, in order of path."""

    name: str
    paths: tuple[str, ...]


def find_shards(roots: tuple[str, ...] | None = None) -> list[Shard]:
    """The shards of the packages under `roots` (default: the standard library and site-packages)."""
    if roots is None:
        paths = sysconfig.get_paths()
        roots = tuple(dict.fromkeys(os.path.realpath(paths[k]) for k in ("stdlib", "purelib", "platlib")))
    shards = []
    for root in roots:
        # One root may lie inside another: site-packages in the standard library's folder.
        inner = {other for other in roots if other != root}
        packages: dict[str, list[str]] = {}
        for name in sorted(os.listdir(root)) if os.path.isdir(root) else ():
            path = os.path.join(root, name)
            # Modules that are a single file make one package of their own.
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
    """The docstrings of a shard, a file at a time."""
    for path in shard.paths:
        yield _read_file(path)


# The head of the source is read three times at the start of a run: for the tokenizer, for the evaluation rows
# and for the first window.
@functools.lru_cache(maxsize=_REMEMBERED_FILES)
def _read_file(path: str) -> pa.Array:
    return pa.array(read_docstrings(path), pa.large_string())


def read_docstrings(path: str) -> list[str]:
    """The docstrings of a source file from top to bottom; none of a file that does not parse."""
    try:
        with open(path, "rb") as file:
            code = file.read(_MAX_FILE_BYTES + 1)
        if len(code) > _MAX_FILE_BYTES:
            return []
        module = _parse(code)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    docstrings = []
    nodes: list[ast.AST] = [module]
    while nodes:
        node = nodes.pop()
        if isinstance(node, _DOCUMENTED):
            text = _docstring(node)
            if len(text) >= _MIN_CHARACTERS:
                docstrings.append(text)
        # Definitions hide in the bodies of statements (`if`, `try`), never in expressions.
        for field in ("finalbody", "orelse", "handlers", "cases", "body"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                nodes.extend(reversed(children))
    return docstrings


def _parse(code: bytes) -> ast.Module:
    """`ast.parse`, silent, and in half the time: all its nodes set off garbage collections for nothing."""
    # Of invalid escapes in other people's strings. A lasting filter by name, for `catch_warnings` is not safe
    # in a thread.
    warnings.filterwarnings("ignore", module=_PARSED_AS)
    collecting = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(code, filename=_PARSED_AS)
    finally:
        if collecting:
            gc.enable()


def _docstring(node: ast.AST) -> str:
    first = node.body[0] if node.body else None
    if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
        return ""
    text = first.value.value
    if not isinstance(text, str):
        return ""
    # A lone surrogate ("\\ud800" in the source) is no text.
    return inspect.cleandoc(text.encode("utf-8", "ignore").decode("utf-8")).strip()
