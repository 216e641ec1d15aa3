"""Corpora, as ``local/data.sh`` prepares them."""
