"""Tests of the private APIs of libraries: they exist, behave as expected, and are used in internals modules only."""

import ast
import contextlib
import functools
import gc
import importlib
import json
import logging
import operator
import shutil
import subprocess
import sys
import tempfile
import weakref
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxscript import rewriter
from torch.onnx._internal.exporter._registration import ONNXRegistry

from compressor.internals.onnxscript import rules_by_operator
from compressor.internals.torch_onnx import one_registry
from compressor.lower import write_onnx
from tests.samples import traced

ROOT = Path(__file__).parent.parent
PACKAGES = ("compressor", "passes", "runtimes")


def is_internal(path):
    return path.parent.name == "internals" or path.stem.endswith("internals")


FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
INTERNALS = [path for path in FILES if is_internal(path)]


def is_foreign(module):
    top = module.partition(".")[0]
    return top not in PACKAGES and top not in sys.stdlib_module_names


# --------------------------------------------------------------------------------------------------- what is imported


def imported():
    """Return the imports of the internals modules from libraries, as (module, name)."""
    trees = (ast.parse(path.read_text()) for path in INTERNALS)
    froms = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return sorted({(node.module, alias.name) for node in froms if is_foreign(node.module) for alias in node.names})


@pytest.mark.parametrize(("module", "name"), imported())
def test_imported_names_exist(module, name):
    pytest.importorskip(module.partition(".")[0])
    try:
        library = importlib.import_module(module)
    except ModuleNotFoundError as error:
        pytest.fail(f"{module} does not exist: {error}")
    assert hasattr(library, name) or importlib.util.find_spec(f"{module}.{name}") is not None


# ------------------------------------------------------------------------------------------------------------- passes


class Halves(torch.nn.Module):
    """A module that reshapes [n, 4] to [2n, 2]."""

    def forward(self, x):
        return x.reshape(-1, 2)


@pytest.fixture(scope="module")
def program():
    axes = {"x": {0: torch.export.Dim.DYNAMIC}}
    return torch.export.export(Halves(), (torch.ones(6, 4),), dynamic_shapes=axes, strict=False)


@pytest.fixture(scope="module")
def values(program):
    """Return the traced input and output."""
    nodes = [node for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    return nodes[0].meta["val"], nodes[-1].meta["val"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SOFTMAX", ["aten::_softmax"]),
        ("SAFE_SOFTMAX", ["aten::_safe_softmax"]),
        ("UNSAFE_VIEWS", ["aten::_unsafe_view"]),
        ("COPYING_CASTS", ["aten::_to_copy"]),
        ("RUN_TIME_ASSERTIONS", ["aten::_assert_async", "aten::_assert_scalar", "aten::_assert_tensor_metadata"]),
    ],
)
def test_torch_has_the_private_operators(name, expected):
    from passes import torch_internals

    assert sorted(each.name().partition(".")[0] for each in getattr(torch_internals, name)) == expected


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_onednn_computes_linear_layers():
    from passes.torch_internals import onednn_linear

    x, weight, bias = torch.ones(2, 3, 4), torch.arange(20.0).reshape(5, 4), torch.arange(5.0)
    for offset in (bias, None):
        torch.testing.assert_close(onednn_linear(x, weight, offset), torch.nn.functional.linear(x, weight, offset))


def test_missing_operators_are_skipped():
    from passes.torch_internals import operators

    relu = torch.ops.aten.relu.default
    assert operators("relu.default", "relu.no_such_overload", "_no_such_operator.default") == {relu}


def test_is_higher_order():
    from passes.torch_internals import is_higher_order

    assert is_higher_order(torch.ops.higher_order.cond)
    assert not any(map(is_higher_order, (operator.add, "placeholder", torch.ops.aten.add.Tensor)))


def test_is_mutable():
    from passes.torch_internals import is_mutable

    assert is_mutable(torch.ops.aten.add_.Tensor)
    assert not is_mutable(torch.ops.aten.add.Tensor)
    assert not any(map(is_mutable, (operator.add, "placeholder", torch.ops.higher_order.cond)))


def test_arguments_of_operators():
    from passes.torch_internals import arguments

    names_and_defaults = [(each.name, each.default_value) for each in arguments(torch.ops.aten.softmax.int)]
    assert names_and_defaults == [("self", None), ("dim", None), ("dtype", None)]
    assert [each.default_value for each in arguments(torch.ops.aten.transpose.int)] == [None] * 3
    assert arguments(torch.ops.aten.flatten.using_ints)[2].default_value == -1


