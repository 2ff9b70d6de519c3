"""Data that cannot be used, in part or at all: arrays, folders of pictures, and texts."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Answer, Case, command, figures_of, report_of
from .judging import MARKER
from .materials import (
    BERT,
    FEATURES,
    LLAMA,
    MODULE,
    SAMPLES,
    VIT,
    labels,
    picture,
    rows,
)
from .processes import Ended

Write = Callable[[Path], object]
QUICK = ("--drop", "none", "--rounds", "1")
DEEP = "[" * 200_000


class Payload:
    """An object that writes the marker when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle calls."""
        return (open, (MARKER, "w"))


def cases() -> Iterator[Case]:
    """Yield all cases with bad data."""
    for name, file, write, words in ARRAYS:
        yield _case(f"array: {name}", MODULE, file, write, words)
    for name, file, write, words, answer in USABLE_ARRAYS:
        yield _case(f"array: {name}", MODULE, file, write, words, answer)
    for name, write, words in PICTURES:
        yield _case(f"pictures: {name}", VIT, "data", write, words)
    for name, write, words, answer in USABLE_PICTURES:
        yield _case(f"pictures: {name}", VIT, "data", write, words, answer)
    for name, file, write, words in TABLES:
        yield _case(f"texts: {name}", BERT, file, write, words)
    for name, file, write, words, answer in USABLE_TABLES:
        yield _case(f"texts: {name}", BERT, file, write, words, answer)
    for name, file, write, words in TOKENS:
        yield _case(f"language: {name}", LLAMA, file, write, words)


def _case(name: str, model: str, file: str, write: Write, words: str, answer: Answer | None = None) -> Case:
    arguments = command("export", (model, "--data", file, *QUICK))
    return Case(f"data, {name}", arguments, words, (model,), lambda folder: write(folder / file), answer)


# ------------------------------------------------------------------------------------------------- answers


def skips(*ids: str) -> Answer:
    """Return a check that exactly these samples are left out, and that the report names them."""

    def answer(folder: Path, ended: Ended, _: object) -> str | None:
        skipped = [sample["id"] for sample in report_of(folder)["data"]["skipped"]]
        return None if sorted(skipped) == sorted(ids) else f"skipped {skipped}; expected {list(ids)}"

    return answer


def scored_as(classes: np.ndarray[Any, Any] | None) -> Answer:
    """Return a check that the accuracy in the report is that of the module on these labels, or that there is none."""

    def answer(folder: Path, ended: Ended, _: object) -> str | None:
        report = report_of(folder)
        figures = figures_of(report)
        if classes is None or figures is None or report["quality"]["metric"] != "accuracy":
            found = None if figures is None else report["quality"]["metric"]
            return None if (classes is None) == (found != "accuracy") else f"the metric is {found}"
        right = _answers(folder) == classes
        test = [int(number) for number in report["data"]["test_ids"]]
        expected = 100 * float(np.mean(right[test]))
        return (
            None if abs(figures["result"] - expected) < 1e-6 else f"accuracy {figures['result']}; expected {expected}"
        )

    return answer


def _answers(folder: Path) -> np.ndarray[Any, Any]:
    """Return the classes that the exported file gives the plain rows in plain ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "room/out/model.onnx")
    (output, *_) = session.run(None, {session.get_inputs()[0].name: rows()})
    return np.asarray(output).argmax(axis=1)


# --------------------------------------------------------------------------------------------------- files


def text(content: str, encoding: str = "utf-8") -> Write:
    """Return what writes a text."""
    return lambda path: path.write_text(content, encoding=encoding)


def array(**arrays: Any) -> Write:
    """Return what writes a .npz file, or a .npy file of the array ``x`` alone."""

    def write(path: Path) -> None:
        if path.suffix == ".npy":
            np.save(path, arrays["x"], allow_pickle=True)
        else:
            np.savez(path, **arrays)

    return write


def labelled(classes: Any) -> Write:
    """Return what writes the plain rows with labels."""
    return array(x=rows(), labels=classes)


