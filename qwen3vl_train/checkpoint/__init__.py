"""What is read from and written to disk.

Weights in Hugging Face form, adapters, and the state that a run resumes from.
"""
