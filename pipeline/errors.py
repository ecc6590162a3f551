"""Everything volseg raises on purpose.

PipelineError            the user can mend it; its text says where, what was found, what was expected, what to do
├── ConfigError          a spec, a run, a bundle or a command line that cannot be
├── ReadError            a file that cannot be read whole
├── VolumeError          a volume that was read and cannot be segmented as it is
├── GeometryError        grids that do not agree
├── ShapeError           a tensor that does not fit the network (also a ValueError)
└── WriteError           a result that cannot be written
"""

__all__ = [
    "ConfigError",
    "GeometryError",
    "PipelineError",
    "ReadError",
    "ShapeError",
    "VolumeError",
    "WriteError",
    "root_cause",
    "unwrap",
]


class PipelineError(Exception):
    """Something the user can mend."""


class ConfigError(PipelineError):
    """A spec, a run, a bundle or a command line that cannot be."""


class ReadError(PipelineError):
    """A file that cannot be read whole."""


class VolumeError(PipelineError):
    """A volume that was read and cannot be segmented as it is."""


class GeometryError(PipelineError):
    """Grids that do not agree."""


class ShapeError(PipelineError, ValueError):
    """A tensor that does not fit the network."""


class WriteError(PipelineError):
    """A result that cannot be written."""


def unwrap(error: BaseException | None) -> PipelineError | None:
    """The PipelineError behind an exception, through the wrappers that MONAI's transforms and engines put around it."""
    while error is not None and not isinstance(error, PipelineError):
        error = error.__cause__ or error.__context__
    return error


def root_cause(error: BaseException) -> str:
    """What went wrong at the bottom of wrapped errors."""
    known = unwrap(error)
    while known is None and error.__cause__ is not None:
        error = error.__cause__
    return str(known or f"{type(error).__name__}: {error}")
