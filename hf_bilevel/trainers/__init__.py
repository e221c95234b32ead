"""The trainers: a config, a mixin and a class for each method. Glue without formulas."""
