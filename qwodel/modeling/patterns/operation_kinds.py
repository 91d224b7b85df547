"""What an operation does to the channels that pass through it."""

from __future__ import annotations

from qwodel.modeling.patterns.operations import GraphOperation, Value

__all__ = ["activation_name", "carried", "gated_name", "is_identity", "is_move", "is_split"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_IDENTITY = _words(
    "to to_copy type type_as float half bfloat16 double contiguous clone detach alias lift_fresh_copy"
    " dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d featuredropout alphadropout identity"
    " requires_grad cpu cuda"
)
_SPLIT = _words("chunk unsafe_chunk split unsafe_split split_with_sizes tensor_split unbind")
_MOVE = _SPLIT | _words(
    "view reshape unsafe_view flatten unflatten transpose swapaxes swapdims permute movedim moveaxis t T mT"
    " squeeze unsqueeze expand slice select getitem narrow"
)
_ELEMENTWISE = _words("add sub rsub mul div neg pow square sqrt abs exp tanh clamp clamp_min clamp_max clip")
_ACTIVATIONS = _words(
    "silu gelu relu relu6 leaky_relu elu celu selu mish hardswish hardsigmoid softplus sigmoid"
    " leakyrelu prelu rrelu logsigmoid log_sigmoid"
)
_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu", "sigmoid": "glu"}
_SHAPED_GELU = ("tanh", "erf")  # gelu written out, exactly or by its approximation
_IN_SCALAR_CHAINS = _ELEMENTWISE | _IDENTITY | {"sigmoid", *_SHAPED_GELU}


def is_identity(operation: GraphOperation) -> bool:
    """Tell whether it gives the values that it reads: casts, copies, dropout."""
    return operation.name in _IDENTITY


def is_split(operation: GraphOperation) -> bool:
    """Tell whether it cuts a tensor into several."""
    return operation.name in _SPLIT


def is_move(operation: GraphOperation) -> bool:
    """Tell whether it only moves values, or picks some: views, permutations, slices, splits."""
    return operation.name in _MOVE and len(operation.inputs()) == 1


def carried(operation: GraphOperation) -> Value | None:
    """Return the value whose channels an elementwise operation leaves where they are.

    Its other operands are numbers or depend on parameters alone. ``None`` for anything else.
    """
    if operation.name not in _ELEMENTWISE and activation_name(operation) is None:
        return None
    moving = [value for value in operation.inputs() if not value.constant]
    return moving[0] if len(moving) == 1 and len(operation.outputs) == 1 else None


def activation_name(operation: GraphOperation) -> str | None:
    """Return the activation function's name, whether called as one or written as ``x·sigmoid(x)``."""
    if operation.name in _ACTIVATIONS:
        return operation.name
    if operation.name != "mul":
        return None
    factors = operation.inputs()
    if len(factors) != 2:
        return None
    for factor, other in (factors, factors[::-1]):
        chain = list(_scalar_chain(factor))
        names = [each.name for each in chain]
        if "sigmoid" in names and _same_source(chain[names.index("sigmoid")].inputs()[0], other):
            return "silu" if _is_plain(chain[names.index("sigmoid")].inputs()[0], other) else "quick_gelu"
        if names[:1] == ["add"] and len(names) > 1 and names[1] in _SHAPED_GELU:
            return "gelu"
    return None


def gated_name(activation: str) -> str:
    """Return the name of ``activation(a)·b``."""
    return _GATED.get(activation, f"{activation} gate")


def _scalar_chain(value: Value) -> list[GraphOperation]:
    """Return the elementwise operations of one operand that end in ``value``, latest first."""
    chain: list[GraphOperation] = []
    while value.producer is not None and len(chain) < 4:
        moving = [each for each in value.producer.inputs() if not each.constant]
        if len(moving) != 1 or value.producer.name not in (
            *_ELEMENTWISE,
            *_IDENTITY,
            "sigmoid",
            *_SHAPED_GELU,
        ):
            break
        chain.append(value.producer)
        value = moving[0]
    return chain


def _is_plain(value: Value, other: Value) -> bool:
    return _skip_identity(value) is _skip_identity(other)


def _same_source(value: Value, other: Value) -> bool:
    """Tell whether both are one value but for casts and factors."""
    root = _skip_identity(other)
    chain = _scalar_chain(value)
    passed = {_skip_identity(value)} | {
        _skip_identity(each) for operation in chain for each in operation.inputs() if not each.constant
    }
    return root in passed


def _skip_identity(value: Value) -> Value:
    while value.producer is not None and is_identity(value.producer):
        value = value.producer.inputs()[0]
    return value
