"""Processes on one machine or many."""
