"""What is said of a calibration text: taken once, checked, and never repeated."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwodel.backends import load_backend
from qwodel.calibration.options import CalibrationBatches, CalibrationOptions, CalibrationText, GivenInPython
from qwodel.exceptions import ConfigurationError

SECRET = "the patient's name is Zaphod"
BACKENDS = ("gguf", "awq", "int8", "fp8", "smoothquant")

KINDS: dict[str, Callable[[], Iterable[Any]]] = {
    "list": lambda: [SECRET, SECRET + "!"],
    "tuple": lambda: (SECRET, SECRET + "!"),
    "generator": lambda: (SECRET + mark for mark in ("", "!")),
    "dictionary's values": lambda: {1: SECRET, 2: SECRET + "!"}.values(),
    "records": lambda: [{"text": SECRET}, {"text": SECRET}],
    "conversations": lambda: [[{"role": "user", "content": SECRET}]] * 2,
}


def options_of(backend: str, **given: Any) -> Any:
    return load_backend(backend).parse_options(given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_that_calibrate_share_one_class(backend: str) -> None:
    assert issubclass(load_backend(backend).options_type, CalibrationText)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_given_in_python_are_nowhere_shown(backend: str, kind: str) -> None:
    options = options_of(backend, calibration_dataset=KINDS[kind]())
    shown = (
        repr(options), str(options), f"{options.calibration_dataset}", repr(options.model_dump()),
        options.model_dump_json(), repr(copy.deepcopy(options)), repr(pickle.loads(pickle.dumps(options))),
    )  # fmt: skip
    for text in shown:
        assert "Zaphod" not in text
        assert "2 items given in Python" in text
    assert list(options.calibration_dataset) == list(KINDS[kind]())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_iterator_serves_any_number_of_runs(backend: str) -> None:
    adapter, taken = load_backend(backend), []

    def texts() -> Iterator[str]:
        for number in range(3):
            taken.append(number)
            yield f"text {number}"

    options = adapter.parse_options({"calibration_dataset": texts()})
    for _ in range(2):
        again = adapter.parse_options({"overwrite": True}, options)
        assert again.calibration_dataset == ["text 0", "text 1", "text 2"]
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [3, 1.5, True, b"bytes", {"text": SECRET}, object()])
def test_what_is_no_text_is_refused_without_being_repeated(backend: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"not {type(wrong).__name__}") as caught:
        options_of(backend, calibration_dataset=wrong)
    assert "Zaphod" not in str(caught.value) + str(caught.value.hint)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", ["num_samples", "seq_length"])
@pytest.mark.parametrize("wrong", [0, -1, 1.5, float("nan"), float("inf"), "many", [SECRET]])
def test_sizes_are_positive_whole_numbers(backend: str, setting: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=setting) as caught:
        options_of(backend, calibration_dataset=["a"], **{setting: wrong})
    assert "Zaphod" not in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seq_len_is_short_for_seq_length(backend: str) -> None:
    assert options_of(backend, calibration_dataset=["a"], seq_len=64).seq_length == 64
    with pytest.raises(ConfigurationError, match="same option"):
        options_of(backend, calibration_dataset=["a"], seq_len=64, seq_length=64)


def test_paths_are_named_without_their_folder(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(SECRET)
    options = CalibrationText(calibration_dataset=file)  # type: ignore[arg-type]
    assert options.calibration_dataset == str(file)
    assert options.model_dump(mode="json")["calibration_dataset"] == "text.txt"
    hub = CalibrationText(calibration_dataset="wikitext:wikitext-2-raw-v1")
    assert hub.model_dump(mode="json")["calibration_dataset"] == "wikitext:wikitext-2-raw-v1"
    assert CalibrationText().model_dump(mode="json")["calibration_dataset"] is None


def test_errors_of_pydantic_itself_repeat_nothing() -> None:
    with pytest.raises(ValueError, match="calibration_split") as caught:
        CalibrationText(calibration_dataset=[SECRET], calibration_split=[SECRET])  # type: ignore[arg-type]
    assert "Zaphod" not in str(caught.value)


def test_settings_of_a_run_are_those_given_and_defaults() -> None:
    assert CalibrationBatches().calibration() is None
    given = CalibrationBatches(
        calibration_dataset=["a"], num_samples=3, calibration_split="test", text_column="body"  # type: ignore[arg-type]
    )  # fmt: skip
    found = given.calibration(token="hf_secret", device="cuda")
    assert found == CalibrationOptions(
        GivenInPython(["a"]), 3, split="test", column="body", token="hf_secret", device="cuda"
    )
    assert "hf_secret" not in repr(found)


def test_settings_without_a_text_have_no_effect_and_are_refused() -> None:
    CalibrationBatches().refuse_settings_without_text()
    with pytest.raises(ConfigurationError, match="num_samples, seed belong to calibration_dataset"):
        CalibrationBatches(num_samples=3, seed=1).refuse_settings_without_text()
