"""Arithmetic that depends on the device."""
