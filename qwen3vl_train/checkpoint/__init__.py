"""Weights in Hugging Face form, adapters, and the state that a run resumes from, on disk."""
