"""Thin helpers that every chapter stands on; imports no chapter."""
