"""Scores of enhanced speech and of transcripts."""
