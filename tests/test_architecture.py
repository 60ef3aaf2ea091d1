"""The structure of the code: import contracts, one owner per library, and every config key is read."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from mlm.settings import KEYS

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


@pytest.mark.slow
def test_imports_point_one_way():
    """The contracts are in pyproject.toml, one per rule."""
    result = subprocess.run(
        [pathlib.Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("orbax", {"mlm/run/checkpoint.py"}),
        ("jax._src", {"mlm/parallel.py"}),
        ("absl.flags", {"main.py", "mlm/command_line.py"}),
        ("absl.app", {"main.py"}),
        ("ml_collections.config_flags", {"main.py", "mlm/command_line.py"}),
        ("matplotlib", {"mlm/reporting/curves.py"}),
        ("tensorflow", {"mlm/reporting/without_keras.py"}),
        ("torch", {"mlm/models/hf/pretrained.py"}),
    ],
)
def test_only_one_file_imports(package, files):
    assert files_importing(package) == files


def test_the_command_line_imports_nothing_slow():
    code = "import sys, main; print({'jax', 'numpy', 'tensorflow', 'datasets', 'transformers'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_datasets_is_imported_in_the_data_folder_only():
    assert all(file.startswith("mlm/data/") for file in files_importing("datasets"))


def test_config_dicts_are_read_at_the_command_line_only():
    assert files_importing("ml_collections.ConfigDict") == {"mlm/command_line.py"} | {
        file for file in TREES if file.startswith("configs/") and not file.endswith(("__init__.py", "compat.py"))
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


def test_every_key_is_read():
    names = set()
    for file, tree in TREES.items():
        for node in ast.walk(tree) if file.startswith("mlm/") and file != "mlm/settings.py" else ():
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)  # A field that a whole group is passed to.
    # settings.py accepts only one value of the other key.
    assert {key for key in KEYS if key.rpartition(".")[2] not in names} == {"tokenizer.use_fast_tokenizer"}


def test_requirements_list_what_the_code_imports():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split("[=<>]", line)[0] for line in lines if line and not line.startswith("#")}
    distributions = {"absl": "absl-py", "orbax": "orbax-checkpoint", "tensorflow": "tensorflow-cpu"}
    distributions |= {"google": "google-cloud-storage", "sklearn": "scikit-learn"}
    packages = {name.split(".")[0] for tree in TREES.values() for name in imports(tree)}
    # PyTorch is for those who have weights in its own format, and is asked for then.
    packages -= sys.stdlib_module_names | {"mlm", "configs", "torch"}
    # `datasets` needs zstandard for .zst files, and huggingface_hub needs jinja2 for the model card.
    assert {distributions.get(name, name) for name in packages} == required - {"zstandard", "jinja2"}
