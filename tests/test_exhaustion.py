from __future__ import annotations

import errno
import os

import pytest

from qwodel.exceptions import ResourceError, ValidationError
from qwodel.exhaustion import exhausted, exhaustion


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "memory"),
        (OutOfMemoryError("CUDA"), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "memory"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "threads"),
        (RuntimeError("can't start new thread"), "threads"),
    ],
)  # fmt: skip
def test_want_of_resources_is_a_resource_error_with_its_cause(error: Exception, what: str) -> None:
    with pytest.raises(ResourceError, match=f"{what}.* while testing") as caught, exhaustion("testing"):
        raise error
    assert caught.value.__cause__ is error
    assert caught.value.hint


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), OSError(errno.ENOENT, "gone"), ValidationError("bad"), KeyError()],
)
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    assert exhausted(error) is None
    with pytest.raises(type(error)) as caught, exhaustion("testing"):
        raise error
    assert caught.value is error
