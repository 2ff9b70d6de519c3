"""The engines of benchmarks/smollm2.py: files of every engine and precision, their quality, and their timing."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from smollm2_subject import DENSE, ORIGINAL, Design, Row, Subject

from compressor.benchmark.contenders import EngineEntry
from compressor.benchmark.decode_timing import Generation, measure
from compressor.benchmark.lm_eval_tasks import TaskOptions, evaluate_tasks
from compressor.benchmark.runner import BenchRunner, Condition, Engines
from compressor.measure.engine_builder import EngineBuilder, with_input_sizes
from compressor.measure.engine_parity import engine_parity
from compressor.quality.evaluate import Runner, interaction_figure
from compressor.quality.intervals import Columns
from compressor.quantize.convert import convert
from compressor.quantize.precision import Source
from compressor.quantize.weight_only import ACCURACY_LEVEL, BLOCK, TERNARY, to_int2, to_int4
from compressor.report.factorial import cell_precision, compute_factorial
from compressor.settings import Settings
from compressor.target.availability import check_target
from compressor.workspace.output_folder import engine_bytes
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildOptions, Engine
from runtimes.base.registry import runtime
from runtimes.base.timing import Latency, interleave
from runtimes.onnxruntime.target import LOOKUP_TABLE, OnnxRuntimeEngine, session_options

PLAIN, FUSED = "onnxruntime", "onnxruntime_fused"
PLANS = (DENSE, Design("attention", 25), Design("attention", 50))
FURTHER = Design("block", 10)  # in the factorial of quality alone
INT8, WEIGHTS = "int8-dynamic", "int8-weight-only"
ENGINES = {
    PLAIN: ("fp32", INT8, WEIGHTS, "int4"),
    FUSED: ("fp32", INT8, WEIGHTS, "int4"),
    "gguf": ("fp32", "int8", "int4"),
    "torch": ("fp32", INT8),
}
CONTEXT = 128
BITS = ("int2", "int2-ternary")
PRODUCT = (1024, 3072)  # inputs and outputs of the product that is timed in every precision


@dataclass(frozen=True)
class Cell:
    """One file: an engine, a plan and a precision."""

    engine: str
    design: Design
    precision: str

    @property
    def name(self) -> str:
        """Name in the results."""
        plan = self.design.name if self.design.percent else "dense"
        return f"{self.engine}, {plan}, {'float' if self.precision == 'fp32' else self.precision.replace(INT8, 'int8')}"


@dataclass(frozen=True)
class Files:
    """The exported files in the work folder, by name of the cell, listed in a file of its own."""

    work: Path

    @property
    def index(self) -> Path:
        """The list of the files."""
        return self.work / "engines.json"

    def read(self) -> dict[str, str]:
        """Return the paths by name."""
        return json.loads(self.index.read_text()) if self.index.exists() else {}

    def path(self, cell: Cell) -> Path:
        """Return the file of a cell.

        Raises:
            click.ClickException: it was not exported.
        """
        found = self.read().get(cell.name)
        if found is None:
            raise click.ClickException(f"{self.work} has no file of {cell.name}; run the part export first.")
        return Path(found)

    def add(self, cell: Cell, path: Path) -> None:
        """Add a file to the list."""
        self.index.write_text(json.dumps(self.read() | {cell.name: str(path)}, indent=1))


def cells() -> Iterator[Cell]:
    """Yield the cells that are timed."""
    for engine, precisions in ENGINES.items():
        yield from (Cell(engine, design, precision) for design in PLANS for precision in precisions)


def exported(subject: Subject, engines: Sequence[str]) -> None:
    """Write the files that are missing, and hold the float ones to torch."""
    files = Files(subject.work)
    for engine in engines:
        builder = opened_builder(subject, engine)
        for design in (*PLANS, FURTHER) if engine == PLAIN else PLANS:
            wanted = [Cell(engine, design, precision) for precision in ENGINES[engine]]
            if engine == PLAIN and design == DENSE:
                wanted += [Cell(PLAIN, DENSE, precision) for precision in BITS]
            missing = [cell for cell in wanted if cell.name not in files.read()]
            if missing:
                _export(subject, builder, files, missing)


def _export(subject: Subject, builder: EngineBuilder, files: Files, wanted: Sequence[Cell]) -> None:
    start, design, engine = time.perf_counter(), wanted[0].design, builder.target.name
    stem, graph = (design.name if design.percent else "dense").replace(" ", "-").replace("%", ""), subject.graph(design)
    if engine == FUSED:
        for cell in wanted:
            source = files.path(Cell(PLAIN, design, cell.precision))
            files.add(cell, builder.build(Source(source, "fp32")))
    else:
        path = builder.scratch / f"{stem}{builder.target.source}"
        if not path.exists():
            builder.lower(builder.fold(graph), stem)
            engine_parity(builder, path, graph)
        for cell in wanted:
            files.add(cell, _in_precision(builder, path, cell.precision))
    click.echo(f"export: {engine}, {stem}, {time.perf_counter() - start:.0f} s", err=True)


def _in_precision(builder: EngineBuilder, path: Path, precision: str) -> Path:
    """Return the engine of a float file in a precision."""
    target = builder.target
    if precision == "fp32" or precision in target.own:
        return builder.build(Source(path, precision))
    converted = path.with_suffix(f".{precision}.onnx")
    if precision == BITS[1]:
        to_int2(path, converted, steps=TERNARY)
    else:
        convert(path, converted, precision, target.int8, builder.calibration_batches)
    return converted


def opened_builder(subject: Subject, engine: str) -> EngineBuilder:
    settings = Settings(model=subject.settings.model, data=subject.settings.data, drop="none", target=engine, threads=1)
    target, options = check_target(settings)
    scratch = subject.work / engine
    scratch.mkdir(exist_ok=True)
    return EngineBuilder(subject.traced, target, with_input_sizes(options, subject.traced, settings), scratch)


# ----------------------------------------------------------------------------------------------------------- quality


def factorial(subject: Subject) -> dict[str, Callable[[], Row]]:
    """Return the measurements of quality on ONNX Runtime, by name of the cell."""
    designs = (*PLANS, FURTHER)
    wanted = [Cell(PLAIN, design, precision) for design in designs for precision in ENGINES[PLAIN]]
    wanted += [Cell(PLAIN, DENSE, precision) for precision in BITS]
    return {cell.name: partial(_quality, subject, cell) for cell in wanted}


def _quality(subject: Subject, cell: Cell) -> Row:
    """Return perplexity, loss and agreement against the original in torch, and the loss beyond the sum of losses."""
    path = Files(subject.work).path(cell)
    columns = _columns(subject, cell)
    row = subject.figures(columns) | {"bytes": engine_bytes(path), "precision": cell.precision}
    row["plan"] = cell.design.name if cell.design.percent else ORIGINAL
    if cell.design.percent and cell.precision != "fp32":
        others = [Cell(PLAIN, *which) for which in ((cell.design, "fp32"), (DENSE, cell.precision))]
        one, other = (_columns(subject, each) for each in others)
        before = _columns(subject, Cell(PLAIN, DENSE, "fp32"))
        row["excess"] = asdict(interaction_figure(subject.traced.metric, before, one, other, columns))
    return row


def _columns(subject: Subject, cell: Cell) -> Columns:
    """Return the columns of an engine, kept in the work folder."""
    path = subject.work / f"columns-{len(subject.test)}-{cell.name.replace(', ', '-')}.npz"
    if not path.exists():
        options = BuildOptions(threads=1, spinning=False)
        with runtime(cell.engine).load(Files(subject.work).path(cell), options) as engine:
            np.savez(path, **subject.columns(_runner(subject, engine)))
    return dict(np.load(path))


def _runner(subject: Subject, engine: Engine) -> Runner:
    return lambda feeds: subject.traced.model.evaluated(engine.run(feeds))


# ------------------------------------------------------------------------------------------------------------ timing


def timing(subject: Subject, rounds: int, threads: int) -> Row:
    """Time prompt and further tokens of all exported engines in one interleaved run.

    Args:
        subject: the model.
        rounds: timed bursts of each engine and call.
        threads: threads of every engine.
    """
    files, listed = Files(subject.work), Files(subject.work).read()
    there = [cell for cell in cells() if cell.name in listed]
    absent = [cell.name for cell in cells() if cell.name not in listed]
    entries = tuple(EngineEntry(cell.name, cell.engine, files.path(cell)) for cell in there)
    engines = Engines({each.name: each.opener(each.file) for each in entries}, {})
    against = Cell(PLAIN, DENSE, "fp32").name
    runner = BenchRunner(subject.traced, subject.settings, entries, against, (Condition(1, threads),), {}, (CONTEXT,))
    with tempfile.TemporaryDirectory(dir=subject.work) as scratch:
        # Dynamic int8 rounds one token in another range than a whole text: 0.5 here. Exports check the float files.
        made = measure(runner, engines, rounds, Path(scratch), Steps(), allowed=np.inf)
    found = {each.name: each for each in made}
    rows = {cell.name: _timed(cell, found) | {"bytes": engine_bytes(files.path(cell))} for cell in there}
    return {"context": CONTEXT, "rounds": rounds, "threads": threads, "rows": rows, "absent": absent,
            "interactions": list(_interactions(there, found))}  # fmt: skip


def _timed(cell: Cell, found: Mapping[str, Generation]) -> Row:
    """Return medians, tokens a second, and speed-ups over the dense model of the precision and over dense float."""
    mine = found[cell.name]
    row: Row = {"engine": cell.engine, "plan": cell.design.name if cell.design.percent else "dense"}
    row |= {"precision": cell.precision, "cache_bytes": mine.cache, "difference": mine.difference}
    over = {"dense": Cell(cell.engine, DENSE, cell.precision), "float": Cell(cell.engine, DENSE, "fp32"),
            PLAIN: Cell(PLAIN, DENSE, "fp32")}  # fmt: skip
    for part, tokens in (("first", CONTEXT), ("token", 1)):
        latency: Latency = getattr(mine, part)
        ratios = {key: latency.speedup_over(getattr(found[other.name], part))._asdict() for key, other in over.items()}
        speed = tokens / latency.median * 1000.0
        row[part] = {"median": latency.median, "tokens_per_second": speed, "speedup": ratios}
    return row


def _interactions(there: Sequence[Cell], found: Mapping[str, Generation]) -> Iterator[Row]:
    """Yield S_both / (S_prune x S_quant) of every engine, plan and precision, for the prompt and a further token."""
    for cell in there:
        if not cell.design.percent or cell.precision == "fp32":
            continue
        low = cell_precision(cell.precision)
        four = {
            "dense float": Cell(cell.engine, DENSE, "fp32"), f"dense {low}": Cell(cell.engine, DENSE, cell.precision),
            "compressed float": Cell(cell.engine, cell.design, "fp32"), f"compressed {low}": cell,
        }  # fmt: skip
        for part in ("first", "token"):
            latency = {name: getattr(found[each.name], part) for name, each in four.items()}
            (made,) = compute_factorial(latency, None, {}, "").interactions
            yield {"cell": cell.name, "part": part, "speedup": made.to_dict()["speedup"],
                   "ratio": made.ratio._asdict(), "verdict": made.verdict}  # fmt: skip


# ------------------------------------------------------------------------------------------------- products in few bits


def products(rounds: int, threads: int) -> Row:
    """Time one product of `PRODUCT`, for one token and for `CONTEXT` tokens, in every precision of ONNX Runtime.

    Returns:
        By rows of the activation and precision: bytes of the file, and the latency with its speed-up over float and
        over 4 bits. 2 bits are also timed without the look-up table.
    """
    made: Row = {"inputs": PRODUCT[0], "outputs": PRODUCT[1], "threads": threads, "rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        files = _product_files(Path(folder))
        openers = {name: partial(_opened, path, threads) for name, path in files.items()}
        openers["2 bits, no table"] = partial(_opened, files["2 bits"], threads, table=False)
        for rows in (1, CONTEXT):
            feeds = {"x": np.random.default_rng(0).standard_normal((rows, PRODUCT[0])).astype(np.float32)}
            found = interleave(openers, feeds, rounds=rounds, burst_seconds=0.3)
            made["rows"][str(rows)] = {
                name: {
                    "milliseconds": latency.median,
                    "over_float": latency.speedup_over(found["float"])._asdict(),
                    "over_4_bits": latency.speedup_over(found["4 bits"])._asdict(),
                    "bytes": files[name.partition(",")[0]].stat().st_size,
                }
                for name, latency in found.items()
            }
    return made


def _product_files(folder: Path) -> dict[str, Path]:
    """Write the product in each precision; the 8 bits are those of MatMulNBits."""
    weight = np.random.default_rng(1).standard_normal(PRODUCT).astype(np.float32)
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", None]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "product", values[:1],
                              values[1:], [numpy_helper.from_array(weight, "w")])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    files = {name: folder / f"{name}.onnx" for name in ("float", "8 bits", "4 bits", "2 bits")}
    onnx.save(model, files["float"])
    eight = MatMulNBitsQuantizer(model, bits=8, block_size=BLOCK, accuracy_level=ACCURACY_LEVEL)
    eight.process()
    onnx.save(eight.model.model, files["8 bits"])
    to_int4(files["float"], files["4 bits"])
    to_int2(files["float"], files["2 bits"])
    return files


def _opened(path: Path, threads: int, *, table: bool = True) -> OnnxRuntimeEngine:
    options = session_options(BuildOptions(threads=threads))
    if not table:  # ONNX Runtime warns of an option that is set twice
        options.log_severity_level = 4
        options.add_session_config_entry(LOOKUP_TABLE, "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return OnnxRuntimeEngine(session, device="cpu")


# ---------------------------------------------------------------------------------------------------- a task of lm-eval

TASK, WORDS, CHOICE_WORDS, CHOICES = "wikitext_next", 40, 16, 4


def task(subject: Subject) -> dict[str, Callable[[], Row]]:
    """Return the measurement of lm-eval's accuracy on a task made of the test paragraphs, for every plan.

    A question has the first `WORDS` words of a paragraph. The choices are its next `CHOICE_WORDS` words and those of
    three other paragraphs.
    """
    return {TASK: lambda: _task(subject)}


def _task(subject: Subject) -> Row:
    with tempfile.TemporaryDirectory(dir=subject.work) as scratch:
        folder = Path(scratch)
        rows = list(_questions(subject))
        (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{TASK}.yaml").write_text(
            f"task: {TASK}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.json'}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_target: gold\n"
            "doc_to_choice: choices\nmetric_list:\n  - metric: acc\nmetadata:\n  version: 1.0\n"
        )
        plans = {"dense" if not design.percent else design.name: design for design in PLANS}
        files, options = Files(subject.work), BuildOptions(threads=1)
        openers = {
            name: partial(runtime(PLAIN).load, files.path(Cell(PLAIN, design, "fp32")), options)
            for name, design in plans.items()
        }
        asked = TaskOptions((TASK,), include_path=str(folder))
        found = evaluate_tasks(openers, subject.traced.model, asked, against="dense", length=None, steps=Steps())
    assert found is not None
    accuracy = {each.engine: {"value": each.value, "error": each.error} for each in found.results}
    return {"questions": len(rows), "choices": CHOICES, "accuracy": accuracy, "lm_eval": found.release}


def _questions(subject: Subject) -> Iterator[Row]:
    lines = Path(subject.traced.data.source).read_text().splitlines()
    texts = [lines[int(name)].split() for name in subject.test.ids]
    endings = [" " + " ".join(words[WORDS : WORDS + CHOICE_WORDS]) for words in texts]
    for number, words in enumerate(texts):
        gold = number % CHOICES
        others = [endings[(number + offset) % len(texts)] for offset in range(1, CHOICES)]
        yield {"context": " ".join(words[:WORDS]), "choices": [*others[:gold], endings[number], *others[gold:]],
               "gold": gold}  # fmt: skip
