"""--mode=explain: prints the meaning of config keys, which is the comment above each in `configs/default.py`."""

import ast
import dataclasses
import difflib
import io
import textwrap
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

from mlm.errors import UserError
from mlm.settings import RunSettings


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A comment of `configs/default.py` and what it explains.

    Attributes:
      keys: full names of keys, such as "optimizer.learning_rate", or of one group.
      text: the comment as one paragraph.
    """

    keys: tuple[str, ...]
    text: str


def read_explanations(source: str) -> list[Explanation]:
    """Returns the comments of a config file's `get_config`, in order.

    A comment explains the group below it, or the keys below it up to the next comment.
    """
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    }
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    prefixes = {"config": ""}
    found: list[Explanation] = []
    for node in function.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
            continue
        assert isinstance(node.targets[0].value, ast.Name)
        key = prefixes[node.targets[0].value.id] + node.targets[0].attr
        is_group = len(node.targets) > 1  # config.data = data = ConfigDict()
        if is_group and isinstance(node.targets[1], ast.Name):
            prefixes[node.targets[1].id] = f"{key}."
        if text := _comment_above(comments, node.lineno):
            found.append(Explanation((key,), text))
        elif not is_group:
            found[-1] = Explanation((*found[-1].keys, key), found[-1].text)
    return found


def _comment_above(comments: Mapping[int, str], line: int) -> str:
    lines: list[str] = []
    while line - 1 in comments:
        line -= 1
        lines.insert(0, comments[line])
    return " ".join(lines)


def run(
    settings: RunSettings | None,
    workdir: None,
    *,
    arguments: Sequence[str],
    defaults: Mapping[str, Any],
    defaults_file: str,
) -> None:
    """Prints what config keys mean, their defaults, and their values in `settings` where they differ.

    Args:
      settings: those of a config; None if none was given.
      workdir: unused.
      arguments: keys or groups of keys; none for all keys.
      defaults: the values of `configs/default.py`, by keys with dots.
      defaults_file: the path of `configs/default.py`, whose comments explain the keys.
    """
    with open(defaults_file, encoding="utf-8") as file:
        source = file.read()
    values = None if settings is None else settings.flat()
    print(explain(arguments, source, defaults=defaults, values=values))


def explain(names: Sequence[str], source: str, *, defaults: Mapping[str, Any], values: Mapping[str, Any] | None) -> str:
    """Returns the meaning and the value of config keys, as text for a terminal.

    Args:
      names: keys or groups of keys, such as "optimizer"; empty for all keys.
      source: the text of `configs/default.py`.
      defaults: its values by full key.
      values: the values of another config by full key, which are shown beside the defaults; None without another one.

    Raises:
      UserError: a name is neither a key nor a group.
    """
    for name in names:
        if not any(_is_in(key, name) for key in defaults):
            groups = {key.rpartition(".")[0] for key in defaults} - {""}
            nearest = difflib.get_close_matches(name, [*defaults, *groups], n=1, cutoff=0.0)[0]
            raise UserError(f"{name}: unknown key; did you mean {nearest}?")
    paragraphs = []
    for explanation in read_explanations(source):
        # A key is shown with the explanation of its group.
        shown = [key for key in explanation.keys if not names or any(_is_in(key, n) or _is_in(n, key) for n in names)]
        if not shown:
            continue
        lines = []
        for key in shown:
            if key not in defaults:
                lines.append(f"{key}.*")
            elif values is None or values[key] == defaults[key]:
                lines.append(f"{key} = {defaults[key]!r}")
            else:
                lines.append(f"{key} = {values[key]!r}   (default: {defaults[key]!r})")
        text = textwrap.fill(explanation.text, width=100, break_on_hyphens=False, break_long_words=False)
        lines.append(textwrap.indent(text, "    "))
        if others := [key for key in explanation.keys if key not in shown]:
            lines.append(f"    (also for {', '.join(others)})")
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def _is_in(key: str, name: str) -> bool:
    """True if `name` is the key or a group that contains it."""
    return key == name or key.startswith(f"{name}.")
