"""Private torch functions that the targets use; no other module of this package depends on them.

All of them exist in torch 2.14.1 and 2.15.0, and tests/test_internals.py checks them in the installed version. Like the
whole package, this module imports torch only inside its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# Suffix of the file in a package that contains its metadata as JSON. Reading this file instead of opening the package
# avoids running the code of the package.
METADATA_FILE = "wrapper_metadata.json"


def expression(size: Any) -> Any:
    """Return the sympy expression of a symbolic size.

    Reads `SymInt.node.expr`. Without it, equal sizes of different axes cannot be detected.
    """
    return size.node.expr


def hint(size: Any) -> Any:
    """Return the value that a symbolic size had when the program was exported.

    Reads `SymInt.node.hint`. Without it, a program cannot be exported again with the sizes of its example inputs.
    """
    return size.node.hint


def tree_map(function: Callable[[Any], Any], nested: Any) -> Any:
    """Apply a function to every leaf of nested tuples, lists and dicts.

    Reads `torch.utils._pytree`, which has no public name.
    """
    from torch.utils import _pytree

    return _pytree.tree_map(function, nested)


def compile_package(program: ExportedProgram, path: Path, metadata: Mapping[str, str], threads: int) -> None:
    """Compile a program ahead of time and write it as one package.

    Reads `torch._inductor.aoti_compile_and_package`, documented under that name, and four Inductor settings:
    `aot_inductor.metadata`, `freezing`, `cpp.dynamic_threads` and `cpp.threads`. Without `freezing`, weights are not
    packed for the processor. Without the last two, the number of threads of this process is compiled in.

    Args:
        program: The exported program.
        path: The path of the package.
        metadata: Metadata to store in the package.
        threads: The maximum number of threads.
    """
    from torch import _inductor

    settings = {
        "aot_inductor.metadata": dict(metadata),
        "freezing": True,
        "cpp.dynamic_threads": True,
        "cpp.threads": threads,
    }
    _inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


def open_package(path: Path) -> Any:
    """Open a package that was compiled ahead of time; this runs its code.

    Reads `torch._inductor.aoti_load_package`, documented under that name.
    """
    from torch import _inductor

    return _inductor.aoti_load_package(str(path))


def run_package(opened: Any, tensors: list[Any]) -> list[Any]:
    """Run an opened package on flat inputs and return its flat outputs.

    Reads `AOTICompiledModel.loader`, because calling the package itself parses the structure of the outputs every time.
    """
    outputs: list[Any] = opened.loader.run(tensors)
    return outputs
