"""The size of the images that a model takes: found by calling it, not by its class or its config.

A model is exported at one size, or with height and width as dynamic axes. A size is accepted if the model computes an
image of that size. Position embeddings are then interpolated as the model does it in `forward`, or as its library does
it while it loads the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from compressor.choices import DYNAMIC, ImageSize
from compressor.limitations import Limitation
from compressor.models.base import ModelError, copy_sharing_tensors, first_line, fixed_size
from passes.graph.cached_functions import forget_results
from passes.torch_internals import FakeTensorMode

Size = tuple[int, int]
Call = Callable[..., tuple[torch.Tensor, ...]]
PROPORTIONS = "proportions of the images"  # the feature of the limitation on processors that keep them
SHAPES = ((48, 64), (64, 48), (64, 64), (96, 96))  # of images that show whether a processor gives all one size
CONFIG_SIZE = "image size of the config"  # the feature of a limitation
# Pixels added to a side to find further sizes; most models need a multiple of their patch or of the stride of a stage.
STEPS = (32, 28, 16, 14, 64, 8, 4)


@dataclass(frozen=True)
class Sizing:
    """The size of the images of an export.

    Attributes:
        size: height and width that the preprocessing gives.
        dynamic: further sizes, on which a graph with dynamic height and width is traced and checked; empty for a
            fixed size. The first is the size of the example inputs.
    """

    size: Size
    dynamic: tuple[Size, ...] = ()

    def example(self, channels: int) -> dict[str, torch.Tensor]:
        """Return the inputs that the model is traced with, [2, channels, height, width]."""
        return {"pixel_values": noise(2, channels, self.dynamic[0] if self.dynamic else self.size)}

    def prepared(self, channels: int) -> dict[str, torch.Tensor]:
        """Return inputs of the size that the preprocessing gives, [2, channels, height, width]."""
        return {"pixel_values": noise(2, channels, self.size)}

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """Return the dynamic axes of the input by name."""
        return {"pixel_values": {0: "batch", 2: "height", 3: "width"} if self.dynamic else {0: "batch"}}

    @property
    def checked(self) -> tuple[Size, ...]:
        """Return the sizes at which the graph is compared with the model."""
        return (self.size, *self.dynamic[1:]) if self.dynamic else ()

    def limitations(self, channels: int) -> Iterator[Limitation]:
        """Yield the limitation of a fixed size, or how a dynamic size was checked."""
        if not self.dynamic:
            yield fixed_size(noise(1, channels, self.size))
            return
        sizes = [text(size) for size in (self.size, *self.dynamic)]
        yield Limitation(
            "image size",
            f"height and width are dynamic; checked at {', '.join(sizes[:-1])} and {sizes[-1]} pixels; other sizes "
            f"must be ones that the model takes, and the data is prepared at {sizes[0]}",
        )


def noise(rows: int, channels: int, size: Size) -> torch.Tensor:
    """Return seeded uniform noise, [rows, channels, height, width]."""
    return torch.rand(rows, channels, *size, generator=torch.Generator().manual_seed(0))


def text(size: Sequence[int]) -> str:
    """Format height and width.

    >>> text((256, 192))
    '256 x 192'
    """
    return " x ".join(map(str, size))


def refusal(call: Call, module: Any, channels: int, size: Size) -> str | None:
    """Return the reason why a model does not compute an image of a size; None if it does.

    Only shapes are propagated. A model that cannot run without values is run on one image. The module is copied because
    some keep tensors of a call, such as the relative positions of ConViT; the copy shares the weights.
    """
    pixels = noise(1, channels, size)
    # Errors of a model have no common base: shapes raise RuntimeError, AssertionError, ValueError and others.
    try:
        copied = copy_sharing_tensors(module)
        with forget_results(module), torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            call(copied, mode.from_tensor(pixels))
    except Exception:
        try:
            with torch.no_grad():
                call(module, pixels)
        except Exception as error:
            return first_line(error)
    return None


def unused_pixels(call: Call, module: Any, channels: int, size: Size) -> Iterator[Limitation]:
    """Yield a limitation if the last rows or columns of pixels do not change the outputs of a model.

    A convolution into patches of 16 pixels ignores what is left of a side that is no multiple of 16. Such pixels have a
    gradient of exactly zero. Nothing is known if all gradients are zero or the model has none, as under `no_grad`.
    """
    pixels = noise(1, channels, size).requires_grad_()
    try:
        with torch.enable_grad():
            outputs = [value.float().square().sum() for value in call(module, pixels)]
            (gradient,) = torch.autograd.grad(torch.stack(outputs).sum(), [pixels])
    except Exception:  # models raise errors of all kinds; those of the size itself were found by `refusal`
        return
    reached = gradient[0].abs().amax(0) != 0
    if not reached.any():
        return
    used = tuple(int(reached.any(axis).nonzero().max()) + 1 for axis in (1, 0))
    if used != size and _ignores(call, module, pixels.detach(), used):
        yield Limitation(
            "pixels at the edge",
            f"of {text(size)} pixels, only the first {text(used)} change the output; it is so where the sides are no "
            "multiples of a model's patches, which leaves out the rest: give --image-size with multiples",
        )


def _ignores(call: Call, module: Any, image: torch.Tensor, used: Sequence[int]) -> bool:
    """Return whether other pixels below and right of `used` leave the outputs as they are.

    A gradient of zero alone does not show it: that of a ReLU is zero for one image and not for another.
    """
    changed = image.clone()
    changed[:, :, used[0] :], changed[:, :, :, used[1] :] = 9.0, -9.0
    with torch.no_grad():
        return all(map(torch.equal, call(module, image), call(module, changed)))


def other_sizes(call: Call, module: Any, channels: int, size: Size, name: str) -> tuple[Size, ...]:
    """Return two further sizes that a model takes, with unequal sides.

    The first is used for tracing: a model may take another path at its own size, or if height and width are equal.

    Raises:
        ModelError: none was found.
    """
    reason = None
    for step in STEPS:
        sizes = ((size[0] + step, size[1] + 2 * step), (size[0] + 2 * step, size[1] + step))
        reasons = (refusal(call, module, channels, each) for each in sizes)
        reason = next((each for each in reasons if each is not None), None)
        if reason is None:
            return sizes
    raise ModelError(
        f"{name} does not take images of other sizes than {text(size)} ({reason}); give --image-size with numbers "
        "instead of dynamic, or leave it out."
    )


def cannot_take(name: str, size: Size, reason: str) -> ModelError:
    """Return the error for a size that a model does not take."""
    return ModelError(
        f"{name} cannot take images of {text(size)} pixels ({reason}); give another --image-size, or leave it out."
    )


def repeated(values: Sequence[float], channels: int) -> tuple[float, ...] | None:
    """Return one value of a normalization for each channel; None if the values differ and do not fit.

    >>> repeated((0.5, 0.5, 0.5), 4), repeated((0.4, 0.5, 0.6), 1)
    ((0.5, 0.5, 0.5, 0.5), None)
    """
    if len(values) == channels:
        return tuple(values)
    return (values[0],) * channels if len(set(values)) == 1 else None


def statistics_limitation(count: int, channels: int) -> Limitation:
    """Return the limitation of mean and standard deviation that were repeated for every channel."""
    return Limitation(
        "normalization of the images",
        f"the preprocessing has {count} equal values of mean and standard deviation, which are used for all "
        f"{channels} channels",
    )


def wrong_statistics(count: int, channels: int) -> str:
    """Return the reason why images cannot be normalized, with the remedy."""
    return (
        f"its preprocessing has {count} values of mean or standard deviation and the model takes {channels} channels; "
        f"set {channels} values in the preprocessing config"
    )


# ------------------------------------------------------------------------------------- image processors of transformers


def pixels(processor: Any, image: Image.Image | npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Preprocess an image with an image processor of transformers.

    Args:
        processor: the image processor.
        image: a PIL image, or an array [C, H, W] with values in 0 to 1.

    Returns:
        The input of the model, [C, H, W].
    """
    if isinstance(image, np.ndarray):  # image processors expect values in 0 to 255 and scale them
        values = processor(images=image * np.float32(255), input_data_format="channels_first", return_tensors="pt")
    else:
        values = processor(images=image, return_tensors="pt")
    array: npt.NDArray[np.float32] = values["pixel_values"][0].float().numpy()
    return array


