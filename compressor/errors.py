"""Base classes of the errors that users see."""


class CompressorError(Exception):
    """Base class of errors that the user can fix.

    The message states the value that was found, the value that was expected and the remedy.
    """


class Terminated(SystemExit):
    """The end of a process that got SIGTERM or SIGHUP, which must not be taken for `sys.exit` in a user's code."""


class SettingsError(CompressorError):
    """An option with an invalid value: a usage error."""


class DataError(CompressorError):
    """A --data argument that cannot be used, or whose data cannot be used."""


class FolderError(CompressorError):
    """An output folder that exists, cannot be written, does not fit on the disk, or is not one of Compressor."""
