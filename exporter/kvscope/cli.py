"""The command line, thin: names the commands and makes every error one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec

import click
from click.core import ParameterSource

from kvscope.commands.dashboards import dashboards
from kvscope.commands.healthcheck import healthcheck
from kvscope.commands.plan import plan_command
from kvscope.commands.serve import serve
from kvscope.settings import SettingsError

DEMO_NEEDS = ("gguf", "numpy", "xllamacpp")


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""
\b
Examples:
  kvscope demo                      a real llama.cpp server with a tiny model, watched in the terminal
  kvscope serve                     watch 127.0.0.1:8080, figures at http://127.0.0.1:10188/metrics
  kvscope serve --once              print one look
  kvscope serve --help              all settings, with examples
  kvscope plan model.gguf           what its KV cache needs, and how much context fits
  kvscope dashboards export DIR     Grafana dashboards and Prometheus rules
""",
)
@click.version_option(version("kvscope"), prog_name="kvscope", message="%(prog)s %(version)s")
@click.pass_context
def kvscope(ctx: click.Context) -> None:
    """Watch llama.cpp servers: what every slot of the KV cache holds, what was lost and why."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


kvscope.add_command(serve)
kvscope.add_command(healthcheck)
kvscope.add_command(plan_command, "plan")
kvscope.add_command(dashboards)


@kvscope.command(
    short_help="Run a real llama.cpp server with a tiny model and watch it.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> object:
    """Run a real llama.cpp server with a tiny model and watch it."""
    if not all(find_spec(module) for module in DEMO_NEEDS):
        raise click.ClickException("the demo's own packages are missing: pip install 'kvscope[demo]'")
    # Only here: the demo loads a llama.cpp server, nothing else needs one.
    from kvscope.commands.demo import demo as demo_command

    return demo_command.main(args=list(arguments), prog_name="kvscope demo", standalone_mode=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run kvscope's command line and exit: 0 done, 1 it could not be done, 2 a wrong setting."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. An error is one line on stderr."""
    try:
        code = kvscope.main(args=arguments, prog_name="kvscope", standalone_mode=False)
    except click.ClickException as error:
        _name_variable(error)
        return _refuse(error.format_message(), error.exit_code)
    except SettingsError as error:
        return _refuse(str(error), 2)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # Whoever read stdout has enough; a second write at exit would complain.
        sys.stdout = None
        return 0
    return code if isinstance(code, int) else 0


def _name_variable(error: click.ClickException) -> None:
    """Let the error name the environment variable where the wrong value came from one."""
    if isinstance(error, click.BadParameter) and error.ctx and error.param and error.param.name:
        source = error.ctx.get_parameter_source(error.param.name)
        if source is ParameterSource.ENVIRONMENT and isinstance(error.param.envvar, str):
            error.param_hint = error.param.envvar


def _refuse(message: str, code: int) -> int:
    click.echo("kvscope: " + " ".join(message.split()), err=True)
    return code
