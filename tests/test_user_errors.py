"""Every user error is one line and exit code 2, and nothing is written.

`user_errors.py` has the tables. A new `raise UserError(...)` needs a row there, which a test here checks.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mlm.errors import UserError
from mlm.run.workdir import WorkDir
from mlm.train import train_and_evaluate
from tests import test_settings, test_stages, user_errors
from tests.tiny import settings_of, tiny_config, write_corpus

REPO = Path(__file__).parent.parent


def save_words(folder: Path, *, ids: dict[str, int], **special: str) -> None:
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory of invalid files."""
    world = tmp_path_factory.mktemp("world")
    (world / "data" / "folder").mkdir(parents=True)
    write_corpus(world / "data")
    for name, content in {
        "notes.odt": "x",
        "table.parquet.gz": "x",
        "not.parquet": "this is no parquet",
        "broken.jsonl": '{"text": "a"}\n{"text": \n',
        "numbers.jsonl": '{"text": 7}\n',
        "empty.txt": "",
        "blank.txt": "\n\n  \n",
        "short.txt": "Only this.\n",
    }.items():
        (world / "data" / name).write_text(content)

    ids = {name: i for i, name in enumerate(("<s>", "</s>", "<pad>", "<unk>", "<mask>"))}
    begin_and_end = {"bos_token": "<s>", "eos_token": "</s>"}
    save_words(world / "tokenizers" / "no_mask", ids=ids, pad_token="<pad>", **begin_and_end)
    save_words(world / "tokenizers" / "no_end", ids=ids, pad_token="<pad>", mask_token="<mask>", bos_token="<s>")
    save_words(world / "tokenizers" / "one_for_all", ids=ids, pad_token="</s>", mask_token="<mask>", **begin_and_end)
    save_words(world / "tokenizers" / "words", ids=ids, pad_token="<pad>", mask_token="<mask>", **begin_and_end)

    tiny = {"model_type": "roberta", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 20}
    for name, config in {
        "garbled": "{",
        "no_type": {"vocab_size": 300},
        "decoder": {**tiny, "is_decoder": True},
        "unknown_field": {**tiny, "moe_experts": 4},
        **dict.fromkeys(("ids_only", "bad_weights", "other_weights", "pytorch", "bad_index", "lost_shard"), tiny),
    }.items():
        (world / "models" / name).mkdir(parents=True)
        (world / "models" / name / "config.json").write_text(config if name == "garbled" else json.dumps(config))
    safetensors.numpy.save_file(
        {"roberta.embeddings.word_embeddings.weight": np.zeros((7, 7), np.float32)},
        world / "models" / "other_weights" / "model.safetensors",
    )
    (world / "models" / "bad_weights" / "model.safetensors").write_text("no tensors")
    (world / "models" / "pytorch" / "pytorch_model.bin").write_text("no tensors")
    (world / "models" / "bad_index" / "model.safetensors.index.json").write_text("[]")
    shards = {"weight_map": {"a": "model-1-of-2.safetensors"}}
    (world / "models" / "lost_shard" / "model.safetensors.index.json").write_text(json.dumps(shards))

    (world / "models" / "damaged").mkdir()
    (world / "models" / "damaged" / "config.json").write_text("{")
    (world / "models" / "damaged" / "model.safetensors").write_text("")
    (world / "tokenizers" / "damaged").mkdir()
    (world / "tokenizers" / "damaged" / "tokenizer.json").write_text("{")

    start = "from configs import default\n\n\ndef get_config():\n    config = default.get_config()\n"
    (world / "broken.py").write_text("def get_config(:\n")
    (world / "typo.py").write_text(start + "    config.optimizer.learning_rat = 1.0\n    return config\n")
    (world / "wrong_type.py").write_text(start + "    config.num_train_steps = 'ten'\n    return config\n")
    (world / "no_function.py").write_text("config = {}\n")
    (world / "dict.py").write_text("def get_config():\n    return {'seed': 1}\n")
    (world / "bare.py").write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'seed': 1})\n"
    )

    for name in ("started", "logged", "garbled", "old_value"):
        WorkDir(str(world / name)).create(
            settings_of(tiny_config(str(world / "data" / "part-*.jsonl"))),
            save_tokenizer=lambda path: Path(path).mkdir(),
            processes=1,
            rows_per_process=4,
            step=0,
        )
    (world / "logged" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    (world / "garbled" / "metrics.jsonl").write_text('garbage\n{"step": 1}\n')
    stored = (world / "old_value" / "config.json").read_text()
    (world / "old_value" / "config.json").write_text(stored.replace('"concatenate"', '"tight"'))
    (world / "no_config" / "checkpoints" / "4").mkdir(parents=True)
    (world / "not_a_run").mkdir()
    (world / "not_a_run" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (world / "file").write_text("")
    return world


# Runs main.py with each list of flags in forks of one process: importing it takes a second, and its flags are global.
RUNNER = """
import json, os, sys, tempfile
import main
results = []
for flags in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as stderr:
        if (child := os.fork()) == 0:
            os.dup2(stderr.fileno(), 2)
            sys.argv = ["main.py", *flags]
            main.command_line.run(lambda: main.app.run(main.main, flags_parser=main.parse_flags))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stderr.seek(0)
        results.append([code, stderr.read()])
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def results(world) -> list[tuple[int, str]]:
    """(exit code, stderr) of main.py for each row of COMMAND_LINE."""
    flags = [[flag.replace("{world}", str(world)) for flag in row] for row, _ in user_errors.COMMAND_LINE]
    command = [sys.executable, "-c", RUNNER]
    done = subprocess.run(command, cwd=REPO, input=json.dumps(flags), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def matches(message: str, expected: str, world: Path) -> bool:
    """Returns whether they are equal; "..." stands for any text."""
    pattern = ".+".join(re.escape(part) for part in expected.replace("{world}", str(world)).split("..."))
    return re.fullmatch(pattern, message) is not None


@pytest.mark.parametrize(
    ("row", "message"),
    [pytest.param(i, message, id=" ".join(flags)) for i, (flags, message) in enumerate(user_errors.COMMAND_LINE)],
)
def test_command_line(results, world, row, message):
    code, stderr = results[row]
    assert code == 2, stderr
    assert stderr.count("\n") == 1
    assert matches(stderr.rstrip("\n"), f"error: {message}", world), stderr
    assert not (world / "x").exists()


def files_of(world: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in world.rglob("*") if path.is_file() and path.name != ".lock"}


def check_error(action, message: str, world: Path) -> None:
    """Checks that `action` raises exactly this error, on one line, and changes no file."""
    before = files_of(world)
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    assert matches(str(error.value), message, world), str(error.value)
    assert files_of(world) == before


def config_of(world: Path, keys: dict) -> ConfigDict:
    def fill_in(value):
        if isinstance(value, list | tuple):
            return type(value)(fill_in(part) for part in value)
        return value.replace("{world}", str(world)) if isinstance(value, str) else value

    config = tiny_config(str(world / "data" / "part-*.jsonl"))
    config.update_from_flattened_dict({key: fill_in(value) for key, value in keys.items()})
    return config


@pytest.mark.parametrize(
    ("keys", "message"), [pytest.param(*row, id=f"{i}-{','.join(row[0])}") for i, row in enumerate(user_errors.VALUES)]
)
def test_values_and_files(world, monkeypatch, keys, message):
    monkeypatch.setenv("HF_HOME", str(world / "data"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    settings = settings_of(config_of(world, keys))
    check_error(lambda: train_and_evaluate(settings, str(world / "run")), message, world)


@pytest.mark.parametrize(("call", "message"), [pytest.param(*row, id=row[0].__name__) for row in user_errors.CALLS])
def test_modes_and_work_directories(world, call, message):
    check_error(lambda: call(config_of(world, {}), world), message, world)


# Messages of mlm/settings.py begin with the key and the value, see its function `_error`.
TABLES = (user_errors.COMMAND_LINE, user_errors.VALUES, user_errors.CALLS, test_settings.WRONG, test_stages.WRONG)
MESSAGES = [message for table in TABLES for _, message in table]


def test_every_message_names_a_subject_and_then_the_problem():
    assert len(MESSAGES) >= 200
    assert [message for message in MESSAGES if not re.match(r"[^;]+: \S", message)] == []


def raised() -> dict[str, list[str]]:
    """file -> the messages of its `UserError(...)`, with "\0" for values."""
    found = {}
    for path in [REPO / "main.py", *sorted((REPO / "mlm").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                parts = getattr(node.args[0], "values", [node.args[0]])
                text = "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in parts)
                found.setdefault(path.relative_to(REPO).as_posix(), []).append(text)
    return found


@pytest.mark.slow
def test_every_error_is_in_the_tables_or_in_another_test():
    assert sum(map(len, raised().values())) >= 100
    unused = {file: dict(texts) for file, texts in user_errors.ELSEWHERE.items()}
    missing = []
    for file, texts in raised().items():
        for text in texts:
            shown = text.replace("\0", "{}")
            if shown in user_errors.ELSEWHERE.get(file, {}):
                unused[file].pop(shown, None)
                continue
            # A message of few fixed words matches too much to be checked.
            pattern = re.compile(".*".join(re.escape(part) for part in text.split("\0")), re.DOTALL)
            if len(text.replace("\0", "")) < 12 or not any(pattern.fullmatch(message) for message in MESSAGES):
                missing.append(f"{file}: {shown}")
    assert missing == [], "an error without a row in tests/user_errors.py"
    assert {file: texts for file, texts in unused.items() if texts} == {}, "ELSEWHERE names errors that do not exist"


@pytest.mark.parametrize("test", sorted({test for texts in user_errors.ELSEWHERE.values() for test in texts.values()}))
def test_tests_of_other_errors_exist(test):
    file, name = test.split("::")
    tree = ast.parse((REPO / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def texts_in_the_code() -> list[str]:
    """Returns every string of main.py and mlm/, with "{}" for what is filled in."""
    texts = []
    for path in [REPO / "main.py", *sorted((REPO / "mlm").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


@pytest.mark.slow
def test_the_page_on_troubleshooting_quotes_messages_of_the_code():
    page = (REPO / "docs" / "troubleshooting.md").read_text()
    entries = re.findall(r"^\*\*(.+?)\*\*:", page, flags=re.MULTILINE)
    quotes = [quote for entry in entries for quote in re.findall(r"`(\.\.\. [^`]+|[^`]+\.\.\.[^`]*)`", entry)]
    assert len(quotes) > 10
    texts = texts_in_the_code()
    patterns = {quote: ".*".join(re.escape(part.strip()) for part in quote.split("...")) for quote in quotes}
    assert [quote for quote in quotes if not any(re.search(patterns[quote], text) for text in texts)] == []
