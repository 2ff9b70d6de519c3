"""User-defined modules: an `nn.Module` passed in Python, or named as ``package.module:factory``."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from compressor.choices import CTC
from compressor.errors import Terminated
from compressor.limitations import Limitation
from compressor.models import class_names
from compressor.models.base import Model, ModelError, as_numpy, first_line
from compressor.models.preprocess import Preprocess
from compressor.models.weights.unregistered import ADVICE, read_by
from passes.torch_internals import forward_hooks, remove_backward_hooks, uncompiled

# Values in an output that are reported as left out, because they are not tensors.
PLAIN = (bool, int, float, complex, str, bytes, np.ndarray, np.generic, torch.dtype, torch.device, torch.Size)
# Parts of torch's messages on operands of two types.
OTHER_TYPES = ("must have the same dtype", "expected scalar type", "to have the same dtype", "type not equal")
# Number of axes of the judged output, for the tasks that determine it.
AXES = {
    "image-classification": 2,
    "text-classification": 2,
    "sentence-similarity": 2,
    "question-answering": 2,
    "text-generation": 3,
    "token-classification": 3,
    "fill-mask": 3,
    "depth-estimation": 3,
    "audio-classification": 2,
    "audio-frame-classification": 3,
    CTC: 3,
    "video-classification": 2,
    "image-segmentation": 4,
    "object-detection": 3,
    "audio-xvector": 2,
}
# What the output must be instead, by its number of axes.
NEEDS = {
    2: "an output [batch, values]",
    3: "input_ids and logits [batch, tokens, vocabulary]",
    4: "logits [batch, classes, height, width]",
}
PER_TOKEN = 3  # axes of an output for each token
SPAN = ("start_logits", "end_logits")  # the outputs that question answering needs


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
    if name.endswith(".py"):
        raise ModelError(
            f"{location} names a file; expected an importable module, so leave .py out, separate folders by dots, and "
            f"run the command in the folder of the file: {Path(name).stem}:{attribute}."
        )
    try:
        with _current_folder():
            factory = getattr(importlib.import_module(name), attribute)
            returned = None if isinstance(factory, torch.nn.Module) else factory()
    except Terminated:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ModelError(f"{location} could not be called: {type(error).__name__}: {first_line(error)}.") from error
    if isinstance(factory, torch.nn.Module):
        raise ModelError(
            f"{location} is a module of the class {type(factory).__name__}; expected a function without arguments that "
            "returns (module, example inputs), so write one and name it."
        )
    module, inputs = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{location} returned {type(module).__name__}; expected an nn.Module, or (nn.Module, example inputs)."
        )
    module = uncompiled(module)
    _check_weights(module, location)
    dtypes, narrowed = _dtypes(module), tuple(_narrowed(dict(_state(module)), "weights"))
    model = _described(module.eval().float().cpu(), inputs, task=task, label=location, cache=cache)
    return dataclasses.replace(model, dtypes=dtypes, limitations=(*narrowed, *model.limitations))


def _dtypes(module: torch.nn.Module) -> dict[str, torch.dtype]:
    """Return the types of the float weights, by name."""
    return {name: value.dtype for name, value in _state(module) if value.is_floating_point()}


def _state(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a module's state by name; a state may also hold what `get_extra_state` returns."""
    for name, value in module.state_dict().items():
        yield from ((name, each) for each in (value if isinstance(value, tuple) else (value,)) if torch.is_tensor(each))


