"""posinv: position-invariant fine-tuning of speech enhancement and SSL models, on ESPnet."""

__version__ = "0.1.0"
