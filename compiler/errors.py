"""The errors that users meet: one line each, saying what was expected, what was found and what to do."""


class EffcError(Exception):
    """Base of every error that effc raises for something a user can change."""


class InputError(EffcError, ValueError):
    """An argument, a prompt or an option does not fit."""


class ModelError(EffcError):
    """A model cannot be found, read or compiled: unknown name, broken file, unsupported architecture."""


class CacheError(EffcError):
    """The cache folder cannot be used: not writable, full, or holding a broken entry that cannot be replaced."""


class ToolchainError(EffcError):
    """No usable C++ compiler, or the compiler refused the code that it was given."""


class UnsupportedKernel(EffcError):
    """A Triton kernel uses an operation that the CPU target does not implement."""


class KernelFailed(EffcError, AssertionError):
    """A kernel stopped while it ran: a device_assert did not hold. The memory it writes is in an unknown state."""


class OutOfBounds(KernelFailed):
    """A kernel in debug mode was about to read or write outside of its tensors."""


class TooLargeKernel(UnsupportedKernel):
    """A Triton kernel's blocks need more memory than a program has. needed, limit: bytes."""

    def __init__(self, message: str, needed: int, limit: int) -> None:
        super().__init__(message)
        self.needed, self.limit = needed, limit


class OptionWarning(UserWarning):
    """An option that was asked for changes what the model says, or does nothing."""


def one_line(error: BaseException) -> str:
    """What another library says, fit to stand inside one of our lines."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