def processor_size(processor: Any, channels: int) -> Size | None:
    """Return height and width of what an image processor gives, for a square image if it depends on the image.

    Return None if the processor does not give images, fails, or keeps the size of a square image too.
    """
    found = _sizes_of(processor, channels, SHAPES)
    if found is None:
        return None
    size = found[0] if found[0] == found[1] else found[2]
    return size if size == found[3] else None


def size_kept(processor: Any, channels: int, size: Size) -> Size | None:
    """Return the size that an image processor gives for an image of a size; None if it does not give images."""
    found = _sizes_of(processor, channels, [size])
    return None if found is None else found[0]


def follows_images(processor: Any, channels: int) -> bool:
    """Return whether the size that an image processor gives depends on that of the image, as DETR's does."""
    found = _sizes_of(processor, channels, SHAPES)
    return found is not None and len(set(found)) > 1


def _sizes_of(processor: Any, channels: int, shapes: Sequence[Size]) -> list[Size] | None:
    """Return height and width of what an image processor gives for black images of some sizes; None if it fails."""
    found = []
    for shape in shapes:
        black = np.zeros((channels, *shape), np.float32)
        image = Image.new("RGB", shape[::-1]) if channels == 3 else black
        try:
            found.append(pixels(processor, image).shape[1:])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # reported when an image is read
            return None
    return [(size[0], size[1]) for size in found if len(size) == 2] if all(len(size) == 2 for size in found) else None


