"""The stages of a run (`config.stages`): which settings hold in which steps. Imports no jax.

A stage is a dict with a name, a number of steps and new values for some keys, which hold from its first step on. A run
without stages is one stage. A *boundary* is the number of steps done when a stage ends; it counts calls of
`train_step`, skipped ones included.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlm.errors import UserError
from mlm.settings import (
    KEYS,
    MUTABLE_KEYS,
    Boundaries,
    DataSettings,
    RunSettings,
    check_key,
    num_tokens,
    resolve_boundaries,
)

# Keys of a schedule, and their values where a stage sets optimizer.schedule without them.
SCHEDULE_KEYS = {
    "optimizer.warmup_steps": 0,
    "optimizer.decay_steps": None,
    "optimizer.decay_shape": None,
    "optimizer.end_factor": None,
}
# Keys that a stage may set.
STAGE_KEYS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "data.max_seq_length",
    "data.mixture",
    "model.overrides.global_rope_theta",
    "model.overrides.local_rope_theta",
    "masking.strategy",
    "masking.mlm_probability",
    "masking.mask_replace_prob",
    "masking.random_replace_prob",
    "optimizer.learning_rate",
    "optimizer.adam_learning_rate",
    "optimizer.schedule",
    *SCHEDULE_KEYS,
)
_EXAMPLE = '{"name": "extend", "steps": 0.1, "data.max_seq_length": 512}'


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps `start` + 1 to `end` of a run, with their settings.

    Attributes:
      name: "" for a run without stages.
      start, end: the boundaries.
      settings: the run's settings with the values of this stage; `stages` is empty.
      schedule_start, schedule_end: the steps between which its learning-rate schedule runs; stages may share one.
      boundaries: the boundaries of that schedule, counted from `schedule_start`.
      mask_start, mask_end: the steps between which masking.mlm_probability changes if it is a pair.
    """

    name: str
    start: int
    end: int
    settings: RunSettings
    schedule_start: int
    schedule_end: int
    boundaries: Boundaries
    mask_start: int
    mask_end: int

    @property
    def rows_per_device(self) -> int:
        """Sequences of a step on one device; for per_device_train_batch_size=0 as if it were 1."""
        return _rows_per_device(self.settings)

    def to_json(self) -> dict[str, Any]:
        """Returns what `config.json` records at each start."""
        return {"name": self.name, "end": self.end, "borders": dataclasses.asdict(self.boundaries)}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An entry of `config.stages`: `changes` maps keys with dots to values, `settings` are the resulting settings."""

    key: str
    name: str
    steps: int | float | str | None
    changes: Mapping[str, Any]
    settings: RunSettings


def check(settings: RunSettings) -> None:
    """Raises UserError if `config.stages` is invalid, as far as it can be known without the number of devices."""
    entries = _entries(settings)
    durations = [entry.steps for entry in entries]
    for entry in entries:
        durations += [entry.settings.optimizer.warmup_steps, entry.settings.optimizer.decay_steps or 0]
    if not any(isinstance(duration, str) for duration in durations):
        resolve(settings, num_devices=1)


def settings_of_stages(settings: RunSettings) -> tuple[RunSettings, ...]:
    """Returns the settings of each stage, with `stages` empty; for a run without stages its own settings."""
    return tuple(entry.settings for entry in _entries(settings))


def resolve(
    settings: RunSettings, *, num_devices: int, earlier: Sequence[int] = (), step: int = 0
) -> tuple[Stage, ...]:
    """Returns the stages of a run with their boundaries in steps; one stage for a run without stages.

    Args:
      settings: the run's settings.
      num_devices: number of devices, for durations in tokens.
      earlier: the ends of the stages at the last start; those already passed stay.
      step: steps done.

    Raises:
      UserError: `settings.stages` is invalid.
    """
    entries = _entries(settings)
    tokens = [_rows_per_device(e.settings) * num_devices * e.settings.data.max_seq_length for e in entries]
    passed = [end for end in earlier[:-1] if end < step]
    ends = _ends(entries, tokens, passed=passed, num_train_steps=settings.num_train_steps)
    for index in range(len(ends) - 1 if earlier else 0):
        ends[index] = passed[index] if index < len(passed) else min(max(ends[index], step), ends[-1])

    def boundaries(stage: Stage) -> Boundaries:
        if stage.schedule_start == stage.schedule_end:  # A boundary moved to where the next stage begins.
            return stage.boundaries
        parts = [
            (end - start, per_step)
            for start, end, per_step in zip([0, *ends[:-1]], ends, tokens, strict=True)
            if stage.schedule_start <= start < stage.schedule_end
        ]
        return resolve_boundaries(
            stage.settings.optimizer,
            num_train_steps=stage.schedule_end - stage.schedule_start,
            tokens_per_step=parts[0][1],
            parts=parts if len(entries) > 1 else None,
        )

    stages = []
    for entry, stage in zip(entries, _with_ends(entries, ends), strict=True):
        try:
            stages.append(dataclasses.replace(stage, boundaries=boundaries(stage)))
        except UserError as error:
            raise _in_stage(entry.key, error) from None
    return tuple(stages)


def stages_at_last_start(settings: RunSettings, last_stages: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
    """Returns the stages of a run as at its last start (`WorkDir.last_stages`), independent of the devices here."""
    ends = [stage["end"] for stage in last_stages[:-1]]
    stages = _with_ends(_entries(settings), [*ends, settings.num_train_steps])
    boundaries = [stage["borders"] for stage in last_stages] or [stages[0].boundaries]
    return tuple(
        dataclasses.replace(stage, boundaries=stage_boundaries)
        for stage, stage_boundaries in zip(stages, boundaries, strict=True)
    )


def _with_ends(entries: Sequence[_Entry], ends: Sequence[int]) -> list[Stage]:
    """Returns the stages with these boundaries, and schedules without warm-up and decay."""
    starts = [0, *ends[:-1]]
    schedule_spans = _spans(entries, "optimizer.schedule", starts, ends)
    mask_spans = _spans(entries, "masking.mlm_probability", starts, ends)
    return [
        Stage(
            name=entry.name,
            start=starts[index],
            end=ends[index],
            settings=entry.settings,
            schedule_start=schedule_spans[index][0],
            schedule_end=schedule_spans[index][1],
            boundaries=Boundaries(0, schedule_spans[index][1] - schedule_spans[index][0]),
            mask_start=mask_spans[index][0],
            mask_end=mask_spans[index][1],
        )
        for index, entry in enumerate(entries)
    ]


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Returns the stage that a step belongs to; for step 0 the first one."""
    return next((stage for stage in stages if step <= stage.end), stages[-1])


