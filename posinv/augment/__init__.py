"""Perturbations of a batch of waveforms: speed, pitch, padding, noise; the random draws."""
