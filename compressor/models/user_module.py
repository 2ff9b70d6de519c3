"""User-defined modules: an `nn.Module` passed in Python, or named as ``package.module:factory``."""

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

# Number of axes of the judged output, for the tasks that determine it.
AXES = {"image-classification": 2, "text-classification": 2, "sentence-similarity": 2, "text-generation": 3}


def load(
    location: str,
    *,
    task: str | None,
    revision: str | None,
    random_weights: bool,
    trust_remote_code: bool,
    cache: bool = True,
) -> Model:
    """Call the factory, which returns a module, or a module and its example inputs.

    Raises:
        ModelError: the factory cannot be imported or called, returns another type, or an option does not apply to
            modules.
    """
    refuse(location, revision=revision, random_weights=random_weights)
    name, attribute = location.split(":")
    try:
        with _current_folder():
            returned = getattr(importlib.import_module(name), attribute)()
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ModelError(f"{location} could not be called: {type(error).__name__}: {first_line(error)}.") from error
    module, inputs = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{location} returned {type(module).__name__}; expected an nn.Module, or (nn.Module, example inputs)."
        )
    return wrap(module, inputs, task=task, name=location, cache=cache)


def refuse(label: str, *, revision: str | None, random_weights: bool) -> None:
    """Reject the options that do not apply to user-defined modules.

    Raises:
        ModelError: `revision` or `random_weights` is set.
    """
    if revision is not None:
        raise ModelError(f"{label} is code, not a hub repository, so it has no revision; leave --revision out.")
    if random_weights:
        raise ModelError(
            f"{label} sets its weights in its own code; leave --random-weights out, or randomize them in that code."
        )


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Append the current folder to `sys.path` temporarily, so that a user's file in it can be imported.

    It is the last entry, so that a folder such as ``datasets`` or ``openvino`` does not shadow the library.
    """
    folder = str(Path.cwd())
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def wrap(
    module: torch.nn.Module, example_inputs: Any, *, task: str | None, name: str | None = None, cache: bool = True
) -> Model:
    """Build the model description of a module from its outputs for the example inputs.

    Args:
        module: a user-defined module.
        example_inputs: a tensor, a tuple of tensors in the order of the arguments of `forward`, or a dict of tensors.
        task: one of `TASKS`; None infers it from the shapes.
        name: name of the module in messages; its class name by default.
        cache: call a language model with its KV cache; it is an error if none is detected.

    Raises:
        ModelError: the example inputs are missing, the forward pass fails or returns no tensors, or the cache of a
            language model cannot be detected.
    """
    dtypes = {name: value.dtype for name, value in module.state_dict().items() if value.is_floating_point()}
    module = module.eval().float()
    label = name or type(module).__name__
    inputs_by_name = _name_inputs(module, example_inputs, label)
    _check_example(inputs_by_name, label)
    example = _two_samples(inputs_by_name)
    try:
        with torch.inference_mode():
            returned = module(**example)
    except Exception as error:  # user code may raise anything
        raise ModelError(
            f"{label} fails on its example inputs: {type(error).__name__}: {first_line(error)}."
        ) from error
    outputs = _output_names(returned, label)
    answer = "logits" if "logits" in outputs else outputs[0]
    resolved_task = _task(task, _flatten(returned)[outputs.index(answer)], example, label)
    axes = {key: _axes(key, value) for key, value in example.items()}
    model = Model(
        name=label,
        source="module",
        task=resolved_task,
        module=module,
        call=partial(_call, names=tuple(example)),
        inputs=tuple(example),
        outputs=outputs,
        answer=answer,
        example=example,
        dynamic_axes=axes,
        preprocess=Preprocess(tuple(example), "tensor", as_numpy(example)),
        save=partial(_save, label, resolved_task, example),
        limitations=(
            *_fixed_shapes(example, axes),
            *_assumptions(returned, outputs, answer, resolved_task if task is None else None),
        ),
        dtypes=dtypes,
    )
    if resolved_task != "text-generation":
        return model
    from compressor.models.kv_cache import with_cache

    return with_cache(model, cache)


def _fixed_shapes(example: dict[str, torch.Tensor], axes: dict[str, dict[int, str]]) -> Iterator[Limitation]:
    """Yield a limitation for every input that has static axes other than the batch."""
    for name, value in example.items():
        fixed = [str(size) for axis, size in enumerate(value.shape) if axis not in axes[name]]
        if fixed:
            yield Limitation(
                f"shape of {name}",
                f"every sample must have the shape of the example, {' x '.join(fixed)}; other shapes are rejected",
            )


def _assumptions(returned: Any, outputs: tuple[str, ...], answer: str, inferred: str | None) -> Iterator[Limitation]:
    """Yield the outputs that are left out, and the assumptions about the judged output and the task."""
    if isinstance(returned, Mapping):
        others = [f"{name} ({type(value).__name__})" for name, value in returned.items() if name not in outputs]
    else:
        values = returned if isinstance(returned, tuple | list) else ()
        others = [type(value).__name__ for value in values if not isinstance(value, torch.Tensor)]
    others = [other for other in others if not other.endswith(("NoneType", "NoneType)"))]
    if others:
        yield Limitation("outputs left out", f"{', '.join(others)}: only tensors are exported")
    if len(outputs) > 1 and answer != "logits":
        yield Limitation(
            "judged output", f"{answer}, the first of {len(outputs)}; quality is not measured on the others"
        )
    if inferred is not None:
        yield Limitation("task", f"{inferred} is assumed from the shape of the output; set another task with --task")


def _name_inputs(module: torch.nn.Module, inputs: Any, label: str) -> dict[str, torch.Tensor]:
    if inputs is None:
        raise ModelError(
            f"{label} has no example inputs; return (module, inputs), with inputs a tensor, tuple or dict of tensors."
        )
    if isinstance(inputs, dict):
        return {str(key): value for key, value in inputs.items()}
    values = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    names = list(inspect.signature(module.forward).parameters)
    if len(values) > len(names):
        raise ModelError(
            f"{label} has {len(values)} example inputs, but forward takes {len(names)}; pass one per argument."
        )
    return dict(zip(names, values, strict=False))


def _check_example(example: dict[str, Any], label: str) -> None:
    """Check that every input is a tensor and that all inputs have the same batch size.

    Raises:
        ModelError: an input is not a tensor, has no samples, or differs from the others in batch size.
    """
    for name, value in example.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) == 0:
            actual = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ModelError(
                f"{label}: example input {name} is {actual}; expected a tensor with the batch as first axis."
            )
    if len({len(value) for value in example.values()}) > 1:
        rows = ", ".join(f"{name} {len(value)}" for name, value in example.items())
        raise ModelError(
            f"{label}: the example inputs have different batch sizes ({rows}); expected the same batch size."
        )


def _two_samples(example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs with a batch of two, because a size of one is traced as a constant, and floats as float32."""
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
            f"{label} returned {type(returned).__name__} without tensors; expected a tensor, tuple or dict of tensors."
        )
    if hasattr(returned, "items"):
        return tuple(key for key, value in returned.items() if isinstance(value, torch.Tensor))
    return ("output",) if len(tensors) == 1 else tuple(f"output_{position}" for position in range(len(tensors)))


