"""What every backend shares: options, validation, staging, progress, manifest, publishing.

An adapter declares its formats and what it accepts, and implements
:meth:`BaseQuantizer.run`, which does the work into a staged output. The rest is here.
"""

from __future__ import annotations

import errno
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as PydanticError

from qwodel.exceptions import (
    ConfigurationError,
    ConversionError,
    FormatNotSupportedError,
    QuantizationError,
    ResourceError,
    ValidationError,
    did_you_mean,
)
from qwodel.hardware import is_out_of_memory
from qwodel.hashes import SourceFiles
from qwodel.output import StagedOutput, disk_errors, size_of
from qwodel.progress import Progress
from qwodel.report import envelope
from qwodel.side_files import files_beside
from qwodel.source import INPUT_FORMATS, ModelSource

__all__ = ["BackendOptions", "BaseQuantizer", "DryRun", "FormatSpec", "Job", "Result", "format_key"]


@dataclass(frozen=True, slots=True)
class FormatSpec:
    """One format of a backend.

    ``bits`` is the nominal number of bits per weight, scales included;
    ``needs`` lists what it cannot do without (``"importance matrix"``, ``"GPU"`` …).
    """

    name: str
    description: str
    bits: float | None
    read_by: str
    needs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


def format_key(name: str) -> str:
    """Fold case and separators, so that ``q4-k-m``, ``Q4_K_M`` and ``q4km`` are one."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


class BackendOptions(BaseModel):
    """Options every backend takes; each adapter's own extend these."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    overwrite: bool = Field(False, description="Replace an output that exists already.")
    revision: str | None = Field(None, description="Branch, tag or commit, where the model is a hub id.")
    token: str | None = Field(
        None,
        repr=False,
        exclude=True,
        description="Hugging Face token for gated and private models and datasets.",
    )


OptionsT = TypeVar("OptionsT", bound=BackendOptions)


class DryRun(Protocol):
    """What a run would do: exact bytes, and a table for people."""

    @property
    def output_bytes(self) -> int:
        """Bytes of everything that would be written but the manifest."""

    def table(self) -> str:
        """Return a line a tensor (what becomes of it, and why), then the totals."""


@dataclass
class Job(Generic[OptionsT]):
    """One run: what goes in, where it goes, and what is learned on the way.

    ``files`` are the source's, hashed meanwhile and watched; ``report`` is filled by the
    adapter and becomes part of the manifest and of ``get_model_info()``.
    """

    source: ModelSource
    format: FormatSpec
    options: OptionsT
    output: StagedOutput
    progress: Progress
    files: SourceFiles
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A published model: its path, bytes, wall seconds and the adapter's report."""

    path: Path
    size: int
    seconds: float
    manifest: Path
    report: Mapping[str, Any]


