"""Patients: records to hourly grids, and how predictions for patients are measured, calibrated and compared.

numpy alone at import; what reads tables (pyarrow) or fits baselines (scikit-learn, LightGBM) is imported where it is
used: `pip install 'attnzoo[clinical]'`. Letters of arrays: N stays, T hours, V variables, S facts known at admission,
E events.
"""
