"""Weights on parameter servers, and several workers."""
