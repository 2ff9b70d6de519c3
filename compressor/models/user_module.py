"""Anyone's own nn.Module: handed over in Python, or named as ``package.module:factory``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, as_numpy, first_line
from compressor.models.preprocess import Preprocess

# Axes of the answer, where a task fixes them.
AXES = {"image-classification": 2, "text-classification": 2, "sentence-similarity": 2, "text-generation": 3}


def load(
    where: str,
    *,
    task: str | None,
    revision: str | None,
    random_weights: bool,
    trust_remote_code: bool,
    cache: bool = True,
) -> Model:
    """Call the factory, which returns a module, or a module and its example inputs.

    Raises:
        ModelError: the factory cannot be imported or called, or returns something else; an option that a module
            has no use for.
    """
    refuse(where, revision=revision, random_weights=random_weights)
    name, attribute = where.split(":")
    try:
        with _current_folder():
            made = getattr(importlib.import_module(name), attribute)()
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ModelError(f"{where} could not be called: {type(error).__name__}: {first_line(error)}.") from error
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{where} returned {type(module).__name__}; expected an nn.Module, or (nn.Module, example inputs)."
        )
    return wrap(module, inputs, task=task, name=where, cache=cache)


def refuse(label: str, *, revision: str | None, random_weights: bool) -> None:
    """Refuse what only a published architecture has: revisions, and weights apart from it.

    Raises:
        ModelError: either was asked for.
    """
    if revision is not None:
        raise ModelError(f"{label} is code, not a hub repository, so it has no revision; leave --revision out.")
    if random_weights:
        raise ModelError(
            f"{label} comes with the weights its code gives it; leave --random-weights out, or make them random there."
        )


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Let the user's own file in the current folder be imported: last on the path, and only meanwhile.

    A folder there called ``datasets`` or ``openvino`` must not pass for the library.
    """
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def wrap(
    module: torch.nn.Module, example_inputs: Any, *, task: str | None, name: str | None = None, cache: bool = True
) -> Model:
    """Describe a module by what it takes and by what it returns for its example inputs.

    Args:
        module: anyone's own.
        example_inputs: a tensor, a tuple of tensors in the order of its forward pass, or a dict of them.
        task: one of `TASKS`; None guesses it from the shapes.
        name: how messages call it.
        cache: call a language model with its KV cache, which must then be found.

    Raises:
        ModelError: no example inputs, a forward pass that fails or returns no tensors, or a language model without a
            cache.
    """
    module = module.eval().float()
    label = name or type(module).__name__
    named = _named(module, example_inputs, label)
    _check_example(named, label)
    example = _two_samples(named)
    try:
        with torch.inference_mode():
            returned = module(**example)
    except Exception as error:  # user code may raise anything
        raise ModelError(
            f"{label} fails on its example inputs: {type(error).__name__}: {first_line(error)}."
        ) from error
    outputs = _output_names(returned, label)
    answer = "logits" if "logits" in outputs else outputs[0]
    chosen = _task(task, _flatten(returned)[outputs.index(answer)], example, label)
    axes = {key: _axes(key, value) for key, value in example.items()}
    model = Model(
        name=label,
        source="module",
        task=chosen,
        module=module,
        call=partial(_call, names=tuple(example)),
        inputs=tuple(example),
        outputs=outputs,
        answer=answer,
        example=example,
        dynamic_axes=axes,
        preprocess=Preprocess(tuple(example), "tensor", as_numpy(example)),
        save=partial(_save, label, chosen, example),
        limitations=(*_fixed(example, axes), *_assumed(returned, outputs, answer, chosen if task is None else None)),
    )
    if chosen != "text-generation":
        return model
    from compressor.models.kv_cache import with_cache

    return with_cache(model, cache)


def _fixed(example: dict[str, torch.Tensor], axes: dict[str, dict[int, str]]) -> Iterator[Limitation]:
    """The inputs whose sizes beyond the batch are those of the example."""
    for name, value in example.items():
        fixed = [str(size) for axis, size in enumerate(value.shape) if axis not in axes[name]]
        if fixed:
            yield Limitation(
                f"shape of {name}",
                f"every sample has the sizes of the example, {' x '.join(fixed)}; others are refused",
            )


