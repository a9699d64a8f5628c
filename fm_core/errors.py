"""Errors that are the user's to mend, and the request to stop."""


class UserError(Exception):
    """One line for the user: what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


class Stopped(Exception):
    """The stage ended early because it was asked to; running it again continues (exit status 3)."""