def _check_weights(module: torch.nn.Module, label: str) -> None:
    """Check that every weight and buffer is a dense tensor with values, and that the modules are written in Python.

    Raises:
        ModelError: one is on the device meta, is of a lazy module that has not run, is sparse, is quantized, or is of a
            class that holds other tensors; or a module is a ScriptModule or was made by torch.export.
    """
    for name, inner in module.named_modules():
        exported = isinstance(inner, torch.fx.GraphModule) and "eval" in vars(inner)  # its modes cannot be changed
        if exported or isinstance(inner, torch.jit.ScriptModule):
            kind = "the module of an exported program" if exported else "a ScriptModule"
            raise ModelError(
                f"{label}: {name or 'the module'} is {kind}, which torch.export does not trace; return the module in "
                "Python that it was made from."
            )
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        lazy = is_lazy(value)
        if lazy or value.is_meta or value.layout != torch.strided:
            found = "has no shape yet" if lazy else "has no values" if value.is_meta else f"is stored as {value.layout}"
            raise ModelError(
                f"{label}: its weight {name} {found}; expected dense weights with values, so run a lazy module once, "
                "and load the weights before."
            )
        if hasattr(value, "__tensor_flatten__"):
            raise ModelError(
                f"{label}: its weight {name} is a {type(value).__name__}, which holds other tensors, as torchao's "
                "quantized and torch's sharded ones do; expected plain float weights, so return the module before it "
                "is quantized or sharded, and have the engine quantized with --int8."
            )
    for name, value in _state(module):
        if value.is_quantized:
            raise ModelError(
                f"{label}: its weight {name} is quantized by torch ({value.dtype}); expected float weights, so return "
                "the module as it is before quantization, and have the engine quantized with --int8."
            )


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


def wrap(module: torch.nn.Module, example_inputs: Any, *, task: str | None, cache: bool = True) -> Model:
    """Build the model description of a module from its outputs for the example inputs.

    The module is not changed: the model is a copy in evaluation mode, with float32 tensors on the CPU, see `copied`.

    Args:
        module: a user-defined module.
        example_inputs: a tensor, a tuple of tensors in the order of the arguments of `forward`, or a dict of tensors.
        task: one of `TASKS`; None infers it from the shapes.
        cache: call a language model with its KV cache; it is an error if none is detected.

    Raises:
        ModelError: the module cannot be copied, the example inputs are missing, the forward pass fails or returns no
            tensors, or the cache of a language model cannot be detected.
    """
    module = uncompiled(module)
    model = _described(copied(module), example_inputs, task=task, label=type(module).__name__, cache=cache)
    narrowed = tuple(_narrowed(dict(_state(module)), "weights"))
    return dataclasses.replace(model, dtypes=_dtypes(module), limitations=(*narrowed, *model.limitations))


def _described(module: torch.nn.Module, example_inputs: Any, *, task: str | None, label: str, cache: bool) -> Model:
    """Build the model description of a module that may be changed; see `wrap`."""
    for name, inner in reversed(tuple(module.named_modules(remove_duplicate=False))):
        if uncompiled(inner) is not inner:
            module.set_submodule(name, uncompiled(inner))
    inputs_by_name = _name_inputs(module, example_inputs, label)
    _check_example(inputs_by_name, label)
    example = _two_samples(inputs_by_name)
    by_position = _by_position(module, example_inputs)
    _check_registered(module, example, label, by_position)
    returned, values = _returned(module, inputs_by_name, example, label, by_position)
    tensors, others = _flatten(returned, label)
    unchanged = {name: value for name, value in values.items() if torch.equal(value, example[name])}
    repeated = dict(_repeated(tensors, unchanged, module))
    tensors = {name: value for name, value in tensors.items() if name not in repeated}
    outputs = _renamed(tuple(tensors), tuple(example))
    answer, *stacked = _evaluated(task, outputs, label)
    evaluated = list(tensors.values())[outputs.index(answer)]
    resolved_task = _task(task, evaluated, example, label)
    names = _class_names(module, resolved_task, evaluated)
    cached = resolved_task == "text-generation"
    fixed = frozenset() if cached else _fixed_lengths(module, example, by_position)
    lengths = dict.fromkeys(example, "sequence") if cached else _names_of_lengths(module, example, fixed, by_position)
    axes = {key: {0: "batch"} if key in fixed else _axes(value, lengths[key]) for key, value in example.items()}
    model = Model(
        name=label,
        source="module",
        task=resolved_task,
        module=module,
        call=partial(_call, names=() if by_position else tuple(example), outputs=tuple(tensors), label=label),
        inputs=tuple(example),
        outputs=outputs,
        answer=answer,
        stacked=tuple(stacked),
        example=example,
        dynamic_axes=axes,
        preprocess=Preprocess(
            tuple(example),
            "text" if resolved_task == "text-generation" else "tensor",
            as_numpy(example),
            varying={name: (1,) for name in example if 1 in axes[name]},
        ),
        save=partial(_save, label, resolved_task, example, names),
        limitations=(
            *_narrowed(inputs_by_name),
            *_fixed_shapes({name: value for name, value in example.items() if name not in fixed}, axes),
            *_fixed_tokens(example, fixed),
            *_hooks(module),
            *_assumptions(
                _without_cache(others, resolved_task, cache) | repeated,
                outputs,
                (answer, *stacked),
                resolved_task if task is None else None,
            ),
            *(_unnamed_masks(example, axes) if evaluated.ndim == PER_TOKEN else ()),
        ),
        class_names=names,
    )
    if resolved_task != "text-generation":
        return model
    from compressor.models.text.kv_cache import with_cache

    return with_cache(model, cache)


