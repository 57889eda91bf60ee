"""The command line `rootstock`. `serve` loads the service, `data` reads files, `db` the database, `gc`, `backup` and
`restore` work on what is stored; the others speak to a service over HTTP.

Exit status: 0 done, 1 the service refused, the job failed or the data have errors, 2 wrong usage or settings,
3 no service there.
"""

from __future__ import annotations

import typer

from service.cli import adapters, data, db, retraining, serve, storage, tenants, tune

app = typer.Typer(
    name="rootstock",
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("tune")(tune.tune)
app.command("gc")(storage.gc)
app.command("backup")(storage.backup)
app.command("restore")(storage.restore)
app.add_typer(tenants.app, name="tenants")
app.add_typer(adapters.app, name="adapters")
app.add_typer(data.app, name="data")
app.add_typer(db.app, name="db")
app.add_typer(retraining.app, name="retraining")


def main() -> None:
    """Entry point of the `rootstock` script."""
    app()
