"""The database's schema, step by step: one file in `versions/` for each change since the first release.

A new one: change `service.tables`, then `python -m tools.migration "what it does"`, read what it wrote and raise
`service.schema.HEAD`.
"""
