"""Private APIs of onnxscript that `compressor` uses.

They were checked with onnxscript 0.7.1. tests/test_internals.py tests that the file is the same without them, but for
constants close to 0 and 1.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from onnxscript import rewriter
from onnxscript.rewriter import _matcher
from onnxscript.rewriter._basics import MatchResult
from onnxscript.rewriter._matcher import PatternMatcher

__all__ = ["exact_constants", "grouped_attention", "plain_sum", "rules_by_operator"]


def grouped_attention(*arguments: Any) -> Any:
    """Add attention by onnxscript's own translation, which repeats keys that have fewer heads than the queries.

    Imports `function_libs.torch_lib`, which the exporter of torch imports too, but which takes a second.
    """
    from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

    return aten_scaled_dot_product_attention(*arguments)


def plain_sum(*arguments: Any) -> Any:
    """Add a sum over axes by onnxscript's own translation; see `grouped_attention` for its import."""
    from onnxscript.function_libs.torch_lib.ops.core import aten_sum_dim_IntList

    return aten_sum_dim_IntList(*arguments)


class _ByOperator(PatternMatcher):
    """A matcher that looks at the operator of a node first, which decides most matches.

    A matcher of onnxscript keeps the graph of its last match, with its weights. Those of the default rules live as long
    as the process, so each match is done by a copy.
    """

    def __init__(self, matcher: Any) -> None:
        super().__init__(matcher.pattern)
        self.matcher = matcher
        self.operator = matcher.pattern.output_nodes[0].op

    def match(self, model: Any, graph_or_function: Any, node: Any, **options: Any) -> MatchResult:
        """Match the pattern against the nodes that end at `node`."""
        if not self.operator.matches(node.op_type):
            return MatchResult().fail("another operator")
        found: MatchResult = copy.copy(self.matcher).match(model, graph_or_function, node, **options)
        return found


def _named_apart(rewrite: Callable[..., Any], model: Any, graph: Any, node: Any, **options: Any) -> Any:
    """Return what a rule puts in place of a node, with new names for its constants if those name other constants.

    The rules name the bounds of a clip after its input. A value that is clipped twice got one pair of bounds for both.
    """
    found = rewrite(model, graph, node, **options)
    for value in () if found is None else found.new_initializers:
        present = graph.initializers.get(value.name)
        if present is not None and set(present.consumers()) - set(found.match.nodes):
            free = (f"{value.name}_{number}" for number in itertools.count(1))
            value.name = next(name for name in free if name not in graph.initializers)
    return found


@functools.cache
def _default_rules() -> tuple[Any, ...]:
    rules = []
    for rule in rewriter._DEFAULT_REWRITE_RULES:
        own: Any = copy.copy(rule)
        own._matcher = _ByOperator(rule._matcher)
        own.try_rewrite = functools.partial(_named_apart, own.try_rewrite)
        rules.append(own)
    return tuple(rules)


@contextlib.contextmanager
def rules_by_operator() -> Iterator[None]:
    """Try each rewrite rule of the optimizer only at nodes of its operator, and keep the names of its constants apart.

    Replaces `onnxscript.rewriter._DEFAULT_REWRITE_RULES`. Without it, every rule is matched at every node, and those
    with several outputs sort all nodes of the graph each time: an eighth of the time of an export.
    """
    with mock.patch.object(rewriter, "_DEFAULT_REWRITE_RULES", _default_rules()):
        yield


@contextlib.contextmanager
def exact_constants() -> Iterator[None]:
    """Match the constants of the optimizer's rewrite rules exactly.

    Replaces the name `math` in `onnxscript.rewriter._matcher`, which reads `isclose` of it and nothing else. Without
    it, the rules for x + 0 and x * 1 also take numbers within 1e-8 of 0 and within 1e-5 of 1: the epsilon of a
    normalisation is left out, and a row of zeros is divided by zero.
    """
    exact = SimpleNamespace(isclose=lambda found, expected, **_: found == expected)
    with mock.patch.object(_matcher, "math", exact):
        yield
