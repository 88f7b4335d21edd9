"""Speed and memory against peers: one command each, the results as JSON and Markdown."""
