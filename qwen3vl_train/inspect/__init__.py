"""Look before training: what the data of a recipe is, what the model will see of it, and what looks wrong.

`gather` collects the facts, `hazards` judges them; `page`, `table` and JSON show the same facts.
"""
