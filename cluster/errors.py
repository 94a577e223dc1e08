"""What can go wrong where models run. Each message names the cause and the next step."""


class ClusterError(Exception):
    """Base of all errors of this package."""


class InvalidRequest(ClusterError):
    """The request itself is wrong; sending it again unchanged cannot work."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextTooLong(InvalidRequest):
    """Prompt and answer together do not fit into the model's context."""

    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class EngineBusy(ClusterError):
    """No slot is free and the queue is full; try again later. `retry_after_s`: when, where the other side says so."""

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDead(ClusterError):
    """The engine cannot generate any more and has to be restarted."""


class EngineFailed(ClusterError):
    """One generation failed; the engine itself still works."""


class CannotContinue(ClusterError):
    """An answer that another engine began cannot be continued here."""


class ModelNotFound(ClusterError):
    """No such model in the catalogue, folder or hub."""


class ModelDamaged(ClusterError):
    """A model's files are missing, incomplete or do not match their checksums."""


class HomeError(ClusterError):
    """The data folder cannot be used: not writable, full, or written by newer code."""


class LoadUnavailable(ClusterError):
    """The model has experts, but the engine that runs it does not count them."""


class LoadError(ClusterError):
    """Counts of experts that contradict themselves or each other."""


class TopologyError(ClusterError):
    """The description of the nodes is wrong."""


class PlanError(ClusterError):
    """What was asked for cannot be planned on any nodes."""


class NoFit(PlanError):
    """The nodes at hand do not hold what was asked for; the message says what would."""