def npy(header: str) -> Write:
    """Return what writes a .npy file of a header and a few bytes."""
    line = header.encode() + b"\n"
    return lambda path: path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(line)) + line + bytes(64))


def zipped(change: Callable[[bytearray], object]) -> Write:
    """Return what writes a compressed .npz file and changes its bytes."""

    def write(path: Path) -> None:
        np.savez_compressed(path, x=rows(), labels=labels())
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return write


def _flags(content: bytearray, offset_local: int, offset_central: int, value: int) -> None:
    """Set a field of two bytes in every header of a zip file."""
    for signature, offset in ((b"PK\x03\x04", offset_local), (b"PK\x01\x02", offset_central)):
        start = content.find(signature)
        while start >= 0:
            content[start + offset : start + offset + 2] = struct.pack("<H", value)
            start = content.find(signature, start + 4)


def _damage(content: bytearray) -> None:
    """Overwrite the compressed bytes of the first array."""
    start = content.find(b"x.npy") + 5 + 20
    content[start : start + 40] = bytes(range(200, 240))


def _with_name(name: str) -> Write:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"no array")

    return write


def special(kind: str) -> Write:
    """Return what makes a pipe, a socket, or a link that leads to itself or nowhere."""

    def write(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        else:
            path.symlink_to(path.name if kind == "loop" else "nowhere")

    return write


def _wrong(value: float) -> np.ndarray[Any, Any]:
    """Return the plain rows with one wrong value."""
    changed = rows()
    changed[3, 3] = value
    return changed


def _pictures(folder: Path, labels: tuple[str, ...] = ("0", "1")) -> None:
    """Write pictures in the folders of classes."""
    chance = np.random.default_rng(0)
    for label in labels:
        (folder / label).mkdir(parents=True)
        for number in range(SAMPLES // 2):
            picture(chance.integers(0, 256, (32, 32, 3))).save(folder / label / f"{number:02}.png")


LABELS_OF_FLOAT = np.where(np.arange(SAMPLES) == 3, 1e300, labels().astype(float))
ARRAYS: tuple[tuple[str, str, Write, str], ...] = (
    ("empty file", "d.npz", text(""), "not a readable NumPy file"),
    ("a text as .npz", "d.npz", text("x,y\n1,2\n"), "not a readable NumPy file"),
    ("truncated .npy", "d.npy", lambda path: (np.save(path, rows()), os.truncate(path, 300)), "not a readable"),
    ("truncated .npz", "d.npz", lambda path: (labelled(labels())(path), os.truncate(path, 300)), "not a readable"),
    ("damaged compressed .npz", "d.npz", zipped(_damage), "not a readable"),
    ("encrypted .npz", "d.npz", zipped(lambda content: _flags(content, 6, 8, 1)), "not a readable"),
    ("unknown compression", "d.npz", zipped(lambda content: _flags(content, 8, 10, 99)), "not a readable"),
    ("a pickle as .npy", "d.npy", array(x=np.array([Payload()], dtype=object)), "holds Python objects"),
    ("a pickle in .npz", "d.npz", array(x=np.array([Payload()], dtype=object)), "holds Python objects"),
    ("pickled labels", "d.npz", labelled(np.array([Payload()] * SAMPLES, dtype=object)), "holds Python objects"),
    (
        "a header of a huge shape",
        "d.npy",
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999, 8)}"),
        "not a readable",
    ),
    ("a negative shape", "d.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 8)}"), "not a readable"),
    ("a deep header", "d.npy", npy("{'descr': '<f4', 'shape': " + "(" * 3000), "not a readable"),
    ("code in a header", "d.npy", npy(f"{{'descr': open('{MARKER}', 'w')}}"), "not a readable"),
    ("a path as array name", "d.npz", _with_name("../../x.npy"), "d.npz"),
    ("no array in .npz", "d.npz", _with_name("x.txt"), "d.npz"),
    ("NaN", "d.npy", array(x=_wrong(np.nan)), "NaN or infinite"),
    ("infinity", "d.npy", array(x=_wrong(np.inf)), "NaN or infinite"),
    ("complex numbers", "d.npy", array(x=rows() * 1j), "complex"),
    ("dates", "d.npy", array(x=np.zeros((24, FEATURES), "datetime64[s]")), "datetime64"),
    ("records", "d.npy", array(x=np.zeros(24, [("a", "f4"), ("b", "i4")])), "expected"),
    ("strings", "d.npy", array(x=np.full((24, FEATURES), "x")), "expected"),
    ("integers", "d.npy", array(x=rows().astype(int)), "expected float32"),
    ("too many features", "d.npy", array(x=np.zeros((24, 9), np.float32)), "expected float32"),
    ("one axis", "d.npy", array(x=np.zeros(24, np.float32)), "expected float32"),
    ("no axis", "d.npy", array(x=np.float32(1)), "expected samples along the first axis"),
    ("no rows", "d.npy", array(x=np.zeros((0, FEATURES), np.float32)), "expected samples along the first axis"),
    ("one row", "d.npy", array(x=rows()[:1]), "1"),
    ("two rows", "d.npy", array(x=rows()[:2]), "2"),
    ("another array", "d.npz", array(x=rows(), z=rows()), "beside"),
    ("fewer labels than rows", "d.npz", labelled(labels()[:-1]), "one for each sample"),
    ("labels of two axes", "d.npz", labelled(np.zeros((SAMPLES, 2), int)), "one for each sample"),
    ("a class below 0", "d.npz", labelled(labels() - 1), "class label -1"),
    ("a class that the model lacks", "d.npz", labelled(labels() + 90), "class"),
    ("a class of 2^63", "d.npz", labelled(labels().astype(np.uint64) + np.uint64(2**63)), "class"),
    ("a class of 1e300", "d.npz", labelled(LABELS_OF_FLOAT), "class"),
    ("NaN as label", "d.npz", labelled(np.where(np.arange(SAMPLES) == 3, np.nan, 1.0)), "the label nan"),
    ("dates as labels", "d.npz", labelled(np.zeros(SAMPLES, "datetime64[s]")), "labels of type datetime64"),
    ("bytes as labels", "d.npz", labelled(np.array([b"\xff\xfe"] * SAMPLES)), "not UTF-8"),
    ("names and numbers as labels", "d.npz", labelled(np.array(["0", "cat"] * 12)), "both numbers (0) and names (cat)"),
    ("a folder as .npz", "d.npz", lambda path: path.mkdir(), "holds no images"),
    ("a pipe", "d.npz", special("pipe"), "is a FIFO, not a file"),
    ("a socket", "d.npz", special("socket"), "is a socket, not a file"),
    ("a link to itself", "d.npz", special("loop"), "d.npz"),
    ("a link to nothing", "d.npz", special("dangling"), "there is no file or folder"),
    ("a name without ending", "data", text("x"), "extension none"),
    ("pictures for a module", "d", _pictures, "holds images"),
    ("texts for a module", "d.csv", text("text,label\na,0\nb,1\n"), "holds texts"),
)
USABLE_ARRAYS: tuple[tuple[str, str, Write, str, Answer], ...] = (
    (
        "big-endian rows",
        "d.npz",
        array(x=rows().astype(">f4"), labels=labels()),
        "the accuracy of plain ONNX Runtime",
        scored_as(labels()),
    ),
    (
        "rows of float64",
        "d.npz",
        array(x=rows().astype(float), labels=labels()),
        "the accuracy of plain ONNX Runtime",
        scored_as(labels()),
    ),
    (
        "Fortran order",
        "d.npz",
        array(x=np.asfortranarray(rows()), labels=labels()),
        "the accuracy of plain ONNX Runtime",
        scored_as(labels()),
    ),
    (
        "labels as whole floats",
        "d.npz",
        labelled(labels().astype(float)),
        "the accuracy of plain ONNX Runtime",
        scored_as(labels()),
    ),
    (
        "labels as numbers in text",
        "d.npz",
        labelled(labels().astype(str)),
        "the accuracy of plain ONNX Runtime",
        scored_as(labels()),
    ),
    (
        "labels of one column",
        "d.npz",
        labelled(labels().reshape(-1, 1)),
        "the accuracy of plain ONNX Runtime",
        scored_as(labels()),
    ),
    ("no labels", "d.npy", array(x=rows()), "no accuracy is stated", scored_as(None)),
)


