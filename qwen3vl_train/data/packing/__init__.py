"""Costs -> packs -> steps -> this rank's packs."""
