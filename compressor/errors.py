"""The base of every error a user is meant to read."""


class CompressorError(Exception):
    """Something the user can act on; the message says what was found, what was expected and what to do."""


class SettingsError(CompressorError):
    """An option has a value that cannot work; a usage error."""


class DataError(CompressorError):
    """The --data string, or what it points at, cannot be used."""
