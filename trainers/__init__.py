"""Training: one loop, the contrastive update step, and what surrounds them."""


def train(config, workdir):
    """See loop.train."""
    from trainers import loop

    return loop.train(config, workdir)


def evaluate(config, workdir):
    """See loop.evaluate."""
    from trainers import loop

    return loop.evaluate(config, workdir)
