"""A graph that is traced for one row computes, for any number of rows, what its function computes for each."""

import pickle

import pytest
import torch

from passes.execute.rows import RowsError, run_rows, trace_one_row

F = torch.nn.functional
ROWS, PATCHES, WIDTH = 5, 24, 4
CLOSE = 1e-5  # sums in another order


class Weights(torch.nn.Module):
    """Weights of the functions below."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = torch.nn.Linear(WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH)
        self.merge = torch.nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.near = torch.nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.table = torch.nn.Parameter(torch.randn(1, WIDTH, 5, 5))
        self.end = torch.nn.Parameter(torch.randn(WIDTH))


def picture(x):
    return x.T.reshape(1, WIDTH, 4, 6)


def with_line_ends(own, x):
    lines = own.merge(picture(x))
    ends = own.end.reshape(1, WIDTH, 1, 1).expand(1, WIDTH, lines.shape[2], 1)
    return torch.cat([lines, ends], -1).flatten(2)[0].T


def with_class_token(own, x):
    grid = torch.tensor([[1, 4, 6]])  # whose product code reads
    place = torch.arange(int(grid.prod(-1))) + 1
    rows = own.end.repeat(len(place) + 1, 1)
    rows[place] = x
    return rows[place.flip(0)]


def attention(own, x, heads=2):
    split = own.linear(x).view(PATCHES, heads, -1).transpose(0, 1)[None]
    return F.scaled_dot_product_attention(split, split, split).transpose(1, 2).reshape(PATCHES, -1)


FUNCTIONS = {
    "linear and norm": lambda own, x: x + own.norm(own.linear(x)).softmax(-1),
    "attention": attention,
    "products": lambda own, x: (x @ x.T).softmax(-1) @ x,
    "convolution of merged patches": with_line_ends,
    "depthwise convolution": lambda own, x: own.near(picture(x)).flatten(2)[0].T,
    "convolution without a batch": lambda own, x: own.near(picture(x)[0]).flatten(1).T,
    "resized values": lambda own, x: F.interpolate(picture(x), size=(2, 3), mode="bilinear")[0],
    "resized weights": lambda own, x: x + F.interpolate(own.table, size=(4, 6), mode="bilinear")[0].flatten(1).T,
    "places that are read": with_class_token,
    "axes from behind": lambda own, x: x.view(2, 3, 4, 4).permute(0, 2, 1, -1).flatten(-2).mean(-1, keepdim=True),
    "parts": lambda own, x: torch.stack([each * 2 for each in torch.split(x, [20, 4])[0].chunk(2, -1)], -1),
    "a constant beside": lambda own, x: torch.stack([x, torch.ones(PATCHES, WIDTH)]),
    "inserted axes": lambda own, x: (x[:, None] * own.end[None]).squeeze(1).repeat(2, 1).unsqueeze(-1),
    "sum of all": lambda own, x: x.sum() + x.expand(2, PATCHES, WIDTH),
}


@pytest.mark.parametrize("name", [*FUNCTIONS])
def test_rows_are_computed_as_each_alone(name):
    own, call = Weights().eval(), FUNCTIONS[name]
    rows = torch.randn(ROWS, PATCHES, WIDTH, generator=torch.Generator().manual_seed(1))
    one = trace_one_row(own, call, rows[0])
    with torch.inference_mode():
        found, expected = run_rows(one, own, rows), torch.stack([call(own, row) for row in rows])
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("name", [*FUNCTIONS])
def test_the_number_of_rows_stays_dynamic_where_it_is_traced(name):
    own, call = Weights().eval(), FUNCTIONS[name]
    rows = torch.randn(ROWS, PATCHES, WIDTH)
    one = trace_one_row(own, call, rows[0])

    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = own

        def forward(self, x):
            return run_rows(one, self.model, x)

    program = torch.export.export(Rows(), (rows[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    with torch.no_grad():
        expected = torch.stack([call(own, row) for row in rows])
        torch.testing.assert_close(program.module()(rows), expected, atol=CLOSE, rtol=CLOSE)


def test_weights_are_those_of_the_module_that_is_given():
    one = trace_one_row(Weights().eval(), FUNCTIONS["linear and norm"], torch.ones(PATCHES, WIDTH))
    other = Weights().eval()
    torch.nn.init.zeros_(other.norm.weight)
    with torch.inference_mode():
        found = run_rows(one, other, torch.ones(1, PATCHES, WIDTH))
        torch.testing.assert_close(found[0], FUNCTIONS["linear and norm"](other, torch.ones(PATCHES, WIDTH)))


def test_a_graph_of_one_row_can_be_sent_to_another_process():
    own, rows = Weights().eval(), torch.randn(2, PATCHES, WIDTH)
    one = trace_one_row(own, attention, rows[0])
    with torch.inference_mode():
        assert torch.equal(run_rows(pickle.loads(pickle.dumps(one)), own, rows), run_rows(one, own, rows))


REFUSED = {
    "an unknown operator": (lambda own, x: torch.linalg.inv(x[:WIDTH] + torch.eye(WIDTH)), r"is not known for rows"),
    "places of the row": (lambda own, x: own.table.flatten()[x.long()], r"index.* depend on the row is not known"),
    "no row": (lambda own, x: own.table + own.end[0], r"the output depends on no input"),
}


@pytest.mark.parametrize("name", [*REFUSED])
def test_what_is_not_known_for_rows_is_refused(name):
    call, said = REFUSED[name]
    own = Weights().eval()
    one = trace_one_row(own, call, torch.ones(PATCHES, WIDTH))
    with pytest.raises(RowsError, match=said):
        run_rows(one, own, torch.ones(2, PATCHES, WIDTH))