def may_change(key: str, before: Any, now: Any) -> bool:
    """Returns whether a key may change when a run is resumed; in `stages`, only the numbers of steps may."""

    def without_steps(stages: Any) -> Any:
        return [
            {name: value for name, value in stage.items() if name != "steps"} if isinstance(stage, Mapping) else stage
            for stage in stages
        ]

    if key != "stages":
        return key in MUTABLE_KEYS
    return isinstance(before, tuple) and without_steps(before) == without_steps(now)


def started_stages(last_stages: Sequence[Mapping[str, Any]], *, step: int) -> Sequence[Mapping[str, Any]]:
    """Returns those of `WorkDir.last_stages` that have steps up to `step`, and always the first."""
    return [stage for index, stage in enumerate(last_stages) if index == 0 or last_stages[index - 1]["end"] < step]


def check_branch(settings: RunSettings, parent: RunSettings, *, num_begun: int) -> None:
    """Checks whether a run with these settings can continue a checkpoint of a run with other stages.

    Args:
      settings: settings of the new run.
      parent: settings of the parent run.
      num_begun: number of the parent's stages that have begun at the checkpoint.

    Raises:
      UserError: a stage that has begun differs in a key that must not change during a run, or a later stage needs
        evaluation text that the parent did not hold out.
    """
    now, before = settings_of_stages(settings), settings_of_stages(parent)
    if num_begun > len(now):
        raise UserError(f"stages has {len(now)} of the {num_begun} stages that have begun; add the missing ones")
    for index in range(num_begun):
        values, old_values = now[index].flat(), before[index].flat()
        for key in STAGE_KEYS:
            if key not in MUTABLE_KEYS and values[key] != old_values[key]:
                raise UserError(
                    f"stages[{index}] has begun there, with {key}={old_values[key]!r}, and has {values[key]!r} here; "
                    "change only stages that begin later"
                )
    if _text_read_at_start(now) != _text_read_at_start(before):
        raise UserError(
            "a later stage introduces a length, a source or its weight, for which other evaluation sequences would be "
            "held out; change other keys"
        )


