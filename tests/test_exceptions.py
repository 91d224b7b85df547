from __future__ import annotations

import pickle
import traceback

import pytest

import qwodel
from qwodel import exceptions
from qwodel.exceptions import QuantizationError, ResourceError, did_you_mean
from qwodel.process import show_error


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("ValidationError", ValueError),
        ("FormatNotSupportedError", ValueError),
        ("ConfigurationError", ValueError),
        ("BackendNotFoundError", ValueError),
        ("DependencyError", ImportError),
        ("CalibrationError", RuntimeError),
        ("ResourceError", RuntimeError),
    ],
)
def test_each_error_is_also_the_builtin_that_callers_catch(name: str, old: type[Exception]) -> None:
    error = getattr(qwodel, name)
    assert issubclass(error, QuantizationError)
    assert issubclass(error, old)


def test_the_module_docstring_draws_every_class() -> None:
    for name in exceptions.__all__:
        if name != "did_you_mean":
            assert name in (exceptions.__doc__ or "")


def test_hint_is_a_note_and_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ResourceError("disk full", hint="free some")))
    assert type(error) is ResourceError
    assert str(error) == "disk full"
    assert error.hint == "free some"
    assert "hint: free some" in "".join(traceback.format_exception(error))


def test_did_you_mean_prefers_the_spelling_with_the_same_case() -> None:
    near = did_you_mean("LlamaForCausalLMM", ["LLaMAForCausalLM", "LlamaForCausalLM", "BertModel"])
    assert near is not None
    assert near.startswith("did you mean 'LlamaForCausalLM'")
    assert did_you_mean("zzz", ["abc"]) is None


def test_a_place_goes_before_the_message_and_the_hint_is_shown_once() -> None:
    first = ResourceError("disk full", hint="free some")
    with pytest.raises(ResourceError) as caught:
        raise first.within("a.weight") from first
    assert (str(caught.value), caught.value.hint) == ("a.weight: disk full", "free some")
    assert "".join(traceback.format_exception(caught.value)).count("hint: free some") == 1


@pytest.mark.parametrize("verbose", [False, True])
def test_programs_print_a_hint_once(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_error(ResourceError("disk full", hint="free some"), verbose=verbose)
    assert capsys.readouterr().err.count("free some") == 1
