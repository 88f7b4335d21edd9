"""Preprocessing: from an example to pixels and token ids, by steps that are plain functions."""
