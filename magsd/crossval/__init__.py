"""Cross-validation: ordinary runs over models, seeds and folds, and what they add up to."""
