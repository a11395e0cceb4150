"""Define the methods, one paper per file. Every class here is a leaf: a plain signature and a recipe."""
