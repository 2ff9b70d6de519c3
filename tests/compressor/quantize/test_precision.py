"""Tests of precisions: support by targets and the choice of the fastest."""

from __future__ import annotations

import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from compressor.choices import AUTO, SHORT_FORMS
from compressor.quantize.int8_search import Attempt, Kept, Quantized
from compressor.quantize.precision import Converted, PrecisionError, Trial, check_precision, choose_precision, table
from runtimes.base.protocols import PRECISIONS
from runtimes.base.registry import runtime, targets


@pytest.mark.parametrize("name", targets())
def test_check_accepts_only_the_precisions_of_the_target(name: str) -> None:
    target = runtime(name)
    for device in target.devices:
        for precision in PRECISIONS:
            if precision in target.precisions[device]:
                check_precision(target, precision, device)
                continue
            with pytest.raises(
                PrecisionError, match=rf"^target {name} has no {precision} on {device}; .*\.$"
            ) as caught:
                check_precision(target, precision, device)
            for supported in target.precisions[device]:
                assert supported in str(caught.value)
        check_precision(target, AUTO, device)
        check_precision(target, "fp32", device)


def test_error_names_the_targets_with_the_precision() -> None:
    with pytest.raises(PrecisionError) as caught:
        check_precision(runtime("onnxruntime"), "bf16", "cpu")
    others = [name for name in targets() if "bf16" in runtime(name).precisions.get("cpu", ())]
    assert "openvino" in others
    assert str(caught.value) == (
        "target onnxruntime has no bf16 on cpu; it has fp32, int8, int8-dynamic, int8-weight-only, int4, int2 there; "
        f"bf16 on cpu needs --target {' or '.join(others)}."
    )
    with pytest.raises(PrecisionError, match=r"int4 on cpu needs --target (\w+ or )*onnxruntime"):
        check_precision(runtime("openvino"), "int4", "cpu")


def test_error_without_a_target_with_the_precision() -> None:
    for precision, words in (
        ("int8-dynamic", r"^target onnxruntime has no int8-dynamic on cuda; it has fp32, fp16 there\.$"),
        ("int4", r"int4 on cuda needs --target onnxruntime_rtx or tensorrt_rtx\.$"),
        ("int8", r"int8 on cuda needs --target onnxruntime_rtx or tensorrt or tensorrt_rtx\.$"),
    ):
        with pytest.raises(PrecisionError, match=words):
            check_precision(runtime("onnxruntime"), precision, "cuda")


def test_unsupported_device_has_no_precision_except_fp32() -> None:
    tensorrt = runtime("tensorrt")
    check_precision(tensorrt, "fp32", "cpu")
    with pytest.raises(PrecisionError, match=r"^target tensorrt has no int8 on cpu; int8 on cpu needs --target "):
        check_precision(tensorrt, "int8", "cpu")


def test_short_forms_map_to_precisions() -> None:
    assert {form: SHORT_FORMS[form] for form in ("static", "dynamic", "weight-only")} == SHORT_FORMS
    assert set(SHORT_FORMS.values()) < set(PRECISIONS)


# ---- choice


def test_fastest_within_the_limit_is_chosen_with_verdicts_for_the_others() -> None:
    times = {"fp32": 4.0, "fp16": 3.0, "bf16": 5.0, "int8": 2.0, "int4": 1.0}
    losses = {"fp32": 0.0, "fp16": 0.1, "bf16": 0.2, "int8": 0.5, "int4": 3.0}
    chosen, trials = choose_precision(times, losses, {"int8-dynamic": "It has no kernel."}, 0.5)
    assert chosen == "int8"
    assert trials == (
        Trial("fp32", 4.0, 1.0, 0.0, "reference for the other precisions"),
        Trial("fp16", 3.0, 4 / 3, 0.1, "slower than int8"),
        Trial("bf16", 5.0, 0.8, 0.2, "not faster than fp32"),
        Trial("int8", 2.0, 2.0, 0.5, "chosen"),
        Trial("int8-dynamic", None, None, None, "It has no kernel."),
        Trial("int4", 1.0, 4.0, 3.0, "loses 3.00 %, more than 0.5 %"),
    )


def test_latency_alone_decides_without_losses() -> None:
    assert choose_precision({"fp32": 4.0, "int8": 2.0}, {"fp32": 0.0, "int8": None}, {}, 0.0)[0] == "int8"


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_non_finite_loss_exceeds_every_limit(loss: float) -> None:
    assert choose_precision({"fp32": 4.0, "int8": 2.0}, {"fp32": 0.0, "int8": loss}, {}, 100.0)[0] == "fp32"


figures = st.floats(0.1, 10)


@given(
    st.dictionaries(st.sampled_from(PRECISIONS[1:]), st.tuples(figures, st.floats(0, 5) | st.none())),
    figures,
    st.floats(0, 5),
)
def test_chosen_precision_is_the_fastest_within_the_limit(
    others: dict[str, tuple[float, float | None]], whole: float, limit: float
) -> None:
    times = {"fp32": whole} | {name: time for name, (time, _) in others.items()}
    losses: dict[str, float | None] = {"fp32": 0.0} | {name: loss for name, (_, loss) in others.items()}
    refused = {name: "no" for name in PRECISIONS if name not in times}
    chosen, trials = choose_precision(times, losses, refused, limit)
    lost = losses[chosen]
    assert lost is None or lost <= limit
    fitting = [time for name, time in times.items() if (losses[name] or 0) <= limit]
    assert times[chosen] == min(fitting)
    assert chosen == "fp32" or times[chosen] < whole
    assert [trial.precision for trial in trials] == list(PRECISIONS)
    assert [trial.precision for trial in trials if trial.verdict == "chosen"] == [chosen]


def test_converted_to_dict_is_plain_json() -> None:
    wide = (Kept("node", "module", "largest value 5.5e+05"),)
    plain = Converted("fp16", "compressor", None, float32=wide).to_dict()
    entry = {"node": "node", "module": "module", "reason": "largest value 5.5e+05", "sensitivity": None}
    assert plain == {"precision": "fp16", "by": "compressor", "loss": None, "tried": [], "float32": [entry]}
    kept = (Kept("node", "module", "reason", 0.5),)
    inner = Quantized("static", "uint8", "mse", True, (), 7, kept, 0.25, (Attempt(0, 0.25),), 64)
    tried = ({"by": "nncf", "loss": 1.0, "milliseconds": 2.0},)
    plain = json.loads(json.dumps(Converted("int8", "compressor", 0.3, inner, tried).to_dict()))
    assert (plain["precision"], plain["by"], plain["tried"]) == ("int8", "compressor", list(tried))
    assert (plain["calibration"], plain["smoothed"], plain["nodes"], plain["samples"]) == ("mse", True, 7, 64)
    assert plain["kept"] == [{"node": "node", "module": "module", "reason": "reason", "sensitivity": 0.5}]
    assert plain["loss"] == 0.3


def test_a_verdict_is_no_markup() -> None:
    """Errors name extras such as onnxruntime-gpu[cuda,cudnn], and files of any name."""
    verdict = "refused: pip install 'x[cuda,cudnn]' [red] [/]"
    rows = [{"precision": "fp16", "milliseconds": None, "speedup": None, "loss": None, "verdict": verdict}]
    stream = io.StringIO()
    Console(file=stream, width=150).print(table(rows))
    assert verdict in stream.getvalue()
