"""DeepSpeed's ZeRO as one more engine."""
