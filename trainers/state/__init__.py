"""Where a run starts and what it saves."""
