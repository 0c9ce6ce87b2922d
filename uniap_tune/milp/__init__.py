"""Mixed-integer programs in PuLP: the only package that imports it.

``layers`` is the per-layer formulation (any graph), ``master`` the one over stage columns (chains), ``solvers``
runs either on HiGHS or CBC.
"""
