"""One row in every table, made from the tables themselves: whatever is added to them is filled as well."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Table
from sqlalchemy.engine import Connection

from service.tables import metadata


def fill(connection: Connection, tenant_id: str, marker: str) -> None:
    """A row of the tenant's in every table; each text and blob begins with `marker`, as far as it has room."""
    known: dict[Column[Any], Any] = {}
    for table in metadata.sorted_tables:
        row = {
            column.name: _value(column, tenant_id, marker, known) for column in table.columns if not _counted(column)
        }
        key = connection.execute(table.insert().values(row)).inserted_primary_key
        assert key is not None
        for column, value in zip(table.primary_key.columns, key, strict=True):
            known[column] = value
        known |= {column: row[column.name] for column in table.columns if column.name in row}


def rows(connection: Connection, table: Table) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(sa.select(table)).mappings()]


def _counted(column: Column[Any]) -> bool:
    return column.name == "seq"


def _value(column: Column[Any], tenant_id: str, marker: str, known: dict[Column[Any], Any]) -> Any:
    for key in column.foreign_keys:
        return known[key.column]
    if column.name == "tenant_id" or (column.table.name == "tenants" and column.name == "id"):
        return tenant_id
    match column.type:
        case sa.JSON():
            return {"text": [f"{marker}-{column.name}"]}
        case sa.LargeBinary():
            return f"{marker}-{column.name}".encode()
        case sa.Boolean():
            return True
        case sa.Float() | sa.Integer():
            return 1
        case sa.String(length=length):
            return f"{marker}-{column.name}"[:length]
    raise NotImplementedError(f"{column.table.name}.{column.name} has a type of which this makes no value")
