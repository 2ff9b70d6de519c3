"""Private APIs of onnxscript that `compressor` uses.

They were checked with onnxscript 0.7.1. tests/test_internals.py tests that the result is the same without them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from onnxscript import rewriter
from onnxscript.rewriter._basics import MatchResult
from onnxscript.rewriter._matcher import PatternMatcher

__all__ = ["rules_by_operator"]


class _ByOperator(PatternMatcher):
    """A matcher that looks at the operator of a node first, which decides most matches."""

    def __init__(self, matcher: Any) -> None:
        super().__init__(matcher.pattern)
        self.matcher = matcher
        self.operator = matcher.pattern.output_nodes[0].op

    def match(self, model: Any, graph_or_function: Any, node: Any, **options: Any) -> MatchResult:
        """Match the pattern against the nodes that end at `node`."""
        if not self.operator.matches(node.op_type):
            return MatchResult().fail("another operator")
        found: MatchResult = self.matcher.match(model, graph_or_function, node, **options)
        return found


@functools.cache
def _default_rules() -> tuple[Any, ...]:
    rules = []
    for rule in rewriter._DEFAULT_REWRITE_RULES:
        own = copy.copy(rule)
        own._matcher = _ByOperator(rule._matcher)
        rules.append(own)
    return tuple(rules)


@contextlib.contextmanager
def rules_by_operator() -> Iterator[None]:
    """Try each rewrite rule of the optimizer only at nodes of its operator.

    Replaces `onnxscript.rewriter._DEFAULT_REWRITE_RULES`. Without it, every rule is matched at every node, and those
    with several outputs sort all nodes of the graph each time: an eighth of the time of an export.
    """
    with mock.patch.object(rewriter, "_DEFAULT_REWRITE_RULES", _default_rules()):
        yield
