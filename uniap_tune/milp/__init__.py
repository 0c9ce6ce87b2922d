"""Mixed-integer programs in PuLP: the only package that imports it.

``layers`` is the per-layer formulation (any graph), ``counts`` the same with equal layers aggregated, ``master`` the
one over stage columns (chains), ``solvers`` runs any of them on HiGHS or CBC.
"""
