"""Tests that the oldest releases of a library cannot pass, with the reason; `make oldest` skips them."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

# File and test, or the parameter of a test, empty for all of the file; the package, the first release with which it
# passed, and what is refused or fails before. The releases between the lowest of pyproject.toml and that one were not
# tried.
CHOSEN = ("torch", "2.15", "torch cannot decompose an attention over tokens that are chosen at run time")
NEEDS = {
    ("test_encoder_decoder.py", "[fsmt]"): ("transformers", "5.24", "the cache of FSMT shows later tokens"),
    ("test_patches.py", "test_frames_of_a_clip"): ("transformers", "5.24", "Kimi's encoder takes no rows of patches"),
    ("test_one_grid.py", ""): ("transformers", "5.24", "most of these encoders, such as LFM3-VL, are not known"),
    ("test_patches.py", "test_patches_with_a_mask"): ("transformers", "5.24", "SigLIP 2 fixes the number of images"),
    ("test_recurrence.py", "qwen3_next"): ("transformers", "5.24", "the recurrence has its heads on another axis"),
    ("test_vision_language.py", "test_tiles_of_padding"): ("transformers", "5.24", "the features are one tensor"),
    ("test_vision_language.py", "[idefics3]"): ("transformers", "5.24", "ONNX Runtime refuses the file of Idefics3"),
    ("passes/image_tokens/test_image_tokens.py", "test_the_onnx_file_generates_the_same[attention]"): CHOSEN,
    ("pipeline/test_image_tokens.py", ""): CHOSEN,
    ("test_image_token_choice.py", "test_an_export_is_that_of"): CHOSEN,
    ("test_varying_images.py", "[gemma4"): ("transformers", "5.24", "Gemma 4 takes no embeddings that are not its own"),
    ("test_int8_search.py", "test_fp8"): ("onnxruntime", "1.32", "ONNX Runtime fuses an fp8 product into one of int8"),
}


def reason_to_skip(test: str) -> str | None:
    """Return why a test cannot pass with a release that is installed, or None; `test` is its id."""
    for (file, part), (package, version, reason) in NEEDS.items():
        if f"/{file}::" in f"/{test}" and part in test and Version(metadata.version(package)) < Version(version):
            return f"{package} before {version}: {reason}"
    return None
