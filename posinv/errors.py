"""The one exception for what a user can put right."""


class InputError(ValueError):
    """Bad input: a file, utterance, option or configuration a user can put right.

    The message is one line that names the file, utterance or option, says what was
    wrong with it, and what to do. Commands print it without a traceback.
    """