class BaseQuantizer(ABC, Generic[OptionsT]):
    """A backend. Subclasses are named for their toolchain, and so are their loggers."""

    name: ClassVar[str]
    extra: ClassVar[str]
    accepts: ClassVar[frozenset[str]]
    packages: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions the manifest records."""
    stages: ClassVar[Mapping[str, float]] = {"resolve": 1, "quantize": 90, "verify": 8, "publish": 1}
    """Expected share of wall time per stage."""
    options_type: type[OptionsT]

    def __init__(self) -> None:
        self.log = logging.getLogger(type(self).__name__)

    @classmethod
    @abstractmethod
    def formats(cls) -> Mapping[str, FormatSpec]:
        """Return the formats by name, in the order a user should read them."""

    @abstractmethod
    def run(self, job: Job[OptionsT]) -> None:
        """Write the artefact to ``job.output.path``, verify it, and fill ``job.report``."""

    @abstractmethod
    def output_name(self, source: ModelSource, spec: FormatSpec, options: OptionsT) -> str:
        """Return the artefact's file or directory name."""

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise ValidationError where ``config.json`` alone shows the model cannot be taken.

        Called before a hub model's weights are downloaded.
        """

    def check(self, source: ModelSource, spec: FormatSpec, options: OptionsT) -> None:
        """Raise what can be known before work starts."""

    def stage_weights(self, source: ModelSource, spec: FormatSpec, options: OptionsT) -> Mapping[str, float]:
        """Return the stages this run will have and their shares of wall time."""
        return self.stages

    def plan(self, source: ModelSource, spec: FormatSpec, options: OptionsT) -> DryRun:
        """Return what a run would write, without doing any of it.

        Raises:
            ConfigurationError: this backend learns the sizes only by doing the work.
        """
        raise ConfigurationError(f"the {self.name} backend has no dry run")

    @classmethod
    def find_format(cls, text: str) -> FormatSpec:
        """Return the format named ``text``, whatever its case and separators.

        Raises:
            FormatNotSupportedError: there is none; the nearest are named.
        """
        known = cls.formats()
        wanted = format_key(text)
        for spec in known.values():
            if wanted in (format_key(spec.name), *map(format_key, spec.aliases)):
                return spec
        raise FormatNotSupportedError(
            f"the {cls.name} backend has no format {text!r}",
            hint=did_you_mean(text.replace("-", "_"), known) or f"formats: {', '.join(known)}",
        )

    @classmethod
    def parse_options(cls, given: Mapping[str, Any], base: OptionsT | None = None) -> OptionsT:
        """Validate keyword arguments, on top of ``base`` where there is one.

        Raises:
            ConfigurationError: a keyword is unknown (the nearest is named) or its value is bad.
        """
        fields = cls.options_type.model_fields
        for keyword in given:
            if keyword not in fields:
                raise ConfigurationError(
                    f"the {cls.name} backend has no option {keyword!r}",
                    hint=did_you_mean(keyword, fields) or f"options: {', '.join(fields)}",
                )
        merged = {**({n: getattr(base, n) for n in base.model_fields_set} if base else {}), **given}
        try:
            return cls.options_type(**merged)
        except PydanticError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            # pydantic's own text would repeat the value, which may be a token.
            raise ConfigurationError(
                f"{cls.name} option {where!r}: {first['msg'].removeprefix('Value error, ')}",
                hint=fields[str(first["loc"][0])].description if first["loc"] else None,
            ) from None

    def check_source(self, source: ModelSource) -> None:
        """Raise ValidationError unless this backend takes the source's input format."""
        if source.input_format not in self.accepts:
            kinds = " or ".join(INPUT_FORMATS[kind] for kind in INPUT_FORMATS if kind in self.accepts)
            raise ValidationError(
                f"{source.given} is {INPUT_FORMATS[source.input_format]}; the {self.name} backend takes {kinds}"
            )

    def quantize(
        self, source: ModelSource, output_dir: Path, spec: FormatSpec, options: OptionsT, progress: Progress
    ) -> Result:
        """Run one job from validation to publishing.

        Raises:
            QuantizationError: one of its kinds; nothing was published then.
        """
        started = time.monotonic()
        self.check_source(source)
        self.check(source, spec, options)
        progress.set_weights(self.stage_weights(source, spec, options))
        final = output_dir / self.output_name(source, spec, options)
        with StagedOutput(final, overwrite=options.overwrite) as output, _typed_failures(output):
            beside = files_beside(source.path, source.weight_files) if source.path.is_dir() else ()
            with SourceFiles(source.weight_files, beside) as files:
                job = Job(source, spec, options, output, progress, files)
                with disk_errors(f"writing {final.name}"):
                    self.run(job)
                progress.stage("publish", f"publishing {final}")
                hashes = files.settled()
            seconds = time.monotonic() - started
            manifest = envelope(
                backend=self.name,
                format=spec.name,
                source={**source.describe(), "sha256": hashes},
                recipe=options.model_dump(mode="json"),
                packages=self.packages,
                seconds=seconds,
                report=job.report,
            )
            size = size_of(output.path)
            path, manifest_path = output.publish(manifest), output.manifest_path
        self.log.info("published %s (%.1f MB, %.1f s)", path, size / 1e6, seconds)
        return Result(path, size, seconds, manifest_path, job.report)


@contextmanager
def _typed_failures(output: StagedOutput) -> Iterator[None]:
    """Turn what the machine does to a run into :class:`ResourceError`: memory, disk, the output's folder."""
    try:
        yield
    except Exception as error:
        if isinstance(error, QuantizationError) and not isinstance(error, ConversionError):
            raise
        if isinstance(error, OSError) and output.vanished:
            raise ResourceError(
                f"the output directory {output.final.parent} was removed while the run was writing to it",
                hint="run again, and leave the directory (and what is hidden in it) alone meanwhile",
            ) from error
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            raise ResourceError(
                f"memory ran out while making {output.final.name}: {error or type(error).__name__}",
                hint="free some memory, raise the limit (ulimit -v), or use a larger machine",
            ) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise ResourceError(
                f"the system failed while {output.final.name} was made: {error}",
                hint="look at the disk, the permissions and the limits of the process (ulimit -a)",
            ) from error
        raise
