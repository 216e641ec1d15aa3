"""Trained models taken to other people's audio and tools."""

from posinv.inference.enhancer import Enhancer

__all__ = ["Enhancer"]
