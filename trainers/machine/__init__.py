"""Processes, devices, compilation and memory of the machine."""