def test_hooks_of_a_module_are_listed_and_removed():
    from passes.torch_internals import forward_hooks, remove_backward_hooks

    def hook(*_):
        return None

    outer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    outer.register_forward_pre_hook(hook)
    outer.register_forward_hook(hook)
    assert forward_hooks(outer) == (hook, hook)
    assert forward_hooks(outer[0]) == ()
    called = []
    outer.register_full_backward_hook(lambda *_: called.append("backward"))
    outer.register_full_backward_pre_hook(lambda *_: called.append("before"))
    remove_backward_hooks(outer)
    outer(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert called == []


@pytest.mark.parametrize("module", ["passes.torch_internals", "runtimes.torch.internals"])
def test_expression_and_hint_of_symbolic_sizes(module, values):
    internals = importlib.import_module(module)
    before, after = (value.shape[0] for value in values)
    assert internals.expression(before).is_Symbol
    assert internals.expression(after) == 2 * internals.expression(before)
    assert (internals.hint(before), internals.hint(after)) == (6, 12)
    assert int(internals.expression(after).subs({internals.expression(before): 5})) == 10
    assert dict(internals.expression(after).as_coefficients_dict()) == {internals.expression(before): 2}


def test_expression_and_hint_of_integers():
    from passes.torch_internals import expression, hint

    assert (expression(3), hint(3)) == (3, 3)


def test_guards_are_the_conditions_on_sizes():
    from passes.torch_internals import guards, holds

    class Branching(torch.nn.Module):
        def forward(self, *tensors):
            return tensors[0] * 2 if tensors[0].shape[1] > 16 else tensors[0]

    axes = {"tensors": ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)}
    traced = torch.export.export(Branching(), (torch.ones(2, 10),), dynamic_shapes=axes, strict=False)
    (guard,) = guards(traced)
    assert guard == "L['tensors'][0].size()[1] <= 16"
    assert [holds(guard, [torch.ones(3, size)]) for size in (16, 17)] == [True, False]
    assert holds("math.trunc(L['tensors'][0].size()[0] / 2) == 1", [torch.ones(3)])  # as XLNet's relative positions


def test_free_size_is_a_new_symbol(values):
    from passes.torch_internals import expression, fake_mode, hint, new_symbolic_size

    size = new_symbolic_size(fake_mode(values[0]), 12, "somewhere")
    assert expression(size).is_Symbol
    assert expression(size) not in {expression(value.shape[0]) for value in values}
    assert hint(size) == 12


def test_fake_mode_of_traced_values(values):
    from passes.torch_internals import FakeTensorMode, fake_mode

    assert isinstance(fake_mode(values[0]), FakeTensorMode)
    assert fake_mode(values[0]) is fake_mode(values[1])
    assert fake_mode(torch.ones(2)) is None
    assert fake_mode(None) is None


def test_python_dispatcher_broadcasts_traced_values(values):
    from passes.torch_internals import enable_python_dispatcher, fake_mode

    with enable_python_dispatcher(), fake_mode(values[0]):
        result = torch.ops.aten.addcmul.default(values[0], values[0], torch.empty(4))
    assert result.shape == values[0].shape


def test_values_without_the_cache_of_their_mode_are_the_same(values):
    from passes.torch_internals import fake_mode, uncached

    mode = fake_mode(values[0])
    cached = torch.ops.aten.gelu.default(values[0])
    before = mode.cache_info()
    with uncached(mode):
        value = torch.ops.aten.gelu.default(values[0])
    assert (value.shape, value.stride(), value.dtype) == (cached.shape, cached.stride(), cached.dtype)
    assert mode.cache_info() == before
    assert torch.ops.aten.gelu.default(values[0]).shape == value.shape
    assert mode.cache_info() != before


