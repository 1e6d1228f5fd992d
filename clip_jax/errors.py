"""The exceptions that the scripts end with in one line."""


class UserError(ValueError):
    """A mistake the user can mend: the message says what was expected, what came and what to do.

    The scripts print the message as one line and exit with code 2; every other exception is a fault of ours
    and keeps its traceback.
    """


class DamagedFile(UserError):
    """What this project wrote is missing, or is not what was written; the message names it."""


class RunStopped(RuntimeError):
    """A run that cannot go on, by no mistake of the user: the message says what is safe and what to do.

    The scripts print the message as one line and exit with `exit_code`: 1, or that of the signal which ended the run.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
