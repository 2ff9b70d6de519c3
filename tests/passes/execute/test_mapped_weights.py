"""Weights that are mapped from files have the same values, share what they shared, and leave the memory."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from passes.execute.mapped_weights import map_weights, weight_bytes
from passes.execute.offloaded_weights import offloaded


class Tied(torch.nn.Module):
    """Two layers with one weight, a view of another layer's weight, a small weight and one that stays on disk."""

    def __init__(self, size=600):
        super().__init__()
        self.first, self.second = torch.nn.Linear(size, size), torch.nn.Linear(size, size)
        self.second.weight = self.first.weight
        self.table = torch.nn.Embedding(2 * size, size)
        self.register_buffer("part", self.table.weight.detach()[size:].t())
        self.small = torch.nn.Linear(4, 4)
        self.on_disk = offloaded(torch.zeros(size, size), lambda: torch.zeros(size, size))

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) @ self.part + self.table.weight[0]


def test_values_and_shared_memory_stay(tmp_path):
    module, x = Tied(), torch.randn(3, 600)
    expected, before = module(x), {name: value.clone() for name, value in module.state_dict().items()}
    assert weight_bytes([module, module.first]) == 4 * (600 * 600 + 2 * 600 * 600)
    map_weights([module, module.first], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(module(x), expected)
    for name, value in module.state_dict().items():
        assert name == "on_disk" or torch.equal(value, before[name])
    assert module.first.weight is module.second.weight
    assert module.part.data_ptr() == module.table.weight[600:].data_ptr()
    with torch.no_grad():
        module.table.weight[600:].fill_(2.0)
    assert (module.part == 2.0).all()
    module(x).sum().backward()
    assert module.first.weight.grad is not None


def test_a_file_that_cannot_be_written_leaves_the_weights_as_they_are(tmp_path):
    module, x = Tied(), torch.randn(3, 600)
    expected = module(x)
    with pytest.raises(OSError, match="missing"):
        map_weights([module], tmp_path / "missing")
    assert torch.equal(module(x), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_mapped_weights_take_no_memory_until_they_are_read(tmp_path):
    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    module = torch.nn.Linear(6000, 6000)
    gc.collect()
    full = anonymous()
    map_weights([module], tmp_path)
    assert full - anonymous() > 0.9 * 4 * 6000 * 6000
