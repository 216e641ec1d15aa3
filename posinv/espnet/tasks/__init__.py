"""posinv's task classes: ESPnet's own, with posinv's classes registered on import."""
