"""`eval`: the labeled tasks and the minimal pairs that are measured at every evaluation."""

import dataclasses
import re
from typing import Any

from mlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """`eval`: pairs (name, file); the metrics are probe/<name>/accuracy and pairs/<name>/accuracy."""

    probes: tuple[tuple[str, str], ...]
    pairs: tuple[tuple[str, str], ...]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _named_files(f"eval.{field.name}", getattr(self, field.name)))


def _named_files(key: str, value: Any) -> tuple[tuple[str, str], ...]:
    """Returns pairs (name, file) as tuples. Raises UserError if they are something else."""
    is_list = isinstance(value, list | tuple)
    if not is_list or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)
        for pair in value
    ):
        raise UserError(f"{key}={value!r}: must be pairs of a name and a file, such as (('topics', 'topics.jsonl'),)")
    names = [name for name, _ in value]
    for name in names:
        # Names become parts of metric names, which have slashes, and cells of tables in model cards.
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{key}={value!r}: the name {name!r} may have letters, digits and _.- only; rename it")
        if names.count(name) > 1:
            raise UserError(f"{key}={value!r}: the name {name!r} is used twice; rename one")
    return tuple((name, file) for name, file in value)
