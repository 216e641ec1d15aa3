"""The exception for bad input, which a user can correct."""


class InputError(ValueError):
    """Bad input: a file, utterance, option or configuration that a user can correct.

    The message is one line. It names the file, utterance or option, and says what is wrong with it
    and what to do. Commands print it without a traceback.
    """
