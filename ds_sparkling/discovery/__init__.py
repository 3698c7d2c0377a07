"""Find which dimension of which parameter belongs to which axis: read on the meta device, try, and prove.

:mod:`~ds_sparkling.discovery.find_axes` is where to start. The other files, in the order in which it uses them:

| to | files |
|---|---|
| build a model from its widths | `factory`, `build`, `one_rank` |
| read what its parameters may be | `moves`, `roles`, `reading` |
| make it small and run it | `small_config`, `small_instance`, `token_selection`, `forward` |
| grow it and compare | `plain_growth`, `comparison`, `functional_heads` |
| try every reading, prove one, and know it again | `trial`, `patience`, `proof`, `fingerprint` |
"""
