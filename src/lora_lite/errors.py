"""The library's errors. Each says what is wrong, where, and how to fix it."""


class LoraLiteError(Exception):
    """Base class of every error that this library raises on purpose (config values raise plain `ValueError`)."""


class TargetError(LoraLiteError, ValueError):
    """No layer, or a layer that cannot carry the adapter: a pattern without a match, a meta or sharded weight."""


class StateError(LoraLiteError, RuntimeError):
    """The call does not fit the model's present state: a name taken, nothing attached, merged, sharded too early."""


class CoefficientError(LoraLiteError, ValueError):
    """A coefficient that cannot be used: unknown adapter, not finite, or not one value per batch row."""


class CalibrationError(LoraLiteError, ValueError):
    """Calibration data that is missing, empty, too short, or that never reaches a target."""


class CheckpointError(LoraLiteError, ValueError):
    """An adapter file that is damaged, incomplete, or does not fit this model."""


class NotAFileError(LoraLiteError, OSError):
    """A place to write to where something else than a file is: a folder, a device, a pipe, a socket."""


class BaseMismatchError(CheckpointError):
    """An adapter file that was trained on another base model."""


class NotAffineError(LoraLiteError, ValueError):
    """The stack of a layer is not an affine function of its input, so no plain weight equals it."""


class MethodError(LoraLiteError, TypeError):
    """What a method's `before` or `change` returned does not have the shape or dtype that its layer needs."""


class CheckError(LoraLiteError, RuntimeError):
    """`check` found an adapter that has no effect or gets no usable gradient."""


class LoraLiteWarning(UserWarning):
    """Base class of the library's warnings, so that they can be turned into errors together."""
