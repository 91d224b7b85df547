from __future__ import annotations

import pickle
import traceback

import pytest

import qwodel
from qwodel import exceptions
from qwodel.exceptions import QuantizationError, ResourceError, did_you_mean


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
