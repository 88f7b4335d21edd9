"""What every folder builds on: standard library only, and tqdm for progress lines."""