def _text_read_at_start(stages: Sequence[RunSettings]) -> list[Any]:
    """Returns what the evaluation sequences depend on, which `data.pipeline.open_text` holds out at a run's start."""
    found: list[Any] = []
    lengths: set[int] = set()
    sources: dict[str, Any] = {}
    for stage in stages:
        length, weights, options = stage.data.max_seq_length, source_weights(stage.data), _source_options(stage.data)
        if length not in lengths or not options.keys() <= sources.keys():
            found.append((length, list(weights.items()), options))
        lengths.add(length)
        sources |= options
    return found


def source_weights(data: DataSettings) -> dict[str, float]:
    """Returns name -> weight of the sources of a stage; the only source of a run without mixture is "text"."""
    return {entry.name: entry.weight for entry in data.mixture_entries} or {"text": 1.0}


def batch_ramp(
    sizes: Sequence[int], *, duration: int | float | str, key: str = "per_device_train_batch_size"
) -> tuple[dict[str, Any], ...]:
    """Returns stages in which the batch grows; the stage after them sets its final size.

        config.stages = (
            *batch_ramp((16, 32, 48), duration="3e9 tokens"),
            {"name": "pretrain", "per_device_train_batch_size": 64},
        )

    Args:
      sizes: the values of `key`, one for each stage.
      duration: total duration of these stages, divided equally: steps, a fraction of the run, or a string with a number
        of tokens.
      key: per_device_train_batch_size or gradient_accumulation_steps.
    """
    stages = []
    for number, size in enumerate(sizes):
        part: int | float | str
        if isinstance(duration, str):
            part = f"{(num_tokens(duration) or 0.0) / len(sizes):.0f} tokens"
        elif isinstance(duration, float):
            part = duration / len(sizes)
        else:
            part = duration * (number + 1) // len(sizes) - duration * number // len(sizes)
        stages.append({"name": f"batch_{size}", "steps": part, key: size})
    return tuple(stages)


def _rows_per_device(settings: RunSettings) -> int:
    return max(1, settings.per_device_train_batch_size) * settings.gradient_accumulation_steps


def _entries(settings: RunSettings) -> list[_Entry]:
    if not settings.stages:
        return [_Entry("", "", None, {}, settings)]
    current = settings.replace({"stages": ()})
    entries: list[_Entry] = []
    sources = _source_options(current.data)
    for number, value in enumerate(settings.stages):
        key = f"stages[{number}]"
        name, steps, changes = _parse(key, value)
        if name in [entry.name for entry in entries]:
            raise UserError(f"{key}.name={name!r}: is the name of two stages; rename one")
        try:
            current = current.replace(_complete(changes))
        except UserError as error:
            raise _in_stage(key, error) from None
        if current.per_device_train_batch_size == 0:
            raise UserError(f"{key}.per_device_train_batch_size=0: cannot be found for several stages; set a number")
        for source, options in _source_options(current.data).items():
            if sources.setdefault(source, options) != options:
                raise UserError(
                    f"{key}.data.mixture={changes['data.mixture']!r}: the source {source!r} has other options in an "
                    "earlier stage; rename it"
                )
        entries.append(_Entry(key, name, steps, changes, current))
    if [entry.steps for entry in entries].count(None) > 1:
        raise UserError(f"stages={_names(entries)}: only one stage may leave out its steps; set the others")
    return entries


