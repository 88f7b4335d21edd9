"""Where examples come from: contract.py says what a source is, registry.py names all of them."""
