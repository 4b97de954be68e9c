"""Rows from somewhere, and what makes them examples."""
