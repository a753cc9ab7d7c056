"""The model: plain torch, packed end to end, and ignorant of ranks."""
