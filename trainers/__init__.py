"""Training: one loop, the update step, and what surrounds them."""


def train(config, workdir):
    """Trains what the config says: see loop.train."""
    from trainers import loop

    return loop.train(config, workdir)


def evaluate(config, workdir):
    """Evaluates what the workdir holds: see evaluation.evaluate."""
    from trainers import evaluation

    return evaluation.evaluate(config, workdir)
