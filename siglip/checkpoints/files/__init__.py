"""Readers and writers of array files, safe against hostile ones."""
