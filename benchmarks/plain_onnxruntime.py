"""Check an exported image classifier without Compressor, torch or timm: only onnxruntime, numpy and Pillow.

    python benchmarks/plain_onnxruntime.py OUT IMAGES

reads OUT/model.onnx, OUT/config.json (timm's preprocessing) and OUT/report.json (the test images and the top-1
accuracy), classifies the test images, and fails if its own top-1 differs from the report by more than 0.2 points.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

TOLERANCE = 0.2  # points; resizing with another Pillow release can flip an image in 500


def pixels(path: Path, config: dict) -> np.ndarray:
    """Return an image as float32 [3, H, W]: shorter side to size / crop_pct, centre crop, scale, normalize."""
    side = config["input_size"][-1]
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[config["interpolation"]]
    image = Image.open(path).convert("RGB")
    short = int(side / config["crop_pct"])
    width, height = image.size
    longer = int(short * max(width, height) / min(width, height))
    image = image.resize((short, longer) if width <= height else (longer, short), resample)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    array = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32) / 255.0
    array = (array - np.array(config["mean"], np.float32)) / np.array(config["std"], np.float32)
    return array.transpose(2, 0, 1)


def top1(folder: Path, images: Path) -> tuple[float, float]:
    """Return the top-1 accuracy in % on the report's test images, and the accuracy in the report."""
    report = json.loads((folder / "report.json").read_text())
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    classes = {
        name: index for index, name in enumerate(sorted(path.name for path in images.iterdir() if path.is_dir()))
    }
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    correct = 0
    for name in report["data"]["test_ids"]:
        (logits,) = session.run(["logits"], {"pixel_values": pixels(images / name, config)[None]})
        correct += int(logits[0].argmax() == classes[Path(name).parts[0]])
    claimed = report["quality"]["figures"]["result"]["value"]
    return 100.0 * correct / len(report["data"]["test_ids"]), claimed


if __name__ == "__main__":
    measured, claimed = top1(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"top-1 with plain ONNX Runtime {measured:.2f} %, report.json says {claimed:.2f} %")
    sys.exit(abs(measured - claimed) > TOLERANCE)
