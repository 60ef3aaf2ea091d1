"""Words that this project used once, and that no paper or library uses, do not return in names, messages or pages."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PHRASES = (
    "told, anew, goes on, go on from, mend, mends, mended, dealt, deal anew, set aside, will not do, that cannot be, "
    "in vain, whole form, in the dress of"
).split(", ")
# Words of a phrase may be apart by a line break, with the mark of a comment at the start of the next line.
PATTERN = re.compile(r"\b(" + "|".join(PHRASES).replace(" ", r"[ \n#]+") + r")\b", re.IGNORECASE)
SCANNED = re.compile(r".*\.(py|md|sh|html|toml)|\.ci/run|(tests/)?requirements\.txt|tests/fakes/.*")


def findings(text: str) -> list[tuple[int, str]]:
    """Returns the line and the words of each phrase in a text; identifiers such as `was_told` are split into words."""
    # Every replacement keeps the number of lines.
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).replace("_", " ")
    return [
        (words.count("\n", 0, match.start()) + 1, " ".join(match[0].replace("#", " ").split()))
        for match in PATTERN.finditer(words)
    ]


def test_no_phrase_of_the_list_is_used():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    scanned = [file for file in files if SCANNED.fullmatch(file) and file != "tests/test_glossary.py"]
    assert {"README.md", "main.py", "mlm/modes/report.html", "launch/tpu_vm.sh", ".ci/run"} <= {*scanned}
    found = [
        f"{file}:{line}: {phrase}"
        for file in scanned
        if (ROOT / file).exists()
        for line, phrase in findings((ROOT / file).read_text())
    ]
    assert not found, f"{len(found)} phrases to replace by plain English:\n" + "\n".join(found)


def test_phrases_are_found_in_identifiers_and_across_lines_and_not_within_words():
    assert findings("x = was_told(1)\nclass WasTold: ...") == [(1, "told"), (2, "Told")]
    assert findings("# It is Set\n    # aside.") == [(1, "Set aside")]
    assert findings("deal_anew()") == [(1, "deal anew")]
    assert findings("amend recommended whole_word apply_updates set aside_from") == [(1, "set aside")]
