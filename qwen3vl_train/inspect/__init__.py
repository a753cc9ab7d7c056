"""Inspect the data of a recipe before training: what it is, what the model will see of it, and what looks wrong.

`recipe` collects the facts, `findings` judges them; `page`, `table` and JSON show the same facts.
"""