def _without_cache(others: dict[str, str], task: str, cache: bool) -> dict[str, str]:
    """Return the outputs that are left out, without the cache of a language model that is exported with it."""
    from compressor.models.text.kv_cache import CACHE_NAMES

    left_out = () if task != "text-generation" or not cache else CACHE_NAMES
    return {name: kind for name, kind in others.items() if name not in left_out}


def _class_names(module: torch.nn.Module, task: str, answer: torch.Tensor) -> class_names.ClassNames | None:
    return class_names.of_module(module, answer.shape[-1]) if task.endswith("classification") else None


# ---------------------------------------------------------------------------------------------------------- the module


def copied(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a module in evaluation mode, with float32 parameters on the CPU.

    Parameters that have this type and place already are shared, not copied. Buffers and other tensors are copied,
    because a forward pass may change them. Hooks of the forward pass are kept; those of the backward pass are left out.

    Raises:
        ModelError: the module cannot be copied.
    """
    _check_weights(module, type(module).__name__)
    try:
        tensors: dict[int, Any] = {id(parameter): _converted(parameter) for parameter in module.parameters()}
        for value in _other_tensors(module):
            if id(value) not in tensors:
                tensors[id(value)] = kept = _floating(value.detach().cpu().clone())
                if isinstance(value, torch.nn.Parameter):  # one that is not registered stays known as a weight
                    tensors[id(value)] = torch.nn.Parameter(kept, requires_grad=value.requires_grad)
        twin = copy.deepcopy(module, tensors)
    except Exception as error:  # locks, process groups and tensors without data, each with its own error
        raise ModelError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}), and the module "
            "itself must not change; remove what cannot be copied, or pass package.module:factory, whose module is not."
        ) from error
    for inner in twin.modules():
        remove_backward_hooks(inner)
    return twin.eval()


def _other_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield buffers and the tensors in other attributes, also those in lists and dicts."""
    yield from module.buffers()
    for inner in module.modules():
        for value in vars(inner).values():
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            )
            yield from (each for each in values if isinstance(each, torch.Tensor))


def _converted(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return the parameter itself if it is float32 (or no float) on the CPU; a converted copy otherwise."""
    converted = _floating(parameter.detach().cpu())
    if converted.data_ptr() == parameter.data_ptr() and converted.dtype == parameter.dtype:
        return parameter
    return torch.nn.Parameter(converted, requires_grad=parameter.requires_grad)


def _check_registered(module: torch.nn.Module, example: dict[str, torch.Tensor], label: str, by_position: bool) -> None:
    """Check that the forward pass computes with weights that are registered alone.

    Raises:
        ModelError: it reads weights in plain lists, dicts or functions.
    """

    def call() -> None:
        with contextlib.suppress(Exception):  # of all kinds, such as that of half a model in float32
            _run(module, example, by_position)

    names = read_by(call, module)
    if names:
        raise ModelError(f"{label} computes with weights in plain attributes ({', '.join(names)}), {ADVICE}.")


def _returned(
    module: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    example: dict[str, torch.Tensor],
    label: str,
    by_position: bool,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the outputs for two samples, and the inputs after the call.

    Raises:
        ModelError: the forward pass fails. If it does not fail for the user's own batch, the message says so.
    """
    try:
        return _run(module, example, by_position)
    except Exception as error:  # user code may raise anything
        kind, line = type(error).__name__, first_line(error)
        reason, rows = kind if line == kind else f"{kind}: {line}", len(next(iter(inputs.values())))
        if any(text in line for text in OTHER_TYPES):
            raise ModelError(
                f"{label} fails in float32, to which its weights and float inputs are converted ({reason}); leave "
                ".double(), .half() and other conversions to a type of their own out of forward."
            ) from error
        if rows == len(next(iter(example.values()))) or not _runs(module, inputs, by_position):
            raise ModelError(f"{label} fails on its example inputs: {reason}.") from error
        raise ModelError(
            f"{label} computes its example inputs, a batch of {rows}, but not a batch of two ({reason}); Compressor "
            "needs a forward pass that works at any batch size, so replace the fixed size in it."
        ) from error


def _by_position(module: torch.nn.Module, example_inputs: Any) -> bool:
    """Return whether inputs are passed by position, as a tuple is. Hooks do not see arguments that have a keyword."""
    if isinstance(example_inputs, dict):
        return False
    given = len(example_inputs) if isinstance(example_inputs, tuple | list) else 1
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()][:given]
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # *args, which takes all that follow
        kinds = kinds[: kinds.index(inspect.Parameter.VAR_POSITIONAL)]
    return all(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)


