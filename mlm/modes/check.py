"""--mode=check: a dry run, on any machine, that trains nothing and writes nothing.

It opens text, tokenizer and model with the functions that training uses, so what it prints is what the run would use.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from mlm import build, memory, steps
from mlm.data import pipeline as text_lib
from mlm.data.packing import pack
from mlm.data.reader import has_text
from mlm.data.sources.source import Source
from mlm.data.tokenizer import Tokenizer
from mlm.downstream.during_training import read_tasks
from mlm.errors import UserError
from mlm.hardware import Machine, find_device, parse_topology
from mlm.masking import mask_tokens
from mlm.models.flops import flops_per_token
from mlm.modes.show_data import decode_masked
from mlm.reporting.progress import duration
from mlm.run.workdir import KeyChanges, WorkDir
from mlm.settings import SYNTHETIC, DataSettings, RunSettings
from mlm.stages import Stage, resolve, source_weights

# Time for reading text to estimate the tokens of an epoch.
_SAMPLE_SECONDS = 5.0
# Documents tokenized at once for that estimate.
_SAMPLE_DOCUMENTS = 500
# Muennighoff et al. 2023, "Scaling Data-Constrained Language Models": no gain beyond about 40 epochs.
_MANY_EPOCHS = 40
# Characters printed of a document or a sequence.
_MAX_CHARACTERS = 400


@dataclasses.dataclass
class Findings:
    """The problems found, one line each."""

    problems: list[str] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Records a UserError of the block as a problem."""
        try:
            yield
        except UserError as error:
            self.problems.append(str(error))


def run(
    settings: RunSettings,
    workdir_path: str,
    *,
    defaults: Mapping[str, Any],
    topology: str | None,
    utilization: float,
    key_changes: KeyChanges,
) -> None:
    """Prints a dry run of a training run.

    Args:
      settings: the run's settings.
      workdir_path: its work directory, which need not exist.
      defaults: the values of `configs/default.py`, by keys with dots.
      topology: the machine that the run is meant for, such as "v3-8"; None for the devices here.
      utilization: the assumed fraction of the devices' peak rate.
      key_changes: how config keys have changed since earlier versions.

    Raises:
      UserError: the run is not ready; the message lists every problem found.
    """
    machine = parse_topology(topology) if topology else None
    problems = check(
        settings, workdir_path, defaults=defaults, machine=machine, utilization=utilization, key_changes=key_changes
    )
    if problems:
        numbered = [f"({number}) {problem}" for number, problem in enumerate(problems, start=1)]
        raise UserError(f"not ready: {' '.join(numbered if len(problems) > 1 else problems)}")
    print("\nready")


def check(
    settings: RunSettings,
    workdir_path: str,
    *,
    defaults: Mapping[str, Any],
    machine: Machine | None,
    utilization: float,
    key_changes: KeyChanges | None = None,
) -> list[str]:
    """Prints the dry run; returns the problems found, one line each. Arguments as in `run`, with a parsed topology."""
    findings = Findings()
    here = machine or Machine("this machine", jax.devices()[0].device_kind, jax.device_count(), 1)
    _heading("Config")
    show_config(settings, defaults)
    workdir, parent = None, None
    with findings.collect():
        workdir = WorkDir(workdir_path, key_changes=key_changes)
        settings = workdir.resume(settings)
        if settings.checkpoint.init_from:
            from mlm.init_from import open_parent  # Imported here: it imports Orbax, which takes half a second.

            settings, parent = open_parent(settings, workdir, key_changes=key_changes)
        workdir.storage.check_writable()
    with findings.collect():
        build.check_device(settings)
    if workdir is None or findings.problems:
        return findings.problems
    # Checked separately, so that other problems do not hide these.
    with findings.collect():
        build.check_hub(settings, workdir)
    with findings.collect():
        read_tasks(settings.eval)
    local = settings.replace({"hub.push_to_hub": False})
    with findings.collect():
        components = build.build(local, workdir, parent_tokenizer=parent.workdir.tokenizer if parent else None)
        if local.per_device_train_batch_size == 0:
            local = local.replace({"per_device_train_batch_size": find_batch(local, components, machine)})
        components = components.with_stages(resolve(local, num_devices=here.devices))
        _heading("Text")
        show_documents(components.text)
        with findings.collect():
            show_sequences(components, here)
        _heading("Tokenizer and model")
        show_tokenizer(components)
        _heading("The run")
        state_bytes = show_size(local, components, workdir, here, findings, utilization=utilization)
        if has_english_sentences(settings, defaults):
            print("note          report.sentences are the English defaults; give sentences in your text's language")
        compiled: list[int | None] = [None for _ in components.stages]
        if machine is not None and settings.per_device_train_batch_size > 0:
            stages = components.stages if memory.can_compile_for(machine) else components.stages[:1]
            for number, stage in enumerate(stages):
                own = components.for_stage(stage)
                compiled[number] = show_compiled(stage.settings, own, machine, findings, stage=stage.name)
        if len(compiled) > 1:
            show_stages(components, here, state_bytes, compiled, utilization=utilization)
    return findings.problems


