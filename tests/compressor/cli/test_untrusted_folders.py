"""`build` and `bench` on folders that someone else wrote: no code of one runs, nothing is written outside of it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compressor
from compressor.benchmark.contenders import ExportFolder
from compressor.cli.main import main
from compressor.deferred.check_package import read_package
from compressor.errors import CompressorError
from compressor.quality.parity import TOLERANCE
from compressor.workspace.output_folder import write_manifest
from tests.samples import DIGITS, five_blocks

pytest.importorskip("onnxruntime", reason="the target of the export")

Json = dict[str, Any]
DEEP = "[" * 200_000  # json.loads ends in a RecursionError
PAYLOAD = "from pathlib import Path\nPath('PAYLOAD').touch()\ndef make():\n    Path('PAYLOAD').touch()\n"
REPORT, MANIFEST, PLAN, ANSWERS = "report.json", "manifest.json", "plan.json", "deferred/answers.npz"
BOTH = ("build", "bench")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export two blocks of the embedded sample with a deferred build."""
    room = tmp_path_factory.mktemp("original")
    folder, model = room / "out", five_blocks(room / "model", kept=(0, 9))
    compressor.export(model, data=DIGITS, drop="1", samples=24, rounds=1, defer_build=True, output=folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a copy of the export beside a module `evil`, and check that nothing was written outside of the copy."""
    (tmp_path / "evil.py").write_text(PAYLOAD)
    (tmp_path / "secret.json").write_text('{"files": {}}')
    monkeypatch.chdir(tmp_path)
    copied = Path(shutil.copytree(original, tmp_path / "out"))
    yield copied
    assert {path.name for path in tmp_path.iterdir()} == {"evil.py", "secret.json", "out"}
    assert (tmp_path / "secret.json").read_text() == '{"files": {}}'


def edit(folder: Path, name: str, change: Callable[[Json], object], *, seal: bool = True) -> None:
    """Change a JSON file of a folder; with `seal`, make the manifest match, as an author of both would."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    if seal and name != MANIFEST:
        write_manifest(folder)


def run(command: str, folder: Path, *options: str) -> Result:
    output = ("--output", str(folder.parent / "bench.json"), "--rounds", "1") if command == "bench" else ()
    return CliRunner().invoke(main, [command, str(folder), "--quiet", *output, *options])


def refused(command: str, folder: Path, words: str, *options: str) -> None:
    """Check that a command ends with one sentence and a non-zero status, and leaves the folder as it is."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    done = run(command, folder, *options)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (1, 2)
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def at(*keys: str | int, value: Any) -> Callable[[Json], None]:
    """Return a change that sets a value."""

    def change(content: Json) -> None:
        part: Any = content
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value

    return change


# ----------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("spec", ["evil:make", "os:abort"])
def test_bench_runs_no_code_that_a_report_names(folder: Path, spec: str) -> None:
    edit(
        folder,
        REPORT,
        lambda content: (content["model"].update(source="module"), at("settings", "model", value=spec)(content)),
    )
    refused("bench", folder, "a folder cannot name code to run; name the package.module:factory that builds the module")


def test_bench_runs_no_code_that_a_config_names(folder: Path) -> None:
    """transformers runs a file of the folder that `auto_map` names, if it is told to trust it."""
    (folder / "evil.py").write_text(PAYLOAD)
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder)
    refused("bench", folder, "contains custom code, which is not run")


def test_bench_opens_no_compiled_code_of_a_folder(folder: Path) -> None:
    """An engine of target torch is a compiled library, whose initialisers run when it is opened."""
    (folder / "model.onnx").rename(folder / "model.pt2")
    edit(
        folder,
        REPORT,
        lambda content: (content["settings"].update(target="torch"), content["engine"].update(file="model.pt2")),
    )
    refused("bench", folder, "model.pt2 is compiled code, and opening it runs it; give --trust-remote-code")


def test_bench_downloads_no_data_that_a_report_names(folder: Path) -> None:
    edit(folder, REPORT, at("settings", "data", value="owner/name"))
    edit(folder, REPORT, at("data", "reading", value="hub dataset: images"))
    refused("bench", folder, "is not downloaded on the word of a folder; give --data owner/name to download it")


@pytest.mark.parametrize("data", ["data/photos", "photos"])
def test_bench_says_that_the_data_of_an_export_are_not_here(folder: Path, data: str) -> None:
    """A relative path with one slash looks like a name of the hub."""
    edit(folder, REPORT, at("settings", "data", value=data))
    refused(
        "bench", folder, f"'{data}', is not here (a relative path starts where the export ran); give it with --data"
    )


# ---------------------------------------------------------------------------------------------------------- names

NAMES = ["../../../pwn", "/etc/passwd", "a/../../b", "a\x00b", "a\nb", "\x1b[31m", "a\\b", "C:b", "", ".", "x" * 300]


@pytest.mark.parametrize("name", NAMES)
def test_names_must_be_plain(folder: Path, name: str) -> None:
    edit(folder, MANIFEST, lambda content: content["files"].update({name: content["files"]["plan.json"]}))
    for command in BOTH:
        refused(command, folder, "it has no valid manifest.json")
    shutil.copy(folder / MANIFEST, folder / "kept")
    write_manifest(folder)
    edit(folder, REPORT, at("engine", "file", value=name))
    refused("bench", folder, "engine.file")
    edit(
        folder,
        REPORT,
        lambda content: (content["engine"].pop("file"), at("engine", "files", "result", value=name)(content)),
    )
    refused("build", folder, "engine.files.result")


def test_variants_have_fixed_names(folder: Path) -> None:
    """The key of a file is the name of a folder in which the engine is built."""

    def change(content: Json) -> None:
        for part in ("files", "allowed", "precisions"):
            content["engine"][part]["../../../pwn"] = content["engine"][part].pop("baseline")

    edit(folder, REPORT, change)
    refused("build", folder, "engine.precisions")


@pytest.mark.parametrize("name", [MANIFEST, REPORT, PLAN, ANSWERS, "model.onnx", "config.json"])
def test_links_that_lead_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    write_manifest(folder)
    outside = folder.parent / "secret.json"
    content = json.loads((folder / MANIFEST).read_text())
    if name != MANIFEST:
        content["files"][name] = {"bytes": 13, "sha256": "0" * 64}
        (folder / MANIFEST).write_text(json.dumps(content))
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    for command in BOTH:
        refused(command, folder, "manifest.json" if name == MANIFEST else f"{name} in")


# ------------------------------------------------------------------------------------------------------- manifest


@pytest.mark.parametrize(
    "name", [REPORT, PLAN, ANSWERS, "model.onnx", "deferred/baseline.onnx", "config.json", "report.html"]
)
def test_every_file_is_held_to_the_manifest(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for changed, words in ((content + b" ", "is not the file that was exported"), (None, f"lacks {name}")):
        if changed is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(changed)
        for command in BOTH:
            refused(command, folder, words) if command == "build" or name != REPORT or changed else None


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer.json", "model.onnx.data", "code/modeling.py"])
def test_a_file_to_be_loaded_must_be_listed(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    for command in BOTH:
        refused(command, folder, f"holds '{name}', which its manifest.json does not list")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"files": 1}',
        '{"files": {"a": null}}',
        DEEP,
        '{"files": ' + DEEP,
        "\xff",
        '{"files": {}, "x": 1}',
    ],
)
def test_a_manifest_must_fit_its_schema(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    for command in BOTH:
        refused(command, folder, "it has no valid manifest.json")


# --------------------------------------------------------------------------------------------------- report.json

EDITS: list[tuple[Callable[[Json], object], str, tuple[str, ...]]] = [
    (lambda content: content.clear(), "settings: field required", BOTH),
    (at("engine", value=None), "engine: input should be an object, found null", BOTH),
    (at("settings", "target", value=["onnxruntime"]), "settings.target: input should be a valid string", BOTH),
    (at("settings", "target", value="os"), "Unknown target 'os'", ("bench",)),
    (at("settings", "max_length", value=10**9), "settings.max_length", BOTH),
    (at("model", "source", value="pickle"), "model.source", BOTH),
    (at("model", "name", value="\x1b]0;owned\x07"), "model.name: a text must not hold control characters", BOTH),
    (at("data", "test_ids", value=7), "data.test_ids", BOTH),
    (at("data", "sizes", "test", value=-1), "data.sizes.test", BOTH),
    (at("settings", "batch", value=10**12), "settings.batch", ("build",)),
    (at("settings", "rounds", value=10**9), "settings.rounds", ("build",)),
    (at("settings", "rounds", value=True), "settings.rounds: input should be a valid integer, found true", ("build",)),
    (at("engine", "options", "threads", value=10**6), "engine.options.threads", ("build",)),
    (at("engine", "options", "batches", value=[1, 2]), "engine.options.batches", ("build",)),
    (at("engine", "options", "batches", value=[1, 1, 10**9]), "engine.options.batches.2", ("build",)),
    (at("engine", "options", "samples", value="evil:make"), "engine.options.samples", ("build",)),
    (at("engine", "allowed", "result", value=1e9), f"1e+09 from torch; expected {TOLERANCE:g}", ("build",)),
    (at("engine", "allowed", "result", value=float("nan")), "engine.allowed.result", ("build",)),
    (at("engine", "allowed", "result", value=float("inf")), "engine.allowed.result", ("build",)),
    (at("engine", "precisions", "result", value="int1"), "engine.precisions.result", ("build",)),
    (at("engine", "answer", value="../logits"), "holds no output '../logits' of baseline", ("build",)),
    (at("engine", "files", "result", value="report.json"), "names report.json as the model of result", ("build",)),
    (at("engine", "target", value="openvino"), "engine.target does not fit the other parts", ("build",)),
    (at("sizes", "result", "parameters", value=-5), "sizes.result.parameters", ("build",)),
    (at("sizes", "result", "surprise", value=1), "sizes.result.surprise", ("build",)),
    (at("latency", "result", "samples_ms", value=[[]]), "latency.result.samples_ms.0", ("build",)),
    (at("plan", "changes", value={"[/b]": 3}), "plan.changes.[/b]", ("build",)),
    (lambda content: content.pop("plan"), "plan: field required", ("build",)),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words", "commands"), EDITS, ids=[words[:40] for _, words, _ in EDITS])
def test_a_report_must_fit_its_schema(
    folder: Path, change: Callable[[Json], object], words: str, commands: tuple[str, ...]
) -> None:
    edit(folder, REPORT, change)
    for command in commands:
        refused(command, folder, words)


def test_an_int8_engine_cannot_be_allowed_any_difference(folder: Path) -> None:
    """The limits are numbers of the folder too, so each has a bound."""

    def change(content: Json) -> None:
        content["engine"]["precisions"]["result"] = "int8"
        content["engine"]["allowed"]["result"] = 1.5

    edit(folder, REPORT, change)
    refused("build", folder, f"allows result a difference of 1.5 from torch; expected {TOLERANCE:g}")


@pytest.mark.parametrize("name", [REPORT, PLAN])
@pytest.mark.parametrize(
    "text", ["", "null", DEEP, '{"engine": ' + DEEP, "\xff", "9" * 5000, "{" * 9, '{"a": "\\ud800"}']
)
def test_text_that_is_no_json_object_is_refused(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    write_manifest(folder)
    for command in BOTH if name == REPORT else ("build",):
        refused(command, folder, name)


def test_a_pipe_in_place_of_a_file_does_not_block(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    for command in BOTH:
        assert "it is not a regular file" in run(command, folder).stderr
    (folder / MANIFEST).unlink()


# --------------------------------------------------------------------------------------------------- answers.npz


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    with np.load(folder / ANSWERS) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(folder / ANSWERS, **arrays)
    write_manifest(folder)


def test_arrays_cannot_claim_more_memory_than_their_file_has(folder: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 64), }"
    array = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    for compression, words in ((zipfile.ZIP_STORED, "does not fit its"), (zipfile.ZIP_DEFLATED, "is compressed")):
        with zipfile.ZipFile(folder / ANSWERS, "w", compression) as archive:
            archive.writestr("feeds/pixel_values.npy", array + bytes(100))
        write_manifest(folder)
        refused("build", folder, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays: arrays.update({"feeds/pixel_values": np.array([None], object)}), "cannot be read"),
        (lambda arrays: arrays.update({"timed/pixel_values": np.zeros((0, 1))}), "timed arrays have [0] rows"),
        (lambda arrays: arrays.update({"labels": np.zeros(3, np.int64)}), "rows; expected one number for all"),
        (lambda arrays: arrays.update({"feeds/pixel_values": np.float32(1.0)}), "rows; expected one number for all"),
        (lambda arrays: arrays.update({"allowed/result/logits": np.full((1, 1), 1e9)}), "looser than 2.0"),
        (lambda arrays: arrays.update({"scale/result/logits": np.full((1, 10), 1e9)}), "scales of result, logits"),
        (lambda arrays: arrays.update({"ties/result": np.full(2, 1e9)}), "rows with ties are looser"),
        (lambda arrays: arrays.update({"labels": arrays["labels"] + 90}), "are no classes of the model"),
        (lambda arrays: arrays.clear(), "the stored arrays have [] rows"),
        (lambda arrays: [arrays.pop(each) for each in list(arrays) if "result" in each], "holds no output"),
    ],
)  # fmt: skip
def test_arrays_must_fit_each_other(folder: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    rewritten(folder, change)
    refused("build", folder, words)


def test_an_encrypted_file_of_arrays_is_refused(folder: Path) -> None:
    content = bytearray((folder / ANSWERS).read_bytes())
    content[content.find(b"PK\x01\x02") + 8] |= 1
    (folder / ANSWERS).write_bytes(content)
    write_manifest(folder)
    refused("build", folder, "answers.npz cannot be read (it is damaged (RuntimeError))")


# ------------------------------------------------------------------------------------------------ any other edit

values = st.sampled_from([None, True, -1, 0, 10**30, 1e308, float("nan"), "x", "[/b]", "../x", [], {}, [[]], {"a": 1}])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every key and of the first entry of every list."""
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_edit_ends_in_another_error(
    original: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Reading any edited JSON file returns its content or raises an error of Compressor."""
    folder = tmp_path_factory.mktemp("edited") / "out"
    shutil.copytree(original, folder)
    name = data.draw(st.sampled_from([REPORT, PLAN, MANIFEST]))
    content = json.loads((folder / name).read_text())
    *parents, key = data.draw(st.sampled_from(list(places(content))))
    part: Any = content
    for parent in parents:
        part = part[parent]
    kind = data.draw(st.sampled_from(["set", "delete", "add"]))
    if kind == "set":
        part[key] = data.draw(values)
    elif kind == "delete":
        del part[key]
    elif isinstance(part, dict):
        part["surprise"] = copy.deepcopy(data.draw(values))
    (folder / name).write_text(json.dumps(content))
    if name != MANIFEST:
        write_manifest(folder)
    for read in (read_package, ExportFolder.read):
        with contextlib.suppress(CompressorError):
            assert read(folder)
    shutil.rmtree(folder.parent)
