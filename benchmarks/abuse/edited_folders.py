"""Exported folders that someone edited, for `build`, `bench` and `export --drop plan.json`.

Unless a case is about the manifest, the manifest is computed anew after the edit, as an author of both would do. The
schemas and the comparison with torch must then find the edit, and not the SHA-256 of a file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compressor.workspace.output_folder import write_manifest

from .cases import Answer, Case
from .data import DEEP, Payload, special
from .judging import MARKER
from .materials import MODULE, MODULE_DATA, OUT, Materials
from .processes import Ended

REPORT, PLAN, MANIFEST, ANSWERS, MODEL = (
    "report.json",
    "plan.json",
    "manifest.json",
    "deferred/answers.npz",
    "model.onnx",
)
BOTH = ("build", "bench")
DEFERRED, BUILT = "deferred", "built"  # the folders in a case: the one that is edited, and one of another plan
Edit = Callable[[Path], object]
MODULE_AND_DATA = ("--data", MODULE_DATA)
COMMANDS = {
    "build": ("build", DEFERRED, "--rounds", "1", "--quiet"),
    "bench": (
        "bench",
        DEFERRED,
        "--model",
        MODULE,
        *MODULE_AND_DATA,
        "--rounds",
        "1",
        "--quiet",
        "--output",
        f"{OUT}.json",
    ),
    "export": (
        "export",
        MODULE,
        *MODULE_AND_DATA,
        "--drop",
        f"{DEFERRED}/{PLAN}",
        "--rounds",
        "1",
        "--quiet",
        "--output",
        OUT,
    ),
}


def at(*keys: str | int, value: Any) -> Callable[[Any], None]:
    """Return a change that sets a value of a JSON file."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def without(*keys: str) -> Callable[[Any], None]:
    """Return a change that deletes a key of a JSON file."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def changed(name: str, change: Callable[[Any], object], *, seal: bool = True) -> Edit:
    """Return an edit of a JSON file; with `seal`, the manifest is computed anew."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
        if seal:
            write_manifest(folder)

    return edit


def replaced(name: str, content: str | bytes, *, seal: bool = True) -> Edit:
    """Return an edit that replaces a file."""

    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode("latin-1") if isinstance(content, str) else content)
        if seal:
            write_manifest(folder)

    return edit


def swapped(name: str, other: str | None = None, *, seal: bool = True) -> Edit:
    """Return an edit that takes a file from the export of another plan."""

    def edit(folder: Path) -> None:
        shutil.copyfile(folder.parent / BUILT / (other or name), folder / name)
        if seal:
            write_manifest(folder)

    return edit


def instead(name: str, kind: str) -> Edit:
    """Return an edit that puts a pipe, a socket or a link in the place of a file."""

    def edit(folder: Path) -> None:
        (folder / name).unlink()
        special(kind)(folder / name)

    return edit


def linked(name: str) -> Edit:
    """Return an edit that moves a file out of the folder and leaves a link to it."""

    def edit(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "moved")
        (folder / name).symlink_to(folder.parent / "moved")

    return edit


