"""Names of a kernel's grid axes and of its warpgroups.

`lax.axis_index` inside a kernel asks by name, and a mesh axis around the call that has the same
name answers instead: "batch" and "heads" are what users call theirs.
"""

BATCH = "dpfa_batch"
HEADS = "dpfa_heads"
ROWS = "dpfa_rows"
KEYS = "dpfa_keys"
COLUMNS = "dpfa_columns"
CHUNKS = "dpfa_chunks"
OWNER = "dpfa_owner"
PROGRAM = "dpfa_program"
BLOCKS = "dpfa_blocks"
WARPGROUP = "dpfa_warpgroup"
