"""`v4graph serve`: an engine to an HTTP server that OpenAI's clients can talk to."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.engine import checkpoint_option, open_engine, provider_option, threads_option
from v4graph.cli.output import allow_unknown_option, extra, size

if TYPE_CHECKING:
    from v4graph.ort import Provider
    from v4graph_runtime import PrefixCache
    from v4graph_runtime.serving import Engine
    from v4graph_runtime.serving.options import ServerOptions


@click.command()
@click.argument("engine_dir", type=click.Path(path_type=Path))
@checkpoint_option
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: for other machines too.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option(
    "--slots", type=click.IntRange(min=1), default=4, show_default=True, help="Requests that run at once."
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Requests that wait for a slot; one more is answered with 429.",
)
@click.option(
    "--prefill-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Prompt tokens read between two tokens of what runs: more answer long prompts sooner.",
)
@click.option(
    "--prefix-cache",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep states of prompts here, for the next start too; default: in memory.",
)
@click.option(
    "--prefix-cache-bytes",
    type=click.IntRange(min=0),
    default=1 << 30,
    show_default=True,
    help="Most bytes of kept states, which spare reading a prompt's known beginning again; 0: keep none.",
)
@click.option(
    "--api-key",
    envvar="V4GRAPH_API_KEY",
    show_envvar=True,
    help="What callers must bring; the variable does not show in the list of processes.",
)
@click.option("--model-name", help="What requests ask for; default: the name of ENGINE_DIR.")
@click.option(
    "--max-body-bytes",
    type=click.IntRange(min=1),
    default=8_000_000,
    show_default=True,
    help="A larger body is answered with 413.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Most new tokens of a request; default: the room there is.",
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds that a request may take."
)
@click.option(
    "--drain",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that a shutdown waits for what runs; what is cut off is answered with what there is.",
)
@click.option(
    "--mode",
    type=click.Choice(["chat", "thinking", "max"]),
    default="chat",
    show_default=True,
    help="Of chats that do not say one.",
)
@provider_option
@threads_option
@allow_unknown_option
@click.option("--json", "as_json", is_flag=True, help='Print {"url": ...} on stdout, one line, when ready.')
def serve(
    engine_dir: Path,
    checkpoint: str | None,
    provider: Provider,
    threads: int,
    allow_unknown: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve an engine over HTTP, with OpenAI's API and a page to chat at /.

    Ctrl-C or SIGTERM finishes what runs and ends; a second one does not wait.

    \b
    v4graph serve build/nano.engine --checkpoint models/nano --slots 8 --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "In the beginning", "max_tokens": 50}'
    """
    with extra("serve"):
        from v4graph_runtime.serving import Engine, Limits
        from v4graph_runtime.serving.server import bind
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    # A port that is taken is said before the weights are read, and nobody can connect before that is done.
    listener = bind(options["host"], options["port"])
    slots: int = options["slots"]
    session, tokenizer = open_engine(engine_dir, checkpoint, provider, threads, allow_unknown, slots)
    limits = Limits(options["max_waiting"], options["prefill_tokens"])
    cache = _cache(options)
    with listener, session, Engine(session, tokenizer, limits=limits, cache=cache) as engine:
        _listen(engine, listener, _server_options(engine_dir, options), as_json)


def _cache(options: dict[str, Any]) -> PrefixCache | None:
    from v4graph_runtime import PrefixCache

    if not options["prefix_cache_bytes"]:
        return None
    return PrefixCache(options["prefix_cache"], max_bytes=options["prefix_cache_bytes"])


def _server_options(engine_dir: Path, options: dict[str, Any]) -> ServerOptions:
    from v4graph_runtime.serving.options import ServerOptions

    names = ("mode", "api_key", "max_body_bytes", "max_tokens", "timeout", "drain")
    model = options["model_name"] or engine_dir.resolve().name.removesuffix(".engine")
    return ServerOptions(model_name=model, **{name: options[name] for name in names})


def _listen(engine: Engine, listener: Any, options: ServerOptions, as_json: bool) -> None:
    from v4graph_runtime.serving.app import create_app
    from v4graph_runtime.serving.server import Server, url_of

    url = url_of(listener)

    def ready() -> None:
        session = engine.session
        click.echo(
            f"{options.model_name} at {url} (API at {url}/v1): {session.batch} slots of {session.capacity} "
            f"tokens, state {size(session.state_bytes)}, {'with' if options.api_key else 'no'} API key",
            err=True,
        )
        if as_json:
            click.echo(json.dumps({"url": url, "model": options.model_name}))
            sys.stdout.flush()

    Server(create_app(engine, options), ready).run(sockets=[listener])