# ------------------------------------------------------------------------------------------------ pictures


def among(name: str, write: Write) -> Write:
    """Return what writes good pictures and a bad one."""

    def all_of(folder: Path) -> None:
        _pictures(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name)

    return all_of


def only(name: str, write: Write) -> Write:
    """Return what writes four bad pictures and no good one."""

    def all_of(folder: Path) -> None:
        for number in range(4):
            path = folder / "0" / f"{number}{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)

    return all_of


def _truncated(path: Path) -> None:
    picture(np.random.default_rng(0).integers(0, 256, (32, 32, 3))).save(path)
    os.truncate(path, path.stat().st_size // 2)


def _huge(path: Path) -> None:
    """Write a PNG whose header claims 100,000 x 100,000 pixels."""
    picture(np.zeros((4, 4, 3))).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", __import__("zlib").crc32(bytes(content[12:29])))
    path.write_bytes(content)


def _bytes_name(folder: Path) -> None:
    """Write a picture whose name is not UTF-8."""
    _pictures(folder)
    shutil.copyfile(folder / "0" / "00.png", os.fsencode(folder / "0") + b"/\xff.png")


def _bytes_class(folder: Path) -> None:
    """Write a class whose name is not UTF-8."""
    _pictures(folder)
    shutil.copytree(os.fsencode(folder / "0"), os.fsencode(folder) + b"/\xff")


PICTURES: tuple[tuple[str, Write, str], ...] = (
    ("an empty folder", lambda folder: folder.mkdir(), "holds no images"),
    ("texts only", lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("x")), "holds no images"),
    ("empty classes", lambda folder: (folder / "0").mkdir(parents=True), "holds no images"),
    ("truncated PNGs only", only(".png", _truncated), "none of the 4 images in data can be decoded"),
    ("empty PNGs only", only(".png", text("")), "none of the 4 images in data can be decoded"),
    ("huge PNGs only", only(".png", _huge), "none of the 4 images in data can be decoded"),
    (
        "texts named .jpg only",
        only(".jpg", text("<svg onload=alert(1)>")),
        "none of the 4 images in data can be decoded",
    ),
    (
        "pickles named .npy only",
        only(".npy", array(x=np.array([Payload()], dtype=object))),
        "none of the 4 images in data can be decoded",
    ),
    (
        "NaN in .npy only",
        only(".npy", array(x=np.full((3, 32, 32), np.nan, np.float32))),
        "none of the 4 images in data can be decoded",
    ),
    ("pipes only", only(".png", special("pipe")), "a FIFO, not a file"),
    ("classes beside pictures", among("x.png", lambda path: picture(np.zeros((4, 4, 3))).save(path)), "beside"),
    ("splits of a data set", partial(_pictures, labels=("train", "val")), "holds splits"),
    ("numbers and names as classes", partial(_pictures, labels=("0", "cat")), "both numbers (0) and names (cat)"),
    ("a class that the model lacks", partial(_pictures, labels=("0", "7")), "class"),
    (
        "two pictures",
        lambda folder: [folder.mkdir(), *(picture(np.zeros((4, 4, 3))).save(folder / f"{n}.png") for n in "ab")],
        "2",
    ),
    ("a link to itself as folder", special("loop"), "data"),
)
USABLE_PICTURES: tuple[tuple[str, Write, str, Answer], ...] = (
    ("one truncated PNG", among("0/bad.png", _truncated), "it is skipped and named", skips("0/bad.png")),
    ("one empty PNG", among("0/bad.png", text("")), "it is skipped and named", skips("0/bad.png")),
    ("one huge PNG", among("0/bad.png", _huge), "it is skipped and named", skips("0/bad.png")),
    ("one pipe", among("0/bad.png", special("pipe")), "it is skipped and named", skips("0/bad.png")),
    ("one socket", among("0/bad.png", special("socket")), "it is skipped and named", skips("0/bad.png")),
    ("one link to itself", among("0/bad.png", special("loop")), "it is skipped and named", skips("0/bad.png")),
    ("one link to nothing", among("0/bad.png", special("dangling")), "it is skipped and named", skips("0/bad.png")),
    (
        "one pickle as .npy",
        among("0/bad.npy", array(x=np.array([Payload()], dtype=object))),
        "it is skipped and named",
        skips("0/bad.npy"),
    ),
    ("a class folder that links to itself", among("2", special("loop")), "nothing is skipped", skips()),
    (
        "a name with a line feed",
        among("0/a\nb.png", lambda path: picture(np.zeros((32, 32, 3))).save(path)),
        "nothing is skipped",
        skips(),
    ),
    (
        "a name with markup",
        among("0/[red]<b>&\x1b[31m.png", lambda path: picture(np.zeros((32, 32, 3))).save(path)),
        "nothing is skipped",
        skips(),
    ),
    (
        "a truncated PNG whose name has markup",
        among("0/[red]\x1b[31m<b>.png", _truncated),
        "it is skipped and named",
        skips("0/[red]\x1b[31m<b>.png"),
    ),
    ("a name that is not UTF-8", _bytes_name, "nothing is skipped", skips()),
    (
        "one pixel",
        among("0/bad.png", lambda path: picture(np.zeros((1, 1, 3))).save(path)),
        "nothing is skipped",
        skips(),
    ),
    (
        "a picture of 3,000 x 1 pixels",
        among("0/bad.png", lambda path: picture(np.zeros((1, 3000, 3))).save(path)),
        "nothing is skipped",
        skips(),
    ),
    (
        "CMYK",
        among("0/bad.jpg", lambda path: picture(np.zeros((32, 32, 3))).convert("CMYK").save(path)),
        "nothing is skipped",
        skips(),
    ),
    (
        "two levels of grey with transparency",
        among("0/bad.png", lambda path: picture(np.zeros((32, 32, 3))).convert("LA").save(path)),
        "nothing is skipped",
        skips(),
    ),
)


