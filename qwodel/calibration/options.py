"""What a run can be told about its calibration text: one vocabulary for every backend that has a use for it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from qwodel.calibration.records import CalibrationSpec, describe_dataset
from qwodel.calibration.texts import DEFAULT_DATASET
from qwodel.exceptions import ConfigurationError

__all__ = [
    "CalibrationBatches",
    "CalibrationOptions",
    "CalibrationText",
    "Dataset",
    "GivenInPython",
    "renamed",
]


class GivenInPython(list[Any]):
    """Documents given in Python: a list like any other, but that it does not show what is in it."""

    def __repr__(self) -> str:
        return f"{len(self)} item{'s' if len(self) != 1 else ''} given in Python"


def _dataset(value: Any) -> Any:
    """A path or a hub dataset as a string; of anything else its items, taken once: an iterator serves once."""
    if value is None or isinstance(value, str | GivenInPython):
        return value
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | Mapping):
        return GivenInPython(value)
    raise ValueError(
        "a path, a hub dataset, or an iterable of texts, records, conversations or lists of token ids "
        f"is wanted, not {type(value).__name__}"
    )


def _named(value: Any) -> str | None:
    """What a manifest says of a dataset: it names a set, and repeats no text."""
    return repr(value) if isinstance(value, GivenInPython) else value and describe_dataset(value)


Dataset = Annotated[str | GivenInPython, BeforeValidator(_dataset), PlainSerializer(_named)]
"""A path or a hub dataset, or documents given in Python; in a manifest or a log only what it is called."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Which text a model is run on, and how.

    Attributes:
        dataset: a file, a folder, a hub dataset or an iterable.
        num_samples: sequences; by default as many as hold 16,384 tokens, and two for each input
            channel of the widest layer.
        seq_length: tokens a sequence.
        batch_size: sequences run together.
        split, column, token: of a hub dataset: its split, text column and access token.
        seed: of the choice of sequences.
        device: where blocks are run.
    """

    dataset: CalibrationSpec = DEFAULT_DATASET
    num_samples: int | None = None
    seq_length: int = 512
    batch_size: int = 4
    split: str = "train"
    column: str | None = None
    token: str | None = field(default=None, repr=False)
    seed: int = 0
    device: str = "cpu"


class CalibrationText(BaseModel):
    """The text, and how much of it. A backend's options inherit it and override what differs there."""

    model_config = ConfigDict(arbitrary_types_allowed=True, hide_input_in_errors=True)

    calibration_dataset: Dataset | None = Field(
        None,
        description="Text to run the model on: a .txt, .json, .jsonl or .parquet file, a folder, a hub dataset "
        "(repo or repo:subset), or in Python any iterable of texts.",
    )
    num_samples: int | None = Field(
        None,
        ge=1,
        description="Calibration: sequences; by default two tokens an input channel, at least 16384.",
    )
    seq_length: int | None = Field(None, ge=1, description="Calibration: tokens a sequence; 512.")
    calibration_split: str | None = Field(None, description="Calibration: split of a hub dataset; train.")


class CalibrationBatches(CalibrationText):
    """Text that is cut into batches of token sequences here, and not by a toolchain."""

    settings: ClassVar[tuple[str, ...]] = (
        "num_samples",
        "seq_length",
        "batch_size",
        "calibration_split",
        "text_column",
        "seed",
    )
    """Options that say something about the text, and nothing without one."""

    batch_size: int | None = Field(None, ge=1, description="Calibration: sequences run together; 4.")
    text_column: str | None = Field(None, description="Calibration: the text column; found by its name.")
    seed: int | None = Field(None, description="Calibration: seed of the choice of sequences.")

    def calibration(self, *, token: str | None = None, device: str = "cpu") -> CalibrationOptions | None:
        """The text to run the model on, with defaults for what was not given; ``None`` where there is none.

        Args:
            token: of a gated or private hub dataset.
            device: where blocks are run.
        """
        if self.calibration_dataset is None:
            return None
        names = {"calibration_split": "split", "text_column": "column"}
        given = {names.get(name, name): getattr(self, name) for name in CalibrationBatches.settings}
        given = {name: value for name, value in given.items() if value is not None}
        return CalibrationOptions(self.calibration_dataset, token=token, device=device, **given)

    def refuse_settings_without_text(self) -> None:
        """Raise :class:`ConfigurationError` where options were given that need a text, and no text was."""
        given = [name for name in self.settings if getattr(self, name) is not None]
        if self.calibration_dataset is None and given:
            raise ConfigurationError(f"{', '.join(given)} belong to calibration_dataset, which is not given")


def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with ``seq_len``, the other name of ``seq_length``, under that one.

    Raises:
        ConfigurationError: both are given.
    """
    if "seq_len" in given and "seq_length" in given:
        raise ConfigurationError("seq_len and seq_length are the same option", hint="give one of them")
    return {("seq_length" if name == "seq_len" else name): value for name, value in given.items()}
