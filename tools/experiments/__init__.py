"""The paper's experiments in small: which runs they need, one process that trains each, and what comes out.

The runs grow by the functions that the engine grows by (:mod:`ds_sparkling.growth`, :mod:`ds_sparkling.optim`), without
an engine: one process, fp32, so that hundreds of them fit on a few cores. Start reading at
:mod:`~experiments.catalogue`.
"""