def test_fake_mode_computes_shapes_with_real_inputs():
    from passes.torch_internals import FakeTensorMode

    weight = torch.full((), torch.nan).expand(3, 5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = mode.from_tensor(torch.ones(2, 3)) @ weight
    assert result.shape == (2, 5)


def test_traces_without_stack_traces_are_the_same():
    from passes.torch_internals import without_stack_traces

    def exported():
        return torch.export.export(Halves(), (torch.ones(6, 4),), strict=False).graph

    whole = exported()
    with without_stack_traces():
        graph = exported()
    assert [node.format_node() for node in graph.nodes] == [node.format_node() for node in whole.nodes]
    assert any(node.stack_trace for node in whole.nodes)
    assert not any(node.stack_trace for node in graph.nodes)
    assert any(node.stack_trace for node in exported().nodes)


def test_tree_leaves_of_nested_values():
    from passes.torch_internals import tree_leaves

    largest = torch.tensor([[1, 3], [2, 0]]).max(dim=1)
    assert len(tree_leaves([largest, {"a": (torch.ones(1), None)}])) == 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_share_their_storage_key(device):
    from passes.torch_internals import storage_key

    tensor = torch.empty(4, 4, device=device)
    assert storage_key(tensor) == storage_key(tensor[1:].T)
    other = torch.empty(4, 4, device=device)
    assert storage_key(tensor) != storage_key(other)


def test_registries_of_a_module_are_mutable():
    from passes.torch_internals import registries

    module = torch.nn.BatchNorm1d(2)
    module.register_parameter("nothing", None)
    parameters, buffers = registries(module)
    assert list(parameters) == ["weight", "bias", "nothing"]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    del parameters["nothing"], parameters["bias"], buffers["num_batches_tracked"]
    assert list(module.state_dict()) == ["weight", "running_mean", "running_var"]


# ----------------------------------------------------------------------------------------------------------- runtimes


def test_tree_map_reaches_every_leaf():
    from runtimes.torch.internals import tree_map

    assert tree_map(lambda leaf: -leaf, ([1, (2,)], {"a": 3})) == ([-1, (-2,)], {"a": -3})


@pytest.mark.slow  # tests/runtimes/torch reads the metadata of packages in the usual run
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++, which is not installed")
def test_package_keeps_its_metadata_and_runs(program, tmp_path):
    from runtimes.base.protocols import suppress_output
    from runtimes.torch.internals import METADATA_FILE, compile_package, open_package, run_package

    path = tmp_path / "halves.pt2"
    with suppress_output(), torch.no_grad():
        compile_package(program, path, {"compressor": "metadata"}, threads=1)
    with zipfile.ZipFile(path) as archive:
        (entry,) = (each for each in archive.namelist() if each.endswith(METADATA_FILE))
        assert json.loads(archive.read(entry))["compressor"] == "metadata"
    x = torch.arange(12.0).reshape(3, 4)
    with suppress_output():
        (output,) = run_package(open_package(path), [x])
    assert torch.equal(output, x.reshape(-1, 2))


@pytest.mark.slow  # every engine that tests/runtimes/executorch opens sets the number of threads
def test_executorch_thread_pool_can_be_resized():
    pytest.importorskip("executorch")
    code = "from runtimes.executorch.internals import *; reset_threads(3); print(thread_count())"
    # In a separate process, since open engines of this one hold the address of the pool.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split()[-1] == "3"


# --------------------------------------------------------------------------------------------------------- compressor


def test_timm_writes_a_config_without_weights(tmp_path):
    timm = pytest.importorskip("timm")
    from compressor.internals.timm import save_config_for_hf

    save_config_for_hf(timm.create_model("resnet10t", num_classes=3), tmp_path / "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "resnet10t"
    assert config["pretrained_cfg"]["input_size"]


def test_cached_file_of_a_folder_or_none(tmp_path):
    from compressor.internals.transformers import cached

    (tmp_path / "there.json").write_text("{}")
    assert cached(str(tmp_path), "there.json", None) == tmp_path / "there.json"
    assert cached(str(tmp_path), "absent.json", None) is None


def test_cached_file_of_the_hub_is_none_while_offline(tmp_path, monkeypatch):
    from compressor.internals.transformers import cached

    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert cached("nobody/no-such-model", "absent.json", "main") is None


def test_shards_of_an_index(tmp_path):
    from compressor.internals.transformers import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, shards

    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = tmp_path / SAFE_WEIGHTS_INDEX_NAME
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for name in names.values():
        (tmp_path / name).touch()
    assert shards(str(tmp_path), index, None) == [tmp_path / name for name in names.values()]
    assert (index.name, SAFE_WEIGHTS_NAME) == ("model.safetensors.index.json", "model.safetensors")


def test_names_in_the_files_of_a_module_are_replaced_and_come_back():
    from transformers import BertConfig, BertModel
    from transformers.models.bert import modeling_bert

    from compressor.internals.transformers import files_of, with_names

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    module = BertModel(BertConfig(vocab_size=9, **sizes))
    assert modeling_bert in files_of(module)
    assert all(file.__name__.startswith("transformers.") for file in files_of(module))
    function, method = modeling_bert.eager_attention_forward, BertModel.forward
    names = {"eager_attention_forward": 1, "BertModel.forward": 2, "len": 3, "no_such_name": 4, "NoClass.forward": 5}
    with contextlib.suppress(ZeroDivisionError), with_names(module, names):
        assert (modeling_bert.eager_attention_forward, BertModel.forward, modeling_bert.len) == (1, 2, 3)
        assert not {"no_such_name", "NoClass"} & vars(modeling_bert).keys()
        raise ZeroDivisionError
    assert (modeling_bert.eager_attention_forward, BertModel.forward) == (function, method)
    assert "len" not in vars(modeling_bert)


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_silences_transformers_temporarily(bars):
    from transformers.utils import logging as transformers_logging

    from compressor.internals.transformers import quiet

    before, level = transformers_logging.is_progress_bar_enabled(), logging.getLogger("transformers").level
    switch = {True: transformers_logging.enable_progress_bar, False: transformers_logging.disable_progress_bar}
    switch[bars]()
    try:
        with quiet():
            assert not transformers_logging.get_logger("transformers.modeling_utils").isEnabledFor(logging.WARNING)
            assert not transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.is_progress_bar_enabled() == bars
        assert logging.getLogger("transformers").level == level
    finally:
        switch[before]()


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 40,
}


def test_older_weight_names_are_renamed():
    import transformers

    from compressor.internals.transformers import as_modules_name_them

    bert = transformers.BertModel(transformers.BertConfig(**SMALL))
    older = {"embeddings.LayerNorm.gamma": 1, "pooler.dense.weight": 2}
    assert as_modules_name_them(older, bert) == {"embeddings.LayerNorm.weight": 1, "pooler.dense.weight": 2}


def test_converted_weights_are_skipped_and_renamed_as_in_checkpoints():
    import transformers

    from compressor.internals.transformers import as_checkpoints_name_them, as_modules_name_them

    with torch.device("meta"):
        mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=2))
    written = as_checkpoints_name_them(mixtral.state_dict(), mixtral)
    experts = [name for name in written if ".experts." in name]
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in experts
    assert "model.layers.0.block_sparse_moe.gate.weight" in written  # renamed, not converted
    read = as_modules_name_them(written, mixtral)
    assert set(read) == {name for name in mixtral.state_dict() if ".experts." not in name}


