"""The `v4graph` command: each subcommand drives one stage and imports its tower when it runs.

Results go to stdout, progress and figures to stderr. An error that the user can mend is one line and
exit code 2; anything else keeps its traceback.
"""

from __future__ import annotations

from typing import IO, Any

import click

from v4graph import __version__
from v4graph.cli.bench import bench
from v4graph.cli.build import build
from v4graph.cli.chat import chat
from v4graph.cli.checkpoint import init, pack
from v4graph.cli.doctor import doctor
from v4graph.cli.encode import encode
from v4graph.cli.engine import evaluate, run
from v4graph.cli.export import export
from v4graph.cli.inspect import inspect
from v4graph.cli.kernels import kernels
from v4graph.cli.optimize import optimize, passes
from v4graph.cli.plan import plan
from v4graph.cli.serve import serve
from v4graph.cli.verify import verify
from v4graph.cli.view import view
from v4graph.errors import V4GraphError


class _UserError(click.ClickException):
    exit_code = 2

    def __init__(self, error: V4GraphError) -> None:
        super().__init__(str(error.args[0]))
        self.detail = error.detail

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Error: {' '.join(self.message.split())}", file=file, err=file is None)
        for line in self.detail.splitlines():
            click.echo(f"  {line}", file=file, err=file is None)


class _Commands(click.Group):
    """Lists commands in the order of the pipeline and turns `V4GraphError` into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except V4GraphError as error:
            raise _UserError(error) from error


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="v4graph")
def main() -> None:
    """Lower a DeepSeek-V4 checkpoint to ONNX and run it.

    \b
    v4graph export models/nano build/nano.graph
    v4graph build build/nano.graph build/nano.engine --backend ort
    v4graph run build/nano.engine --checkpoint models/nano --prompt "In the beginning"
    """


for _command in (
    *(plan, export, optimize, passes, build, encode, run, chat, serve, evaluate, bench, verify),
    *(inspect, view, init, pack, kernels, doctor),
):
    main.add_command(_command)
