"""The program as data: ops and their table, graphs, records of plans, signatures, and the text form."""
