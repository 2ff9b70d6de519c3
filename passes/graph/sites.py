"""Search for the residual sites of a graph by its structure, and their names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from passes.graph.graph import Graph, GraphError, Site, attribute, is_sum, unscaled, value_of
from passes.torch_internals import SAFE_SOFTMAX, SOFTMAX

aten = torch.ops.aten

ATTENTION_OPS = frozenset({aten.scaled_dot_product_attention.default})
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default})
SELECTIONS = frozenset({aten.index.Tensor, aten.index_select.default})  # of the weights of experts, by the router
TRANSPOSES = frozenset({aten.transpose.int, aten.permute.default, aten.mT.default})
SOFTMAX_OPS = frozenset({aten.softmax.int}) | SOFTMAX | SAFE_SOFTMAX
LINEAR_OPS = frozenset({aten.linear.default, aten.addmm.default, aten.mm.default})
CONV_OPS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default})
CHANNELS_FIRST_OPS = CONV_OPS | {
    aten.batch_norm.default,
    aten.group_norm.default,
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
}
MAPS = LINEAR_OPS | CONV_OPS | PRODUCTS | ATTENTION_OPS  # of several features or tokens, and not of each by itself
RECURRENCE = "compressor.recurrence.default"  # of keys, values and queries over the tokens, as in linear attention
NORM_OPS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
CROSS_ATTENTION = "cross_attention"  # the kind of an attention whose keys and values come from another sequence
ATTENTIONS = ("attention", CROSS_ATTENTION)
PARAMETRIZATIONS = "parametrizations"  # the part of a module that computes its weights, by torch.nn.utils
CALL_NUMBER = re.compile(r"@\d+")  # behind the path of a module that is called again


def find_sites(graph: Graph) -> tuple[Site, ...]:
    """Return every residual branch of a graph, without the use of model names or module classes.

    Sums are flattened first: ``x + a(x) + m(x)`` is one trunk with two branches. The trunk of a branch is the last term
    that it is computed from, so that a sum of two encoders has two trunks. A trunk may be scaled by a constant, as in
    ``2 x + a(x)``; it is the scaled value then. A term is a branch if it is computed from a trunk, uses parameters and
    has no other consumer. A branch may also read values computed before the trunk (masks, rotary tables, batch size). A
    sum inside the branch of another sum is part of that branch, unless the branch holds a chain of two or more sums, or
    is itself such a sum that is scaled. Then the outer sum is a group of blocks (a long skip), and the inner sums are
    the sites. Sites have the order in which their branches are computed.
    """
    finder = _Finder(graph)
    candidates = sorted(finder.outermost(finder.candidates()), key=finder.place)
    bases = [_base_name(graph, candidate) for candidate in candidates]
    names = _unique_names([_full_name(graph, *pair) for pair in zip(candidates, bases, strict=True)])
    blocks = _block_names(graph, candidates, bases)
    return tuple(
        Site(
            name=name,
            kind=candidate.kind,
            block=block,
            order=order,
            width=int(value_of(candidate.trunk).shape[candidate.channel_dim]),
            channel_dim=candidate.channel_dim,
            add=candidate.add.name,
            branch=candidate.branch.name,
            trunk=candidate.trunk.name,
            root=candidate.root.name,
        )
        for order, (name, block, candidate) in enumerate(zip(names, blocks, candidates, strict=True))
    )


@dataclass(frozen=True)
class _Candidate:
    add: fx.Node
    branch: fx.Node
    trunk: fx.Node
    root: fx.Node
    region: int
    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    kind: str
    channel_dim: int

    @property
    def scaled(self) -> bool:
        """Whether the trunk is scaled by a constant before the sum."""
        return unscaled(self.trunk) is not self.trunk


def computes_maps(nodes: Collection[fx.Node]) -> bool:
    """Return whether nodes compute a linear map, a convolution or an attention, and not only values one by one."""
    return any(node.target in MAPS for node in nodes)


class _Finder:
    """Search for sites, with the ancestors of each node as a bit mask, so that a dependency test is one shift."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order = graph.nodes()
        self.index = {node: position for position, node in enumerate(self.order)}
        self.ancestors = self._ancestor_masks()
        self.sources: dict[fx.Node, fx.Node] = {}
        self.from_weights = {node for node in self.order if self._is_constant(node)}
        states = set(graph.state.values())
        placeholders = zip(graph.inputs, graph.placeholders(), strict=True)
        self.data_inputs = self._mask([node for name, node in placeholders if name not in states])
        self.parameters = self._mask([node for node in self.order if node.op == "get_attr"])

    def _mask(self, nodes: Collection[fx.Node]) -> int:
        return sum(1 << self.index[node] for node in nodes)

    def _ancestor_masks(self) -> list[int]:
        """Return the bit mask of the ancestors of each node. Sizes have none, because shapes are not data."""
        masks: list[int] = []
        for node in self.order:
            reached = 0
            if _is_tensor(node):
                for source in node.all_input_nodes:
                    if _is_tensor(source):
                        reached |= masks[self.index[source]] | (1 << self.index[source])
            masks.append(reached)
        return masks

    def _is_constant(self, node: fx.Node) -> bool:
        inputs = list(self.graph.placeholders())
        mask = sum(1 << self.index[placeholder] for placeholder in inputs)
        return not (self.ancestors[self.index[node]] & mask) and node.op != "placeholder"

    def candidates(self) -> list[_Candidate]:
        """Return every branch of every complete sum."""
        candidates: list[_Candidate] = []
        for root in self.order:
            if is_sum(root) and not _is_partial_sum(root):
                candidates.extend(self._branches(root))
        return candidates

    def _branches(self, root: fx.Node) -> Iterator[_Candidate]:
        found = [candidate for operand in root.all_input_nodes for candidate in self._terms_of(root, operand, root)]
        several = len({candidate.trunk for candidate in found}) > 1
        for candidate in found:
            beside = {each.branch for each in found if each.trunk is candidate.trunk}
            yield replace(candidate, root=_sum_of(root, {candidate.trunk, *beside})) if several else candidate

    def _terms_of(self, add: fx.Node, term: fx.Node, root: fx.Node) -> Iterator[_Candidate]:
        """Yield the branches among the terms of an operand, or else the operand, as of ``x + (h + gelu(h))``."""
        nested = is_sum(term) and _is_partial_sum(term)
        operands = term.all_input_nodes if nested else []
        inner = [each for operand in operands for each in self._terms_of(term, operand, root)]
        yield from inner
        own = [each for _, each in _terms(term)] if nested else [term]
        others = [each for _, each in _terms(root) if each not in own]
        trunk = self._trunk(term, others, root)
        if inner or trunk is None or self._is_read(term, others):
            return
        if not nested or any(self._weights(self._region(each, self.unscaled(trunk)), trunk) for each in own):
            candidate = self._candidate(add, term, trunk, root)
            if candidate is not None:
                yield candidate

    def _is_read(self, term: fx.Node, others: list[fx.Node]) -> bool:
        """Return whether a term, or what a constant scales to it, is read by more than its sum."""
        return len(term.users) > 1 or any(self._depends(each, self.unscaled(term)) for each in others)

    def _trunk(self, branch: fx.Node, terms: list[fx.Node], root: fx.Node) -> fx.Node | None:
        """Return the last of other terms of a sum that a branch is computed from, None if it is from none."""
        sources = [term for term in terms if _same_shape(term, root) and self._depends(branch, self.unscaled(term))]
        return max(sources, key=lambda term: self.index[self.unscaled(term)], default=None)

    def unscaled(self, node: fx.Node) -> fx.Node:
        """Return `passes.graph.graph.unscaled` of a node, computed once."""
        if node not in self.sources:
            self.sources[node] = unscaled(node)
        return self.sources[node]

    def _depends(self, node: fx.Node, source: fx.Node) -> bool:
        return bool(self.ancestors[self.index[node]] >> self.index[source] & 1)

    def _candidate(self, add: fx.Node, branch: fx.Node, trunk: fx.Node, root: fx.Node) -> _Candidate | None:
        nodes = self._region(branch, self.unscaled(trunk))
        weights = self._weights(nodes, trunk)
        if not weights or (self.unscaled(trunk) is not trunk and not computes_maps(nodes)):
            return None  # RWKV mixes each token with the one before, by a weight for each feature
        channel_dim = _channel_dim(self.unscaled(trunk), nodes)
        if not isinstance(value_of(trunk).shape[channel_dim], int):
            return None  # scores of tokens for tokens, as of ProphetNet with its relative positions, have no features
        region = sum(1 << self.index[node] for node in nodes)
        kind = self._kind(nodes, self.unscaled(trunk))
        return _Candidate(add, branch, trunk, root, region, nodes, weights, kind, channel_dim)

    def _region(self, branch: fx.Node, trunk: fx.Node) -> tuple[fx.Node, ...]:
        inside = self.ancestors[self.index[branch]] | (1 << self.index[branch])
        first, last = self.index[trunk] + 1, self.index[branch] + 1
        between = [node for node in self.order[first:last] if inside >> self.index[node] & 1]
        return tuple(node for node in between if self._depends(node, trunk))

    def _weights(self, nodes: tuple[fx.Node, ...], trunk: fx.Node) -> tuple[fx.Node, ...]:
        """Return the parameters that a region reads, directly or through values computed from parameters only.

        The trunk may be a parameter itself (a class token that attends to the image). It is not one of the branch.
        """
        stack = [source for node in nodes for source in node.all_input_nodes if source in self.from_weights - {trunk}]
        seen: dict[fx.Node, None] = {}
        while stack:
            node = stack.pop()
            if node not in seen:
                seen[node] = None
                stack.extend(node.all_input_nodes)
        tables = [node for node in seen if node.op == "get_attr"]
        return tuple(node for node in tables if isinstance(attribute(self.graph, node), torch.nn.Parameter))

    def _kind(self, nodes: tuple[fx.Node, ...], trunk: fx.Node) -> str:
        if self._is_attention(nodes):
            return CROSS_ATTENTION if self._reads_another_sequence(nodes, trunk) else "attention"
        spatial = [node for node in nodes if node.target in CONV_OPS and not _is_pointwise(node)]
        if spatial:
            return "conv"
        if any(str(node.target) == RECURRENCE for node in nodes):
            return "attention"
        linear = LINEAR_OPS | CONV_OPS
        pointwise = [node for node in nodes if node.target in linear or self._maps_features(node)]
        return "mlp" if len(pointwise) > 1 else "other"

    def _is_attention(self, nodes: tuple[fx.Node, ...]) -> bool:
        """Return whether the nodes hold fused attention, two products of activations, or one and a softmax."""
        if any(node.target in ATTENTION_OPS for node in nodes):
            return True
        products = [node for node in nodes if node.target in PRODUCTS and self._multiplies_activations(node)]
        return len(products) >= 2 or (bool(products) and any(node.target in SOFTMAX_OPS for node in nodes))

    def _reads_another_sequence(self, nodes: tuple[fx.Node, ...], trunk: fx.Node) -> bool:
        """Return whether the keys or values of an attention are computed from other inputs than those of the trunk.

        That tells the attention of a decoder to its encoder from one that shares the keys of an earlier layer.
        """
        operands = (operand for node in nodes for operand in self._attended(node))
        return any(self._is_of_another_sequence(operand, trunk) for operand in operands)

    def _attended(self, node: fx.Node) -> list[fx.Node]:
        """Return the keys and values of fused attention, or both operands of a product of activations."""
        if node.target in ATTENTION_OPS:
            return [operand for operand in node.args[1:3] if isinstance(operand, fx.Node)]
        if node.target in PRODUCTS and self._multiplies_activations(node):
            return [source for source in node.all_input_nodes if _is_tensor(source)]
        return []

    def _is_of_another_sequence(self, operand: fx.Node, trunk: fx.Node) -> bool:
        sources = self.ancestors[self.index[operand]]
        inputs = self.data_inputs & sources
        missing = self.data_inputs & (self.ancestors[self.index[trunk]] | 1 << self.index[trunk]) & ~sources
        return not self._depends(operand, trunk) and bool(inputs and missing and self.parameters & sources)

    def _maps_features(self, node: fx.Node) -> bool:
        """Return whether a product is a linear map written as ``x @ W.T``, as in Falcon, or one of chosen experts."""
        if node.target not in PRODUCTS:
            return False
        left, right = node.all_input_nodes[0], node.all_input_nodes[-1]
        if self._are_of_experts(left) != self._are_of_experts(right):
            return True
        return right in self.from_weights and left not in self.from_weights and len(_sizes(right)) == 2

    def _multiplies_activations(self, node: fx.Node) -> bool:
        operands = [source for source in node.all_input_nodes if _is_tensor(source)]
        return len(operands) >= 2 and not any(
            operand in self.from_weights or self._are_of_experts(operand) for operand in operands
        )

    def _are_of_experts(self, node: fx.Node) -> bool:
        """Return whether a value is the weights [chosen, out, in] of the experts that a router has chosen."""
        while node.target in TRANSPOSES:
            node = node.all_input_nodes[0]
        if node.target not in SELECTIONS:
            return False
        stacked = node.all_input_nodes[0]
        return stacked in self.from_weights and len(_sizes(stacked)) == 3

    def outermost(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Remove branches that are chains of blocks, and candidates inside other branches (as in GPT-2's tanh GELU)."""
        candidates = self._apart(candidates)
        sums = {candidate.root for candidate in candidates}
        groups = [
            outer
            for outer in candidates
            if self._inner_sums(outer, candidates) >= 2 or (outer.scaled and unscaled(outer.branch) in sums)
        ]
        flat = [candidate for candidate in candidates if candidate not in groups]
        return [inner for inner in flat if not any(_inside(inner, outer) for outer in flat)]

    def _apart(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Remove candidates that begin inside the branch of another one and hold its sum.

        The values of a first attention that later ones mix into theirs (value residual) are no trunk of the blocks
        between. A sum that no other trunk is, or is a norm of, does not count: in DETR's decoder, the queries of an
        attention are the sum of positions and a value that is computed from them.
        """
        kept: list[_Candidate] = []
        trunks = {self.unscaled(candidate.trunk) for candidate in candidates}
        read = trunks.union(*(trunk.all_input_nodes for trunk in trunks))
        for candidate in sorted(candidates, key=lambda each: self.index[each.root]):
            if not any(self._straddles(candidate, other) for other in kept if other.root in read):
                kept.append(candidate)
        return [candidate for candidate in candidates if candidate in kept]

    def _straddles(self, candidate: _Candidate, other: _Candidate) -> bool:
        holds_sum = candidate.region >> self.index[other.root] & 1
        return bool(holds_sum) and candidate.region & other.region not in (0, other.region)

    def place(self, candidate: _Candidate) -> int:
        """Return the place at which the branch of a candidate is complete."""
        return self.index[candidate.branch]

    def _inner_sums(self, outer: _Candidate, candidates: list[_Candidate]) -> int:
        return len({inner.root for inner in candidates if _inside(inner, outer)})


def _inside(inner: _Candidate, outer: _Candidate) -> bool:
    return inner is not outer and inner.root is not outer.root and inner.region & outer.region == inner.region


def _is_tensor(node: fx.Node) -> bool:
    value = value_of(node)
    return node.op in ("get_attr", "placeholder") or isinstance(value, (torch.Tensor, list, tuple)) or value is None


def _is_partial_sum(node: fx.Node) -> bool:
    """Return whether the only consumer of a sum is another sum."""
    return len(node.users) == 1 and is_sum(next(iter(node.users)))


def _terms(root: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the terms of a flattened sum, each with the add node that reads it directly."""
    for operand in root.all_input_nodes:
        if is_sum(operand) and _is_partial_sum(operand):
            yield from _terms(operand)
        else:
            yield root, operand


def _sum_of(root: fx.Node, terms: Collection[fx.Node]) -> fx.Node:
    """Return the smallest part of a sum that holds some of its terms."""
    for part in root.all_input_nodes:
        if is_sum(part) and _is_partial_sum(part) and {term for _, term in _terms(part)}.issuperset(terms):
            return _sum_of(part, terms)
    return root


def _same_shape(left: fx.Node, right: fx.Node) -> bool:
    shapes = [getattr(value_of(node), "shape", None) for node in (left, right)]
    return None not in shapes and str(shapes[0]) == str(shapes[1])


def _is_pointwise(conv: fx.Node) -> bool:
    weight = value_of(conv.all_input_nodes[1])
    return weight is not None and all(int(size) == 1 for size in weight.shape[2:])


def _channel_dim(trunk: fx.Node, nodes: tuple[fx.Node, ...]) -> int:
    """Return the feature axis of the trunk: the one that the branch's first convolution, norm or linear map uses.

    The axes of the trunk are tracked through nodes that only move them. The result is the last axis if none of those
    operators is reached.
    """
    rank = len(value_of(trunk).shape)
    axes: dict[fx.Node, list[int | None]] = {trunk: list(range(rank))}
    for node in nodes:
        source = next((source for source in node.all_input_nodes if source in axes), None)
        if source is None:
            continue
        position = _feature_position(node)
        axis = axes[source][position] if position is not None and len(axes[source]) > 1 else None
        if axis is not None:
            return axis
        axes[node] = _moved_axes(node, source, axes[source])
    return rank - 1


def _feature_position(node: fx.Node) -> int | None:
    """Return the feature axis of a node's input, or None if neither its operator nor a parameter determines it.

    A parameter determines the axis if only one of its axes is longer than 1.
    """
    if node.target in CHANNELS_FIRST_OPS:
        return 1
    if node.target in LINEAR_OPS | NORM_OPS:
        return -1
    for source in node.all_input_nodes:
        sizes = _sizes(source)
        features = [position for position, size in enumerate(sizes) if size != "1"]
        if source.op == "get_attr" and len(features) == 1 and len(sizes) <= len(_sizes(node)):
            return features[0] - len(sizes)
    return None


def _moved_axes(node: fx.Node, source: fx.Node, axes: list[int | None]) -> list[int | None]:
    """Return the axis of the trunk for each axis of `node`, None for axes that are new or merged."""
    if node.target == aten.permute.default:
        return [axes[dim] for dim in node.args[1]]  # type: ignore[union-attr,index]
    if node.target == aten.transpose.int:
        moved, (first, second) = list(axes), node.args[1:3]
        moved[first], moved[second] = axes[second], axes[first]  # type: ignore[index]
        return moved
    before, after = _sizes(source), _sizes(node)
    if len(before) == len(after):
        return axes
    front = _common_length(before, after)
    back = min(_common_length(before[::-1], after[::-1]), len(after) - front)
    return [*axes[:front], *[None] * (len(after) - front - back), *axes[len(axes) - back :]]


def _sizes(node: fx.Node) -> list[str]:
    """Return the sizes of a node as text, because comparing symbolic sizes would specialise them.

    For a node that returns several tensors, such as a split, they are the sizes of the first one.
    """
    value = value_of(node)
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return [str(size) for size in getattr(value, "shape", ())]


def _common_length(left: list[str], right: list[str]) -> int:
    return sum(1 for _ in _common(left, right))


# ------------------------------------------------------------------------------------------------------------ names


def _base_name(graph: Graph, candidate: _Candidate) -> str:
    """Return the common module path of the branch's weight matrices, such as ``blocks.3.attn``.

    If they have none in common, the name is that of the add node. Matrices that the branch reads directly take
    precedence, because a table computed before the branch may belong to an earlier block, as T5's position bias does.
    """
    read = {source for node in candidate.nodes for source in node.all_input_nodes}
    matrices = [node for node in candidate.weights if _is_matrix(attribute(graph, node))] or list(candidate.weights)
    own = [node for node in matrices if node in read] or matrices
    paths = [_owner(graph, node, candidate) for node in own]
    shared = paths[0]
    for path in paths[1:]:
        shared = [a for a, _ in _common(shared, path)]
    return ".".join(shared) or candidate.add.name


def _owner(graph: Graph, weight: fx.Node, candidate: _Candidate) -> list[str]:
    """Return the path of the module that a weight of a branch belongs to.

    A weight that several modules share has the name of the first of them, so that its owner here is the module which
    computes with it. A parametrization, such as that of weight norm, belongs to the module whose weight it computes.
    """
    path = str(weight.target).removeprefix(graph.prefix).split(".")[:-1]
    if PARAMETRIZATIONS in path:
        path = path[: path.index(PARAMETRIZATIONS)]
    for user in weight.users:
        module = f"{CALL_NUMBER.sub('', module_path(user))}.".removeprefix(graph.prefix).split(".")[:-1]
        if user in candidate.nodes and path[: len(module)] != module[: len(path)]:
            return module
    return path


def _is_matrix(weight: torch.Tensor) -> bool:
    return sum(size > 1 for size in weight.shape) >= 2


def _common(left: Sequence[str], right: Sequence[str]) -> Iterator[tuple[str, str]]:
    for a, b in zip(left, right, strict=False):
        if a != b:
            return
        yield a, b


def _full_name(graph: Graph, candidate: _Candidate, base: str) -> str:
    """Return the base name, with the kind appended if the base ends in a number or is the module of the add node.

    The module of the add node gets no kind if its name is the kind already. The name depends on the site alone, so
    that it does not change when other sites are dropped.
    """
    last = base.rpartition(".")[2]
    adding = module_path(candidate.add).removeprefix(graph.prefix)
    return f"{base}.{candidate.kind}" if last.isdigit() or (base == adding and last != candidate.kind) else base


def _unique_names(full_names: list[str]) -> list[str]:
    """Append a number to the names of sites that share their weights, and therefore their name."""
    repeats, seen = Counter(full_names), Counter[str]()
    names = []
    for name in full_names:
        seen[name] += 1
        names.append(f"{name}#{seen[name]}" if repeats[name] > 1 else name)
    return names


def _block_names(graph: Graph, candidates: list[_Candidate], bases: list[str]) -> list[str]:
    """Return the block of each site: the module path up to its last number.

    A new block starts with a new path, a repeated site or, for sites without a numbered path, the next attention.
    """
    names: list[str] = []
    key, members, count = None, list[tuple[str, str]](), 0
    for candidate, base in zip(candidates, bases, strict=True):
        path = _up_to_last_number(module_path(candidate.root).removeprefix(graph.prefix)) or _up_to_last_number(base)
        repeats = (base, candidate.kind) in members
        restarts = not path and candidate.kind in ATTENTIONS and candidate.kind in [kind for _, kind in members]
        if path != key or repeats or restarts:
            key, members, count = path, [], count + 1
        members.append((base, candidate.kind))
        earlier = names[: len(names) - len(members) + 1]
        names.append(path if path and path not in earlier else f"{path or 'block'}#{count}")
    return _join_sublayers(names, [candidate.kind for candidate in candidates])


def _join_sublayers(blocks: list[str], kinds: list[str]) -> list[str]:
    """Join numbered sublayers, such as attention in ``block.3.layer.0`` and MLP in ``block.3.layer.1``, to one block.

    Blocks of one site each are sublayers if they have the same numbered parent and are attentions followed by one MLP.
    """
    joined, members = list(blocks), defaultdict[str, list[int]](list)
    for position, block in enumerate(blocks):
        if blocks.count(block) == 1:
            members[_up_to_last_number(block.rpartition(".")[0])].append(position)
    for parent, positions in members.items():
        parts = [kinds[position] for position in positions]
        if parent and len(parts) > 1 and parts[-1] == "mlp" and all(part in ATTENTIONS for part in parts[:-1]):
            for position in positions:
                joined[position] = parent
    return joined


def module_path(node: fx.Node) -> str:
    """Return the path of the module that computes a node, with the prefix of its graph; empty if none is known."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _up_to_last_number(path: str) -> str:
    parts = path.split(".")
    last = max((position for position, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def site_named(sites: Collection[Site], name: str) -> Site:
    """Return the site of a name.

    Raises:
        GraphError: no site has this name.
    """
    for site in sites:
        if site.name == name:
            return site
    raise GraphError(f"the graph has no site named {name!r}; it has {len(sites)}, which `compressor inspect` lists.")