def fitted_processor(
    processor: Any, size: Size, channels: int, name: str, *, requested: bool
) -> tuple[Any, tuple[Limitation, ...]]:
    """Return an image processor that gives images of the size of an export, and what has to be said about it.

    One whose size follows the image is set to resize all images to that size. If its options do not set a size, as
    those of GLPN, it stays, and takes images whose size it keeps.

    Raises:
        ModelError: the options of the image processor do not set its size, and it does not keep that of an image.
    """
    follows = follows_images(processor, channels)
    if not follows:
        own = processor_size(processor, channels)
        return (processor if own in (None, size) else resized_processor(processor, size, channels, name)), ()
    try:
        fixed = resized_processor(processor, size, channels, name)
    except ModelError:
        if requested and size_kept(processor, channels, size) != size:
            raise
        reason = f"the image processor gives sizes that follow the image, and cannot be set to {text(size)} pixels"
        remedy = "images that it does not bring to that size are refused; resize them before, or give --image-size"
        return processor, (Limitation(PROPORTIONS, f"{reason}: {remedy}"),)
    reason = (
        f"the image processor keeps them, and the export takes {text(size)} pixels, to which all images are resized"
    )
    return fixed, (Limitation(PROPORTIONS, f"{reason}; --image-size sets others, such as those of most images"),)


def resized_processor(processor: Any, size: Size, channels: int, name: str) -> Any:
    """Return an image processor of the same class and options that gives all images another size.

    A resize before a center crop keeps its proportion to the crop.

    Raises:
        ModelError: the options of the image processor do not set its size.
    """
    options = processor.to_dict()
    for changed in _size_options(options, size):
        candidate = type(processor).from_dict({**options, **changed})
        if _sizes_of(candidate, channels, SHAPES) == [size] * len(SHAPES):
            return candidate
    raise ModelError(
        f"the image processor of {name} ({type(processor).__name__}) cannot be set to {text(size)} pixels; leave "
        "--image-size out, or pass preprocessed model inputs as data without its preprocessor_config.json."
    )


def _size_options(options: dict[str, Any], size: Size) -> Iterator[dict[str, Any]]:
    """Yield the options of an image processor that may set its size, the most faithful first."""
    height, width = size
    exact, before = {"height": height, "width": width}, options.get("size") or {}
    crop = options.get("crop_size") or {}
    if options.get("do_center_crop") and {"height", "width"} <= crop.keys():
        scales = {"height": height / crop["height"], "width": width / crop["width"]}
        larger = max(scales.values())
        resize = {key: round(side * scales.get(key, larger)) for key, side in before.items() if side is not None}
        yield {"crop_size": exact, "size": resize}
    if height == width and before.get("shortest_edge") is not None:
        yield {"size": {"shortest_edge": height}}
    yield {"size": exact}
    yield {"size": exact, "do_resize": True, "keep_aspect_ratio": False}  # of the DPT family


class _Interpolating:
    """A model of transformers that interpolates its position embeddings in every call."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, interpolate_pos_encoding=True, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def call_interpolating(call: Call, module: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Call a module so that it interpolates its position embeddings."""
    return call(_Interpolating(module), *tensors)


