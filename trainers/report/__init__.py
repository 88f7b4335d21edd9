"""What a run tells: metrics, progress, rates, results."""
