"""The failures a user can act on, each with the exit code scripts rely on."""

__all__ = ["ConfigError", "DataError", "GateError", "Interrupted", "ReportedError"]


class ReportedError(Exception):
    """A failure explained by one line: what, where (file, key) and the value at fault."""

    exit_code = 1


class ConfigError(ReportedError):
    """The command line or a configuration cannot work (exit code 2)."""

    exit_code = 2


class DataError(ReportedError):
    """A file, sample or shard is missing, corrupt or contradicts its description (exit code 3)."""

    exit_code = 3


class GateError(ReportedError):
    """A quality gate failed: collapse, export parity, demo (exit code 4)."""

    exit_code = 4


class Interrupted(ReportedError):
    """The run was stopped by a signal, its state is saved and it can be resumed (exit code 75)."""

    exit_code = 75
