"""The reports of a run: metrics, progress, rates, results."""