def _assumed(returned: Any, outputs: tuple[str, ...], answer: str, guessed: str | None) -> Iterator[Limitation]:
    """What is left out of a module's answer, and what was assumed of it."""
    if isinstance(returned, Mapping):
        others = [f"{name} ({type(value).__name__})" for name, value in returned.items() if name not in outputs]
    else:
        values = returned if isinstance(returned, tuple | list) else ()
        others = [type(value).__name__ for value in values if not isinstance(value, torch.Tensor)]
    others = [each for each in others if not each.endswith(("NoneType", "NoneType)"))]
    if others:
        yield Limitation("outputs left out", f"{', '.join(others)}: only tensors are exported")
    if len(outputs) > 1 and answer != "logits":
        yield Limitation("judged output", f"{answer}, the first of {len(outputs)}; the others are not judged")
    if guessed is not None:
        yield Limitation("task", f"taken for {guessed} by the shape of its answer; --task says otherwise")


def _named(module: torch.nn.Module, inputs: Any, label: str) -> dict[str, torch.Tensor]:
    if inputs is None:
        raise ModelError(
            f"{label} came without example inputs; return (module, inputs), a tensor, tuple or dict of tensors."
        )
    if isinstance(inputs, dict):
        return {str(key): value for key, value in inputs.items()}
    values = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    names = list(inspect.signature(module.forward).parameters)
    if len(values) > len(names):
        raise ModelError(f"{label} came with {len(values)} example inputs, but forward takes {len(names)}.")
    return dict(zip(names, values, strict=False))


def _check_example(example: dict[str, Any], label: str) -> None:
    """Every input must be a tensor whose first axis holds as many samples as that of the others."""
    for name, value in example.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) == 0:
            found = f"the shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ModelError(f"{label}: example input {name} is {found}; expected a tensor, first axis the samples.")
    if len({len(value) for value in example.values()}) > 1:
        rows = ", ".join(f"{name} {len(value)}" for name, value in example.items())
        raise ModelError(f"{label}: the example inputs have different numbers of samples ({rows}); expected the same.")


def _two_samples(example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two samples, because a batch of one would be traced as a constant; floats as float32, as the module."""
    return {name: _floating(torch.cat([value, value])[:2].detach().cpu()) for name, value in example.items()}


def _floating(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


def _flatten(returned: Any) -> list[torch.Tensor]:
    if isinstance(returned, torch.Tensor):
        return [returned]
    values = returned.values() if hasattr(returned, "items") else returned
    if not isinstance(values, Iterable):
        return []
    return [value for value in values if isinstance(value, torch.Tensor)]


def _output_names(returned: Any, label: str) -> tuple[str, ...]:
    tensors = _flatten(returned)
    if not tensors:
        raise ModelError(
            f"{label} returned {type(returned).__name__} without tensors; expected a tensor, tuple or dict."
        )
    if hasattr(returned, "items"):
        return tuple(key for key, value in returned.items() if isinstance(value, torch.Tensor))
    return ("output",) if len(tensors) == 1 else tuple(f"output_{position}" for position in range(len(tensors)))


def _call(module: torch.nn.Module, *tensors: torch.Tensor, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(_flatten(module(**dict(zip(names, tensors, strict=True)))))


def _task(task: str | None, answer: torch.Tensor, example: dict[str, torch.Tensor], label: str) -> str:
    """The task asked for if the answer has its shape, else the one that shape suggests."""
    if answer.ndim < 2 or len(answer) != 2:
        raise ModelError(
            f"{label} answers two samples with the shape {list(answer.shape)}; expected a first axis of samples and "
            "at least one more."
        )
    axes = AXES.get(task or "", answer.ndim)
    if answer.ndim != axes or (task == "text-generation" and "input_ids" not in example):
        needs = "input_ids and logits [batch, tokens, vocabulary]" if axes == 3 else "an answer [batch, values]"
        raise ModelError(f"{label} answers with {answer.ndim} axes, but {task} needs {needs}; leave --task out.")
    return task or _guess_task(answer, example)


def _guess_task(answer: torch.Tensor, example: dict[str, torch.Tensor]) -> str:
    picture = next(iter(example.values())).ndim == 4
    if answer.ndim == 2:
        return "image-classification" if picture else "text-classification"
    return "image-feature-extraction" if picture else "feature-extraction"


def _axes(name: str, value: torch.Tensor) -> dict[int, str]:
    tokens = value.ndim == 2 and not value.is_floating_point()
    return {0: "batch", 1: "sequence"} if tokens else {0: "batch"}


def _save(label: str, task: str, example: dict[str, torch.Tensor], folder: Path) -> None:
    inputs = {name: {"shape": list(value.shape[1:]), "dtype": str(value.dtype)} for name, value in example.items()}
    (folder / "config.json").write_text(json.dumps({"model": label, "task": task, "inputs": inputs}, indent=2) + "\n")
