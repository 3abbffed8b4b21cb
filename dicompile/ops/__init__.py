"""Tensor functions that several stages share; pure, traced into graphs by passes, and tested as plain functions."""
