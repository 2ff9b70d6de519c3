"""Options with bad values, options that contradict each other, and outputs that cannot be written."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

from .cases import Case, command
from .materials import MODULE, MODULE_DATA

# A command and what its refusal says; M is the module with its data.
TABLE = """
export M --drop 150% | --drop 150%: expected at most 100%
export M --drop -1 | --drop -1: '-1' is neither a number nor a site name
export M --drop '' | drop is empty
export M --drop nan% | --drop nan%: 'nan%' is neither a number nor a site name
export M --drop 0.5 | --drop names '0.5', which is neither a site nor a block of the model
export M --drop 1e3 | --drop names '1e3', which is neither a site nor a block of the model
export M --drop 99999999999999999999 | --drop 99999999999999999999: the model has only 3 of the kind site
export M --drop attention:99 | --drop attention:99: the model has only 0 of the kind attention
export M --drop mlp:x | --drop mlp:x: 'mlp:x' is neither a number nor a site name
export M --drop head:1 | --drop head:1: unknown kind 'head'
export M --drop garbage | --drop names 'garbage', which is neither a site nor a block of the mod
export M --drop blocks.0.mlp,garbage | --drop names 'garbage', which is neither a site nor a block of the mod
export M --drop missing.json | the plan file missing.json cannot be read
export M --drop . | --drop names '.', which is neither a site nor a block of the model
export M --drop tiny.npz | --drop names 'tiny.npz', which is neither a site nor a block of the mo
export M --metric size | Invalid value for '--metric': 'size' is not one of 'cosine', 'influenc
export M --actions teleport | --actions: unknown action 'teleport'
export M --actions '' | --actions: unknown action ''
export M --actions drop,,linear | --actions: unknown action ''
export M --drop 1 --actions low-rank:0 | --actions: unknown action 'low-rank:0'
export M --drop 1 --actions low-rank:-1 | --actions: unknown action 'low-rank:-1'
export M --drop 1 --actions low-rank:x | --actions: unknown action 'low-rank:x'
export M --drop 2 --actions drop,linear | found --actions drop,linear with --drop 2
export M --drop 1 --tokens 8 | --tokens 8 merges tokens after attentions, but the model has none
export M --tokens -1 | --tokens -1: expected auto, none, a number such as 8, one number for e
export M --tokens 99% | --tokens 99%
export M --tokens 8,x | --tokens 8,x
export M --cost time | Invalid value for '--cost': 'time' is not one of 'latency', 'macs'
export M --max-loss -1 | max-loss is -1
export M --max-loss nan | max-loss is nan
export M --max-loss much | Invalid value for '--max-loss': 'much' is not a percentage
export M --speedup 0.5 | speedup is 0.5
export M --speedup inf | speedup is inf
export M --drop 2 --speedup 1.5 | --speedup is a goal of the search
export M --speedup 2 --latency 5ms | found --speedup and --latency, which both set the goal for speed
export M --latency soon | Invalid value for '--latency': 'soon' is not a latency
export M --latency nan | latency is nan
export M --latency -5ms | latency is -5
export M --latency 5ms --cost macs | found --latency with --cost macs, which does not time the target
export M --latency 5ms --defer-build | found --latency with --defer-build, which does not time the target
export M --heal prayer | Invalid value for '--heal': 'prayer' is not one of 'none', 'closed-for
export M --heal-budget 0 | heal-budget is 0
export M --heal-budget 5d | Invalid value for '--heal-budget': '5d' is not a duration
export M --heal-budget nan | heal-budget is nan
export M --target onnxruntim | Unknown target 'onnxruntim'
export M --target '' | Unknown target ''
export M --target ../os | Unknown target '../os'
export M --target base | Unknown target 'base'
export M --precision fp4 | Invalid value for '--precision': 'fp4' is not one of 'auto', 'fp32', '
export M --precision fp16 | target onnxruntime has no fp16 on cpu
export M --precision bf16 | target onnxruntime has no bf16 on cpu
export M --int8 --precision fp16 | found --int8 and --precision fp16
export M --int8=often | Invalid value for '--int8': 'often' is not one of 'static', 'dynamic'
export M --device tpu | Invalid value for '--device': 'tpu' is not one of 'cpu', 'cuda'
export M --threads 0 | Invalid value for '--threads': 0 is not in the range x>=1
export M --threads many | Invalid value for '--threads': 'many' is not a valid integer range
export M --threads 99999999999 | expected at most 4,096
export M --batch 0 | Invalid value for '--batch': 0 is not in the range x>=1
export M --batch -1 | Invalid value for '--batch': -1 is not in the range x>=1
export M --batch 1000000000000 | expected at most 65,536
export M --generate 128 | --generate 128
export M --generate 0:5 | --generate 0:5
export M --generate ٣:٣ | --generate needs a language model with a KV cache
export M --generate 128:128 | --generate needs a language model with a KV cache
export M --rounds 99999999999 | expected at most 10,000
export M --rounds 0 | Invalid value for '--rounds': 0 is not in the range x>=1
export M --rounds 1.5 | Invalid value for '--rounds': '1.5' is not a valid integer range
export M --samples 2 | Invalid value for '--samples': 2 is not in the range x>=3
export M --search-samples 0 | Invalid value for '--search-samples': 0 is not in the range x>=1
export M --max-length 1 | Invalid value for '--max-length': 1 is not in the range x>=2
export M --max-length 16 | --max-length and --stride cut the texts of language models
export M --stride 0 | Invalid value for '--stride': 0 is not in the range x>=1
export M --image-size 0x0 | --image-size 0x0
export M --image-size axb | --image-size axb
export M --image-size 224 | --image-size is for image models of timm and transformers
export M --image-size 99999x8 | expected at most 16,384 pixels a side
export M --image-size -1 | --image-size -1
export M --max-memory 0 | Invalid value for '--max-memory': '0' is not a size
export M --max-memory nan | Invalid value for '--max-memory': 'nan' is not a size
export M --max-memory much | Invalid value for '--max-memory': 'much' is not a size
export M --drop 1 --max-memory 8GiB | found --target onnxruntime with --max-memory, but building its engine
export M --task juggling | Invalid value for '--task': 'juggling' is not one of
export M --task text-generation | tiny:make returns an output with 2 axes, but text-generation needs inp
export M --problem-type ranking | Invalid value for '--problem-type': 'ranking' is not one of
export M --revision main | tiny:make is code, not a hub repository, so it has no revision
export M --random-weights | a search (--drop auto, or sweep) needs trained weights
export M --seed x | Invalid value for '--seed': 'x' is not a valid integer
export M --calibration median | Invalid value for '--calibration': 'median' is not one of 'auto', 'typ
export M --max-precision-loss nan | max-precision-loss is nan
export M --max-precision-loss 101 | max-precision-loss is 101
export M --factorial --precision auto | --factorial compares compression with one precision
export M --portable-engine | Target onnxruntime has no portable engines
export M --no-cache | --no-cache is for language models, but the task of tiny:make is text-c
export M --target transformers --drop 1 | --target transformers can only remove whole blocks
export M --unknown | No such option '--unknown'
export M extra | Got unexpected extra argument
export tiny:make | no data given
export --data random | a search (--drop auto, or sweep) needs real data
sweep M --points 1 | Invalid value for '--points': 1 is not in the range x>=2
sweep M --points few | Invalid value for '--points': 'few' is not a valid integer range
sweep M --max-loss nan | max-loss is nan
sweep M --max-loss -1 | max-loss is -1
sweep M --drop 2 | No such option '--drop'
sweep M --actions drop,teleport | --actions: unknown action 'teleport'
sweep M --precision auto | a sweep compares plans in one precision
sweep M --target nowhere | Unknown target 'nowhere'
sweep M --samples 0 | Invalid value for '--samples': 0 is not in the range x>=3
sweep M --calibration mse | No such option '--calibration'
sweep tiny:make --data random | a search (--drop auto, or sweep) needs real data
inspect M --metric random | Invalid value for '--metric': 'random' is not one of 'cosine', 'output
inspect M --against-data random | found --against-data without --study, whose rankings it compares
inspect M --study --against-data missing.npz | there is no file or folder 'missing.npz'
inspect M --max-memory 8GiB | --max-memory is for language models of transformers, whose layers run
inspect M --search-samples 0 | Invalid value for '--search-samples': 0 is not in the range x>=1
inspect M --output tiny.npz | tiny.npz cannot be written
inspect tiny:make --data missing.npz | there is no file or folder 'missing.npz'
bench | nothing to measure
bench missing | no model named 'missing'
bench room | room contains no config.json
bench tiny.npz | tiny.npz is a file
bench M --against nobody | --against nobody is not a measured engine
bench M --batch 0 | batch is 0; expected distinct integers of at least 1
bench M --batch 1,1 | batch is 1,1
bench M --batch 1,x | Invalid value for '--batch': '1,x' is not a list of integers
bench M --batch 1000000000000 | expected integers of at most 65,536
bench M --threads 99999999999 | expected integers of at most 4,096
bench M --threads 0 | threads is 0
bench M --context 0 | context is 0
bench M --context 128 | --context needs a language model with a KV cache
bench M --rounds 0 | Invalid value for '--rounds': 0 is not in the range x>=1
bench M --samples 2 | Invalid value for '--samples': 2 is not in the range x>=3
bench M --target nowhere | found --target nowhere, but only torch models are measured
bench M --device cuda | torch models are timed on the CPU only, found device 'cuda'
bench M --tasks arc_easy | --tasks needs a language model
bench M --limit nan | --limit needs --tasks
bench M --num-fewshot -1 | Invalid value for '--num-fewshot': -1 is not in the range x>=0
bench M --image-size 0 | --image-size 0
bench M --task juggling | Invalid value for '--task': 'juggling' is not one of
bench M --output room | --output room is a folder
bench M --output tiny.npz/x.json | tiny.npz cannot be written
bench tiny:make | no data given
bench tiny:make tiny:make --data tiny.npz | tiny:make is given twice
bench M --model missing:make | missing:make could not be called: ModuleNotFoundError: No module named
build | Missing argument 'FOLDER'
build missing | there is no folder missing; check the path
build room | room is not a folder that Compressor wrote: it has no valid manifest.j
build tiny.npz | tiny.npz is not a folder that Compressor wrote: it has no valid manife
build room --threads 0 | Invalid value for '--threads': 0 is not in the range x>=1
build room --rounds 99999999999 | expected 1 to 10,000
build room --threads 99999999999 | no valid manifest.json
build room --rounds 0 | Invalid value for '--rounds': 0 is not in the range x>=1
export M --output tiny.npz | tiny.npz exists and is not a folder
export M --output tiny.npz/out | tiny.npz/out cannot be written
export M --output . | the output folder
export M --output / | is the root of the file system
export M --output /dev/null | /dev/null exists and is not a folder
export M --output /proc/out | /proc/out cannot be written
export M --output pipe | pipe exists and is not a folder
export M --output socket | socket exists and is not a folder
export M --output loop | cannot be written
export M --output theirs | the output folder theirs exists
export M --output theirs --force | theirs holds files that Compressor did not write
export M --output mine --force | mine holds files that Compressor did not write
sweep M --output theirs --force | theirs holds files that Compressor did not write
inspect M --output / | is the root of the file system
inspect M --output loop | cannot be written
inspect M --output pipe | pipe cannot be written
bench M --output loop | cannot be written
bench M --output /dev/null | is a device, but a file is written there
bench M --output pipe | is a FIFO, but a file is written there
bench M --output socket | is a socket, but a file is written there
build loop | loop is not a folder that Compressor wrote: it has no valid manifest.j
build pipe | pipe is not a folder that Compressor wrote: it has no valid manifest.j
"""
LONG_NAME = "x" * 300


def cases() -> Iterator[Case]:
    """Yield a case for each line of the table, and for outputs whose name no line can hold."""
    for line in TABLE.strip().splitlines():
        text, _, words = line.partition("|")
        yield _case(shlex.split(text.replace(" M", f" {MODULE} --data {MODULE_DATA}")), text.strip(), words.strip())
    for command_name in ("export", "bench"):
        arguments = [command_name, MODULE, "--data", MODULE_DATA, "--output", f"room/{LONG_NAME}"]
        yield _case(arguments, f"{command_name} M --output with 300 letters", "File name too long")


def _case(arguments: list[str], name: str, words: str) -> Case:
    return Case(f"options: {name}", command(arguments[0], arguments[1:]), words, (MODULE, MODULE_DATA), _outputs)


def _outputs(folder: Path) -> None:
    """Make outputs that must not be written: others' files, links that form a loop, a pipe and a socket."""
    for name in ("theirs", "mine"):
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("three years of work")
    (folder / "mine" / "manifest.json").write_text('{"files": {}}')
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