def test_renamed_weights_are_the_same_objects():
    import transformers

    from compressor.internals.transformers import as_checkpoints_name_them

    bert = transformers.BertModel(transformers.BertConfig(**SMALL))
    marks = {name: torch.empty((), device="meta") for name in bert.state_dict()}
    assert {id(each) for each in as_checkpoints_name_them(marks, bert).values()} == set(map(id, marks.values()))


@pytest.mark.parametrize("name", ["AutoModel", "BertModel"])
def test_with_random_weights(name):
    import transformers

    from compressor.internals.transformers import with_random_weights

    module = with_random_weights(getattr(transformers, name), transformers.BertConfig(**SMALL))
    assert type(module) is transformers.BertModel


def test_keep_stages_of_a_backbone_config():
    import transformers

    from compressor.internals.transformers import keep_stages

    config = transformers.Dinov2Config(**(SMALL | {"num_hidden_layers": 4}))
    keep_stages(config, 3, 2)  # no effect: the config has another number of blocks
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    keep_stages(config, 4, 2)
    assert config.stage_names == ["stem", "stage1", "stage2"]
    assert (list(config.out_features), list(config.out_indices)) == (["stage2"], [2])
    keep_stages(plain := transformers.BertConfig(**SMALL), 1, 1)
    assert not hasattr(plain, "stage_names")


