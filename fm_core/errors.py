"""Errors that are the user's to mend, failures that a new start would repeat, and the request to stop."""


class UserError(Exception):
    """One line for the user: what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


class UnreachableError(UserError):
    """A host or a store does not answer.

    Before a job runs that is the user's to mend; once it does, something that may pass, and it is restarted.
    """


class StopRequested(Exception):
    """The stage ended early because it was asked to; running it again continues (exit status 3)."""


class UnrecoverableError(Exception):
    """The stage cannot go on, and starting it again as it is would end the same way (exit status 1)."""
