"""The plan of the house, held over the syntax tree: who may import whom, and that every config key is read."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from configs import default
from mlm.workdir import MAY_CHANGE, flatten

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted([ROOT / "main.py", *ROOT.glob("mlm/**/*.py"), *ROOT.glob("configs/*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

# Room -> the rooms it may import. Every room imports only from rows above its own; a new file needs a row here.
ROOMS = {
    "errors": "",
    "models": "errors",
    "masking": "",
    "loss": "",
    "terminal": "",
    "optimizer": "errors",
    "data": "errors",
    "curves": "errors",
    "bucket": "errors",
    "workdir": "bucket errors",
    "parallel": "",
    "checkpoint": "bucket errors",
    "steps": "loss masking models",
    "evaluate": "parallel steps",
    "hub": "data errors",
    "fill_mask": "data errors models",
    "card": "data fill_mask workdir",
    "export": "card curves data fill_mask models workdir",
    "metric_files": "curves workdir",
    "report": "data errors metric_files parallel steps terminal workdir",
    "text": "data errors workdir",
    "warm_start": "data errors models",
    "setup": "data errors export hub fill_mask masking models optimizer steps text warm_start workdir",
    "show_data": "checkpoint data errors masking setup steps text workdir",
    "saved": "bucket card checkpoint curves data errors export fill_mask models setup workdir",
    "interrupt": "terminal",
    "hosts": "errors interrupt",
    "fit": "errors parallel steps",
    "told": "fill_mask setup steps workdir",
    "train": "card checkpoint data errors evaluate export fill_mask fit interrupt models parallel report setup steps "
    "told workdir",
    "benchmark": "curves parallel setup steps train workdir",
    "html_report": "curves errors workdir",
    "explain": "errors",
    "machine": "errors",
    "topology": "errors fit machine steps",
    "preflight": "data errors fit machine masking models report setup show_data steps terminal text topology workdir",
    "main": "benchmark errors explain hosts html_report interrupt machine preflight saved setup show_data train "
    "workdir",
}
# A step is timed on machines that have only these.
STEP_ROOMS = {"models", "masking", "loss", "optimizer", "parallel", "steps"}
STEP_PACKAGES = {"jax", "flax", "optax", "numpy"}


def room_of(file):
    return "main" if file == "main.py" else file.removeprefix("mlm/").removesuffix(".py").split("/")[0]


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


def mlm_rooms(file):
    return {name.split(".")[1] for name in imports(TREES[file]) if name.startswith("mlm.")}


@pytest.mark.parametrize("file", [file for file in TREES if not file.startswith("configs/")])
def test_imports_point_one_way(file):
    if file == "mlm/__init__.py":
        assert list(imports(TREES[file])) == []
        return
    room = room_of(file)
    assert mlm_rooms(file) - {room} <= set(ROOMS[room].split())
    if room in STEP_ROOMS:
        packages = {name.split(".")[0] for name in imports(TREES[file])} - {"mlm"} - sys.stdlib_module_names
        assert packages <= STEP_PACKAGES


def test_the_table_points_one_way_and_has_no_row_too_many():
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= set(order[: order.index(room)])
    imported = {room: set() for room in ROOMS}
    for file in TREES:
        if file != "mlm/__init__.py" and not file.startswith("configs/"):
            imported[room_of(file)] |= mlm_rooms(file) - {room_of(file)}
    assert imported == {room: set(allowed.split()) for room, allowed in ROOMS.items()}


def test_a_step_needs_nothing_but_jax_flax_optax_and_numpy():
    # Flax brings Orbax; the others are those that take seconds or are not there.
    blocked = [
        "tensorflow",
        "tensorboard",
        "clu",
        "datasets",
        "transformers",
        "tokenizers",
        "pyarrow",
        "ml_collections",
    ]
    rooms = ", ".join(f"mlm.{room}" for room in sorted(STEP_ROOMS))
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\nimport {rooms}, mlm.models.weights"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("orbax", {"mlm/checkpoint.py"}),
        ("absl.flags", {"main.py"}),
        ("absl.app", {"main.py"}),
        ("ml_collections.config_flags", {"main.py"}),
        ("matplotlib", {"mlm/curves.py"}),
        ("tensorflow", {"mlm/metric_files.py"}),
        ("torch", {"mlm/warm_start.py"}),
    ],
)
def test_only_one_file_imports(package, files):
    assert files_importing(package) == files


def test_datasets_are_the_data_rooms_own_and_it_knows_no_device():
    data = {file for file in TREES if file.startswith("mlm/data/")}
    assert files_importing("datasets") <= data
    for package in ("jax", "flax", "optax", "clu", "orbax"):
        assert not files_importing(package) & data


def test_config_dicts_stop_at_train_setup_text_and_show_data():
    assert {file for file in files_importing("ml_collections") if file.startswith("mlm/")} == {
        "mlm/benchmark.py",
        "mlm/card.py",
        "mlm/preflight.py",
        "mlm/saved.py",
        "mlm/setup.py",
        "mlm/show_data.py",
        "mlm/text.py",
        "mlm/told.py",
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


@pytest.mark.parametrize("folder", ["mlm", "configs", "benchmarks", "."])
def test_no_file_passes_400_lines(folder):
    glob = "*.py" if folder == "." else "**/*.py"
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).glob(glob)}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


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
    for prefix in MAY_CHANGE:
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
