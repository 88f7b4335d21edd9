"""What a step needs of a machine, known before it runs: memory, traffic, collectives, time."""
