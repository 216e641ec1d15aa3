"""posinv in ESPnet. Importing this package puts posinv's classes into ESPnet's tables.

Whatever was imported before: ESPnet's own classes (``SeparateSpeech``, ``Speech2Text``) and
commands then build posinv's classes from the names in a YAML file. All that imports ESPnet is in
this package, thin commands in :mod:`posinv.bin` apart.
"""

from posinv.espnet.register import register

register()

__all__ = ["register"]
