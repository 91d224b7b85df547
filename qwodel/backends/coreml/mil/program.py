"""A Core ML package as it lies on disk: its description, operations and constants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qwodel.backends.coreml.mil.weight_file import WeightFile, unpack_bits
from qwodel.exceptions import IntegrityError
from qwodel.untrusted import read_json

__all__ = ["MilOperation", "Program", "TensorType"]

_NUMPY = {
    "BOOL": np.bool_, "FLOAT16": np.float16, "FLOAT32": np.float32, "FLOAT64": np.float64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
}  # fmt: skip
_PACKED = {"UINT1": 1, "UINT2": 2, "UINT3": 3, "UINT4": 4, "UINT6": 6, "INT4": 4}
_VARIADIC = frozenset({"values"})


@dataclass(frozen=True, slots=True)
class TensorType:
    """A MIL tensor type; an unknown dimension is ``None``."""

    dtype: str
    shape: tuple[int | None, ...]

    @property
    def numel(self) -> int:
        """Number of elements, 0 where a dimension is unknown."""
        return 0 if None in self.shape else math.prod(size for size in self.shape if size is not None)

    @property
    def bits(self) -> int:
        """Bits of an element as stored."""
        return _PACKED.get(self.dtype) or np.dtype(_NUMPY.get(self.dtype, np.uint8)).itemsize * 8


@dataclass(frozen=True, slots=True)
class MilOperation:
    """One operation of a block.

    ``inputs`` maps parameter to names of earlier outputs, or to values given in place;
    a parameter that takes several has a list.
    """

    type: str
    name: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, TensorType]

    @property
    def output(self) -> str:
        """The first output's name."""
        return next(iter(self.outputs))


@dataclass(frozen=True, slots=True)
class _InPlace:
    """A value the protocol buffer holds in place; kept apart from names, which are strings."""

    value: Any


