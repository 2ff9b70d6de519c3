"""Options of `compressor bench`. The module imports no torch: the command line reads its fields for `--help`."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.choices import MOST_ROWS, MOST_THREADS, MOST_TOKENS, parse_image_size
from compressor.errors import SettingsError
from compressor.options import check_options, documented, like, option
from compressor.settings import Settings, text

if TYPE_CHECKING:
    from compressor.benchmark.lm_eval_tasks import TaskOptions
    from compressor.benchmark.runner import Condition

MOST = {"batch": MOST_ROWS, "threads": MOST_THREADS, "context": MOST_TOKENS}


@documented
@dataclass(frozen=True)
class BenchSettings:
    """Options of `compressor bench`; each field is an option of the same name."""

    what: tuple[str | Path, ...] = option(
        (),
        "any number of folders that `compressor export` wrote (with every cell of a factorial), .onnx files, and "
        "models as for `export`. Models, and folders that hold a checkpoint, are measured in torch.",
        positional=True,
    )
    data: str | Path | None = option(None, "Samples, as for export.", unset="those of the first folder")
    model: str | None = option(
        None,
        "Model whose preprocessing is used; needed for a folder that was exported from a module of one's own.",
        unset="that of the first folder, or the first model",
    )
    against: str | None = option(None, "Baseline of the comparison.", unset="the first engine")
    batch: tuple[int, ...] = option((1,), "Batch sizes, such as 1,8.")
    threads: tuple[int, ...] = option((), "Thread counts, such as 1,2.", unset="the runtimes' own")
    context: tuple[int, ...] | None = option(
        None,
        "Language models: context lengths in tokens at which generation is timed, such as 128,512.",
        unset="128, or as many as fit",
    )
    compile: bool = option(False, "Also measure torch models with torch.compile.")
    target: str | None = option(None, "Runtime.", unset="that of the export for folders, onnxruntime for .onnx files")
    device: str | None = like(Settings, "device", help="Device of the engines.")
    task: str | None = like(Settings, "task", help="Override the task of the models, as for export.")
    problem_type: str | None = like(Settings, "problem_type", help="What a classifier predicts, as for export.")
    revision: str | None = like(Settings, "revision", help="Branch, tag or commit of a model on the hub.")
    trust_remote_code: bool = option(
        False,
        "Let a hub repository run code of its own, and open a folder's engine that is compiled code (target torch).",
    )
    random_weights: bool = like(Settings, "random_weights", help="Build models with random weights (speed only).")
    cache: bool = like(Settings, "cache")
    samples: int | None = like(
        Settings, "samples", help="Largest number of samples in total; use that of the export.", unset=""
    )
    max_length: int | None = like(Settings, "max_length", unset="as in the export")
    stride: int | None = like(Settings, "stride", unset="as in the export")
    image_size: str | int | None = like(
        Settings, "image_size", help="Image models: size of the images, as for export.", unset="as in the export"
    )
    sequence_length: int | None = like(
        Settings,
        "sequence_length",
        help="Models of texts, or of sound: the only number of tokens, samples or frames, as for export.",
        unset="as in the export",
    )
    tasks: tuple[str, ...] = option(
        (),
        "Language models: lm-eval tasks to evaluate, such as arc_easy,wikitext (needs pip install lm-eval).",
    )
    num_fewshot: int | None = option(None, "Few-shot examples of --tasks.", unset="the task's", least=0)
    limit: float | None = option(None, "Questions of each task, or a share below 1.", unset="all")
    include_path: str | Path | None = option(None, "Folder with further lm-eval tasks as YAML files.")
    rounds: int = like(Settings, "rounds", help="Timed bursts per engine.")
    seed: int = like(Settings, "seed", help="Seed of the data split; use that of the export.")
    workers: int | None = like(
        Settings,
        "workers",
        help="Processes of Ray that measure the quality of the engines, of one core each, with the figures of one "
        "process. The timing stays in this process.",
    )
    ray: str | None = like(
        Settings, "ray", help="Cluster of Ray whose workers measure the quality, as for export: HOST:PORT or auto."
    )
    output: str | Path = option("bench.json", "Output file.", letter="o")

    def __post_init__(self) -> None:
        for name in ("what", "batch", "threads", "context", "tasks"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        what: tuple[object, ...] = self.what
        if (found := next((each for each in what if not isinstance(each, str | os.PathLike)), None)) is not None:
            raise SettingsError(
                f"what holds a {type(found).__name__}; expected paths and names, each an argument of its own; name a "
                "module as package.module:factory."
            )
        check_options(self)
        for name, values in (("batch", self.batch), ("threads", self.threads), ("context", self.context or ())):
            if any(value < 1 for value in values) or len(set(values)) < len(values):
                raise SettingsError(f"{name} is {_listed(values)}; expected distinct integers of at least 1.")
            if any(value > MOST[name] for value in values):
                raise SettingsError(f"{name} is {_listed(values)}; expected integers of at most {MOST[name]:,}.")
        if not self.batch:
            raise SettingsError("batch is empty; expected batch sizes such as 1,8.")
        try:
            parse_image_size(self.image_size)
        except ValueError as error:
            raise SettingsError(f"{error}.") from error
        self.asked.check()

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All combinations of batch size and thread count."""
        from compressor.benchmark.runner import Condition

        return tuple(itertools.starmap(Condition, itertools.product(self.batch, self.threads or (None,))))

    @property
    def asked(self) -> TaskOptions:
        """The options of the lm-evaluation-harness."""
        from compressor.benchmark.lm_eval_tasks import TaskOptions

        return TaskOptions(self.tasks, self.num_fewshot, self.limit, text(self.include_path))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        paths = {name: text(getattr(self, name)) for name in ("data", "include_path", "output")}
        return dataclasses.asdict(self) | paths | {"what": tuple(map(str, self.what))}


def _listed(values: Sequence[int]) -> str:
    return ",".join(map(str, values)) or "empty"
