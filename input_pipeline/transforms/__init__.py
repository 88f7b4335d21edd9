"""Example -> pixels and token ids, as a program of plain functions."""
