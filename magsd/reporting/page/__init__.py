"""A report for people: one page, a model card, and all numbers as JSON and CSV."""
