"""Results tables, significance, the HTML report, training curves and model cards."""
