"""Views of a batch of waveforms (speed, pitch, padding, noise), and the random draws."""