# ----------------------------------------------------------------------------------------------------- separation

# Modules without a leading underscore that their libraries do not declare stable.
UNSTABLE = (
    "torch.fx.experimental",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "executorch.extension.pybindings",
)
# Public despite the underscore: torch documents the first, named tuples have the others.
PUBLIC = {"_check", "_asdict", "_replace"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names():
    """Return the names that the packages define: functions, classes, attributes, variables and parameters."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.FunctionDef() | ast.ClassDef():
                    names.add(node.name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    names.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                    names.add(name)
    return names


def private_parts(tree, own):
    """Yield the private names of libraries in a file, each with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if is_foreign(module):
                paths = [f"{module}.{alias.name}" for alias in node.names]
                yield from ((path, node.lineno) for path in paths if _is_private_path(path))
            case ast.Import():
                names = [alias.name for alias in node.names if is_foreign(alias.name)]
                yield from ((name, node.lineno) for name in names if _is_private_path(name))
            case ast.Attribute(value=ast.Attribute(attr="node"), attr="expr" | "hint"):
                yield f"node.{node.attr}", node.lineno
            case ast.Attribute() if is_private(node.attr) and node.attr not in own | PUBLIC:
                yield node.attr, node.lineno
            case ast.keyword(arg=str(name)) if is_private(name) and name not in own:
                yield name, node.lineno
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(str(name)), *_]):
                if is_private(name) and name not in own:
                    yield name, node.lineno


def _is_private_path(path):
    return any(map(is_private, path.split("."))) or any(f"{path}.".startswith(f"{each}.") for each in UNSTABLE)


def test_private_names_are_used_in_internals_only():
    own, violations = own_names(), []
    for path in (path for path in FILES if not is_internal(path)):
        relative = path.relative_to(ROOT).as_posix()
        parts = private_parts(ast.parse(path.read_text()), own)
        violations += [f"{relative}:{line} {name}" for name, line in parts]
    assert not violations, "move these to the internals module of their package"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._dynamo.source import ConstantSource", "torch._dynamo.source.ConstantSource"),
        ("from torch.utils import _pytree", "torch.utils._pytree"),
        ("from torch.fx.experimental import symbolic_shapes", "torch.fx.experimental.symbolic_shapes"),
        ("torch._inductor.aoti_load_package(path)", "_inductor"),
        ("tensor.untyped_storage()._cdata", "_cdata"),
        ("getattr(node.target, '_schema', None)", "_schema"),
        ("size.node.hint", "node.hint"),
        ("cached_file(where, _raise_exceptions_for_gated_repo=False)", "_raise_exceptions_for_gated_repo"),
    ],
)
def test_private_names_are_detected(line, expected):
    assert [name for name, _ in private_parts(ast.parse(line), {"_own"})] == [expected]


@pytest.mark.parametrize(
    "line", ["import torch", "self._own", "row._asdict()", "from passes.execute.interpreter import _walk", "a.__b__"]
)
def test_public_names_are_accepted(line):
    assert not list(private_parts(ast.parse(line), {"_own"}))


# ------------------------------------------------------------------------------------------------------ huggingface_hub


def test_no_request_is_sent_offline(monkeypatch):
    """A request would go to a port of this machine that nothing listens on."""
    from huggingface_hub import errors, get_session

    from compressor.internals.huggingface_hub import offline

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with offline(), pytest.raises(errors.OfflineModeIsEnabled):
        get_session().get("http://127.0.0.1:9/config.json")
    with pytest.raises(Exception, match="refused") as caught:
        get_session().get("http://127.0.0.1:9/config.json")
    assert not isinstance(caught.value, errors.OfflineModeIsEnabled)


# --------------------------------------------------------------------------------------------------------- exporters


@contextlib.contextmanager
def as_released(*_):
    """Do nothing in place of the change of a private API."""
    yield


@functools.cache
def written(architecture):
    """Return the bytes of the ONNX file of an architecture."""
    model, graph, _ = traced(architecture)
    with tempfile.TemporaryDirectory() as folder:
        return write_onnx.lower(graph, model, Path(folder, "model.onnx")).read_bytes()


