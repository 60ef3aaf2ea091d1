"""--mode=explain: what a config key means, told by the comments of `configs/default.py`."""

import ast
import dataclasses
import difflib
import io
import textwrap
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

from mlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Of some keys at once: those that stand together under a comment.

    Attributes:
      keys: full names, such as "optimizer.learning_rate".
      text: the comment, one paragraph.
    """

    keys: tuple[str, ...]
    text: str


def read_explanations(source: str) -> list[Explanation]:
    """The comments of a config file's `get_config`, in its order.

    A comment explains the keys that follow it up to the next comment or empty line. Keys of a group that have none of
    their own have the group's.
    """
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    }
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    prefixes = {"config": ""}
    texts = {"config": ""}
    found: list[Explanation] = []
    end, text = 0, ""
    for node in function.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
            continue
        owner, name = node.targets[0].value.id, node.targets[0].attr
        key = prefixes[owner] + name
        above = _comment_above(comments, node.lineno)
        is_next = node.lineno == end + 1
        end = node.end_lineno
        if len(node.targets) > 1:  # config.data = data = ConfigDict()
            prefixes[node.targets[1].id], texts[node.targets[1].id] = f"{key}.", above
            text = ""
        elif above or not is_next or not found or not text:
            text = above or texts[owner]
            found.append(Explanation((key,), text))
        else:
            found[-1] = Explanation((*found[-1].keys, key), text)
    return found


def _comment_above(comments: Mapping[int, str], line: int) -> str:
    lines: list[str] = []
    while line - 1 in comments:
        line -= 1
        lines.insert(0, comments[line])
    return " ".join(lines)


def explain(
    names: Sequence[str], source: str, *, defaults: Mapping[str, Any], values: Mapping[str, Any] | None, config: str
) -> str:
    """What keys mean, and what they are.

    Args:
      names: keys, or groups of them, such as "optimizer"; none for all keys.
      source: of `configs/default.py`.
      defaults: key -> value there, flat.
      values: key -> value of another config, flat; None when there is none.
      config: what that one is called.

    Raises:
      UserError: there is no such key.
    """
    explanations = read_explanations(source)
    for name in names:
        if not any(_is_named(key, name) for key in defaults):
            groups = {key.rpartition(".")[0] for key in defaults} - {""}
            nearest = difflib.get_close_matches(name, [*defaults, *groups], n=1, cutoff=0.0)[0]
            raise UserError(f"{name}: there is no such key; did you mean {nearest}?")
    parts = []
    for explanation in explanations:
        chosen = [key for key in explanation.keys if not names or any(_is_named(key, name) for name in names)]
        if not chosen:
            continue
        lines = []
        for key in chosen:
            line = f"{key} = {defaults[key]!r}"
            if values is not None and values[key] != defaults[key]:
                line += f"   ({values[key]!r} in {config})"
            lines.append(line)
        lines.append(textwrap.indent(textwrap.fill(explanation.text, width=100), "    "))
        if others := [key for key in explanation.keys if key not in chosen]:
            lines.append(f"    (said of {', '.join(others)}, too)")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _is_named(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")
