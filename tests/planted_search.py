"""A search on planted effects: its collaborators are replaced by sites whose effects, costs and losses are known."""

import itertools
from types import SimpleNamespace

import numpy as np

from compressor.quality.validation_loss import Loss
from compressor.search.greedy import SOFTENED, Search
from passes.base import PassError
from passes.graph.graph import Site
from passes.plan.plan import merged_tokens


class World:
    """Sites with planted effects, costs and losses; a graph is the set of its changes.

    Effects only grow with further changes, and no action is better than the estimate of the search or saves more than
    the drop. Lazy greedy search is exact in this case (Minoux 1978). The class replaces all collaborators of a search.
    """

    def __init__(self, seed=0, count=8, actions=("drop", "linear", "scale"), refused=(), slope=0.0):
        rng = np.random.default_rng(seed)
        self.sites = tuple(
            Site(f"s{n}", "mlp", f"b{n}", n, 8, 2, f"a{n}", f"f{n}", f"t{n}", f"a{n}") for n in range(count)
        )
        self.actions, self.refused, self.slope = actions, dict(refused), slope
        self.original, self.split = frozenset(), range(40)
        self.own, self.saves = {}, {}
        for site in self.sites:
            drop, saved = rng.random(), int(rng.integers(10, 1000))
            for share in (0.12, 0.25, 0.37):
                self.own[site.name, f"merge:{share:.0%}"], self.saves[site.name, f"merge:{share:.0%}"] = (
                    share**2,
                    500 * share,
                )
            for action in dict.fromkeys(("drop", *actions)):
                least = SOFTENED.get(action, 1.0)
                self.own[site.name, action] = drop * (1.0 if action == "drop" else rng.uniform(least, 1.1))
                self.saves[site.name, action] = saved if action == "drop" else int(saved * rng.uniform(0.3, 1.0))
        self.pairs = rng.random((count, count)) * 0.2
        self.whole = 2 * sum(self.saves[site.name, "drop"] for site in self.sites)
        self.measured, self.previewed, self.tried, self.losses = [], [], [], 0
        self.compared, self.noise = [], 0.0

    def begin(self, limit=100.0, *, racing=False, **options):
        effects, preview = SimpleNamespace(split=self.split[:16]), SimpleNamespace(split=self.split[:4])
        effects.measure = lambda main, variants: self.measure(main, variants)  # noqa: PLW0108 - looked up when called
        effects.by_row = lambda main, variants: self.by_row(main, variants, len(effects.split))
        preview.measure = lambda main, variants: self.estimated(main, variants)  # noqa: PLW0108
        preview.by_row = lambda main, variants: self.by_row(main, variants, len(preview.split))
        options |= {"preview": preview} if racing else {}
        return Search(self, effects, self, self, self.actions, limit, self.split[16:32], **options)

    def changed(self, graph, name, action, fits=None):
        assert fits is None or fits.graph == graph  # fits must come from the same graph
        self.tried.append((name, action))
        stage = "measured" if fits is not None or action == "drop" else "carried out"
        if self.refused.get((name, action)) in (stage, "always"):
            raise PassError(f"{name} cannot be {stage}.")
        return graph | {(name, action)}

    @property
    def units(self):
        return {site.name: (site,) for site in self.sites}

    def of_sites(self, changes):
        return changes

    def apply_changes(self, changes):
        """Return the graph without merges, which are applied last (see `Rewriter.reduced`)."""
        return frozenset(change for change in changes.items() if merged_tokens(change[1]) is None)

    def reduced(self, graph, changes):
        return graph | {change for change in changes.items() if merged_tokens(change[1]) is not None}

    def fits(self, graph, names, split):
        return {name: SimpleNamespace(graph=graph) for name in names}

    def divergence(self, graph):
        orders = sorted(int(name[1:]) for name, _ in graph)
        interactions = sum(self.pairs[pair] for pair in itertools.combinations(orders, 2))
        return sum(self.own[change] for change in graph) + float(interactions)

    def measure(self, graph, variants):
        self.measured.extend(variants)
        return self.divergence(graph), {key: self.divergence(variant) for key, variant in variants.items()}

    def estimated(self, graph, variants):
        self.previewed.extend(variants)
        return self.divergence(graph), {key: self.divergence(variant) for key, variant in variants.items()}

    def by_row(self, graph, variants, rows):
        """Return divergences by sample, whose mean is the planted one; `noise` says how far the samples scatter."""
        self.compared.extend(variants)
        rng = np.random.default_rng(rows)
        scattered = {key: self.divergence(fork) + self._scatter(rng, rows) for key, fork in variants.items()}
        return np.full(rows, self.divergence(graph)), scattered

    def _scatter(self, rng, rows):
        values = rng.standard_normal(rows)
        return self.noise * (values - values.mean()) / values.std(ddof=1)

    def loss(self, graph, *, limit):
        self.losses += 1
        return Loss(self.slope * self.divergence(graph), len(self.split))

    def count(self, graph):
        return self.whole - sum(self.saves[change] for change in graph)

    def multiply_adds(self, work):
        return work

    def of(self, work):
        return float(work)

    def cost(self, graph):
        return self.of(self.count(graph))

    def greedy(self, count):
        """Return the first `count` changes of a greedy search that measures every candidate at each step."""
        graph, order = frozenset(), []
        rest = {(site.name, action) for site in self.sites for action in self.actions}
        while len(order) < count:
            now = self.divergence(graph)
            best = min(rest, key=lambda change: (self.divergence(graph | {change}) - now) / self.saves[change])
            graph, rest = graph | {best}, {change for change in rest if change[0] != best[0]}
            order.append(best)
        return order