class Program:
    """A written ``.mlpackage``, as Core ML would read it.

    Raises:
        IntegrityError: a file is missing or damaged, or there is no ML program in it.
    """

    def __init__(self, package: Path) -> None:
        from coremltools.proto import Model_pb2

        self.package = package
        model = _model_file(package)
        self.spec = Model_pb2.Model()
        try:
            self.spec.ParseFromString(model.read_bytes())
        except Exception as error:
            raise IntegrityError(f"{model} is not a Core ML model: {error}") from error
        if self.spec.WhichOneof("Type") != "mlProgram":
            raise IntegrityError(f"{model} holds no ML program")
        function = self.spec.mlProgram.functions["main"]
        self.opset: str = function.opset
        self._block = function.block_specializations[function.opset]
        self._folder = model.parent
        self._files: dict[str, WeightFile] = {}
        self.inputs: dict[str, TensorType] = {each.name: _type(each.type) for each in function.inputs}
        self.outputs: tuple[str, ...] = tuple(self._block.outputs)

    @cached_property
    def operations(self) -> tuple[MilOperation, ...]:
        """All operations but constants, in order."""
        return tuple(self._operation(each) for each in self._block.operations if each.type != "const")

    @cached_property
    def constants(self) -> Mapping[str, TensorType]:
        """Types of the constants, by output name."""
        return {name: _type(proto.type) for name, proto in self._constants.items()}

    def operation_name(self, constant: str) -> str:
        """Return the name of the operation that gives a constant; its output may be named differently."""
        return self._constant_operations[constant]

    def counts(self) -> dict[str, int]:
        """Number of operations of each type, most frequent first."""
        return dict(Counter(each.type for each in self._block.operations).most_common())

    def consumers(self) -> dict[str, list[MilOperation]]:
        """Operations that read each value, by the value's name."""
        found: dict[str, list[MilOperation]] = {}
        for operation in self.operations:
            for name in _names(operation.inputs):
                found.setdefault(name, []).append(operation)
        return found

    def constant(self, name: str) -> Any:
        """Return a constant: an array of its own dtype (sub-byte ones as uint8 or int8), or text."""
        return self._value(self._constants[name])

    def argument(self, operation: MilOperation, parameter: str) -> Any:
        """Return a parameter of ``operation`` that is constant, or ``None`` where it is not given."""
        given = operation.inputs.get(parameter)
        if given is None:
            return None
        return given.value if isinstance(given, _InPlace) else self.constant(given)

    def resolve(self, given: Any, environment: Mapping[str, Any]) -> Any:
        """Replace names in an operation's input by their values."""
        if isinstance(given, list):
            return [self.resolve(each, environment) for each in given]
        return given.value if isinstance(given, _InPlace) else environment[given]

    @cached_property
    def _constants(self) -> dict[str, Any]:
        return {
            each.outputs[0].name: each.attributes["val"]
            for each in self._block.operations
            if each.type == "const"
        }

    @cached_property
    def _constant_operations(self) -> dict[str, str]:
        return {each.outputs[0].name: _name(each) for each in self._block.operations if each.type == "const"}

    def _operation(self, proto: Any) -> MilOperation:
        inputs = {key: self._bindings(key, value.arguments) for key, value in proto.inputs.items()}
        for key, value in proto.attributes.items():
            if key != "name":  # constexpr operations up to iOS 17 have parameters as attributes
                inputs[key] = _InPlace(self._value(value))
        outputs = {each.name: _type(each.type) for each in proto.outputs}
        return MilOperation(proto.type, _name(proto), inputs, outputs)

    def _bindings(self, key: str, arguments: Any) -> Any:
        bound = [each.name or _InPlace(self._value(each.value)) for each in arguments]
        return bound if len(bound) > 1 or key in _VARIADIC else bound[0]

    def _value(self, proto: Any) -> Any:
        kind = _type(proto.type)
        if proto.WhichOneof("value") == "blobFileValue":
            blob = proto.blobFileValue
            data = self._weight_file(blob.fileName).read(blob.offset, (kind.numel * kind.bits + 7) // 8)
            return _decode(data, kind)
        if proto.immediateValue.WhichOneof("value") == "list":
            return [self._value(each) for each in proto.immediateValue.list.values]
        tensor = proto.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field == "strings":
            return tensor.strings.values[0]
        if field == "bytes":
            return _decode(np.frombuffer(tensor.bytes.values, np.uint8), kind)
        values = getattr(tensor, field).values if field else ()
        return np.array(values, _NUMPY[kind.dtype]).reshape([size or 0 for size in kind.shape])

    def _weight_file(self, name: str) -> WeightFile:
        if name not in self._files:
            path = self._folder / name.removeprefix("@model_path/")
            if not path.is_file() or self._folder.resolve() not in path.resolve().parents:
                raise IntegrityError(f"{self.package} has no file {name!r}")
            self._files[name] = WeightFile(path)
        return self._files[name]


def _model_file(package: Path) -> Path:
    manifest = package / "Manifest.json"
    try:
        entries = read_json(manifest)
        item = entries["itemInfoEntries"][entries["rootModelIdentifier"]]
        model = package / "Data" / str(item["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{manifest} is no package manifest: {error!r}") from error
    if not model.is_file():
        raise IntegrityError(f"{package} has no model file {item['path']}")
    return model


def _name(operation: Any) -> str:
    return "".join(operation.attributes["name"].immediateValue.tensor.strings.values)


def _type(proto: Any) -> TensorType:
    from coremltools.proto import MIL_pb2

    kind = proto.WhichOneof("type")
    if kind == "stateType":
        return _type(proto.stateType.wrappedType)
    if kind == "listType":
        return TensorType("LIST", ())
    tensor = proto.tensorType
    shape = tuple(
        int(each.constant.size) if each.WhichOneof("dimension") == "constant" else None
        for each in tensor.dimensions
    )
    return TensorType(MIL_pb2.DataType.Name(tensor.dataType), shape)


def _decode(data: np.ndarray, kind: TensorType) -> np.ndarray:
    shape = [size or 0 for size in kind.shape]
    if kind.dtype not in _PACKED:
        return data.view(_NUMPY[kind.dtype]).reshape(shape)
    values = unpack_bits(data, _PACKED[kind.dtype], kind.numel)
    if kind.dtype == "INT4":
        values = ((values ^ 8).astype(np.int8) - 8).astype(np.int8)
    return values.reshape(shape)


def _names(inputs: Mapping[str, Any]) -> Iterator[str]:
    for given in inputs.values():
        for each in given if isinstance(given, list) else (given,):
            if isinstance(each, str):
                yield each
