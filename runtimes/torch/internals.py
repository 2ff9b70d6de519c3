"""What the targets read of torch's private parts: a name that a release changes is changed here, and nowhere else here.

All of it was seen in torch 2.14.1 and 2.15.0; of whichever is installed, tests/test_internals.py goes through it name
by name. It imports torch when it is called, as the whole package does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# The end of the name of the file in a package that holds, as JSON, the metadata it was compiled with. Without it, a
# package could be asked what it was built for only by opening it, which runs its code.
METADATA_FILE = "wrapper_metadata.json"


def expression(size: Any) -> Any:
    """Return the sympy expression of a symbolic size.

    Reads `SymInt.node.expr`. Without it, a program cannot say which of its axes are of one size.
    """
    return size.node.expr


def hint(size: Any) -> Any:
    """Return the number that a symbolic size had when the program was exported.

    Reads `SymInt.node.hint`. Without it, programs could not be exported anew with the sizes of their example.
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

    Reads `torch._inductor.aoti_compile_and_package`, documented under that name, and four of Inductor's settings:
    `aot_inductor.metadata`, `freezing`, `cpp.dynamic_threads` and `cpp.threads`. Without the second, weights are not
    packed for the processor; without the last two, the number of threads of this process is compiled in.

    Args:
        program: what is compiled.
        path: of the package.
        metadata: what the package carries, for whoever reads it.
        threads: at most.
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

    Reads `AOTICompiledModel.loader`: the call of the package itself parses the structure of the outputs every time.
    """
    found: list[Any] = opened.loader.run(tensors)
    return found
