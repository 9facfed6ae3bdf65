"""Placement: the plan of what lies where (``plan.py``), and following it (``build.py``, ``streaming.py``, ``ring.py``)."""
