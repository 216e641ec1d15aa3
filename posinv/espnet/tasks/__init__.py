"""posinv's tasks for ESPnet: ASR, enhancement, SSL fine-tuning and pretraining."""
