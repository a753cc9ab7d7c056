"""`Sample` -> tokens, labels, positions and patches -> `PackedBatch`."""
