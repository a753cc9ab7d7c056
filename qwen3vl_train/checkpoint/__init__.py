"""What is read from and written to disk: weights in Hugging Face form, adapters, and the state that a run resumes from."""