def _call(module: torch.nn.Module, *tensors: torch.Tensor, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(_flatten(module(**dict(zip(names, tensors, strict=True)))))


def _task(task: str | None, answer: torch.Tensor, example: dict[str, torch.Tensor], label: str) -> str:
    """Return `task` if the output has a matching shape; infer it from the shapes if `task` is None."""
    if answer.ndim < 2 or len(answer) != 2:
        raise ModelError(
            f"{label} returns an output of shape {list(answer.shape)} for a batch of two; expected the batch as first "
            "axis and at least one more axis."
        )
    axes = AXES.get(task or "", answer.ndim)
    if answer.ndim != axes or (task == "text-generation" and "input_ids" not in example):
        needs = "input_ids and logits [batch, tokens, vocabulary]" if axes == 3 else "an output [batch, values]"
        raise ModelError(
            f"{label} returns an output with {answer.ndim} axes, but {task} needs {needs}; leave --task out."
        )
    return task or _infer_task(answer, example)


def _infer_task(answer: torch.Tensor, example: dict[str, torch.Tensor]) -> str:
    is_image = next(iter(example.values())).ndim == 4
    if answer.ndim == 2:
        return "image-classification" if is_image else "text-classification"
    return "image-feature-extraction" if is_image else "feature-extraction"


def _axes(name: str, value: torch.Tensor) -> dict[int, str]:
    tokens = value.ndim == 2 and not value.is_floating_point()
    return {0: "batch", 1: "sequence"} if tokens else {0: "batch"}


def _save(label: str, task: str, example: dict[str, torch.Tensor], folder: Path) -> None:
    inputs = {name: {"shape": list(value.shape[1:]), "dtype": str(value.dtype)} for name, value in example.items()}
    (folder / "config.json").write_text(json.dumps({"model": label, "task": task, "inputs": inputs}, indent=2) + "\n")