@dataclass(frozen=True)
class SizedModel:
    """A model of transformers at the size of an export.

    Attributes:
        sizing: the size.
        call: calls the module at this size.
        processor: its image processor at this size; None if it has none.
        interpolates: `call` passes ``interpolate_pos_encoding=True``.
        limitations: what was assumed or differs.
    """

    sizing: Sizing
    call: Call
    processor: Any
    interpolates: bool
    limitations: tuple[Limitation, ...]


def sized_model(
    module: Any, call: Call, processor: Any, configured: Size, channels: int, image_size: ImageSize, name: str
) -> SizedModel:
    """Return a model of transformers at the requested size, or at the size that its image processor gives.

    Args:
        module: the model.
        call: calls the module with ``pixel_values``.
        processor: its image processor, or None.
        configured: height and width of the config.
        channels: number of channels of the model.
        image_size: the requested size.
        name: name of the model in messages.

    Raises:
        ModelError: the model or its image processor does not take the size, or no other sizes if it is dynamic.
    """
    prepared = None
    if processor is not None:
        prepared = processor_size(processor, channels) or size_kept(processor, channels, configured)
    size = configured if prepared is None else prepared
    requested = image_size is not None and image_size != DYNAMIC
    if requested:
        size = cast("Size", image_size)
    fitted: tuple[Limitation, ...] = ()
    if processor is not None:
        processor, fitted = fitted_processor(processor, size, channels, name, requested=requested)
    calls: dict[bool, Call] = {False: call, True: partial(call_interpolating, call)}
    if image_size == DYNAMIC:
        interpolates, dynamic = _other_sizes(calls, module, channels, size, name)
    else:
        interpolates, dynamic = _interpolates(calls, module, channels, size, configured, name), ()
    sizing = Sizing(size, dynamic)
    limits = [*sizing.limitations(channels), *fitted]
    if image_size != DYNAMIC:
        limits += unused_pixels(calls[interpolates], module, channels, size)
    if size != configured:
        limits.append(_differs(configured, size, interpolates, requested=requested))
    return SizedModel(sizing, calls[interpolates], processor, interpolates, tuple(limits))


def _interpolates(calls: dict[bool, Call], module: Any, channels: int, size: Size, configured: Size, name: str) -> bool:
    """Return whether a model takes a size only if it is told to interpolate its position embeddings."""
    if size == configured:
        return False
    reason = refusal(calls[False], module, channels, size)
    if reason is None:
        return False
    if refusal(calls[True], module, channels, size) is not None:
        raise cannot_take(name, size, reason)
    return True


def _other_sizes(
    calls: dict[bool, Call], module: Any, channels: int, size: Size, name: str
) -> tuple[bool, tuple[Size, ...]]:
    try:
        return False, other_sizes(calls[False], module, channels, size, name)
    except ModelError:
        if refusal(calls[True], module, channels, size) is not None:
            raise
    return True, other_sizes(calls[True], module, channels, size, name)


def _differs(configured: Size, size: Size, interpolates: bool, *, requested: bool) -> Limitation:
    source = "--image-size is" if requested else "the image processor gives"
    option = "; in transformers, this takes interpolate_pos_encoding=True" if interpolates else ""
    return Limitation(
        CONFIG_SIZE,
        f"the config has {text(configured)} pixels and {source} {text(size)}, which is used; position embeddings are "
        f"interpolated as the model does it{option}",
    )


def fit_statistics(processor: Any, channels: int) -> tuple[str, tuple[Limitation, ...]]:
    """Fit mean and standard deviation of an image processor to the channels of the model, in place.

    Returns:
        The reason why the processor cannot be used, empty if it can; and the limitations.
    """
    if processor is None or not getattr(processor, "do_normalize", False):
        return "", ()
    before = {name: getattr(processor, name, None) for name in ("image_mean", "image_std")}
    lengths = [len(values) for values in before.values() if isinstance(values, list | tuple)]
    if all(length == channels for length in lengths):
        return "", ()
    fitted = {name: repeated(values, channels) for name, values in before.items() if values is not None}
    wrong = next(length for length in lengths if length != channels)
    if None in fitted.values():
        return wrong_statistics(wrong, channels), ()
    for name, values in fitted.items():
        setattr(processor, name, values)
    return "", (statistics_limitation(wrong, channels),)
