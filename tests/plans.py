"""Sites with planted scores, and plans for these sites."""

import torch

from passes.analysis.redundancy import Moments, Scores
from passes.graph.graph import Site
from passes.plan.selection import choose, parse

BLOCKS = 6


def site(name, kind, block, order, trunk, root=None):
    root = f"add_{order}" if root is None else root
    return Site(name, kind, block, order, 8, 2, root, f"branch_{order}", trunk, root)


def chain(blocks=BLOCKS):
    """Return sequential sites, attention and MLP of each block, whose trunk is the sum before."""
    kinds = ("attention", "mlp")
    return tuple(
        site(f"b.{block}.{kind}", kind, f"b.{block}", order, f"add_{order - 1}" if order else "stem")
        for order, (block, kind) in enumerate((block, kind) for block in range(blocks) for kind in kinds)
    )


SITES = chain()


def moments(cosine, angular=0.5):
    return Moments(10, 10, 10 * cosine, 10 * angular, 1.0)


def scores_of(sites, cosine, *, angular=None, similarity=None, blocks=None):
    """Return scores with a planted cosine for each site, and planted matrices [states, states]."""
    states = tuple(dict.fromkeys([*(site.trunk for site in sites), sites[-1].root]))
    count = len(states)
    matrix = torch.full((count, count), 0.9, dtype=torch.float64) if angular is None else angular
    ones = torch.ones(count, count, dtype=torch.float64)
    names = dict.fromkeys(site.block for site in sites)
    planted = {name: moments(0.5) for name in names} if blocks is None else blocks
    return Scores(
        1,
        {site.name: moments(cosine(site), 1 - cosine(site)) for site in sites},
        planted,
        states,
        10 * (ones if similarity is None else similarity),
        10 * ones,
        matrix,
        ones,
    )


def plan_for(text, metric="reverse", **options):
    return choose(parse(text), SITES, metric, model="m", **options)