def _heading(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")


def show_config(settings: RunSettings, defaults: Mapping[str, Any]) -> None:
    """Prints every config key with its value, and with the default if that differs."""
    values = settings.flat()
    width = max(map(len, values))
    for key, value in values.items():
        if value == defaults[key]:
            print(f"  {key:{width}}  {value!r}")
        else:
            print(f"* {key:{width}}  {value!r}   (default {defaults[key]!r})")


def show_documents(text: text_lib.TextPipeline, *, count: int = 3) -> None:
    """Prints the sources with their shards and the first documents, of several sources in turn."""
    for source in text.sources:
        shards = source.train.num_shards
        print(f"{source.train.name}: {shards:,} shard{'s' * (shards > 1)}, column {source.train.text_column!r}")
    documents = [text_lib.first_documents(source.train, count) for source in text.sources]
    for number in range(count):
        index = number % len(text.sources)
        document = next(documents[index], None)
        if document is not None:
            name = f"document {number // len(text.sources) + 1} of {text.sources[index].train.name}"
            print(f"\n{name}\n  {_shortened(document)}")


def show_sequences(components: build.Components, machine: Machine) -> None:
    """Prints two sequences of the first batch of the first host, and one of them masked.

    Raises:
      UserError: there is not enough text for a batch, of any stage.
    """
    firsts = []
    for stage in components.stages:
        batch_rows = stage.rows_per_device * machine.devices // machine.hosts
        shape = build.batch_shape(stage, batch_rows=batch_rows)._replace(start=0)
        batches = components.text.batches(
            process_index=0, process_count=machine.hosts, batch_rows=batch_rows, shapes=[shape]
        )
        firsts.append(next(batches))
    settings, tokens_BxL = components.stages[0].settings, firsts[0]
    for number, tokens_L in enumerate(tokens_BxL[:2]):
        text = _shortened(components.tokenizer.decode(tokens_L))
        print(f"\nrow {number} of step 1 (data.packing={settings.data.packing!r})\n  {text}")
    key = jax.random.fold_in(steps.random_key(settings.seed, steps.TRAIN_MASKS), 0)
    rate = components.step_config.mask_rate
    mask = jax.jit(functools.partial(mask_tokens, spec=components.step_config.masking))
    masked = jax.device_get(
        mask(
            tokens_BxL,
            rows_B=np.arange(len(tokens_BxL), dtype=np.int32),
            key=key,
            mlm_probability=rate(0) if rate else None,
        )
    )
    print(f"\nrow 0 after masking; [input=label], {masked.label_weights_BxK[0].sum():.0f} masked")
    print(f"  {_shortened(decode_masked(components.tokenizer, masked, 0), limit=2 * _MAX_CHARACTERS)}")
    counts = jax.tree.map(lambda counts_B: max(1.0, float(counts_B.sum())), masked.counts_B)
    print(
        f"  of the batch's tokens {counts.predicted / counts.maskable:.1%} are predicted; of these "
        f"{counts.mask_replaced / counts.predicted:.1%} are replaced by the mask token and "
        f"{counts.random_replaced / counts.predicted:.1%} by a random one"
    )


def show_tokenizer(components: build.Components) -> None:
    """Prints the ids, special tokens and lengths of tokenizer and model; `build.build` has checked that they match."""
    tokenizer, encoder = components.tokenizer, components.encoder
    print(f"tokenizer {tokenizer.name} (backend {tokenizer.backend}), model {encoder.model_type}")
    unused = encoder.vocab_size - tokenizer.num_ids
    print(f"  ids         tokenizer {tokenizer.num_ids:,}, model {encoder.vocab_size:,} ({unused:,} unused)")
    roles = ("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id), ("mask", tokenizer.mask_id)
    named = ", ".join(f"{role} {tokenizer.hf.convert_ids_to_tokens(id)} {id}" for role, id in roles)
    print(f"  special     {named}")
    length = components.text.eval_rows_RxL.shape[1]
    print(f"  length      sequences {length} tokens, model at most {encoder.max_seq_length}")


def show_size(
    settings: RunSettings,
    components: build.Components,
    workdir: WorkDir,
    machine: Machine,
    findings: Findings,
    *,
    utilization: float,
) -> int:
    """Prints batch, shards, parameters, tokens, epochs, memory, disk and time; records what does not fit.

    Returns:
      The bytes of parameters, gradients and optimizer.
    """
    stages, sources = components.stages, components.text.sources
    length = settings.data.max_seq_length
    state = jax.eval_shape(
        lambda: steps.init_state(components.step_config, steps.init_params(components.step_config, length=length))
    )
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    state_bytes = _bytes(state)

    print(f"machine       {machine.name}: {machine.devices} x {machine.kind}, on {_hosts(machine.hosts)}")
    for stage in stages:
        own, of = stage.settings, f"{stage.name}: " if stage.name else ""
        microbatches = own.gradient_accumulation_steps
        print(
            f"step          {of}{stage.rows_per_device * machine.devices:,} sequences of {own.data.max_seq_length} "
            f"tokens: {own.per_device_train_batch_size} per device x {microbatches} "
            f"microbatch{'es' if microbatches > 1 else ''} x {machine.devices} devices"
        )
    for source in sources:
        print(f"shards        {_describe_shards(source.train, machine.hosts)}")
    print(f"parameters    {parameters:,}")
    print(f"tokens        {sum(_tokens(stage, machine) for stage in stages):,} in {settings.num_train_steps:,} steps")
    for source in sources:
        epoch, is_bound = tokens_of_epoch(
            source.train, components.tokenizer, settings.data, seconds=_SAMPLE_SECONDS / len(sources)
        )
        tokens = 0.0
        for stage in stages:
            weights = source_weights(stage.settings.data)
            tokens += _tokens(stage, machine) * weights.get(source.name, 0.0) / sum(weights.values())
        epochs = tokens / epoch
        about = "at most" if is_bound else "about"
        print(
            f"epochs        {about} {epochs:,.2f} of {source.train.name}, {_count(epoch)} tokens{' or more' * is_bound}"
        )
        if epochs > _MANY_EPOCHS and not is_bound:
            print(f"note          more than {_MANY_EPOCHS} epochs give little gain: lower num_train_steps, or add text")
    _show_memory(state_bytes + _bytes(state.params), machine, findings)
    _show_disk(settings, workdir, state_bytes, _bytes(state.params), findings, boundaries=len(stages) - 1)
    _show_time(components, machine, utilization)
    return state_bytes + _bytes(state.params)


def _tokens(stage: Stage, machine: Machine) -> int:
    rows = (stage.end - stage.start) * stage.rows_per_device * machine.devices
    return rows * stage.settings.data.max_seq_length


def show_stages(
    components: build.Components,
    machine: Machine,
    state_bytes: int,
    compiled: Sequence[int | None],
    *,
    utilization: float,
) -> None:
    """Prints a table of the stages.

    Args:
      components: the run's components.
      machine: the machine that the run is meant for.
      state_bytes: bytes of parameters, gradients and optimizer.
      compiled: bytes of the compiled step in each stage; None where it was not compiled.
      utilization: the assumed fraction of the devices' peak rate.
    """
    rows = [("stage", "steps", "tokens", "hours", "memory per device")]
    for stage, needed in zip(components.stages, compiled, strict=True):
        rate, _ = _rate(components.for_stage(stage), stage, machine, utilization)
        hours = "unknown" if rate is None else f"{_tokens(stage, machine) / rate / 3600:,.1f}"
        memory_text = _gigabytes(needed) if needed else f"{_gigabytes(state_bytes)} without activations"
        steps_text = f"{stage.start + 1:,} to {stage.end:,}"
        rows.append((stage.name, steps_text, f"{_tokens(stage, machine):,}", hours, memory_text))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show_memory(needed: int, machine: Machine, findings: Findings) -> None:
    print(
        f"memory        {_gigabytes(needed)} per device for parameters, gradients and optimizer, without activations",
        end="",
    )
    if machine.memory_bytes is None:
        print()
        return
    print(f", of {_gigabytes(machine.memory_bytes)}")
    if needed > machine.memory_bytes:
        findings.problems.append(
            f"--topology={machine.name}: parameters, gradients and optimizer need {_gigabytes(needed)} per device, a "
            f"{machine.kind} has {_gigabytes(machine.memory_bytes)}; choose a smaller model"
        )


def _show_disk(
    settings: RunSettings, workdir: WorkDir, state_bytes: int, model_bytes: int, findings: Findings, *, boundaries: int
) -> None:
    every = settings.checkpoint.keep_every_steps
    # One more checkpoint while the oldest is not yet removed, and the model twice while it is replaced.
    num_checkpoints = settings.checkpoint.keep_checkpoints + 1 + boundaries
    num_checkpoints += settings.num_train_steps // every if every else 0
    needed = num_checkpoints * state_bytes + 2 * model_bytes
    free = workdir.storage.free_bytes()
    content = f"{num_checkpoints} checkpoints of {_gigabytes(state_bytes)} and the model"
    available = "" if free is None else f"; {_gigabytes(free)} are free"
    print(f"disk          {_gigabytes(needed)} for {content}{available}")
    if free is not None and needed > free:
        findings.problems.append(
            f"--workdir={workdir.display_path}: has {_gigabytes(free)} free and needs {_gigabytes(needed)}; choose "
            "another, or lower checkpoint.keep_checkpoints"
        )


def _show_time(components: build.Components, machine: Machine, utilization: float) -> None:
    seconds = 0.0
    for stage in components.stages:
        rate, flops = _rate(components.for_stage(stage), stage, machine, utilization)
        if rate is None:
            print(
                f"time          unknown: no peak rate of a {machine.kind} is known; name a machine, such as "
                "--topology=v3-8"
            )
            return
        seconds += _tokens(stage, machine) / rate
    of_stage = f", {rate:,.0f} tokens/s ({flops / 1e6:,.0f} MFLOP per token)" if len(components.stages) == 1 else ""
    print(f"time          {duration(seconds)} at {utilization:.0%} of the peak rate{of_stage}, without evaluations")


def _rate(
    components: build.Components, stage: Stage, machine: Machine, utilization: float
) -> tuple[float | None, float]:
    """Returns the tokens per second of a stage, None if the peak rate is unknown, and the operations per token."""
    length = stage.settings.data.max_seq_length
    flops = flops_per_token(
        components.encoder,
        length=length,
        max_predictions_per_seq=components.step_config.masking.max_predictions_per_seq(length),
    )
    device = find_device(machine.kind)
    return None if device is None else device.peak_flops * machine.devices * utilization / flops, flops


def has_english_sentences(settings: RunSettings, defaults: Mapping[str, Any]) -> bool:
    """Returns True if the examples are the English defaults, but the data is the user's own."""
    data = settings.data
    is_own = data.mixture or data.data_files is not None or data.dataset_name not in ("docstrings", SYNTHETIC)
    return bool(is_own) and tuple(settings.report.sentences) == tuple(defaults["report.sentences"])


def find_batch(settings: RunSettings, components: build.Components, machine: Machine | None) -> int:
    """Returns what per_device_train_batch_size=0 will be on a machine, or a small batch if that is not known here.

    Raises:
      UserError: not even one sequence fits.
    """
    if machine is None or not memory.can_compile_for(machine):
        print(f"\nper_device_train_batch_size=0 is resolved when the run starts; the check uses {memory.FIRST_BATCH}")
        return memory.FIRST_BATCH
    print(f"\nper_device_train_batch_size=0: compiling the step for {machine.kind}, minutes at real size", flush=True)
    found = memory.find_batch_size(
        _for_tpu(settings, components),
        length=settings.data.max_seq_length,
        microbatches=settings.gradient_accumulation_steps,
        machine=machine,
    )
    print(f"per_device_train_batch_size=0 will be {found}: the largest that fits a {machine.kind} device")
    return found


def _for_tpu(settings: RunSettings, components: build.Components) -> steps.StepConfig:
    execution = build.resolve_execution(settings, backend="tpu")
    return dataclasses.replace(components.step_config, model=components.step_config.model.clone(execution=execution))


def show_compiled(
    settings: RunSettings, components: build.Components, machine: Machine, findings: Findings, *, stage: str = ""
) -> int | None:
    """Prints the memory of the compiled step on a TPU device, and the largest batch that fits.

    Args:
      settings: the run's settings, or those of a stage.
      components: what they determine.
      machine: the machine that the run is meant for.
      findings: receives the problem if the step does not fit.
      stage: the name of the stage.

    Returns:
      The bytes; None if they are unknown.
    """
    of = f"{stage}: " if stage else ""
    if not memory.can_compile_for(machine):
        reason = "install libtpu: pip install libtpu" if machine.kind.startswith("TPU") else "possible for TPUs only"
        print(f"compiled      no; {reason}")
        return None
    # Flushed, so that a reader of a pipe sees everything above before the long wait.
    print(f"compiling     {of}the step for {machine.kind}, minutes at real size", flush=True)
    batch, microbatches = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    step_config = _for_tpu(settings, components)
    estimate_of = functools.partial(
        memory.estimate_memory,
        machine=machine,
        length=settings.data.max_seq_length,
        microbatches=microbatches,
        batch=batch,
    )
    estimate = estimate_of(step_config)
    assert machine.memory_bytes is not None, "known for every machine that steps are compiled for"
    device = f"the {_gigabytes(machine.memory_bytes)} of a {machine.kind} device"
    largest = estimate.largest_batch
    if estimate.needed_bytes is not None:
        needed = _gigabytes(estimate.needed_bytes)
        print(f"compiled      {of}the step takes {needed} of {device}; up to {largest:,} sequences per microbatch fit")
        return estimate.needed_bytes
    print(f"compiled      {of}the step does not fit {device}")
    remat = ""
    if not largest and step_config.model.execution.remat != "full":
        print("compiling     the step with model.remat='full', which needs less memory and more time", flush=True)
        largest = estimate_of(memory.with_remat(step_config, "full")).largest_batch
        print(f"compiled      up to {largest:,} sequences per microbatch fit" if largest else "compiled      none fits")
        remat = "model.remat='full', "
    if largest >= batch:
        advice = "set model.remat='full'"
    elif largest:
        accumulation = math.ceil(batch * microbatches / largest)
        advice = f"set {remat}{largest} and gradient_accumulation_steps={accumulation}"
    else:
        advice = "lower data.max_seq_length or choose a smaller model"
    findings.problems.append(f"{of}per_device_train_batch_size={batch}: does not fit a {machine.kind} device; {advice}")
    return None


def tokens_of_epoch(source: Source, tokenizer: Tokenizer, data: DataSettings, *, seconds: float) -> tuple[float, bool]:
    """Estimates the tokens of an epoch from random shards, with special tokens, and padding if every text is a row.

    Args:
      source: the documents.
      tokenizer: text to ids.
      data: how they become sequences.
      seconds: how long shards are read.

    Returns:
      The number of tokens, and True if it is only a lower bound because no shard was read to its end.
    """
    deadline = time.monotonic() + seconds
    # Training packs far more documents together than a small shard has, with almost no padding.
    packing = "isolate" if data.packing == "best_fit" else data.packing
    complete: list[int] = []
    for shard in np.random.default_rng(0).permutation(source.num_shards).tolist():
        count = 0
        for texts in _samples(source, shard):
            count += pack(texts, tokenizer, packing=packing, max_seq_length=data.max_seq_length).data.size
            if time.monotonic() > deadline:
                # The other shards are assumed to have as many tokens.
                return (float(np.mean(complete or [count])) * source.num_shards, not complete)
        complete.append(count)
    return float(sum(complete)), False


def _samples(source: Source, shard: int) -> Iterator[pa.LargeStringArray]:
    for column in source.read(shard):
        texts = column.drop_null()
        texts = texts.filter(pa.array(has_text(texts)))
        for start in range(0, len(texts), _SAMPLE_DOCUMENTS):
            yield texts.slice(start, _SAMPLE_DOCUMENTS)


def _describe_shards(source: Source, hosts: int) -> str:
    count = f"{source.num_shards:,} of {source.name}, for {_hosts(hosts)}"
    if source.num_shards < hosts:
        return f"{count}: several hosts read all of a shard and use a part of it; more shards are faster"
    return count


def _hosts(count: int) -> str:
    return f"{count} host{'s' * (count > 1)}"


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _count(number: float) -> str:
    """Returns a number with three digits, such as "12.3 million"."""
    for size, word in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return f"{number:.0f}"


def _shortened(text: str, *, limit: int = _MAX_CHARACTERS) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " ..."
