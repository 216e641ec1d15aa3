"""Results tables, plots and the HTML report."""
