"""The exceptions of every floor: each is a FastDiffError and the builtin that a caller would catch."""


class FastDiffError(Exception):
    """Base of everything fastdiff raises on purpose."""


class InvalidInputError(FastDiffError, ValueError):
    """A value is out of range or does not fit the others. The message says given, allowed, what to do."""


class UnsupportedError(FastDiffError, NotImplementedError):
    """The request is sound, but this model, device or backend cannot do it."""


class NotFiniteError(FastDiffError, ArithmeticError):
    """A result has values that are not finite, where the inputs gave no reason for it."""


class WrongResultError(FastDiffError, ArithmeticError):
    """A kernel computes something else than what it is for."""


class MissingDependencyError(FastDiffError, ImportError):
    """An optional package is needed here; the message names the pip line."""
