"""posinv in ESPnet. Importing this package puts posinv's classes into ESPnet's tables.

After that, ESPnet's own classes (``SeparateSpeech``, ``Speech2Text``) and commands build posinv's
classes from the names in a YAML file, even if they were imported before. Besides this package, only
the commands in :mod:`posinv.bin` import ESPnet.
"""

from posinv.espnet.register import register

register()

__all__ = ["register"]
