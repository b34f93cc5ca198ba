"""The one exception for input that a user can mend."""


class InputError(ValueError):
    """Something the user gave is wrong. The message says what was found, what was expected and what to do."""