def _called(module: torch.nn.Module, names: tuple[str, ...], tensors: tuple[torch.Tensor, ...]) -> Any:
    """Call a module by keyword, or by position if there are no names.

    Raises:
        ModelError: the module calls `sys.exit`, which would end the command as if it had succeeded.
    """
    try:
        return module(**dict(zip(names, tensors, strict=True))) if names else module(*tensors)
    except Terminated:
        raise
    except SystemExit as error:
        name = type(module).__name__
        raise ModelError(f"the forward pass of {name} calls sys.exit({error}); remove the call from it.") from error


def _run(
    module: torch.nn.Module, example: dict[str, torch.Tensor], by_position: bool
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the outputs for copies of the inputs, and these copies, which the module may have changed."""
    with torch.inference_mode():
        values = {name: _floating(value.detach().cpu().clone()) for name, value in example.items()}
        return _called(module, () if by_position else tuple(values), tuple(values.values())), values


def _runs(module: torch.nn.Module, example: dict[str, torch.Tensor], by_position: bool) -> bool:
    try:
        _run(module, example, by_position)
    except Exception:  # any error of the module's own code
        return False
    return True


def _fixed_lengths(module: torch.nn.Module, example: dict[str, torch.Tensor], by_position: bool) -> frozenset[str]:
    """Return the inputs of tokens whose number of tokens cannot vary, by calling the module with one token less.

    Inputs of the same length are shortened together. Two tokens become three, because one would be broadcast.
    """
    lengths = {name: value.shape[1] for name, value in example.items() if _holds_tokens(value)}
    fixed = {name for name, length in lengths.items() if length == 1}  # torch.export treats a size of 1 as a constant
    for length in set(lengths.values()) - {1}:
        group = {name for name, each in lengths.items() if each == length}
        other = {name: _other_length(value) if name in group else value for name, value in example.items()}
        if not _runs(module, other, by_position):
            fixed |= group
    return frozenset(fixed)


def _names_of_lengths(
    module: torch.nn.Module, example: dict[str, torch.Tensor], fixed: Collection[str], by_position: bool
) -> dict[str, str]:
    """Return the name of the length of each input; lengths that may differ have names of their own.

    An engine takes one size for one name. The texts of two encoders, or of an encoder and a decoder, have two: they are
    of different lengths in the example, or the module computes one of them with a token less.
    """
    names = dict.fromkeys(example, "sequence")
    first, *others = [name for name, value in example.items() if name not in fixed and _holds_tokens(value)] or [""]
    groups = [[first]]
    for name in others:
        own = next((group for group in groups if not _varies_alone(module, example, group[0], name, by_position)), None)
        if own is None:
            groups.append([name])
        else:
            own.append(name)
    names |= {name: f"{group[0]}_sequence" for group in groups[1:] for name in group}
    return names


def _varies_alone(
    module: torch.nn.Module, example: dict[str, torch.Tensor], first: str, name: str, by_position: bool
) -> bool:
    """Return whether a module takes another length of an input than of the first one."""
    if example[first].shape[1] != example[name].shape[1]:
        return True
    return _runs(module, example | {name: _other_length(example[name])}, by_position)


def _other_length(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, :-1] if tokens.shape[1] > 2 else torch.cat([tokens, tokens[:, -1:]], 1)


# ---------------------------------------------------------------------------------------------------------- limitations


def _fixed_shapes(example: dict[str, torch.Tensor], axes: dict[str, dict[int, str]]) -> Iterator[Limitation]:
    """Yield a limitation for every input that has static axes other than the batch."""
    for name, value in example.items():
        fixed = [str(size) for axis, size in enumerate(value.shape) if axis not in axes[name]]
        if fixed:
            yield Limitation(
                f"shape of {name}",
                f"every sample must have the shape of the example, {' x '.join(fixed)}; other shapes are rejected",
            )


def _fixed_tokens(example: dict[str, torch.Tensor], fixed: Collection[str]) -> Iterator[Limitation]:
    """Yield a limitation for every input of tokens whose number of tokens cannot vary."""
    static = [name for name, value in example.items() if not _holds_tokens(value) and value.ndim > 1]
    beside = f" while {' and '.join(static)} keep{'s' * (len(static) == 1)} the shape of the example" if static else ""
    for name in (name for name in example if name in fixed):
        length = example[name].shape[1]
        reason = (
            f"the module fails with another number of tokens{beside}" if length > 1 else "the example has one token"
        )
        yield Limitation(
            f"length of {name}", f"{reason}, so every sample must have {length} tokens; other lengths are rejected"
        )


def _hooks(module: torch.nn.Module) -> Iterator[Limitation]:
    """Yield a limitation if the module has hooks of the forward pass, which are traced like its own code."""
    named = [name or "the module" for name, inner in module.named_modules() if _has_own_hooks(inner)]
    if named:
        yield Limitation(
            "forward hooks",
            f"those of {', '.join(named[:3])}{f' and {len(named) - 3} more' if len(named) > 3 else ''} become part of "
            "the model; remove hooks that only record values",
        )


def _has_own_hooks(inner: torch.nn.Module) -> bool:
    """Return whether a module has forward hooks, other than those with which torch computes its weight."""
    return any(not type(hook).__module__.startswith("torch.nn.utils") for hook in forward_hooks(inner))


def _assumptions(
    others: dict[str, str], outputs: tuple[str, ...], judged: tuple[str, ...], inferred: str | None
) -> Iterator[Limitation]:
    """Yield the outputs that are left out, and the assumptions about the judged output and the task."""
    if others:
        named = ", ".join(f"{name} ({kind})" for name, kind in others.items())
        yield Limitation("outputs left out", f"{named}: only computed tensors are exported, each once")
    if len(outputs) > 1 and len(judged) == 1 and judged[0] != "logits":
        yield Limitation(
            "judged output", f"{judged[0]}, the first of {len(outputs)} outputs; quality is not measured on the others"
        )
    if inferred is not None:
        yield Limitation("task", f"{inferred} is assumed from the shape of the output; set another task with --task")


def _unnamed_masks(example: dict[str, torch.Tensor], axes: dict[str, dict[int, str]]) -> Iterator[Limitation]:
    """Yield a limitation for an input that looks like the mask of padding, under a name that the metrics do not know.

    An output for each token is judged without padding where ``attention_mask`` tells it.
    """
    if "attention_mask" in example:
        return
    _, *others = [name for name in example if 1 in axes[name]] or [""]
    for name in others:
        if name == "token_type_ids" or int(example[name].min()) < 0 or int(example[name].max()) > 1:
            continue
        yield Limitation(
            "padding",
            f"counted like other tokens, because the module has no input attention_mask; if {name} is the mask of "
            "padding, name it so",
        )


# ------------------------------------------------------------------------------------------------------ inputs, outputs


def _name_inputs(module: torch.nn.Module, inputs: Any, label: str) -> dict[str, torch.Tensor]:
    if inputs is None:
        raise ModelError(
            f"{label} has no example inputs; return (module, inputs), with inputs a tensor, tuple or dict of tensors."
        )
    if isinstance(inputs, dict):
        return {str(key): value for key, value in inputs.items()}
    values = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        repeated = parameter.kind is inspect.Parameter.VAR_POSITIONAL  # wrappers such as DataParallel take *inputs
        rest = range(len(values) - len(names))
        names += [f"{parameter.name}_{index}" for index in rest] if repeated else [parameter.name]
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
        if value.is_floating_point() and value.isnan().any():
            raise ModelError(f"{label}: example input {name} holds NaN; expected numbers.")
    if len({len(value) for value in example.values()}) > 1:
        rows = ", ".join(f"{name} {len(value)}" for name, value in example.items())
        raise ModelError(
            f"{label}: the example inputs have different batch sizes ({rows}); expected the same batch size, because "
            "each input is cut into samples along its first axis. Keep what all samples share, such as the edges of "
            "one graph, as a buffer of the module."
        )


def _narrowed(tensors: Mapping[str, torch.Tensor], kind: str = "inputs") -> Iterator[Limitation]:
    """Yield a limitation for float64 inputs or weights, which have more digits than the float32 that is computed in."""
    names = [name for name, value in tensors.items() if value.dtype == torch.float64]
    if names:
        listed = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        yield Limitation(f"float64 {kind}", f"{listed}: converted to float32, in which engines compute")


def _two_samples(example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs with a batch of two, because a size of one is traced as a constant, and floats as float32."""
    return {name: _floating(torch.cat([value, value])[:2].detach().cpu()) for name, value in example.items()}


def _floating(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


def _flatten(returned: Any, label: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of nested outputs by name, and the types of all other values but None by name.

    A name is the path to the value: keys, field names and positions, joined by dots, as in ``encoder.0``. A single
    tensor is ``output``; the entries of an outermost tuple are ``output_0``, ``output_1``.

    Raises:
        ModelError: an output is neither a dense real tensor nor a container nor a plain value, two have the same
            name, or there is no tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, str] = {}
    for path, value in _leaves(returned, (), label):
        name = _output_name(path)
        if name in tensors or name in others:
            raise ModelError(f"{label} returns two outputs with the name {name}; rename one of the keys.")
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_complex():
                found = value.dtype if value.is_complex() else value.layout
                raise ModelError(f"{label} returns {name} as {found}; return a dense tensor of real numbers.")
            tensors[name] = value
        elif value is not None:
            others[name] = type(value).__name__
    if not tensors:
        raise ModelError(
            f"{label} returned {type(returned).__name__} without tensors; expected a tensor, tuple or dict of tensors."
        )
    if len(tensors) == 1 and re.fullmatch(r"output_\d+", name := next(iter(tensors))):
        tensors = {"output": tensors[name]}
    return tensors, others


def _repeated(
    tensors: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], module: torch.nn.Module
) -> Iterator[tuple[str, str]]:
    """Yield the outputs that are an input, a weight, or the same tensor as an output before, with a phrase for each.

    An ONNX file has one name for a value. A module that computes nothing keeps its first output.
    """
    names = {_storage(value): f"the weight {name}" for name, value in _state(module)}
    names |= {_storage(value): f"the input {name}" for name, value in inputs.items()}
    if all(_storage(value) in names for value in tensors.values()):
        names = {}
    for name, value in tensors.items():
        if _storage(value) in names:
            yield name, names[_storage(value)]
        else:
            names[_storage(value)] = f"the same as {name}"


def _storage(value: torch.Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _leaves(value: Any, path: tuple[str, ...], label: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the value of everything in nested containers that is no container."""
    if value is None or isinstance(value, (torch.Tensor, *PLAIN)) or _is_cache(value):
        yield path, value
    elif (entries := _entries(value, not path)) is not None:
        for key, entry in entries:
            yield from _leaves(entry, (*path, key), label)
    else:
        place = f" at {_output_name(path)}" if path else ""
        raise ModelError(
            f"{label} returns an object of the class {type(value).__name__}{place}, in which tensors cannot be found; "
            "return a tensor, tuple, dict or dataclass, or wrap the module in one that does."
        )


def _entries(value: Any, outermost: bool) -> Iterator[tuple[str, Any]] | None:
    """Return the entries of a container with their names; None if the value is no container."""
    if hasattr(value, "items") and callable(value.items):  # dict, OrderedDict, ModelOutput, BatchEncoding
        return ((str(key), entry) for key, entry in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, tuple) and type(value) is not tuple:
        fields = getattr(type(value), "__match_args__", ())  # of a named tuple
        if len(fields) == len(value):
            return ((str(name), entry) for name, entry in zip(fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return ((f"output_{index}" if outermost else str(index), entry) for index, entry in enumerate(value))
    return None


def _output_name(path: tuple[str, ...]) -> str:
    """Return the name of an output: letters, digits, underscores, dots and hyphens."""
    return ".".join(re.sub(r"[^\w.-]", "_", key, flags=re.ASCII) or "_" for key in path) or "output"


def _is_cache(value: Any) -> bool:
    """Return whether a value is a KV cache, as `kv_cache` recognizes it: an object with layers."""
    return hasattr(value, "layers")


def _renamed(outputs: tuple[str, ...], inputs: tuple[str, ...]) -> tuple[str, ...]:
    """Return output names that differ from the input names, because an ONNX file has one list of names."""
    prefix = "output."
    while any(f"{prefix}{name}" in (*outputs, *inputs) for name in outputs if name in inputs):
        prefix += "output."
    return tuple(f"{prefix}{name}" if name in inputs else name for name in outputs)


def _call(
    module: torch.nn.Module, *tensors: torch.Tensor, names: tuple[str, ...], outputs: tuple[str, ...], label: str
) -> tuple[torch.Tensor, ...]:
    returned, _ = _flatten(_called(module, names, tensors), label)
    return tuple(returned[name] for name in outputs)


def _evaluated(task: str | None, outputs: tuple[str, ...], label: str) -> tuple[str, ...]:
    """Return the outputs that quality is measured on; with question answering, the first and the last token's."""
    if task == "question-answering":
        if not set(SPAN) <= set(outputs):
            raise ModelError(
                f"{label} returns {', '.join(outputs)}, but question-answering needs {' and '.join(SPAN)}; return a "
                "dict with these names, or leave --task out."
            )
        return SPAN
    return ("logits",) if "logits" in outputs else outputs[:1]


def _task(task: str | None, answer: torch.Tensor, example: dict[str, torch.Tensor], label: str) -> str:
    """Return `task` if the output has a matching shape; infer it from the shapes if `task` is None."""
    if answer.ndim < 2 or len(answer) != 2:
        one = answer.ndim == 1 and len(answer) == 2
        remedy = "return a number for each sample as [batch, 1]" if one else "forward must keep the samples apart"
        raise ModelError(
            f"{label} returns an output of shape {list(answer.shape)} for a batch of two; expected the batch as first "
            f"axis and at least one more axis, so {remedy}."
        )
    if not answer.is_floating_point():
        raise ModelError(
            f"{label} returns an output of {answer.dtype}, which quality is not measured on; return numbers as the "
            "first output, such as logits, or under the name logits, and decisions such as an argmax beside them."
        )
    axes = AXES.get(task or "", answer.ndim)
    if answer.ndim != axes or (task == "text-generation" and "input_ids" not in example):
        needs = "a depth [batch, height, width]" if task == "depth-estimation" else NEEDS[axes]
        raise ModelError(
            f"{label} returns an output with {answer.ndim} axes, but {task} needs {needs}; leave --task out."
        )
    return task or _infer_task(answer, example)


def _infer_task(answer: torch.Tensor, example: dict[str, torch.Tensor]) -> str:
    is_image = next(iter(example.values())).ndim == 4
    if answer.ndim == 2:
        return "image-classification" if is_image else "text-classification"
    return "image-feature-extraction" if is_image else "feature-extraction"


def _axes(value: torch.Tensor, length: str) -> dict[int, str]:
    """Return the names of the dynamic axes of an input; `length` is that of its tokens."""
    return {0: "batch", 1: length} if _holds_tokens(value) else {0: "batch"}


def _holds_tokens(value: torch.Tensor) -> bool:
    return value.ndim == 2 and not value.is_floating_point()


def _save(
    label: str, task: str, example: dict[str, torch.Tensor], names: class_names.ClassNames | None, folder: Path
) -> None:
    inputs = {name: {"shape": list(value.shape[1:]), "dtype": str(value.dtype)} for name, value in example.items()}
    content: dict[str, Any] = {"model": label, "task": task, "inputs": inputs}
    if names is not None:
        content["id2label"] = names.id2label()
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
