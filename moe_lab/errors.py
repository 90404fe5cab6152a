"""The errors a person can meet, apart from plain `ValueError` (their mistake: names the key and the mend)."""


class UnavailableError(RuntimeError):
    """What was asked for cannot run here: an implementation, a device, or a dtype on that device.

    An error with exit code 2 for a single run; a `skipped` row with this reason in a sweep.
    """


class MismatchError(RuntimeError):
    """The run's output disagrees with the fp32 reference; `where` is `route` or `layers`.

    `clause`: of the router's contract, where that is what was broken.
    """

    def __init__(self, where: str, message: str, clause: str | None = None):
        super().__init__(message)
        self.where, self.clause = where, clause
