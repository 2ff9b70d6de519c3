"""Open an exported folder with Optimum's classes and answer; tests/test_optimum.py runs this with another Python.

    python optimum_check.py LIBRARY TASK FOLDER FEEDS.npz ANSWERS.npz [NEW_TOKENS]

It needs nothing of Compressor and is no test itself: optimum-onnx and transformers 5 exclude each other.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

CLASSES = {
    "feature-extraction": "FeatureExtraction",
    "sentence-similarity": "FeatureExtraction",
    "text-classification": "SequenceClassification",
    "image-classification": "ImageClassification",
    "text-generation": "CausalLM",
    "text2text-generation": "Seq2SeqLM",
    "automatic-speech-recognition": "SpeechSeq2Seq",
}
TEXT = "A man plays a flute."


def opened(library, task, folder):
    """The folder as whoever follows Optimum's documentation opens it."""
    options = {}
    if task == "text-generation":  # these classes expect a cache unless told otherwise, and do not ask the config
        options["use_cache"] = json.loads((Path(folder) / "config.json").read_text())["use_cache"]
    if library == "openvino":
        from optimum import intel

        # OpenVINO would compute in bfloat16 where the processor can; no file can ask it not to.
        options["ov_config"] = {"INFERENCE_PRECISION_HINT": "f32"}
        return getattr(intel, f"OVModelFor{CLASSES[task]}").from_pretrained(folder, **options)
    from optimum import onnxruntime

    return getattr(onnxruntime, f"ORTModelFor{CLASSES[task]}").from_pretrained(folder, **options)


def answer(model, feeds):
    """Every output of one call, by name."""
    return {name: value.numpy() for name, value in model(**feeds).items() if hasattr(value, "numpy")}


def generate(model, feeds, new):
    """Greedy, so many new tokens, whatever they are."""
    found = model.generate(
        **feeds, do_sample=False, min_new_tokens=new, max_new_tokens=new, eos_token_id=None, pad_token_id=0
    )
    return {"sequences": found.numpy()}


def tokens(folder):
    """Token ids of a text by the folder's own tokenizer, where it has one: of an older transformers than wrote it."""
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return {}
    from transformers import AutoTokenizer

    return {"tokens": np.array(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])}


def main(library, task, folder, feeds, answers, new="0"):
    """Answer the feeds of one file in another."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    with np.load(feeds) as file:
        tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    model = opened(library, task, folder)
    found = generate(model, tensors, int(new)) if int(new) else answer(model, tensors)
    np.savez(answers, **found, **tokens(folder))


if __name__ == "__main__":
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent]
    main(*sys.argv[1:])
