"""Parquet that FastVideo's own scripts wrote: latents without an index and a contract, in compressed row groups.

1. `declared.py`: the user says which model the latents are of, and how they were stored: the contract.
2. `survey.py` finds the files and looks at every row's shapes and metadata, by footers and small columns (`columns.py`)
   alone; what cannot be of the declared model is refused, rows that cannot be used are dropped and listed. Only rows
   that may be there twice are read (`repetitions.py`).
3. `groups.py` reads rows: whole row groups (`parquet.py`), as a compressed blob has no place of its own.
4. `checks.py` looks at the values of some rows: whether they are what was declared, as far as values can tell.
5. `origin.py` shows all of it to `streamprep convert` as a finished output.
"""