# --------------------------------------------------------------------------------------------------- texts


def table(*lines: str) -> Write:
    """Return what writes a table with a header."""
    return text("\n".join(["text,label", *lines, ""]))


GOOD = [f"{' '.join('abcdefgh'[number % 5 :])},{number % 2}" for number in range(SAMPLES)]
HUGE_CELL = "a " * 500_000
TABLES: tuple[tuple[str, str, Write, str], ...] = (
    ("an empty table", "t.csv", text(""), "holds no rows"),
    ("a header only", "t.csv", text("text,label\n"), "no rows"),
    ("a quote that does not end", "t.csv", table(*GOOD[:4], '"a b,1', *GOOD[4:]), "quoted cell that does not end"),
    ("UTF-16", "t.csv", text("\n".join(["text,label", *GOOD]), "utf-16"), "UTF-16"),
    ("Latin-1", "t.csv", text("text,label\nä ö,1\n" * 9, "latin-1"), "not UTF-8"),
    ("random bytes", "t.csv", lambda path: path.write_bytes(np.random.default_rng(0).bytes(4000)), "UTF-8"),
    ("NUL characters", "t.csv", text("\0" * 4000), "NUL"),
    ("a picture as .csv", "t.csv", lambda path: picture(np.zeros((8, 8, 3))).save(path, "png"), "UTF-8"),
    ("no column of texts", "t.csv", text("label\n" + "1\n" * 20), "texts"),
    ("three columns of texts", "t.csv", text("one,two,three\n" + "a b,c d,e f\n" * 20), "columns that look like texts"),
    ("two columns of numbers", "t.csv", text("a b,1,7\nc d,0,3\n" * 20), "numeric columns"),
    ("a class that the model lacks", "t.csv", table(*GOOD, "a b,7"), "class"),
    ("a class below 0", "t.csv", table(*GOOD, "a b,-2"), "class label -2"),
    ("a class of 1e300", "t.csv", table(*GOOD, "a b,1e300"), "class"),
    ("an infinite class", "t.csv", table(*GOOD, "a b,inf"), "class"),
    ("a class of 2^63", "t.csv", table(*GOOD, f"a b,{2**63}"), "class"),
    ("names and numbers as classes", "t.csv", table(*GOOD, "a b,cat"), "both numbers"),
    ("one text", "t.csv", table("a b,1"), "1"),
    ("empty texts only", "t.csv", table(*[" ,1"] * 9), "empty"),
    ("an empty .jsonl", "t.jsonl", text("\n\n"), "holds no samples"),
    (
        "a line that is no JSON",
        "t.jsonl",
        text('{"text": "a", "label": 1}\n{"text"\n' * 9),
        "line 2 of t.jsonl is no JSON object",
    ),
    ("a list in .jsonl", "t.jsonl", text("[1, 2]\n" * 9), "is no JSON object"),
    ("a deep line in .jsonl", "t.jsonl", text('{"text": ' + DEEP + "\n"), "is no JSON object"),
    ("a lone surrogate in .jsonl", "t.jsonl", text('{"text": "\\ud800", "label": 1}\n' * 9), "is no JSON object"),
    ("a label of 10^400 in .jsonl", "t.jsonl", text(f'{{"text": "a b", "label": 1{"0" * 400}}}\n' * 9), "label"),
    ("NaN as label in .jsonl", "t.jsonl", text('{"text": "a b", "label": NaN}\n' * 9), "label"),
    ("an object as text in .jsonl", "t.jsonl", text('{"text": {"a": 1}, "label": 1}\n' * 9), "text"),
    ("null as label in .jsonl", "t.jsonl", text('{"text": "a b", "label": null}\n' * 9), "the class is empty"),
    (".conll for a classifier of texts", "t.conll", text("a O\nb O\n\n" * 9), "words with tags"),
    ("token ids beyond the vocabulary", "t.npy", array(x=np.full((24, 6), 99)), "index out of range"),
    ("negative token ids", "t.npy", array(x=np.full((24, 6), -5)), "token id -5"),
    ("token ids as floats", "t.npy", array(x=np.ones((24, 6))), "expected integer token ids"),
    ("token ids of 2^40", "t.npy", array(x=np.full((24, 6), 2**40)), "index out of range"),
)
USABLE_TABLES: tuple[tuple[str, str, Write, str, Answer], ...] = (
    ("scores for a classifier", "t.csv", table("a b,0.5", "c d,0.25", *GOOD), "no accuracy is stated", scored_as(None)),
    ("rows with more cells", "t.csv", table(*GOOD, "a,b,1"), "the row is skipped and named", skips("24")),
    ("an empty label", "t.csv", table(*GOOD, "a b,"), "the row is skipped and named", skips("24")),
    ("an empty text", "t.csv", table(*GOOD, " ,1"), "the row is skipped and named", skips("24")),
    ("a NUL in a text", "t.csv", table(*GOOD, "a\0b,1"), "the row is skipped and named", skips("24")),
    ("a cell of a million characters", "t.csv", table(*GOOD, f"{HUGE_CELL},1"), "nothing is skipped", skips()),
    ("control characters", "t.csv", table(*GOOD, "\x1b[31m [red] <b>,1"), "nothing is skipped", skips()),
    ("a byte order mark", "t.csv", text("\ufeff" + "\n".join(["text,label", *GOOD])), "nothing is skipped", skips()),
)
TOKENS: tuple[tuple[str, str, Write, str], ...] = (
    ("an empty text", "t.txt", text("\n\n"), "holds no text"),
    ("one short text", "t.txt", text("a\n"), "t.txt"),
    ("token ids beyond the vocabulary", "t.npy", array(x=np.full((24, 16), 99)), "index out of range"),
    ("token ids of one column", "t.npy", array(x=np.full((24, 1), 5)), "has one token in each row"),
    (
        "a mask of zeros",
        "t.npz",
        array(input_ids=np.full((24, 16), 5), attention_mask=np.zeros((24, 16), int)),
        "attention_mask",
    ),
    ("pictures", "t", _pictures, "holds images"),
)
