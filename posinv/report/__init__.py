"""Results tables, training curves and model cards."""
