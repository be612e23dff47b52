"""What predictions are worth: measures with intervals, calibration, operating points, groups.

Works on tables of predictions alone, with numpy and SciPy, and imports nothing of training.
"""
