"""The programs of complete runs, traced, lowered and compiled once for all processes of a test session.

A complete run of a tiny model spends most of its time on that; jax's compilation cache avoids the compilation only.
Here the first process that needs a program saves it, and others load it. A program is found by what determines it: the
constants of the function, shapes and devices of its arguments, and XLA's flags.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import compilation_cache
from jax.experimental import serialize_executable

from mlm import build, parallel, steps
from mlm.export import fill_mask
from mlm.run import checkpoint
from mlm.stages import Stage

# id -> object and how it was created, for schedules and optimizers: their repr does not say it.
_created: dict[int, tuple[Any, str]] = {}
# The programs of this process, and how they are called.
_loaded: dict[str, tuple[jax.stages.Compiled, Callable[..., Any]]] = {}


def install(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Makes runs of this process use programs and initial states of $SAVED_PROGRAMS; `patch` replaces attributes."""
    if "SAVED_PROGRAMS" not in os.environ:
        return
    for name in ("create_schedule", "create_optimizer", "create_mask_rate_schedule"):
        patch(build, name, functools.partial(_create, getattr(build, name)))
    patch(parallel, "data_parallel", functools.partial(_data_parallel, parallel.data_parallel))
    patch(build.Components, "initial_state", _initial_state(build.Components.initial_state))
    for module, name in ((checkpoint, "_checksums"), (fill_mask, "_top_candidates"), (parallel, "_unstack")):
        patch(module, name, SavedProgram(getattr(module, name), name))


def forget() -> None:
    """Releases the loaded programs."""
    _loaded.clear()


class SavedProgram:
    """A function under `jit` or `pmap`, with the methods of those that the trainer uses. Keywords are static."""

    def __init__(self, function: Any, description: str, *, on_all_devices: bool = False):
        self._function = function
        self._description = description
        self._on_all_devices = on_all_devices

    def __call__(self, *args: Any, **static: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
            return self._function(*args, **static)
        return self._load(args, static)[1](*args)

    def lower(self, *args: Any) -> Any:
        """Returns an object with a method `compile`."""
        return types.SimpleNamespace(compile=lambda: self._load(args, {})[0])

    def _load(self, args: Any, static: dict[str, Any]) -> tuple[jax.stages.Compiled, Callable[..., Any]]:
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), args)
        name = _name(self._description, static, shapes)
        if name not in _loaded:
            saved = _read(name)
            if saved is None:
                # A program from jax's cache could not be saved completely.
                with mock.patch.object(compilation_cache, "is_cache_used", return_value=False):
                    compiled = self._function.lower(*args, **static).compile()
                _save(name, compiled)
                call = functools.partial(self._function, **static)
            else:
                program, out_example = saved
                trees = jax.tree.structure((args, {})), jax.tree.structure(out_example)
                on_device = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
                devices = list(on_device[0].devices()) if on_device else jax.local_devices()[:1]
                devices = None if self._on_all_devices else devices
                compiled = serialize_executable.deserialize_and_load(program, *trees, execution_devices=devices)
                joins = self._on_all_devices and jax.process_count() > 1
                call = functools.partial(_call_jointly, compiled) if joins else compiled
            _loaded[name] = compiled, call
        return _loaded[name]


def _save(name: str, program: jax.stages.Compiled) -> None:
    # One that calls Python cannot be pickled.
    with contextlib.suppress(AttributeError):
        serialized, _, out_tree = serialize_executable.serialize(program)
        # Tree definitions cannot be pickled, trees can.
        _write(name, (serialized, jax.tree.unflatten(out_tree, range(out_tree.num_leaves))))


def _call_jointly(program: jax.stages.Compiled, *args: Any) -> Any:
    """Runs a program of all processes, as `pmap` does: arguments and results are on this process's devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (parallel.AXIS,))
    sharding = jax.NamedSharding(mesh, jax.P(parallel.AXIS))

    def join(leaf: jax.Array) -> jax.Array:
        shape = (leaf.shape[0] * jax.process_count(), *leaf.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, [s.data for s in leaf.addressable_shards])

    results = program(*jax.tree.map(join, args))
    return jax.tree.map(lambda leaf: parallel._stack([shard.data for shard in leaf.addressable_shards]), results)


def _data_parallel(
    data_parallel: Callable[..., parallel.DataParallel], step: Any, *, donate_argnums: tuple[int, ...] = ()
) -> parallel.DataParallel:
    result = data_parallel(step, donate_argnums=donate_argnums)
    if getattr(step, "func", None) in (steps.train_step, steps.eval_step):
        description = f"{step.func.__name__} {_describe(step.keywords)} {donate_argnums}"
        if _identifies(description):
            result._run = SavedProgram(result._run, description, on_all_devices=True)
    return result


def _initial_state(initial_state: Callable[[build.Components], Any]) -> Callable[[build.Components], Any]:
    def saved_initial_state(components: build.Components) -> Any:
        description = f"{_describe(components.step_config)} {components.text.eval_rows_RxL.shape[1]}"
        if components.pretrained is not None or not _identifies(description):
            return initial_state(components)
        name = _name("initial state", description)
        if (state := _read(name)) is None:
            state = initial_state(components)
            if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state)):
                _write(name, jax.device_get(state))
        return state

    return saved_initial_state


def _create(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Calls a function that creates a schedule or an optimizer, and notes how."""
    result = function(*args, **keywords)
    if result is not None:
        _created[id(result)] = result, f"{function.__name__} {_describe(args)} {_describe(keywords)}"
    return result


def _describe(value: Any) -> str:
    """Returns a text that differs if the value does."""
    if id(value) in _created:
        return _created[id(value)][1]
    if type(value) is tuple:
        return str([_describe(item) for item in value])
    if isinstance(value, dict):
        return str({name: _describe(item) for name, item in value.items()})
    if isinstance(value, Stage):  # As far as `create_mask_rate_schedule` uses it.
        return repr((value.settings.masking, value.mask_start, value.mask_end))
    if isinstance(value, steps.StepConfig):
        return _describe(vars(value))
    return repr(value)


def _identifies(description: str) -> bool:
    """False for a description with an address, which may be another object's in another process."""
    return " at 0x" not in description


def _name(*described: Any) -> str:
    devices = (jax.local_device_count(), jax.process_index(), jax.process_count(), os.environ.get("XLA_FLAGS"))
    return hashlib.sha256(repr((described, devices)).encode()).hexdigest()


def _path(name: str) -> Path:
    return Path(os.environ["SAVED_PROGRAMS"], name)


def _read(name: str) -> Any:
    return pickle.loads(_path(name).read_bytes()) if _path(name).exists() else None


def _write(name: str, value: Any) -> None:
    _path(name).parent.mkdir(exist_ok=True, parents=True)
    with tempfile.NamedTemporaryFile(dir=_path(name).parent, delete=False) as file:
        file.write(pickle.dumps(value))
    os.replace(file.name, _path(name))
