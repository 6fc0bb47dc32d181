"""Side-by-side measurements: ours and the stock way, same input, same machine, one run."""
