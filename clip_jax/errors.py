"""The one exception type for a user's mistake."""


class UserError(ValueError):
    """A mistake the user can mend: the message says what was expected, what came and what to do.

    The scripts print the message as one line and exit with code 2; every other exception is a fault of ours
    and keeps its traceback.
    """