@pytest.mark.parametrize("name", ["rules_by_operator", "exact_constants", "one_registry"])
@pytest.mark.parametrize("architecture", ["vit_swiglu", pytest.param("hf_bert", marks=pytest.mark.slow)])
def test_the_exporter_writes_the_same_file_without_the_private_api(name, architecture, tmp_path, monkeypatch):
    ours = written(architecture)
    model, graph, _ = traced(architecture)
    monkeypatch.setattr(write_onnx, name, as_released)
    assert ours == write_onnx.lower(graph, model, tmp_path / "theirs.onnx").read_bytes()


@pytest.mark.parametrize("architecture", ["vit_swiglu", "hf_bert"])
def test_operators_decomposed_one_by_one_give_the_operators_and_weights_of_a_second_trace(
    architecture, tmp_path, monkeypatch
):
    """The names of inner values differ, and the operators that compute sizes."""
    ours = onnx.ModelProto.FromString(written(architecture))
    model, graph, _ = traced(architecture)
    monkeypatch.setattr(write_onnx, "decomposed_by", as_released)
    theirs = onnx.load(write_onnx.lower(graph, model, tmp_path / "theirs.onnx"))
    sizes = {"Shape", "Gather", "Squeeze", "Unsqueeze", "Concat", "Cast", "Reshape"}
    counts = [Counter(node.op_type for node in each.graph.node if node.op_type not in sizes) for each in (ours, theirs)]
    assert counts[0] == counts[1]
    weights = [sorted(weight.raw_data for weight in each.graph.initializer) for each in (ours, theirs)]
    assert weights[0] == weights[1]
    feeds = {name: value.numpy() for name, value in model.example.items()}
    sessions = [onnxruntime.InferenceSession(each.SerializeToString()) for each in (ours, theirs)]
    for one, other in zip(*(session.run(None, feeds) for session in sessions), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rules_are_matched_at_nodes_of_their_operator_only(monkeypatch):
    """The rules themselves are tried at every node; those of other operators fail before their pattern is looked at."""
    nodes = [ir.node("Relu", [ir.val("x")]), ir.node("Add", [ir.val("a"), ir.val("b")])]
    graph = ir.Graph([], [], nodes=nodes)
    looked_at = []
    with rules_by_operator():
        rules = rewriter._DEFAULT_REWRITE_RULES
        assert len(rules) > 20
        for rule in rules:
            inner = rule._matcher.matcher
            monkeypatch.setattr(inner, "match", lambda *args, inner=inner, **_: looked_at.append((inner, args[2])))
            for node in nodes:
                rule._matcher.match(None, graph, node)
    assert {type(rule._matcher).__name__ for rule in rewriter._DEFAULT_REWRITE_RULES} != {"_ByOperator"}
    assert looked_at
    assert all(matcher.pattern.output_nodes[0].op.matches(node.op_type) for matcher, node in looked_at)
    assert len(looked_at) < len(rules)


def test_a_written_file_leaves_no_graph_with_its_weights_in_memory(tmp_path, monkeypatch):
    """The default rules of onnxscript live as long as the process, and keep the graph that they matched last."""
    model, graph, _ = traced("vit_swiglu")
    written, check = [], write_onnx._check_dynamic_axes
    monkeypatch.setattr(
        write_onnx,
        "_check_dynamic_axes",
        lambda found, *args: (written.append(weakref.ref(found.graph)), check(found, *args)),
    )
    write_onnx.lower(graph, model, tmp_path / "model.onnx")
    gc.collect()
    (kept,) = written
    assert kept() is None


def test_the_registry_is_built_once_and_additions_stay_in_their_copy():
    with one_registry():
        first, second = (ONNXRegistry().from_torchlib(opset_version=20) for _ in range(2))
    whole = ONNXRegistry.from_torchlib(opset_version=20)
    name = "aten::relu"
    assert first.functions.keys() == whole.functions.keys()
    assert first.opset_version == whole.opset_version == 20
    assert first.functions[name][0] is second.functions[name][0]
    assert first.functions[name][0] is not whole.functions[name][0]
    with torch.library._scoped_library("later", "DEF") as library, one_registry():
        library.define("operator(Tensor x) -> Tensor")
        assert ONNXRegistry().from_torchlib(opset_version=20).functions[name][0] is not first.functions[name][0]
    first.functions[name].append("added")
    first.functions["new"] = []
    assert "added" not in second.functions[name]
    assert "new" not in second.functions
