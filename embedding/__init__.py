"""A data set -> embeddings on disk -> neighbours."""
