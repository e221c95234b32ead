"""The command ``hf-bilevel``, and what the scripts beside it run: any model and any dataset, from a recipe."""
