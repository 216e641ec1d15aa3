"""Models as plain PyTorch: DEMUCS, self-supervised fine-tuning, masked prediction."""
