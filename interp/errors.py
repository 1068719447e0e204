"""The one kind of error that is the user's to mend."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, what was expected and what came.

    The command line prints it as one line and exits with code 2.
    """
