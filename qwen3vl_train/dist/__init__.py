"""Ranks: who this process is, how it starts and stops, and what it exchanges with the others."""
