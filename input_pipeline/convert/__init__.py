"""Copies data sets into other formats."""
