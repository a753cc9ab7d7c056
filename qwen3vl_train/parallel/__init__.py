"""How ranks share the work on one model."""