def arrays(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Return an edit of the stored samples and answers."""

    def edit(folder: Path) -> None:
        with np.load(folder / ANSWERS) as file:
            content = dict(file)
        change(content)
        np.savez(folder / ANSWERS, **content)
        write_manifest(folder)

    return edit


def compressed(folder: Path) -> None:
    """Compress the stored samples and answers."""
    with np.load(folder / ANSWERS) as file:
        content = dict(file)
    np.savez_compressed(folder / ANSWERS, **content)
    write_manifest(folder)


def encrypted(folder: Path) -> None:
    """Mark the stored samples and answers as encrypted."""
    content = bytearray((folder / ANSWERS).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + offset] |= 1
            start = content.find(signature, start + 4)
    (folder / ANSWERS).write_bytes(content)
    write_manifest(folder)


def scaled(name: str, factor: float) -> Edit:
    """Return an edit that multiplies a float weight of an ONNX file."""

    def edit(folder: Path) -> None:
        import onnx
        from onnx import numpy_helper

        model = onnx.load(folder / name)
        weight = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
        onnx.save(model, folder / name)
        write_manifest(folder)

    return edit


def external(folder: Path) -> None:
    """Let the model read a weight from a file outside of the folder."""
    import onnx

    model = onnx.load(folder / MODEL)
    onnx.external_data_helper.convert_model_to_external_data(model, location="x.data", size_threshold=0)
    onnx.save(model, folder / MODEL)
    (folder / "x.data").rename(folder.parent / "x.data")
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            entry.value = "../x.data" if entry.key == "location" else entry.value
    (folder / MODEL).write_bytes(model.SerializeToString())
    write_manifest(folder)


def renamed_input(folder: Path) -> None:
    """Rename the input of the model."""
    import onnx

    model = onnx.load(folder / MODEL)
    old = model.graph.input[0].name
    model.graph.input[0].name = "renamed"
    for node in model.graph.node:
        node.input[:] = ["renamed" if name == old else name for name in node.input]
    onnx.save(model, folder / MODEL)
    write_manifest(folder)


def payload_engine(folder: Path) -> None:
    """Name a module as the model of the report, and put it beside the folder."""
    (folder.parent / "evil.py").write_text(f"open('{MARKER}', 'w')\ndef make(): pass\n")
    changed(REPORT, at("settings", "model", value="evil:make"))(folder)


# ------------------------------------------------------------------------------------------------- answers


def built_as_exported(folder: Path, ended: Ended, materials: Materials) -> str | None:
    """Check that a build states the quality that the export measured."""
    report = json.loads((folder / DEFERRED / REPORT).read_text())
    exported = json.loads((materials.deferred / REPORT).read_text())
    if report["engine"]["state"] != "built":
        return "the engine is not built"
    return None if report["quality"] == exported["quality"] else "the quality differs from that of the export"


def measured(folder: Path, ended: Ended, materials: Materials) -> str | None:
    """Check that a comparison has a figure of the folder's engine."""
    content = json.loads((folder / f"{OUT}.json").read_text())
    return None if DEFERRED in json.dumps(content["measurements"]) else "the engine is not measured"


def same_plan(folder: Path, ended: Ended, materials: Materials) -> str | None:
    """Check that an export follows the plan."""
    made, wanted = (json.loads(path.read_text())["order"] for path in (folder / OUT / PLAN, folder / DEFERRED / PLAN))
    return None if made == wanted else f"the plan is {made}; expected {wanted}"


def shown(value: Any) -> str:
    """Return a short form of a value."""
    text = repr(value)
    return text if len(text) < 24 else f"{text[:20]}..."


Row = tuple[str, Edit, tuple[str, ...], str]
MANIFESTS: tuple[Row, ...] = (
    *(
        (f"manifest: {name}", replaced(MANIFEST, content, seal=False), BOTH, "no valid manifest.json")
        for name, content in (
            ("empty", ""),
            ("null", "null"),
            ("a list", "[]"),
            ("nothing in it", "{}"),
            ("200,000 lists in each other", DEEP),
            ("200,000 lists in its files", '{"files": ' + DEEP),
            ("not UTF-8", "\xff"),
            ("a size that is NaN", '{"files": {"model.onnx": {"bytes": NaN, "sha256": "0"}}}'),
            ("a size of 10^400", '{"files": {"model.onnx": {"bytes": 1' + "0" * 400 + ', "sha256": "0"}}}'),
            ("an unknown key", '{"files": {}, "more": 1}'),
        )
    ),
    ("manifest: missing", lambda folder: (folder / MANIFEST).unlink(), ("build",), "no valid manifest.json"),
    ("manifest: no files", replaced(MANIFEST, '{"files": {}}', seal=False), BOTH, ""),
    (
        "manifest: a name with ../",
        changed(MANIFEST, lambda content: content["files"].update({"../tiny.py": content["files"][PLAN]}), seal=False),
        BOTH,
        "no valid manifest.json",
    ),
    (
        "manifest: an absolute name",
        changed(MANIFEST, lambda content: content["files"].update({"/etc/passwd": content["files"][PLAN]}), seal=False),
        BOTH,
        "no valid manifest.json",
    ),
    (
        "manifest: a name with escapes",
        changed(MANIFEST, lambda content: content["files"].update({"\x1b[31m": content["files"][PLAN]}), seal=False),
        BOTH,
        "no valid manifest.json",
    ),
    ("manifest: a pipe", instead(MANIFEST, "pipe"), BOTH, "not a regular file"),
    ("manifest: a link to itself", instead(MANIFEST, "loop"), BOTH, "manifest.json"),
    *(
        (
            f"{name}: one byte more",
            lambda folder, name=name: (folder / name).write_bytes((folder / name).read_bytes() + b" "),
            BOTH,
            "is not the file that was exported",
        )
        for name in (REPORT, PLAN, MODEL, ANSWERS, "config.json", "report.html")
    ),
    *(
        (f"{name}: missing", lambda folder, name=name: (folder / name).unlink(), BOTH, f"lacks {name}")
        for name in (PLAN, MODEL, ANSWERS)
    ),
    *(
        (f"{name}: a link out of the folder", linked(name), BOTH, "is not a regular file in the folder")
        for name in (REPORT, MODEL, ANSWERS)
    ),
    *(
        (f"{name}: a pipe", instead(name, "pipe"), ("build",), "is not a regular file in the folder")
        for name in (REPORT, MODEL)
    ),
    *(
        (
            f"{name}: a pipe",
            instead(name, "pipe"),
            ("bench",),
            "is a FIFO, not a file" if name == REPORT else "is not a regular file in the folder",
        )
        for name in (REPORT, MODEL)
    ),
    *(
        (f"{name}: an extra file", replaced(name, "{}", seal=False), BOTH, "does not list")
        for name in ("adapter_config.json", "tokenizer.json", "model.onnx.data", "code/evil.py", "model.safetensors")
    ),
    *(
        (f"{name}: from another export", swapped(name, seal=False), BOTH, "is not the file that was exported")
        for name in (MODEL, REPORT, PLAN)
    ),
)
REPORTS: tuple[Row, ...] = (
    *(
        (f"report: {name}", replaced(REPORT, content), BOTH, REPORT)
        for name, content in (
            ("empty", ""),
            ("null", "null"),
            ("a list", "[]"),
            ("200,000 lists in each other", DEEP),
            ("200,000 lists in its engine", '{"engine": ' + DEEP),
            ("not UTF-8", "\xff"),
            ("a number of 5,000 digits", "9" * 5000),
            ("a lone surrogate", '{"a": "\\ud800"}'),
        )
    ),
    *(
        (
            f"report: {'.'.join(map(str, keys))} is {shown(value)}",
            changed(REPORT, at(*keys, value=value)),
            commands,
            ".".join(map(str, words or keys)),
        )
        for keys, value, commands, words in (
            (("engine",), None, BOTH, ()),
            (("settings",), [], BOTH, ()),
            (("model",), "x", BOTH, ()),
            (("data",), 7, BOTH, ()),
            (("settings", "target"), ["onnxruntime"], BOTH, ()),
            (("settings", "batch"), 10**12, ("build",), ()),
            (("settings", "rounds"), 10**9, ("build",), ()),
            (("settings", "rounds"), True, ("build",), ()),
            (("settings", "precision"), "int1", BOTH, ()),
            (("model", "source"), "pickle", BOTH, ()),
            (("model", "name"), "\x1b]0;x\x07", BOTH, ()),
            (("model", "task"), None, BOTH, ()),
            (("data", "seed"), "x", BOTH, ()),
            (("data", "sizes", "test"), -1, BOTH, ()),
            (("data", "test_ids"), {"a": 1}, BOTH, ()),
            (("engine", "state"), "done", ("build",), ()),
            (("engine", "options", "threads"), 10**6, ("build",), ()),
            (("engine", "options", "batches"), [1, 1, 10**9], ("build",), ()),
            (("engine", "options", "device"), "tpu", ("build",), ()),
            (("engine", "files", "result"), "../model.onnx", ("build",), ()),
            (("engine", "allowed", "result"), float("nan"), ("build",), ()),
            (("engine", "precisions", "result"), "int1", ("build",), ()),
            (("sizes", "result", "parameters"), -5, ("build",), ()),
            (("sizes", "result", "bytes"), 2**64, ("build",), ()),
            (("quality", "metric"), "beauty", ("build",), ()),
            (("quality", "figures"), {}, ("build",), ("quality",)),
            (("latency",), {"result": {}}, ("build",), ("latency",)),
            (("speedup",), {}, ("build",), ()),
            (("plan", "dropped"), ["x"], ("build",), ("plan",)),
            (("plan", "changes"), {"x": 3}, ("build",), ("plan", "changes")),
            (("environment",), {}, ("build",), ()),
            (("notes",), [None], ("build",), ()),
            (("seconds",), -1, ("build",), ()),
            (("timed_inputs",), {"x": [-1]}, ("build",), ("timed_inputs",)),
        )
    ),
    (
        "report: engine.allowed.result is 10^9",
        changed(REPORT, at("engine", "allowed", "result", value=1e9)),
        ("build",),
        "allows result a difference",
    ),
    (
        "report: engine.answer is another name",
        changed(REPORT, at("engine", "answer", value="../x")),
        ("build",),
        "holds no output",
    ),
    (
        "report: the model of result is report.json",
        changed(REPORT, at("engine", "files", "result", value=REPORT)),
        ("build",),
        "expected a file .onnx",
    ),
    (
        "report: the model of result is that of baseline",
        changed(
            REPORT, lambda content: content["engine"]["files"].update(result=content["engine"]["files"]["baseline"])
        ),
        ("build",),
        "result",
    ),
    (
        "report: a variant with ../",
        changed(REPORT, lambda content: content["sizes"].update({"../x": content["sizes"]["result"]})),
        ("build",),
        "sizes",
    ),
    ("report: no plan", changed(REPORT, without("plan")), ("build",), "plan: field required"),
    ("report: no quality", changed(REPORT, without("quality")), ("build",), "quality: field required"),
    ("report: of another export", swapped(REPORT), ("build",), ""),
)
PLANS: tuple[Row, ...] = (
    *(
        (f"plan: {name}", replaced(PLAN, content), ("build", "export"), PLAN)
        for name, content in (
            ("empty", ""),
            ("null", "null"),
            ("a list", "[]"),
            ("200,000 lists in each other", DEEP),
            ("200,000 lists in its order", '{"order": ' + DEEP),
            ("not UTF-8", "\xff"),
        )
    ),
    *(
        (f"plan: {name}", changed(PLAN, change), commands, words)
        for name, change, commands, words in (
            ("an unknown key", at("more", value=1), ("build", "export"), "more"),
            ("no order", without("order"), ("build", "export"), "order"),
            ("an order of numbers", at("order", value=[1]), ("build", "export"), "order"),
            (
                "a site that the model lacks",
                lambda content: (
                    content["order"].append("x"),
                    content["decisions"].append({"site": "x", "action": "drop", "reason": "x"}),
                ),
                ("export",),
                "x",
            ),
            (
                "an order with a site that is kept",
                lambda content: content["order"].append(content["decisions"][0]["site"]),
                ("export",),
                "",
            ),
            (
                "an order that names a site twice",
                lambda content: content["order"].append(content["order"][0]),
                ("export",),
                "",
            ),
            (
                "a decision twice",
                lambda content: content["decisions"].append(content["decisions"][-1]),
                ("export",),
                "",
            ),
            ("no decisions", at("decisions", value=[]), ("export",), ""),
            ("an unknown action", at("decisions", 2, "action", value="explode"), ("export",), "explode"),
            ("a rank of 0", at("decisions", 2, "action", value="low-rank:0"), ("export",), "low-rank:0"),
            ("merging without an attention", at("decisions", 2, "action", value="merge:50%"), ("export",), "merge"),
            ("another version", at("version", value=99), ("export",), "99"),
            ("a version that is true", at("version", value=True), ("build", "export"), "version"),
            ("another fingerprint", at("fingerprint", value="0" * 16), ("export",), "its sites differ"),
            ("a fingerprint that is a number", at("fingerprint", value=0), ("build", "export"), "fingerprint"),
        )
    ),
    ("plan: a pipe", instead(PLAN, "pipe"), ("export",), "FIFO"),
    ("plan: a link to itself", instead(PLAN, "loop"), ("export",), PLAN),
    ("plan: a folder", lambda folder: ((folder / PLAN).unlink(), (folder / PLAN).mkdir()), ("export",), PLAN),
)
FILES: tuple[Row, ...] = (
    ("model: empty", replaced(MODEL, ""), BOTH, ""),
    ("model: a text", replaced(MODEL, "version https://git-lfs.github.com/spec/v1"), BOTH, ""),
    ("model: truncated", lambda folder: (os.truncate(folder / MODEL, 900), write_manifest(folder)), BOTH, ""),
    ("model: another plan", swapped(MODEL), ("build",), "result"),
    (
        "model: the baseline",
        lambda folder: (shutil.copyfile(folder / "deferred/baseline.onnx", folder / MODEL), write_manifest(folder)),
        ("build",),
        "result",
    ),
    ("model: a weight twice as large", scaled(MODEL, 2.0), ("build",), "result"),
    ("baseline: a weight twice as large", scaled("deferred/baseline.onnx", 2.0), ("build",), "baseline"),
    ("model: a weight that is NaN", scaled(MODEL, float("nan")), BOTH, ""),
    ("model: another name of its input", renamed_input, BOTH, ""),
    ("model: a weight outside of the folder", external, BOTH, ""),
    *(
        (f"samples: {name}", edit, ("build",), words)
        for name, edit, words in (
            ("empty", replaced(ANSWERS, ""), "answers.npz cannot be read"),
            ("a text", replaced(ANSWERS, "PK"), "answers.npz cannot be read"),
            ("compressed", compressed, "is compressed"),
            ("encrypted", encrypted, "answers.npz"),
            (
                "pickled",
                arrays(lambda content: content.update({next(iter(content)): np.array([Payload()], dtype=object)})),
                "answers.npz cannot be read",
            ),
            ("nothing", arrays(lambda content: content.clear()), "rows"),
            (
                "answers of 0",
                arrays(
                    lambda content: content.update(
                        {name: value * 0 for name, value in content.items() if name.startswith("expected/result")}
                    )
                ),
                "result",
            ),
            (
                "answers that are NaN",
                arrays(
                    lambda content: content.update(
                        {name: value * np.nan for name, value in content.items() if name.startswith("expected/")}
                    )
                ),
                "",
            ),
            (
                "other rows",
                arrays(
                    lambda content: content.update(
                        {name: value[::-1] for name, value in content.items() if name.startswith("feeds/")}
                    )
                ),
                "",
            ),
            ("fewer labels", arrays(lambda content: content.update(labels=content["labels"][:-1])), "rows"),
            (
                "labels beyond the classes",
                arrays(lambda content: content.update(labels=content["labels"] + 90)),
                "are no classes of the model",
            ),
            (
                "a limit of 10^9",
                arrays(lambda content: content.update({"allowed/result/logits": np.full((1, 1), 1e9)})),
                "",
            ),
        )
    ),
)
HARMLESS: tuple[tuple[str, Edit, tuple[str, ...], str, Answer | None], ...] = (
    *(
        (f"harmless: {name}", edit, ("build",), "the build states the quality of the export", built_as_exported)
        for name, edit in (
            ("an edited model card", replaced("README.md", "mine", seal=False)),
            ("no model card", lambda folder: (folder / "README.md").unlink()),
            ("a text file", replaced("notes.txt", "mine", seal=False)),
            ("a hidden file", replaced(".DS_Store", "x", seal=False)),
            ("an unknown key in the report", changed(REPORT, at("more", value={"deep": [1]}))),
            (
                "markup in a text of the report",
                changed(REPORT, at("model", "name", value="[red]<script>alert(1)</script>")),
            ),
            ("a page that is no HTML", replaced("report.html", "\xff\x00<<<")),
        )
    ),
    (
        "harmless: code as model, and another on the command line",
        payload_engine,
        ("bench",),
        "the engine is measured",
        measured,
    ),
    (
        "harmless: an edited model card",
        replaced("README.md", "mine", seal=False),
        ("bench",),
        "the engine is measured",
        measured,
    ),
    (
        "harmless: an unknown key in the report",
        changed(REPORT, at("more", value=1)),
        ("bench",),
        "the engine is measured",
        measured,
    ),
    (
        "harmless: other reasons in the plan",
        changed(PLAN, at("decisions", 0, "reason", value="[red]\x1b[31m")),
        ("export",),
        "the export follows the plan",
        same_plan,
    ),
    (
        "harmless: another rule in the plan",
        changed(PLAN, at("rule", value="x" * 10_000)),
        ("export",),
        "the export follows the plan",
        same_plan,
    ),
)


def cases() -> Iterator[Case]:
    """Yield a case for each edit and command."""
    for name, edit, commands, words in (*MANIFESTS, *REPORTS, *PLANS, *FILES):
        for command in commands:
            yield _case(name, edit, command, words, None)
    for name, edit, commands, words, answer in HARMLESS:
        for command in commands:
            yield _case(name, edit, command, words, answer)


def _case(name: str, edit: Edit, command: str, words: str, answer: Answer | None) -> Case:
    uses = (MODULE, MODULE_DATA, DEFERRED, BUILT)
    return Case(f"{command}, {name}", COMMANDS[command], words, uses, lambda folder: edit(folder / DEFERRED), answer)
