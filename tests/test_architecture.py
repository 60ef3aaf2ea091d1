"""The structure of the code: import contracts, one owner per library, and every config key is read."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from configs import default
from mlm.run.workdir import MUTABLE_KEYS, flatten

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted([ROOT / "main.py", *ROOT.glob("mlm/**/*.py"), *ROOT.glob("configs/*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imports(tree):
    """Full names of what is imported: "mlm.data.stream", "absl.flags"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_importing(name):
    return {file for file, tree in TREES.items() if any(f"{i}.".startswith(f"{name}.") for i in imports(tree))}


def test_imports_point_one_way():
    """The contracts are in pyproject.toml, one per rule."""
    result = subprocess.run(["lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("orbax", {"mlm/run/checkpoint.py"}),
        ("absl.flags", {"main.py"}),
        ("absl.app", {"main.py"}),
        ("ml_collections.config_flags", {"main.py"}),
        ("matplotlib", {"mlm/reporting/curves.py"}),
        ("tensorflow", {"mlm/reporting/writers.py"}),
        ("torch", {"mlm/models/hf/pretrained.py"}),
    ],
)
def test_only_one_file_imports(package, files):
    assert files_importing(package) == files


def test_datasets_is_imported_in_the_data_folder_only():
    assert all(file.startswith("mlm/data/") for file in files_importing("datasets"))


def test_config_dicts_stop_at_train_setup_text_and_show_data():
    assert {file for file in files_importing("ml_collections") if file.startswith("mlm/")} == {
        "mlm/modes/benchmark.py",
        "mlm/export/model_card.py",
        "mlm/modes/check.py",
        "mlm/load.py",
        "mlm/build.py",
        "mlm/modes/show_data.py",
        "mlm/data/pipeline.py",
        "mlm/reporting/summary.py",
        "mlm/train.py",
    }


def test_pmap_is_in_parallel_alone():
    def uses(tree):
        return any(
            (isinstance(node, ast.Attribute) and node.attr in ("pmap", "shard_map"))
            or (isinstance(node, ast.alias) and node.name in ("pmap", "shard_map"))
            for node in ast.walk(tree)
        )

    assert {file for file, tree in TREES.items() if uses(tree)} == {"mlm/parallel.py"}


def test_no_key_has_a_default_outside_the_defaults():
    pattern = re.compile(r"\bconfig(\.\w+)*\.get\(")
    assert [path.name for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))] == []


def chain(node):
    """config.data.split -> ["config", "data", "split"]; a closing .to_dict() counts for nothing."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to_dict":
        node = node.func.value
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None


def keys_read(function):
    """Paths read from the argument `config` of a function: keys, and groups that are handed on whole."""
    known = {"config": ()}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and (names := chain(node.value)) and names[0] in known:
            known[node.targets[0].id] = (*known[names[0]], *names[1:])
    inner = {id(node.value) for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner:
            names = chain(node)
            if names and names[0] in known and not isinstance(node.ctx, ast.Store):
                path = (*known[names[0]], *(name for name in names[1:] if name not in ("to_dict", "pop")))
                yield ".".join(path)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "pop":
            names = chain(node.func.value)
            if names and names[0] in known:
                yield ".".join((*known[names[0]], *names[1:], node.args[0].value))


def test_every_key_is_read_and_every_key_read_is_there():
    keys = set(flatten(default.get_config().to_dict()))
    groups = {key.rpartition(".")[0] for key in keys}
    read = set()
    for tree in TREES.values():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and any(
                arg.arg == "config" and arg.annotation is not None and ast.unparse(arg.annotation) == "ConfigDict"
                for arg in function.args.args
            ):
                read |= set(keys_read(function))
    assert read - keys - groups == set()

    # What is handed on whole, f(**config.group) or f(config.group), is read by a parameter, field or string.
    names = set()
    for file, tree in TREES.items():
        for node in ast.walk(tree) if file.startswith("mlm/") else ():
            if isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                names.add(node.slice.value)
    handed_on = {key for key in keys if key.rpartition(".")[0] in read - {""} and key.rpartition(".")[2] in names}
    assert keys - read - handed_on == set()


def test_keys_that_may_change_are_keys():
    keys = flatten(default.get_config().to_dict())
    for prefix in MUTABLE_KEYS:
        assert any(key == prefix or (prefix.endswith(".") and key.startswith(prefix)) for key in keys), prefix


def test_requirements_list_what_the_code_imports():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split("[=<>]", line)[0] for line in lines if line and not line.startswith("#")}
    distributions = {"absl": "absl-py", "orbax": "orbax-checkpoint", "tensorflow": "tensorflow-cpu"}
    distributions["google"] = "google-cloud-storage"
    packages = {name.split(".")[0] for tree in TREES.values() for name in imports(tree)}
    # PyTorch is for those who have weights in its own format, and is asked for then.
    packages -= sys.stdlib_module_names | {"mlm", "configs", "torch"}
    # Needed by `datasets` for .zst files.
    assert {distributions.get(name, name) for name in packages} == required - {"zstandard"}
