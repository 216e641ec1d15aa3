"""Use of trained models: enhancement of audio files, export for other tools."""

from posinv.inference.enhancer import Enhancer

__all__ = ["Enhancer"]