def _parse(key: str, value: Any) -> tuple[str, int | float | str | None, dict[str, Any]]:
    """Returns name, steps and changed keys of an entry."""
    if not isinstance(value, Mapping):
        raise UserError(f"{key}={value!r}: must be a dict such as {_EXAMPLE}")
    if not all(isinstance(option, str) for option in value):
        raise UserError(f"{key}={value!r}: the keys must be strings, such as {_EXAMPLE}")
    changes = dict(value)
    name, steps = changes.pop("name", None), changes.pop("steps", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{key}.name={name!r}: must be a string of letters, digits, '_', '-' and '.'")
    if steps is not None and not _is_duration(steps):
        raise UserError(
            f"{key}.steps={steps!r}: must be a number of steps, a fraction of the run in (0, 1], or a string such as "
            "'3e9 tokens'"
        )
    for option, option_value in changes.items():
        if option not in KEYS:
            check_key(option, shown=f"{key}.{option}")
        if option not in STAGE_KEYS:
            raise UserError(
                f"{key}.{option}={option_value!r}: cannot change in a stage; keys that can are {', '.join(STAGE_KEYS)}"
            )
        if option in SCHEDULE_KEYS and "optimizer.schedule" not in changes:
            raise UserError(
                f"{key}.{option}={option_value!r}: belongs to a schedule, and this stage continues that of the stage "
                "before; set optimizer.schedule in this stage, too"
            )
    if changes.get("data.mixture", True) == ():
        raise UserError(f"{key}.data.mixture=(): must have at least one source")
    return name, steps, changes


def _is_duration(value: Any) -> bool:
    if isinstance(value, str):
        return bool(num_tokens(value))
    return (type(value) is int and value >= 1) or (type(value) is float and 0 < value <= 1)


def _complete(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the changes together with those that they imply."""
    completed: dict[str, Any] = {}
    if "optimizer.schedule" in changes:
        completed |= SCHEDULE_KEYS
    if "data.mixture" in changes:  # Its sources have their own files.
        completed |= {"data.data_files": None, "data.eval_data_files": None}
    return completed | dict(changes)


def _source_options(data: DataSettings) -> dict[str, Any]:
    """Returns name -> what determines the text of a source."""
    return {entry.name: dict(entry.options) for entry in data.mixture_entries} or {
        "text": {"dataset_name": data.dataset_name, "data_files": data.data_files}
    }


def _ends(
    entries: Sequence[_Entry], tokens: Sequence[int], *, passed: Sequence[int], num_train_steps: int
) -> list[int]:
    """Returns the steps done at the end of each stage; `passed` are the ends of the first ones at the last start."""
    lengths: list[float | None] = []
    for index, (entry, per_step) in enumerate(zip(entries, tokens, strict=True)):
        if isinstance(entry.steps, str) and index < len(passed):  # Perhaps on another number of devices.
            lengths.append(passed[index] - (passed[index - 1] if index else 0))
        elif isinstance(entry.steps, str):
            lengths.append((num_tokens(entry.steps) or 0.0) / per_step)
        else:
            lengths.append(entry.steps * num_train_steps if isinstance(entry.steps, float) else entry.steps)
    known = sum(length for length in lengths if length is not None)
    if None in lengths:
        lengths[lengths.index(None)] = num_train_steps - known
    elif abs(known - num_train_steps) > 0.5:
        raise UserError(
            f"stages={_names(entries)}: their steps add up to {known:,.0f}, and num_train_steps={num_train_steps}; "
            "change one of them, or leave out the steps of one stage, which then has the rest"
        )
    ends, position = [], 0.0
    for entry, length in zip(entries, lengths, strict=True):
        position += max(0.0, length or 0.0)
        ends.append(round(position))
        if ends[-1] <= (ends[-2] if len(ends) > 1 else 0):
            raise UserError(
                f"{entry.key}.steps={entry.steps!r}: leaves the stage {entry.name!r} less than one step of "
                f"num_train_steps={num_train_steps}; change the steps of the stages"
            )
    ends[-1] = num_train_steps
    return ends


def _spans(entries: Sequence[_Entry], key: str, starts: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
    """Returns for each stage the steps from the stage that has set `key` to the next one that sets it."""
    firsts = [0] + [index for index in range(1, len(entries)) if key in entries[index].changes]
    spans = []
    for index in range(len(entries)):
        first = max(other for other in firsts if other <= index)
        later = [other for other in firsts if other > index]
        spans.append((starts[first], starts[later[0]] if later else ends[-1]))
    return spans


def _in_stage(key: str, error: UserError) -> UserError:
    return UserError(f"{key}.{error}" if key else str(error))


def _names(entries: Sequence[_Entry]) -> str:
    return str(tuple(entry.name for entry in entries))
